"""`fastclip eval retrieval` and `fastclip eval compose`."""

from __future__ import annotations

from broken import COST, DATA, EVALUATION, STOPS, Break, Promise

PROMISES = [
    Promise(
        EVALUATION,
        "Without ties, `fastclip eval retrieval` gives CLIP_benchmark's numbers; with ties, its numbers are "
        "never higher",
        tests=[
            "evaluation/test_retrieval.py::test_metrics_are_those_of_clip_benchmark",
            "evaluation/test_retrieval.py::test_with_ties_no_recall_is_above_what_clip_benchmark_can_give",
            "evaluation/test_retrieval.py::test_both_directions_of_one_pass_are_those_of_two",
        ],
        breaks=[
            Break(
                "retrieval: what belongs counts as nearer",
                "fastclip/evaluation/retrieval.py",
                old="similarities[tile.paired] = -torch.inf",
                new="pass",
            ),
            Break(
                "retrieval: texts are counted over texts",
                "fastclip/evaluation/retrieval.py",
                old="rankings[1].count(tile.columns, similarities.T)",
                new="rankings[1].count(tile.columns, similarities.T.flip(0))",
            ),
            Break(
                "retrieval: a caption belongs to the next picture",
                "fastclip/evaluation/caption_retrieval.py",
                old="torch.tensor([i for i, _ in owners]), torch.arange",
                new="torch.tensor([(i + 1) % len(used) for i, _ in owners]), torch.arange",
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "An image in several rows is one image with several captions",
        tests=[
            "evaluation/test_retrieval.py::test_rows_of_one_picture_are_one_image",
            "evaluation/test_retrieval.py::test_spellings_of_a_path_are_one_image",
        ],
        breaks=[
            Break(
                "retrieval: a row is an image",
                "fastclip/evaluation/caption_retrieval.py",
                old="firsts.setdefault(place, index)",
                new="firsts.setdefault(place := (str(index), ''), index)",
            ),
            Break(
                "retrieval: a spelling is an image",
                "fastclip/evaluation/caption_retrieval.py",
                old="for index, place in enumerate(picture_places(source)):",
                new="for index, place in enumerate(('', source.key(k)) for k in range(len(source))):",
            ),
            Break(
                "retrieval: a row that is there twice counts twice",
                "fastclip/evaluation/caption_retrieval.py",
                old="[text for text in texts if text not in known] if known else texts",
                new="texts",
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "An image that cannot be used is counted, and its captions are left out",
        tests=[
            "evaluation/test_retrieval.py::test_pictures_that_cannot_be_used_take_their_captions_with_them",
            "evaluation/test_retrieval.py::test_model_without_finite_numbers_is_refused",
        ],
        breaks=[
            Break(
                "retrieval: captions of the pictures before",
                "fastclip/evaluation/caption_retrieval.py",
                old="for text in pictures.captions[k]]",
                new="for text in pictures.captions[i]]",
            ),
            Break(
                "retrieval: features that are not finite count",
                "fastclip/evaluation/retrieval.py",
                old="if not finite and len(features):",
                new="if False:",
            ),
            Break(
                "retrieval: skipped pictures are not counted",
                "fastclip/evaluation/caption_retrieval.py",
                old="skipped=pictures.skipped + len(pictures.source) - len(used)",
                new="skipped=pictures.skipped",
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "Each of several equal captions belongs to its own image, or with --unique-captions to all of their images",
        tests=[
            "evaluation/test_retrieval.py::test_captions_of_the_same_words",
        ],
        breaks=[
            Break(
                "retrieval: never one",
                "fastclip/evaluation/caption_retrieval.py",
                old="if unique:",
                new="if False:",
            ),
            Break(
                "retrieval: always one",
                "fastclip/evaluation/caption_retrieval.py",
                old="if unique:",
                new="if True:",
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "Results are valid JSON whatever the numbers, and are written completely or not at all",
        tests=[
            "embedding/test_features.py::test_results_are_json_whatever_the_numbers",
        ],
        breaks=[
            Break(
                "results: NaN in lines of JSON",
                "fastclip/evaluation/results.py",
                old="json.dumps(_finite(row), allow_nan=False)",
                new="json.dumps(row)",
            ),
            Break(
                "results: half of the lines take the place of all",
                "fastclip/evaluation/results.py",
                old="with new_file(path) as half, half.open(",
                new='with __import__("contextlib").nullcontext(path) as half, half.open(',
            ),
        ],
    ),
    Promise(
        STOPS,
        "An interrupted `fastclip eval retrieval` resumes to the same result, and leaves no temporary files",
        tests=[
            "evaluation/test_retrieval.py::test_stopped_evaluation_goes_on",
            "evaluation/test_retrieval.py::test_metrics_are_those_of_clip_benchmark",
        ],
        breaks=[
            Break(
                "retrieval: from the start",
                "fastclip/evaluation/caption_retrieval.py",
                old="images = image_features(embedder, source, store=store, **options)",
                new="images = image_features(embedder, source, **options)",
            ),
            Break(
                "retrieval: features stay",
                "fastclip/cli/evaluate/__init__.py",
                old="store.clear()",
                new="pass",
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "Published retrieval results are shown only beside the test split, or beside any data with `--reference`",
        tests=[
            "evaluation/test_retrieval.py::test_published_results_stand_beside_the_test_split",
        ],
        breaks=[
            Break(
                "retrieval: beside any split",
                "fastclip/cli/evaluate/retrieval.py",
                old='return source.dataset if getattr(source, "splits", ()) == ("test",) else ""',
                new='return getattr(source, "dataset", "")',
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "`--details` lists the rank and the nearest items of every query; items with equal scores keep their order",
        tests=[
            "evaluation/test_retrieval.py::test_details_are_those_of_brute_force",
            "evaluation/test_retrieval.py::test_top_items_are_those_of_a_stable_sort",
        ],
        breaks=[
            Break(
                "retrieval: ranks from 0",
                "fastclip/evaluation/caption_retrieval.py",
                old='"rank": rank + 1',
                new='"rank": rank',
            ),
            Break(
                "retrieval: the best of the last tile",
                "fastclip/losses/largest.py",
                old="        if best:\n",
                new="        if not block:\n",
            ),
            Break(
                "retrieval: NaN first",
                "fastclip/evaluation/retrieval.py",
                old=".T).nan_to_num(-torch.inf)",
                new=".T).nan_to_num(2)",
            ),
        ],
    ),
    Promise(
        COST,
        "Memory of retrieval does not grow with the product of images and texts",
        tests=[
            "evaluation/test_retrieval.py::test_memory_does_not_grow_with_the_product",
        ],
        breaks=[
            Break(
                "retrieval: one tile",
                "fastclip/evaluation/retrieval.py",
                old='return chunk or (_CPU_SIDE if x.device.type == "cpu" else _GPU_SIDE)',
                new="return chunk or 2**20",
            ),
        ],
    ),
    Promise(
        DATA,
        "A split of Karpathy's files has only its own images and captions; without the name of a split, "
        "nothing is read",
        tests=[
            "data/test_karpathy.py::test_split_has_its_pictures_and_captions",
            "data/test_karpathy.py::test_several_splits_and_training",
            "data/test_karpathy.py::test_what_is_no_split_raises",
        ],
        breaks=[
            Break(
                "karpathy: all splits",
                "fastclip/data/sources/karpathy.py",
                old='if image["split"] in self.splits]',
                new="if True]",
            ),
            Break(
                "karpathy: pictures in filepath only",
                "fastclip/data/sources/karpathy.py",
                old="for deep in (True, False):",
                new="for deep in (True,):",
            ),
            Break(
                "karpathy: no name is the whole file",
                "fastclip/data/sources/karpathy.py",
                old='self.splits = tuple((match["splits"] or "").split("+"))',
                new='self.splits = tuple((match["splits"] or "test").split("+"))',
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "`fastclip eval compose` ranks images by the sum of unit vectors, and leaves out the images that the "
        "query names",
        tests=[
            "evaluation/test_compose.py::test_answers_are_those_of_brute_force",
            "evaluation/test_compose.py::test_line_is_read",
            "evaluation/test_compose.py::test_sum_is_of_unit_vectors",
            "evaluation/test_compose.py::test_query_that_cannot_be_answered_raises",
        ],
        breaks=[
            Break(
                "compose: the query's own picture is an answer",
                "fastclip/evaluation/composed_retrieval.py",
                old="others[named] = False",
                new="",
            ),
            Break(
                "compose: the target is a part of the query",
                "fastclip/evaluation/composed_retrieval.py",
                old="parse_terms(asked)",
                new="parse_terms(line)",
            ),
            Break(
                "compose: the sum is no unit vector",
                "fastclip/evaluation/composed_retrieval.py",
                old="return (total / total.norm()).float()",
                new="return total.float()",
            ),
            Break(
                "compose: a sum of large weights has no length",
                "fastclip/evaluation/composed_retrieval.py",
                old="weights)).double()",
                new="weights))",
            ),
            Break(
                "compose: quotes mean nothing",
                "fastclip/evaluation/composed_retrieval.py",
                old="if term.quoted:",
                new="if False:",
            ),
            Break(
                "compose: the target's place among all",
                "fastclip/evaluation/composed_retrieval.py",
                old="int((places < target).sum())",
                new="target",
            ),
        ],
    ),
]
