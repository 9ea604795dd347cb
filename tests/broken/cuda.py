"""The CUDA kernels: masks, launchers, machine code, refusals."""

from __future__ import annotations

from broken import COST, MACHINE, NUMBERS, Break, Promise

PROMISES = [
    Promise(
        NUMBERS,
        "CUDA kernels leave excluded pairs, and cells beyond the last row or column, out of every sum",
        tests=[
            "backends/test_cuda.py::test_statistics",
            "backends/test_cuda.py::test_weights",
            "backends/test_cuda.py::test_sigmoid",
            "backends/test_cuda.py::test_statistics_with_labels",
            "backends/test_cuda.py::test_weights_with_labels",
            "backends/test_cuda.py::test_repaired_weights_are_left_alone",
            "backends/test_cuda.py::test_exponentials_that_flush_are_no_empty_set",
        ],
        breaks=[
            Break(
                "rows past the last",
                "csrc/cuda/tile.cuh",
                old="return 64 * half + 8 * h >= rows || 8 * c + e >= cols;",
                new="return 8 * c + e >= cols;",
            ),
            Break(
                "columns past the last",
                "csrc/cuda/tile.cuh",
                old="return 64 * half + 8 * h >= rows || 8 * c + e >= cols;",
                new="return 64 * half + 8 * h >= rows;",
            ),
            Break(
                "the diagonal's upper end",
                "csrc/cuda/tile.cuh",
                old="own > -kBlockM && own < Op::kBlockN",
                new="own > -kBlockM + 1 && own < Op::kBlockN",
            ),
            Break(
                "the diagonal's lower end",
                "csrc/cuda/tile.cuh",
                old="own > -kBlockM && own < Op::kBlockN",
                new="own > -kBlockM && own < Op::kBlockN - 1",
            ),
            Break(
                "edges are no reason to mask",
                "csrc/cuda/tile.cuh",
                old="const bool masked = edge || excludes",
                new="const bool masked = (edge && false) || excludes",
            ),
            Break(
                "own pairs count, forward",
                "csrc/cuda/contrastive_fwd.cu",
                old="mask.own(half, h, c, e) || mask.outside(half, h, c, e) ? 0.f",
                new="mask.outside(half, h, c, e) ? 0.f",
            ),
            Break(
                "own pairs count, backward",
                "csrc/cuda/contrastive_bwd.cu",
                old="if (kMask && masks[half].own(0, h, c, e)) g = 0.f;  // even if it is infinite",
                new="",
            ),
            Break(
                "own pairs count, sigmoid",
                "csrc/cuda/sigmoid_fwd.cu",
                old="mask.outside(half, h, c, k) || mask.own(half, h, c, k);",
                new="mask.outside(half, h, c, k);",
            ),
            Break(
                "self pairs count, forward",
                "csrc/cuda/contrastive_fwd.cu",
                old="const bool drop = kMask && (mask.own(half, h, c, e) ||",
                new="const bool drop = kMask && (false ||",
            ),
            Break(
                "self pairs count where labels exclude them",
                "csrc/cuda/tile.cuh",
                old="(!Op::kLabels || p.exclude_self) && own",
                new="!Op::kLabels && own",
            ),
            Break(
                "what flushes is an empty set",
                "csrc/cuda/contrastive_fwd.cu",
                old="value[0] < kSmallest ? kSmallest : value[0]",
                new="value[0]",
            ),
            Break(
                "repairs are not left to the repair",
                "csrc/cuda/contrastive_bwd.cu",
                old="kSkipsRepairs = true",
                new="kSkipsRepairs = false",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "The CUDA sigmoid loss is accurate near 0, and also if products of its exponentials overflow float32",
        tests=[
            "backends/test_cuda.py::test_sigmoid",
            "backends/test_cuda.py::test_sigmoid_of_products_beyond_fp32",
            "backends/test_cuda_sigmoid.py::test_norms_and_tiles",
        ],
        breaks=[
            Break(
                "a product beyond fp32 is taken as it is",
                "csrc/cuda/sigmoid_fwd.cu",
                old="fits = fits && both < kLargest;",
                new="",
            ),
            Break(
                "the product meets its 1",
                "csrc/cuda/sigmoid_fwd.cu",
                old="product[half][h] = fmaf(product[half][h], q, q) + product[half][h];",
                new="product[half][h] = (1.f + product[half][h]) * (1.f + q) - 1.f;",
            ),
            Break(
                "the product's exponent",
                "csrc/cuda/sigmoid_fwd.cu",
                old="return fmaf(k, static_cast<float>(kLn2),",
                new="return fmaf(0.f * k, static_cast<float>(kLn2),",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "The CUDA backend meets the same tolerances in bfloat16 and float16, with labels and with shards",
        tests=[
            "losses/test_accuracy.py::test_loss_and_gradients_accurate",
            "losses/test_accuracy.py::test_labels_accurate",
            "backends/test_kernels.py::test_panels_and_blocks",
            "backends/test_kernels.py::test_offset_of_a_shard",
            "losses/test_sigmoid_accuracy.py::test_sigmoid_accurate",
        ],
        breaks=[
            Break(
                "column blocks share an offset",
                "triton_kernels/contrastive_bwd.py",
                old="cols.x[j0:j1], offset + i0 - j0",
                new="cols.x[j0:j1], offset + i0",
            ),
            Break(
                "labels are forgotten",
                "triton_kernels/contrastive_bwd.py",
                old="_side(row_vec[:, i0:], has_labels)",
                new="_side(row_vec[:, i0:], False)",
            ),
            Break(
                "the base of the exponential",
                "csrc/cuda/tile.cuh",
                old="kLog2e64 = 1.4426950408889634,",
                new="kLog2e64 = 1.4429,",
            ),
        ],
    ),
    Promise(
        COST,
        "Compiled CUDA tiles use wgmma and TMA, one exponential per unmasked logit, no spills; their cost rises by at "
        "most 2 %",
        tests=[
            "backends/test_cuda_compiled.py::test_every_kernel_is_compiled_without_spills",
            "backends/test_cuda_compiled.py::test_products_are_not_serialised",
            "backends/test_cuda_compiled.py::test_instructions_as_planned",
            "backends/test_cuda_compiled.py::test_one_exponential_a_logit",
            "backends/test_cuda_compiled.py::test_tiles_cost_no_more_than_they_did",
        ],
        breaks=[
            Break(
                "accumulators are touched between the products",
                "csrc/cuda/tile.cuh",
                old="wgmma_commit();",
                new="wgmma_commit(); acc[0][0] *= 2.f;",
            ),
            Break(
                "all columns at once",
                "csrc/cuda/sigmoid_fwd.cu",
                old=(
                    "for (int c = 0; c < kBlockN / 8; ++c)  // outer loop: otherwise registers spill\n"
                    "#pragma unroll\n"
                    "        for (int half = 0; half < kHalves; ++half)"
                ),
                new=(
                    "for (int half = 0; half < kHalves; ++half)\n"
                    "#pragma unroll\n"
                    "        for (int c = 0; c < kBlockN / 8; ++c)"
                ),
            ),
            Break(
                "a row's values are loaded for every column",
                "csrc/cuda/store.cuh",
                old="weigh(rows[k & 1], half,",
                new="load_later(), weigh(t.rows(half, k & 1), half,",
            ),
            Break(
                "a reciprocal a logit",
                "csrc/cuda/sigmoid_fwd.cu",
                old="g[0] = a * weighted, g[1] = b * weighted;",
                new="g[0] = e[0] * inverse_fast(1.f + e[0]) * row(kWeight), g[1] = b * weighted;",
            ),
            Break(
                "a second exponential",
                "csrc/cuda/contrastive_bwd.cu",
                old="g *= row[kFactor];",
                new="g *= row[kFactor] * exp2_fast(0.f * g);",
            ),
        ],
    ),
    Promise(
        MACHINE,
        "The C interface returns an error code for arguments that it does not support",
        tests=[
            "backends/test_cuda.py::test_c_interface_refuses_bad_arguments",
            "backends/test_cuda.py::test_refusals_become_messages",
        ],
        breaks=[
            Break(
                "unaligned features",
                "csrc/cuda/launch.cu",
                old="reinterpret_cast<uintptr_t>(data) % 16 == 0 && ",
                new="",
            ),
            Break(
                "a stride too short",
                "csrc/cuda/launch.cu",
                old=" && row_stride >= cols;",
                new=";",
            ),
        ],
    ),
    Promise(
        MACHINE,
        "With a missing or old driver, another GPU or another dtype, the CUDA backend gives the reason and "
        "does not crash",
        tests=[
            "backends/test_cuda_available.py::test_backend_says_why_not",
            "backends/test_cuda_available.py::test_machine_without_hopper_is_a_reason",
            "backends/test_cuda_available.py::test_other_gpus_and_dtypes_are_refused",
            "backends/test_cuda_available.py::test_module_without_a_driver",
        ],
        breaks=[
            Break(
                "old drivers",
                "fastclip/_backends/cuda.py",
                old="if driver // 1000 < built // 1000:",
                new="if driver < 0:",
            ),
            Break(
                "any GPU",
                "fastclip/_backends/cuda.py",
                old="!= (9, 0):",
                new="< (8, 0):",
            ),
            Break(
                "another code",
                "csrc/cuda/launch.cu",
                old="if (!encode) return FASTCLIP_NO_DRIVER;",
                new="if (!encode) return FASTCLIP_CUDA_ERROR;",
            ),
        ],
    ),
    Promise(
        MACHINE,
        "The fastest backend that supports the inputs is chosen: cuda before triton before cpu",
        tests=[
            "backends/test_cuda_available.py::test_preferred_to_triton",
        ],
        breaks=[
            Break(
                "after",
                "fastclip/_backends/__init__.py",
                old='{"cuda": cuda, "triton": triton,',
                new='{"triton": triton, "cuda": cuda,',
            ),
        ],
    ),
]
