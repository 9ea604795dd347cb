"""The losses of pairs in the CUDA backend alone: norms, reduction, repair, weights, finish."""

from __future__ import annotations

from broken import NUMBERS, Break, Promise

PROMISES = [
    Promise(
        NUMBERS,
        "The CUDA loss without labels is right in whatever order thread blocks finish, and for widely spread logits",
        tests=[
            "backends/test_cuda_plain.py::test_what_the_forward_hands_on",
            "backends/test_plain.py::test_repair_of_uneven_norms",
            "backends/test_plain.py::test_every_subset_of_gradients",
            "backends/test_plain.py::test_repair_of_opposite_features",
            "backends/test_plain.py::test_panels_and_blocks",
            "backends/test_cuda_plain.py::test_repair_keeps_what_rounding_takes",
            "backends/test_sigmoid_kernels.py::test_loss_of_the_dtype_that_is_asked_for",
            "backends/test_cuda_sigmoid.py::test_norms_and_tiles",
        ],
        breaks=[
            Break(
                "own pairs count in a repair",
                "csrc/cuda/loss_exact.cu",
                old="mask.own(half, h, c, e) || mask.outside(half, h, c, e)",
                new="mask.outside(half, h, c, e)",
            ),
            Break(
                "tickets are not set to 0",
                "csrc/cuda/loss_norms.cu",
                old="t += gridDim.x * kRowThreads) p.tickets[t] = 0;",
                new="t += gridDim.x * kRowThreads) p.tickets[t] += 0;",
            ),
            Break(
                "the sigmoid's ticket is not set to 0",
                "csrc/cuda/loss_norms.cu",
                old="if (t == 0) *p.tickets = 0;",
                new="if (t == 0) *p.tickets += 0;",
            ),
            Break(
                "no barrier before a block's own pairs are summed",
                "csrc/cuda/loss_norms.cu",
                old="smem.own[warp][v] = own[v];\n    }\n    __syncthreads();",
                new="smem.own[warp][v] = own[v];\n    }\n",
            ),
            Break(
                "cells outside count in a repair",
                "csrc/cuda/loss_exact.cu",
                old="mask.own(half, h, c, e) || mask.outside(half, h, c, e)",
                new="mask.own(half, h, c, e)",
            ),
            Break(
                "no fence before the ticket",
                "csrc/cuda/loss_reduce.cuh",
                old="  __threadfence();\n  sync();\n  if (thread == 0) *flag",
                new="  sync();\n  if (thread == 0) *flag",
            ),
            Break(
                "no guard",
                "csrc/cuda/loss_reduce.cu",
                old="served = served && (",
                new="served = served || (",
            ),
            Break(
                "a record written without passing the cache",
                "csrc/cuda/loss_reduce.cuh",
                old="served ? 0 : 1",
                new="0",
            ),
            Break(
                "tickets of a panel are left to the next",
                "csrc/cuda/loss_exact.cu",
                old="if (thread == 0) p.tickets[2 + b] = 0;",
                new="if (thread < 0) p.tickets[2 + b] = 0;",
            ),
            Break(
                "sums of earlier panels are forgotten",
                "csrc/cuda/loss_reduce.cu",
                old="if (k < p.N && !p.first) total",
                new="if (k < 0 && !p.first) total",
            ),
            Break(
                "chunks write over each other's shares of d_scale",
                "csrc/cuda/loss.cu",
                old="  p.tile_part += tiles_before(p, block);\n",
                new="",
            ),
            Break(
                "the earlier state of a repair is forgotten",
                "csrc/cuda/loss_exact.cu",
                old="const double before = p.first ? -kInf : side.sums[k];",
                new="const double before = -kInf;",
            ),
            Break(
                "what rounding took is lost",
                "csrc/cuda/tile.cuh",
                old="*low = fabsf(z2) < HUGE_VALF ? rounded : 0.f;",
                new="*low = 0.f;",
            ),
            Break(
                "rounding of a log-sum-exp is lost",
                "csrc/cuda/loss_reduce.cuh",
                old="if (exact) shift = fabsf(rounded) < HUGE_VALF ? rounded - lse2[s] : 0;",
                new="if (exact) shift = 0;",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "Gradients of the CUDA loss without labels are right, even when the loss is near 0",
        tests=[
            "backends/test_cuda_plain.py::test_weights",
            "backends/test_plain.py::test_repair_of_uneven_norms",
            "backends/test_plain.py::test_every_subset_of_gradients",
            "backends/test_cuda_plain.py::test_finish",
            "backends/test_plain.py::test_upstream_gradient_scales",
            "backends/test_plain.py::test_solved_batch_keeps_digits",
            "backends/test_cuda_plain.py::test_what_the_forward_hands_on",
            "backends/test_plain.py::test_layouts",
            "backends/test_cuda_sigmoid.py::test_norms_and_tiles",
            "backends/test_cuda_sigmoid.py::test_finish",
            "backends/test_cuda_sigmoid.py::test_chunks",
            "backends/test_cuda_sigmoid.py::test_backward_is_the_reference_to_the_bit",
        ],
        breaks=[
            Break(
                "own pairs count in the weights",
                "csrc/cuda/loss_weights.cu",
                old="if (kMask && (mask.outside(half, h, c, e) || mask.own(half, h, c, e))) g = 0.f;",
                new="if (kMask && mask.outside(half, h, c, e)) g = 0.f;",
            ),
            Break(
                "whole tiles of a repair are not repaired",
                "csrc/cuda/tile.cuh",
                old="const bool masked = edge || excludes || (Op::kExact == Exact::on_repair && repairs(p));",
                new="const bool masked = edge || excludes;",
            ),
            Break(
                "the finish's ticket is not set to 0",
                "csrc/cuda/loss_weights.cu",
                old="if (i == 0) *p.loss.tickets = 0;",
                new="if (i == -1) *p.loss.tickets = 0;",
            ),
            Break(
                "no projection",
                "csrc/cuda/loss_finish.cuh",
                old="if (p.normalize && side.inv[k] * kEps < 1.f)",
                new="if (p.normalize && side.inv[k] * kEps < 0.f)",
            ),
            Break(
                "own pairs without the gain",
                "csrc/cuda/loss_finish.cuh",
                old="static_cast<float>(p.own[k] * gain)",
                new="static_cast<float>(p.own[k])",
            ),
            Break(
                "upstream is left out",
                "csrc/cuda/loss_finish.cuh",
                old="static_cast<float>(upstream * *p.scale * rest / gain)",
                new="static_cast<float>(*p.scale * rest / gain)",
            ),
            Break(
                "upstream is left out of d_scale",
                "csrc/cuda/loss_finish.cu",
                old="static_cast<float>(*p.upstream * total)",
                new="static_cast<float>(total)",
            ),
            Break(
                "the small loss's digits",
                "csrc/cuda/loss_reduce.cuh",
                old="(log(u) + (e - (u - 1)) * inverse)",
                new="log(u)",
            ),
            Break(
                "no gain",
                "csrc/cuda/loss_reduce.cuh",
                old="static_cast<float>(scalbn(1024.0, -ilogb(largest)))",
                new="static_cast<float>(scalbn(1024.0, 0 * ilogb(largest)))",
            ),
            Break(
                "no gain, sigmoid of features as they are",
                "csrc/cuda/sigmoid_fwd.cu",
                old="return gain_of(bound, __ldg(p.bias));",
                new="return 1.f;",
            ),
            Break(
                "the gain stays in the sigmoid's d_scale",
                "csrc/cuda/sigmoid_finish.cu",
                old="v == 1 && k < p.tiles ? part[k] / gain",
                new="v == 3 ? part[k] / gain",
            ),
            Break(
                "chunks of the sigmoid write over each other's shares",
                "csrc/cuda/sigmoid.cu",
                old="  p.part += tiles_before(p, block);\n",
                new="",
            ),
            Break(
                "own pairs of a block where the first block has them",
                "csrc/cuda/loss_problem.cu",
                old="block->offset = p->i0 - column;",
                new="block->offset = p->i0;",
            ),
            Break(
                "rows of a block's tiles lie as close as its own are many",
                "csrc/cuda/sigmoid_fwd.cu",
                old=" p.parts_n = loss.tiles_n,",
                new="",
            ),
            Break(
                "the last elements of a gradient are forgotten",
                "csrc/cuda/sigmoid_bwd.cu",
                old="k < begin + 8 && k < side.count",
                new="k < begin + 8 && k < 0",
            ),
            Break(
                "no copies in the backward",
                "csrc/cuda/loss.cu",
                old="if (chunk == 0 && column == 0 && (p.copies[0] || p.copies[1]))",
                new="if (chunk < 0 && column == 0 && (p.copies[0] || p.copies[1]))",
            ),
        ],
    ),
]
