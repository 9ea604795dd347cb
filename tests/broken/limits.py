"""Negatives that are left out because they exceed the positive."""

from __future__ import annotations

from broken import NUMBERS, Break, Promise

PROMISES = [
    Promise(
        NUMBERS,
        "With `negative_margin` loss and gradients are those of the remaining pairs; ties remain; so on several "
        "processes",
        tests=[
            "losses/test_negative_margin.py::test_loss_is_that_of_the_remaining_pairs",
            "losses/test_negative_margin.py::test_loss_with_labels_is_that_of_the_remaining_pairs",
            "losses/test_negative_margin.py::test_both_passes_decide_alike_near_the_limit",
            "losses/test_negative_margin.py::test_a_tie_stays_a_negative",
            "losses/test_negative_margin.py::test_every_instruction_set_leaves_out_the_same_pairs",
            "distributed/test_distributed.py::test_ranks_leave_out_the_pairs_of_one_process",
            "backends/test_triton_compiled.py::test_tiles_with_limits_are_equal",
        ],
        breaks=[
            Break(
                "limits: a repair on a GPU has tiles of its own",
                "triton_kernels/launch.py",
                old='("_repair" if exact and not limits else "")',
                new='("_repair" if exact else "")',
            ),
            Break(
                "limits: ties are left out",
                "fastclip/losses/inputs/limits.py",
                old="(positive + near + tie)",
                new="(positive + near)",
            ),
            Break(
                "limits: the other side's",
                "csrc/cpu/tile_common.h",
                old="Simd::above(z, load(lanes, keep_i.col_limit + j))",
                new="Simd::above(z, keep_i.limit)",
            ),
            Break(
                "limits: the backward forgets them",
                "triton_kernels/contrastive_bwd.py",
                old="row_weight, col_weight = tl.where(row_over, 0.0, row_weight), tl.where(col_over, 0.0, col_weight)",
                new="row_weight, col_weight = row_weight, tl.where(col_over, 0.0, col_weight)",
            ),
            Break(
                "limits: a ring's block has those of the first columns",
                "fastclip/distributed/ring_losses.py",
                old="None if x is None else (x[0], x[1][columns])",
                new="None if x is None else (x[0], x[1][: len(block)])",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "The sigmoid loss with labels, ignored rows and `negative_margin` is that of the remaining pairs; so on "
        "several processes",
        tests=[
            "losses/test_sigmoid_labels.py::test_loss_is_that_of_the_formula",
            "losses/test_sigmoid_labels.py::test_every_instruction_set_has_the_same_pairs",
            "losses/test_sigmoid_labels.py::test_a_tie_stays_a_negative",
            "losses/test_sigmoid_labels.py::test_ranks_have_the_loss_of_one_process",
        ],
        breaks=[
            Break(
                "sigmoid: either limit is enough to keep a pair",
                "fastclip/_backends/reference/sigmoid.py",
                old="(row_negative & col_negative)",
                new="(row_negative | col_negative)",
            ),
            Break(
                "sigmoid: the limit of the column is forgotten on a CPU",
                "csrc/cpu/tile_common.h",
                old="return Simd::and_not(kept.row, Simd::and_not(kept.row, kept.col));",
                new="return kept.row;",
            ),
            Break(
                "sigmoid: the limit of the column is forgotten in Triton",
                "triton_kernels/sigmoid_fwd.py",
                old="above = above | (x",
                new="above = above & (x",
            ),
            Break(
                "sigmoid: the mean counts ignored images",
                "fastclip/losses/sigmoid.py",
                old="images, _ = batch_size(p.image, p.text, shards)",
                new="images = len(batch.kept.images) + 1 if batch.kept else batch_size(p.image, p.text, shards)[0]",
            ),
            Break(
                "sigmoid: a ring's blocks have no labels",
                "fastclip/distributed/ring_losses.py",
                old="block, pairs.problem())",
                new="block, pairs.problem()._replace(labels=None))",
            ),
        ],
    ),
]
