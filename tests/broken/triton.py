"""The Triton kernels."""

from __future__ import annotations

from broken import COST, MACHINE, NUMBERS, Break, Promise

PROMISES = [
    Promise(
        NUMBERS,
        "GPU kernels meet the same tolerances for every shape, dtype, label, shard and memory layout",
        tests=[
            "losses/test_accuracy.py::test_loss_and_gradients_accurate",
            "backends/test_triton.py::test_both_accesses_accurate",
            "losses/test_accuracy.py::test_labels_accurate",
            "backends/test_kernels.py::test_offset_of_a_shard",
            "backends/test_triton.py::test_layouts",
            "backends/test_kernels.py::test_one_side_aligned",
            "backends/test_plain.py::test_loss_and_gradients_accurate",
            "backends/test_plain.py::test_solved_batch_keeps_digits",
        ],
        breaks=[
            Break(
                "columns beyond N count",
                "triton_kernels/contrastive_fwd.py",
                old="inside = j[None, :] < N - j0",
                new="inside = j[None, :] < N - j0 + 1",
            ),
            Break(
                "sides of different width",
                "triton_kernels/features.py",
                old="aligned &= x.shape[1] % 8 == 0",
                new="aligned &= x.shape[1] > 0",
            ),
            Break(
                "rows beyond M count",
                "triton_kernels/contrastive_fwd.py",
                old="offset2 = tl.where(i < M - i0, tl.load(constants_ptr + OFFSET2), INF)",
                new="offset2 = tl.load(constants_ptr + OFFSET2) + 0.0 * i",
            ),
            Break(
                "masked tiles only where the diagonal starts",
                "triton_kernels/tile.py",
                old="(first > -BLOCK_M) & (first < BLOCK_N)",
                new="(first >= 0) & (first < BLOCK_N)",
            ),
            Break(
                "an offset of the wrong sign",
                "triton_kernels/contrastive_bwd_vectors.py",
                old="block * BLOCK, M, N, offset, NORMALIZE",
                new="block * BLOCK, M, N, -offset, NORMALIZE",
            ),
            Break(
                "the second part of a tile takes the first one's columns",
                "triton_kernels/contrastive_bwd.py",
                old="col.k0 + dot.shape[1] // 2",
                new="col.k0",
            ),
            Break(
                "pairs: log of 1 + u",
                "triton_kernels/tile.py",
                old="log1p = tl.where(rounded == 0.0, u, u * (tl.log(above) / tl.where(rounded == 0.0, 1.0, rounded)))",
                new="log1p = tl.log(above)",
            ),
            Break(
                "pairs: both directions weigh the same",
                "triton_kernels/plain_fwd.py",
                old="row_weight, col_weight = weight / N, (1.0 - weight) / N",
                new="row_weight, col_weight = 0.5 / N + 0.0 * weight, 0.5 / N",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "GPU kernels are right even if the logits of a row are spread beyond the range of float32 exponentials",
        tests=[
            "losses/test_accuracy.py::test_unnormalised_features_accurate",
            "backends/test_triton.py::test_repair_forced",
            "backends/test_kernels.py::test_repair_of_opposite_features",
            "backends/test_plain.py::test_repair_of_uneven_norms",
        ],
        breaks=[
            Break(
                "no forward repair",
                "triton_kernels/contrastive_fwd_reduce.py",
                old="((total >= _SAFE_SUM) == 0)",
                new="(total < 0)",
            ),
            Break(
                "no backward repair",
                "triton_kernels/contrastive_bwd_vectors.py",
                old="wanted & ((lse >= lowest) == 0)",
                new="wanted & (lse != lse)",
            ),
            Break(
                "pairs: the loss of a repair is the first one's",
                "triton_kernels/plain.py",
                old='"EXACT": exact == 1',
                new='"EXACT": exact == 2',
            ),
        ],
    ),
    Promise(
        COST,
        "GPU kernels compute exponentials a second time only in batches with extremely spread logits",
        tests=[
            "backends/test_kernels.py::test_repair_not_needed_for_ordinary_batches",
        ],
        breaks=[
            Break(
                "always",
                "triton_kernels/features.py",
                old="tl.store(constants_ptr + REPAIR, 0.0)",
                new="tl.store(constants_ptr + REPAIR, 1.0)",
            ),
        ],
    ),
    Promise(
        COST,
        "GPU kernels keep their workspace memory within its limit",
        tests=[
            "backends/test_kernels.py::test_panels_and_blocks",
            "backends/test_kernels.py::test_workspace_bounded",
            "backends/test_plain.py::test_panels_and_blocks",
            "backends/test_plain.py::test_workspace_bounded",
        ],
        breaks=[
            Break(
                "panels forget the ones before",
                "triton_kernels/contrastive_fwd_reduce.py",
                old="mask=in_rows & (first == 0), other=0.0 if",
                new="mask=in_rows & (first == 2), other=0.0 if",
            ),
            Break(
                "chunks overwrite",
                "triton_kernels/gradients.py",
                old="x[i0:i1], keep=i0 > 0)",
                new="x[i0:i1], keep=False)",
            ),
            Break(
                "all rows at once",
                "triton_kernels/gradients.py",
                old="return min(_padded(M), max(rows, ALIGNMENT)), block_n",
                new="return _padded(M), block_n",
            ),
            Break(
                "columns are never cut",
                "triton_kernels/gradients.py",
                old="    block_n = _padded(ceil_div(N, ceil_div(N, most)))\n",
                new="    block_n = _padded(N)\n",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "Float16 gradients on a GPU neither underflow nor overflow, whatever the norms of the features",
        tests=[
            "losses/test_accuracy.py::test_fp16_weights_do_not_flush",
            "losses/test_accuracy.py::test_zero_rows_finite",
            "losses/test_accuracy.py::test_extreme_norms_finite_and_accurate",
            "backends/test_plain.py::test_blocks_of_solved_and_unsolved_pairs",
            "backends/test_plain.py::test_upstream_gradient_scales",
        ],
        breaks=[
            Break(
                "no gain",
                "triton_kernels/contrastive_bwd_vectors.py",
                old="return 1024.0 / high_bit(",
                new="return 1.0 + 0.0 * high_bit(",
            ),
            Break(
                "rows as they are",
                "triton_kernels/features.py",
                old="if not needs_copy(x, normalize):",
                new="if x.shape[1] % 8 == 0:",
            ),
            Break(
                "pairs: every block keeps its own gain",
                "triton_kernels/plain_fwd.py",
                old="if tl.max(largest, 0) != gain:",
                new="if tl.max(largest, 0) < gain:",
            ),
            Break(
                "pairs: a tiny upstream gradient in one factor",
                "triton_kernels/gradients.py",
                old="tl.where(tl.abs(factor) < TINY, TINY, 1.0)",
                new="tl.where(tl.abs(factor) < TINY, 1.0, 1.0)",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "Features of more than 2^31 elements give the right results on a GPU",
        tests=[
            "backends/test_kernels.py::test_rows_beyond_2_to_the_31",
        ],
        breaks=[
            Break(
                "32-bit base",
                "triton_kernels/tile.py",
                old="image.ptr + i0.to(tl.int64) * image.row_stride",
                new="image.ptr + i0 * image.row_stride",
            ),
        ],
    ),
    Promise(
        COST,
        "GPU kernels take 8 M N D operations and a fixed number of launches",
        tests=[
            "backends/test_kernels.py::test_work_and_launches",
            "backends/test_plain.py::test_work_and_launches",
        ],
        breaks=[
            Break(
                "one more product",
                "triton_kernels/gradients.py",
                old="addmm(raw_text if whole",
                new="torch.mm(block, y[j0:j1]); addmm(raw_text if whole",
            ),
            Break(
                "pairs: another launch for the loss",
                "triton_kernels/plain.py",
                old="_TICKET = not torch.version.hip",
                new="_TICKET = False",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "The sigmoid loss on a GPU keeps its digits when it is near 0, and takes 6 M N D operations",
        tests=[
            "losses/test_sigmoid_accuracy.py::test_sigmoid_accurate",
            "losses/test_sigmoid_accuracy.py::test_sigmoid_of_a_solved_batch_keeps_digits",
            "backends/test_kernels.py::test_sigmoid_without_gradients_multiplies_once",
            "backends/test_sigmoid_kernels.py::test_shards_and_blocks",
            "backends/test_sigmoid_kernels.py::test_float16_weights_of_a_solved_batch_keep_digits",
            "backends/test_sigmoid_kernels.py::test_loss_of_the_dtype_that_is_asked_for",
            "backends/test_sigmoid_kernels.py::test_upstream_gradient_multiplies",
            "backends/test_sigmoid_kernels.py::test_every_subset_of_gradients",
        ],
        breaks=[
            Break(
                "log of 1 + t",
                "triton_kernels/sigmoid_fwd.py",
                old="return t * tl.fma(p, t, 0.99999994)",
                new="return tl.log(1.0 + t)",
            ),
            Break(
                "the texts' own pairs lie the other way",
                "triton_kernels/sigmoid_fwd.py",
                old="-offset, NORMALIZE, COPY",
                new="offset, NORMALIZE, COPY",
            ),
            Break(
                "own pairs without the gain",
                "triton_kernels/sigmoid_fwd.py",
                old="-offset, gain, factor",
                new="-offset, 1.0, factor",
            ),
            Break(
                "blocks of rows overwrite",
                "triton_kernels/gradients.py",
                old="x[i0:i1], keep=i0 > 0)",
                new="x[i0:i1], keep=False)",
            ),
            Break(
                "blocks write their sums to one place",
                "triton_kernels/sigmoid.py",
                old="done += plan.tile.tiles(*shape)",
                new="done += 0 * plan.tile.tiles(*shape)",
            ),
            Break(
                "no gain of features that are not normalised",
                "triton_kernels/sigmoid_fwd.py",
                old="if BOUND:\n        tl.store(top_ptr + block, top)",
                new="if BOUND:\n        tl.store(top_ptr + block, 1e9)",
            ),
            Break(
                "every loss has been a float32",
                "triton_kernels/sigmoid_fwd.py",
                old="loss.to(loss_ptr.dtype.element_ty)",
                new="loss.to(tl.float32).to(loss_ptr.dtype.element_ty)",
            ),
            Break(
                "a factor that is rounded before it multiplies",
                "triton_kernels/sigmoid_bwd.py",
                old="upstream = tl.load(upstream_ptr)",
                new="upstream = tl.load(upstream_ptr).to(tl.float16).to(tl.float32)",
            ),
            Break(
                "scalars where no scalar is wanted",
                "triton_kernels/sigmoid.py",
                old="d_scale, d_bias = grads[0] if needs_scale else None,",
                new="d_scale, d_bias = grads[0] if scalars else None,",
            ),
        ],
    ),
    Promise(
        COST,
        "Compiled Triton kernels spill no register, use Hopper's tensor cores and compute one exponential per logit",
        tests=[
            "backends/test_triton_compiled.py::test_no_kernel_spills",
            "backends/test_triton_compiled.py::test_tensor_cores",
            "backends/test_triton_compiled.py::test_one_exponential_a_logit",
            "backends/test_triton_compiled.py::test_every_configuration_is_compiled",
        ],
        breaks=[
            Break(
                "no parts",
                "triton_kernels/launch.py",
                old="Config(128, 128, 64, 4, 3, SPLIT=4)",
                new="Config(128, 128, 64, 4, 3)",
            ),
        ],
    ),
    Promise(
        MACHINE,
        "Triton's interpreter runs on a CPU only if the backend is requested by name, and refuses bfloat16",
        tests=[
            "backends/test_triton.py::test_interpreter_serves_by_name_only",
        ],
        breaks=[
            Break(
                "bfloat16 too",
                "fastclip/_backends/triton.py",
                old="if image.dtype == torch.bfloat16:",
                new="if image.dtype == torch.complex64:",
            ),
        ],
    ),
]
