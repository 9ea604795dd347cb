"""The loss of prefixes of the features."""

from __future__ import annotations

from broken import NUMBERS, PROCESSES, TRAINING, Break, Promise

PROMISES = [
    Promise(
        NUMBERS,
        "`matryoshka_loss` and its gradients are the weighted sum over prefixes, as in sentence-transformers",
        tests=[
            "losses/test_matryoshka.py::test_matryoshka_accurate",
            "losses/test_matryoshka.py::test_weights_are_one_each_and_not_divided",
            "losses/test_matryoshka.py::test_agrees_with_sentence_transformers",
            "losses/test_matryoshka.py::test_prefixes_are_read_in_place",
        ],
        breaks=[
            Break(
                "prefixes: the last of them",
                "fastclip/losses/matryoshka.py",
                old="for d, factor in zip(sizes, factors)",
                new="for d, factor in zip(sizes[:-1] or sizes, factors)",
            ),
            Break(
                "prefixes: no weights",
                "fastclip/losses/matryoshka.py",
                old="factor * function(",
                new="function(",
            ),
            Break(
                "prefixes: a mean",
                "fastclip/losses/matryoshka.py",
                old="return [1.0] * count",
                new="return [1.0 / count] * count",
            ),
            Break(
                "prefixes: copied",
                "fastclip/losses/matryoshka.py",
                old="function(image_features[:, :d], ",
                new="function(image_features[:, :d].contiguous(), ",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "`matryoshka_loss` refuses the global loss, whose running means the prefixes would mix",
        tests=[
            "losses/test_matryoshka.py::test_matryoshka_misfit_raises",
            "training/test_step.py::test_unknown_optimiser_and_loss_are_named",
        ],
        breaks=[
            Break(
                "prefixes: the global loss is taken",
                "fastclip/losses/matryoshka.py",
                old="if isinstance(loss, GlobalContrastiveLoss):",
                new="if False:",
            ),
            Break(
                "prefixes: left out of the global loss",
                "fastclip/training/step/losses.py",
                old='if name == "global" and prefixes is not None:',
                new="if False:",
            ),
        ],
    ),
    Promise(
        PROCESSES,
        "`matryoshka_loss` over several processes is that of one; other prefixes or weights on a rank are an error",
        tests=["losses/test_matryoshka.py::test_ranks_have_the_loss_of_one_process"],
        breaks=[
            Break(
                "prefixes: ranks with other weights",
                "fastclip/losses/matryoshka.py",
                old=', "weights": factors}',
                new="}",
            ),
        ],
    ),
    Promise(
        TRAINING,
        "`--prefixes` trains every prefix with every loss except global, and refuses one beyond the features",
        tests=[
            "training/test_trainer.py::test_prefixes_are_trained",
            "training/test_trainer.py::test_options_that_fit_nothing_here_are_refused",
            "training/test_step.py::test_prefixes_add_their_losses",
        ],
        breaks=[
            Break(
                "prefixes: the option is not passed on",
                "fastclip/training/from_options.py",
                old="        prefixes=options.prefixes,\n",
                new="",
            ),
            Break(
                "prefixes: the first alone is trained",
                "fastclip/training/step/losses.py",
                old="prefixes=prefixes, loss=function",
                new="prefixes=prefixes[:1], loss=function",
            ),
            Break(
                "prefixes: too long ones are found late",
                "fastclip/training/from_options.py",
                old="if options.prefixes is not None and max(",
                new="if options.prefixes is not None and min(",
            ),
        ],
    ),
]
