"""The statistics of the logits, and the losses that are made from them."""

from __future__ import annotations

from broken import NUMBERS, PROCESSES, Break, Promise

PROMISES = [
    Promise(
        NUMBERS,
        "`logit_statistics` has the values and gradients of the whole matrix in float64, with labels, excluded and "
        "ignored rows",
        tests=[
            "losses/test_logit_statistics.py::test_values_and_gradients",
            "losses/test_logit_statistics.py::test_exact_in_fp64",
            "losses/test_logit_statistics.py::test_one_positive_is_its_own_log_sum_exp",
            "losses/test_logit_statistics.py::test_ignored_rows_are_empty",
        ],
        breaks=[
            Break(
                "the log-sum-exp of a single positive is empty",
                "fastclip/losses/logit_statistics.py",
                old="side.pos if batch.problem.labels is None else side.pos_lse",
                new="side.pos_lse",
            ),
            Break(
                "ignored rows have the log-sum-exp 0",
                "fastclip/losses/logit_statistics.py",
                old="spread(row_neg, col_neg, fill=-torch.inf)",
                new="spread(row_neg, col_neg)",
            ),
        ],
    ),
    Promise(
        PROCESSES,
        "`logit_statistics` of unequal shards are those of one process, and so are their gradients",
        tests=[
            "losses/test_logit_statistics.py::test_ranks_have_the_statistics_of_one_process",
        ],
        breaks=[
            Break(
                "the statistics of this rank's logits alone",
                "fastclip/losses/inputs/batch.py",
                old="    if batch.shards is None:\n        return contrastive_statistics(",
                new="    if True:\n        return contrastive_statistics(",
            ),
        ],
    ),
    Promise(
        PROCESSES,
        "Every recipe of the documentation has the value and gradients of one process in two",
        tests=["losses/test_recipes.py::test_two_processes_have_the_loss_of_one"],
        breaks=[
            Break(
                "texts of all processes with the same numbers",
                "docs/recipes.md",
                old="(rank << 40)",
                new="(0 << 40)",
            ),
            Break(
                "one of three parts without the group",
                "docs/recipes.md",
                old='"exclude_self": True, **options}',
                new='"exclude_self": True}',
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "Every recipe of the documentation has the value and gradients of its reference: sentence-transformers, or the "
        "dense formula in float64",
        tests=[
            "losses/test_recipes.py::test_clip_from_the_statistics",
            "losses/test_recipes.py::test_decoupled_loss",
            "losses/test_recipes.py::test_joint_softmax_over_four_directions",
            "losses/test_recipes.py::test_hard_negatives",
            "losses/test_recipes.py::test_scale_of_hard_negatives_is_learned",
            "losses/test_recipes.py::test_queue_of_negatives",
            "losses/test_recipes.py::test_global_loss",
        ],
        breaks=[
            Break(
                "the own pair is counted once",
                "docs/recipes.md",
                old="parts = [s.row_neg, s.row_pos, s.col_neg, s.col_pos, among_queries",
                new="parts = [s.row_neg, s.row_pos, s.col_neg, among_queries",
            ),
            Break(
                "the gradient of the larger scale",
                "docs/recipes.md",
                old="(s.row_neg - s.row_neg.detach()) / larger",
                new="(s.row_neg - s.row_neg.detach())",
            ),
        ],
    ),
]
