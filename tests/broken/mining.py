"""Mining of hard negatives."""

from __future__ import annotations

from broken import COST, NUMBERS, PROCESSES, Break, Promise

PROMISES = [
    Promise(
        NUMBERS,
        "`hardest_negatives` finds the negatives most similar to each image; equal texts keep their order",
        tests=[
            "losses/test_hard_negatives.py::test_hardest_negatives_accurate",
            "losses/test_hard_negatives.py::test_equal_texts_are_ordered_by_index",
            "losses/test_hard_negatives.py::test_ties_of_unnormalised_features",
            "losses/test_hard_negatives.py::test_rows_that_are_not_finite",
            "losses/test_hard_negatives.py::test_ignored_rows_are_left_out",
            "losses/test_hard_negatives.py::test_agrees_with_sentence_transformers",
        ],
        breaks=[
            Break(
                "mining: another diagonal",
                "fastclip/losses/hard_negatives.py",
                old="z[max(shift, 0) :, max(-shift, 0) :]",
                new="z[max(-shift, 0) :, max(shift, 0) :]",
            ),
            Break(
                "mining: the positives",
                "fastclip/losses/hard_negatives.py",
                old="p.labels[0][rows, None] == p.labels[1][block]",
                new="p.labels[0][rows, None] != p.labels[1][block]",
            ),
            Break(
                "mining: rounding orders equal texts",
                "fastclip/losses/hard_negatives.py",
                old="blocks, k, ties[rows], masked=True)",
                new="blocks, k, masked=True)",
            ),
            Break(
                "mining: a text that is infinite makes all others equal",
                "fastclip/losses/hard_negatives.py",
                old="torch.where(x.isfinite(), x, 0.0) for x in map(norms",
                new="x for x in map(norms",
            ),
            Break(
                "mining: NaN is the smallest",
                "fastclip/losses/largest.py",
                old="values.nan_to_num(torch.inf, torch.inf, -torch.inf)",
                new="values.nan_to_num(-torch.inf, torch.inf, -torch.inf)",
            ),
            Break(
                "mining: indices among the remaining texts",
                "fastclip/losses/hard_negatives.py",
                old="texts[found.indices.clamp_min(0)], -1)",
                new="found.indices, -1)",
            ),
        ],
    ),
    Promise(
        COST,
        "`hardest_negatives` takes one matrix product, 2 M N D operations, and one workspace of fixed size",
        tests=[
            "losses/test_hard_negatives.py::test_work_is_one_product",
            "losses/test_hard_negatives.py::test_missing_negatives_take_no_second_pass",
            "losses/test_hard_negatives.py::test_memory_is_that_of_a_workspace",
        ],
        breaks=[
            Break(
                "mining: a second pass for negatives that do not exist",
                "fastclip/losses/hard_negatives.py",
                old="ties[rows], masked=True)",
                new="ties[rows])",
            ),
            Break(
                "mining: always a second pass",
                "fastclip/losses/largest.py",
                old="if bool(cut.any()):",
                new="if True:",
            ),
            Break(
                "mining: blocks of any size",
                "fastclip/losses/hard_negatives.py",
                old="width = _even(N, math.isqrt(room))\n    height = _even(M, min(math.isqrt(room), ",
                new="width = N\n    height = _even(M, max(M, ",
            ),
        ],
    ),
    Promise(
        PROCESSES,
        "`hardest_negatives` finds the texts of all processes, with indices into the whole batch",
        tests=["losses/test_hard_negatives.py::test_ranks_mine_the_whole_batch"],
        breaks=[
            Break(
                "mining: texts of the first rank",
                "fastclip/losses/hard_negatives.py",
                old="gather_rows(texts + first, ",
                new="gather_rows(texts, ",
            ),
            Break(
                "mining: this rank's texts alone",
                "fastclip/losses/hard_negatives.py",
                old="batch.problem if batch.shards is None else with_all_texts(batch.problem, batch.shards)",
                new="batch.problem",
            ),
        ],
    ),
]
