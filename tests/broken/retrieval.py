"""`fastclip eval retrieval` and `fastclip eval compose`."""

from __future__ import annotations

from broken import Break, Promise

RETRIEVAL, COMPOSE, KARPATHY = "evaluation/test_retrieval.py", "evaluation/test_compose.py", "data/test_karpathy.py"
RANKS, CAPTIONED = "fastclip/evaluation/retrieval.py", "fastclip/evaluation/captioned.py"
QUERIES, COMMAND = "fastclip/evaluation/compose.py", "fastclip/cli/evaluate/retrieval.py"
SPLITS = "fastclip/data/karpathy.py"

# fmt: off
PROMISES: dict[str, list[Promise]] = {
    "Retrieval": [
        Promise(
            "`eval retrieval` has CLIP_benchmark's numbers where nothing ties, and none above what its order of ties can give",
            (f"{RETRIEVAL}::test_metrics_are_those_of_clip_benchmark", f"{RETRIEVAL}::test_with_ties_no_recall_is_above_what_clip_benchmark_can_give", f"{RETRIEVAL}::test_both_directions_of_one_pass_are_those_of_two"),
            (
                Break("retrieval: what belongs counts as nearer", RANKS, "similarities[tile.own] = -torch.inf", "pass"),
                Break("retrieval: texts are counted over texts", RANKS, "best[k][rows], 1 - k)", "best[k][rows], 1 - k).flip(0)"),
                Break("retrieval: a caption belongs to the next picture", CAPTIONED, "torch.tensor([i for i, _ in owners]), torch.arange", "torch.tensor([(i + 1) % len(used) for i, _ in owners]), torch.arange"),
            ),
        ),
        Promise("a picture of several rows is one image with several captions", (f"{RETRIEVAL}::test_rows_of_one_picture_are_one_image",), (Break("retrieval: a row is an image", CAPTIONED, "        key = source.key(index)\n", '        key = f"{index} {source.key(index)}"\n'), Break("retrieval: a row that is there twice counts twice", CAPTIONED, "[text for text in texts if text not in known] if known else texts", "texts"))),
        Promise("a picture that cannot be used takes its captions with it, and is counted", (f"{RETRIEVAL}::test_pictures_that_cannot_be_used_take_their_captions_with_them",), (Break("retrieval: captions of the pictures before", CAPTIONED, "for text in found.captions[k]]", "for text in found.captions[i]]"), Break("retrieval: skipped pictures are not counted", CAPTIONED, "skipped=found.skipped + len(found.source) - len(used)", "skipped=found.skipped"))),
        Promise("captions of the same words are each their picture's, or with --unique-captions one of all", (f"{RETRIEVAL}::test_captions_of_the_same_words",), (Break("retrieval: never one", CAPTIONED, "    if unique:\n", "    if False:\n"), Break("retrieval: always one", CAPTIONED, "    if unique:\n", "    if True:\n"))),
        Promise(
            "results and details are JSON whatever the numbers, and whole or not there",
            ("evaluation/test_features.py::test_results_are_json_whatever_the_numbers",),
            (
                Break("results: NaN in lines of JSON", "fastclip/evaluation/results.py", "json.dumps(_finite(row), allow_nan=False)", "json.dumps(row)"),
                Break("results: half of the lines take the place of all", "fastclip/evaluation/results.py", "with new_file(path) as half, half.open(", 'with __import__("contextlib").nullcontext(path) as half, half.open('),
            ),
        ),
        Promise("an evaluation that was stopped goes on to the same result, and leaves nothing when it is written", (f"{RETRIEVAL}::test_stopped_evaluation_goes_on", f"{RETRIEVAL}::test_metrics_are_those_of_clip_benchmark"), (Break("retrieval: from the start", CAPTIONED, "return image_features(embedder, source, store=store, **options), store", "return image_features(embedder, source, **options), store"), Break("retrieval: features stay", COMMAND, "        store.clear()\n", "        pass\n"))),
        Promise("published results stand beside the test split only", (f"{RETRIEVAL}::test_published_results_stand_beside_the_test_split",), (Break("retrieval: beside any split", COMMAND, 'return source.dataset if getattr(source, "splits", ()) == ("test",) else ""', 'return getattr(source, "dataset", "")'),)),
        Promise("--details has every query's rank and its most similar items; equal ones in their order", (f"{RETRIEVAL}::test_details_are_those_of_brute_force", f"{RETRIEVAL}::test_top_items_are_those_of_a_stable_sort"), (Break("retrieval: ranks from 0", CAPTIONED, '"rank": rank + 1', '"rank": rank'), Break("retrieval: the best of the last tile", RANKS, "keys = torch.cat([best, keys.topk(min(k, len(block)), dim=1).values], dim=1)", "keys = keys.topk(min(k, len(block)), dim=1).values"), Break("retrieval: NaN first", RANKS, "similarities.nan_to_num(-torch.inf)", "similarities.nan_to_num(2)"))),
        Promise("memory does not grow with images times texts", (f"{RETRIEVAL}::test_memory_does_not_grow_with_the_product",), (Break("retrieval: one tile", RANKS, "return chunk or _SIDES.get(x.device.type, _SIDE)", "return chunk or 2**20"),)),
        Promise(
            "a split of Karpathy's files is its pictures and captions, wherever they lie; without a split's name nothing is evaluated or trained on",
            (f"{KARPATHY}::test_split_has_its_pictures_and_captions", f"{KARPATHY}::test_several_splits_and_training", f"{KARPATHY}::test_what_is_no_split_raises"),
            (
                Break("karpathy: all splits", SPLITS, 'if image["split"] in self.splits]', "if True]"),
                Break("karpathy: pictures in filepath only", SPLITS, "for deep in (True, False):", "for deep in (True,):"),
                Break("karpathy: no name is the whole file", SPLITS, "self.splits = tuple((match[\"splits\"] or \"\").split(\"+\"))", "self.splits = tuple((match[\"splits\"] or \"test\").split(\"+\"))"),
            ),
        ),
        Promise(
            "`eval compose` answers with the pictures nearest to the sum of unit vectors, without those that the query names",
            (f"{COMPOSE}::test_answers_are_those_of_brute_force", f"{COMPOSE}::test_line_is_read", f"{COMPOSE}::test_sum_is_of_unit_vectors"),
            (
                Break("compose: the query's own picture is an answer", QUERIES, "    others[own] = False\n", ""),
                Break("compose: nothing is subtracted", QUERIES, '(-1 if match["sign"] == "-" else 1)', "1"),
                Break("compose: the sum is no unit vector", QUERIES, "return F.normalize(total, dim=0)", "return total"),
                Break("compose: quotes mean nothing", QUERIES, "        if term.quoted:\n            return term.text\n", ""),
                Break("compose: the target's place among all", QUERIES, "int((places < target).sum())", "target"),
            ),
        ),
    ],
}
# fmt: on
