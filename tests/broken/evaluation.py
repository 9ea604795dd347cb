"""Validation, evaluated checkpoints, and the features that an evaluation stores."""

from __future__ import annotations

from broken import COST, EVALUATION, STOPS, TRAINING, Break, Promise

PROMISES = [
    Promise(
        EVALUATION,
        "Validation's recall@k counts any caption of an image as a hit, and a tie as a miss",
        tests=[
            "evaluation/test_validation.py::test_recalls_are_those_of_the_definition",
            "evaluation/test_validation.py::test_collapsed_model_has_no_hit",
            "evaluation/test_validation.py::test_what_is_not_finite_is_no_hit",
            "evaluation/test_validation.py::test_rows_of_one_picture_are_one_sample",
            "evaluation/test_validation.py::test_validation_and_retrieval_have_the_same_pictures",
        ],
        breaks=[
            Break(
                "evaluation: validation's rows of one picture are several",
                "fastclip/evaluation/validate.py",
                old="evenly(one_a_picture(source), max_samples)",
                new="evenly(source, max_samples)",
            ),
            Break(
                "evaluation: validation's links to one picture are several",
                "fastclip/data/identity.py",
                old="rows.setdefault(place, [])",
                new="rows.setdefault(('', source.key(index)), [])",
            ),
            Break(
                "evaluation: the worst positive counts",
                "fastclip/evaluation/retrieval.py",
                old='"amax"',
                new='"amin"',
            ),
            Break(
                "evaluation: a tie is a hit",
                "fastclip/evaluation/retrieval.py",
                old="similarities < least_alike(self._best[rows]).unsqueeze(1)",
                new="~(similarities > (self._best[rows] + TIE).unsqueeze(1))",
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "Similarities that differ only by rounding are ties, on any processor, in ranks, predictions, best "
        "matches and search",
        tests=[
            "evaluation/test_zero_shot.py::test_classes_of_one_name_are_an_argmaxs",
            "evaluation/test_retrieval.py::test_the_first_of_a_thousand_pictures_that_are_one",
            "evaluation/test_probe.py::test_classes_of_equal_weights_tie",
            "search/test_search.py::test_scores_that_rounding_alone_tells_apart_are_equal",
        ],
        breaks=[
            Break(
                "ties: the largest by its bits is predicted",
                "fastclip/evaluation/classification.py",
                old="strangers.append(first_best(similarities))",
                new="strangers.append(similarities.argmax(dim=1))",
            ),
            Break(
                "ties: more than there is room for",
                "fastclip/losses/largest.py",
                old="if bool(cut.any()):",
                new="if False:",
            ),
            Break(
                "ties: equal bits alone",
                "fastclip/evaluation/retrieval.py",
                old="return best - TIE * size",
                new="return best",
            ),
            Break(
                "ties: classes of equal weights",
                "fastclip/evaluation/classification.py",
                old=", size=size)",
                new=")",
            ),
            Break(
                "ties: equal scores of a search",
                "fastclip/search/rank.py",
                old="falling[begin] + tie",
                new="falling[begin]",
            ),
        ],
    ),
    Promise(
        COST,
        "Validation never stores all similarities at the same time",
        tests=[
            "evaluation/test_validation.py::test_similarities_are_never_all_stored",
        ],
        breaks=[
            Break(
                "evaluation: everything at once",
                "fastclip/evaluation/retrieval.py",
                old='return chunk or (_CPU_SIDE if x.device.type == "cpu" else _GPU_SIDE)',
                new="return chunk or 2**20",
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "Validation leaves out samples that cannot be used, and reports their number",
        tests=[
            "evaluation/test_validation.py::test_samples_that_cannot_be_used_are_left_out_and_counted",
        ],
        breaks=[
            Break(
                "evaluation: another sample stands for a bad one",
                "fastclip/data/loading/batches.py",
                old="used.append(-1 if faults else index)",
                new="used.append(index)",
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "Validation gives the same metrics on any number of processes",
        tests=[
            "evaluation/test_validation.py::test_ranks_have_the_single_process_metrics",
        ],
        breaks=[
            Break(
                "evaluation: every rank reads everything",
                "fastclip/evaluation/validate.py",
                old="batch_size=batch_size, rank=rank, ranks=ranks",
                new="batch_size=batch_size, rank=0, ranks=1",
            ),
        ],
    ),
    Promise(
        TRAINING,
        "Validation does not change the model or the random generators",
        tests=[
            "evaluation/test_validation.py::test_validation_leaves_no_trace",
            "evaluation/test_validation.py::test_validation_is_that_of_the_definition",
        ],
        breaks=[
            Break(
                "evaluation: a locked tower is in training mode afterwards",
                "fastclip/evaluation/validate.py",
                old="module.training = mode",
                new="module.training = True",
            ),
            Break(
                "evaluation: dropout",
                "fastclip/evaluation/validate.py",
                old="model.eval()",
                new="",
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "A training checkpoint is evaluated as the model that the run would save, with its sizes and averaged weights",
        tests=[
            "embedding/test_features.py::test_checkpoint_of_a_run_is_what_the_run_would_save",
        ],
        breaks=[
            Break(
                "evaluated: the weights in place of their average",
                "fastclip/models/embedder.py",
                old='path / "ema.safetensors" if (path / "ema.safetensors").is_file() else path',
                new="path",
            ),
            Break(
                "evaluated: the model of an earlier end of the run",
                "fastclip/training/run/loop.py",
                old="set_aside(model).name",
                new="model.name",
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "Stored features are reused only for the same weights, configuration, vocabulary, precision and files",
        tests=[
            "embedding/test_features.py::test_store_is_of_one_model_and_one_list",
            "embedding/test_features.py::test_other_vocabulary_is_another_model",
            "embedding/test_features.py::test_names_in_another_folder_are_others",
        ],
        breaks=[
            Break(
                "kept features: whatever the weights",
                "fastclip/models/embedder.py",
                old="digest.update(tensor.detach()",
                new="(tensor.detach()",
            ),
            Break(
                "kept features: whatever the vocabulary",
                "fastclip/models/tokenizers/wordpiece.py",
                old="repr((self.context_length, words))",
                new="repr(self.context_length)",
            ),
            Break(
                "kept features: whatever the precision",
                "fastclip/models/embedder.py",
                old="repr((config, tokenizer, self.precision))",
                new="repr((config, tokenizer))",
            ),
            Break(
                "kept features: wherever they lie",
                "fastclip/data/identity.py",
                old="return os.path.join(folders[folder], base), state",
                new="return base, state and None",
            ),
        ],
    ),
    Promise(
        STOPS,
        "An interrupted evaluation resumes to a bit-identical result, and loses at most one minute of work",
        tests=[
            "embedding/test_features.py::test_interrupted_embedding_goes_on_to_the_same_bits",
            "embedding/test_features.py::test_interrupted_texts_go_on_to_the_same_bits",
            "embedding/test_features.py::test_what_took_a_minute_is_kept",
            "embedding/test_features.py::test_damaged_part_is_computed_again",
        ],
        breaks=[
            Break(
                "kept features: the first ones are taken again",
                "fastclip/embedding/features.py",
                old="Subset(source, range(done, size))",
                new="Subset(source, range(size - done))",
            ),
            Break(
                "kept features: thousands or nothing",
                "fastclip/embedding/features.py",
                old="if samples >= PART or time.monotonic() - begun > _SECONDS:",
                new="if samples >= PART:",
            ),
            Break(
                "kept features: a damaged part ends the command",
                "fastclip/embedding/features.py",
                old="except (ValueError, OSError, KeyError, TypeError) as error:",
                new="except KeyError as error:",
            ),
        ],
    ),
]
