"""The numbers of the contrastive loss on a CPU."""

from __future__ import annotations

from broken import NUMBERS, Break, Promise

PROMISES = [
    Promise(
        NUMBERS,
        "The loss is within 1e-5 of float64, gradients within 3e-5 (1e-4 on tensor cores); no error is "
        "over twice dense PyTorch's",
        tests=[
            "losses/test_accuracy.py::test_loss_and_gradients_accurate",
        ],
        breaks=[
            Break(
                "a coefficient of exp2",
                "csrc/cpu/tile_common.h",
                old="5.550328642e-02f",
                new="5.560328642e-02f",
            ),
            Break(
                "sign of d_scale",
                "fastclip/_backends/cpu/contrastive.py",
                old="new_tensor(d_scale / gain)",
                new="new_tensor(-d_scale / gain)",
            ),
            Break(
                "normalised 16-bit features are rounded again",
                "fastclip/_backends/cpu/blocks.py",
                old="rows.copy_(self.x[start:stop])",
                new=(
                    "rows.copy_(self.x[start:stop]); norms = rows.norm(dim=1, keepdim=True).clamp_min(1e-12); "
                    "rows.copy_((rows / norms).to(self.x.dtype)).mul_(norms)"
                ),
            ),
            Break(
                "the last columns of a row are read past its end",
                "csrc/cpu/tile_common.h",
                old="if (j < N) body(j, Simd::first(N - j));",
                new="if (j < N) body(j, Full{});",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "Every instruction set (AVX-512, AVX2, portable) meets the same tolerances",
        tests=[
            "backends/test_cpu.py::test_every_instruction_set_accurate",
            "backends/test_native.py::test_native_code",
        ],
        breaks=[
            Break(
                "AVX2 shifts by more than an exponent holds",
                "csrc/cpu/simd_avx2.h",
                old="_mm256_min_ps(n, set1(128.0f))",
                new="n",
            ),
            Break(
                "portable max",
                "csrc/cpu/simd_portable.h",
                old="a.v[k] > b.v[k] ? a.v[k] : b.v[k]",
                new="a.v[k]",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "A loss near 0 keeps its digits, down to 1e-20",
        tests=[
            "losses/test_accuracy.py::test_confident_loss_keeps_digits",
        ],
        breaks=[
            Break(
                "logaddexp of pairs",
                "fastclip/_backends/reference/contrastive.py",
                old="return _softplus(side.neg - side.pos)",
                new="return torch.logaddexp(side.pos, side.neg) - side.pos",
            ),
            Break(
                "logaddexp of labels",
                "fastclip/_backends/reference/contrastive.py",
                old="loss = _softplus(torch.where(has_positive, side.neg, -torch.inf) - q)",
                new="loss = torch.logaddexp(torch.where(has_positive, side.neg, -torch.inf), q) - q",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "Labels with several positives per row, rows without a positive, label smoothing and image_weight are right",
        tests=[
            "losses/test_accuracy.py::test_labels_accurate",
            "losses/test_accuracy.py::test_label_smoothing_accurate",
        ],
        breaks=[
            Break(
                "the mean counts all rows",
                "fastclip/losses/inputs/batch.py",
                old="((count > 0).sum().clamp_min(1) for count",
                new="((count >= 0).sum() for count",
            ),
            Break(
                "weights of the directions swapped",
                "fastclip/losses/contrastive.py",
                old="image_weight * row_total + (1.0 - image_weight) * col_total",
                new="image_weight * col_total + (1.0 - image_weight) * row_total",
            ),
            Break(
                "smoothing against the wrong mean",
                "fastclip/losses/contrastive.py",
                old="loss + smoothing * (mean_pos - mean_logit)",
                new="loss + smoothing * (mean_pos + mean_logit)",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "The pairs of each sample with itself can be excluded, as in SimCLR and SupCon",
        tests=[
            "losses/test_self_pairs.py::test_simclr_through_labels",
            "losses/test_self_pairs.py::test_excluded_pairs_do_not_count",
        ],
        breaks=[
            Break(
                "forward forgets",
                "csrc/cpu/entry_points.cpp",
                old="b.exclude_self != 0,",
                new="false,",
            ),
            Break(
                "own pairs count",
                "fastclip/losses/inputs/batch.py",
                old="row_count, col_count = row_count - itself, col_count - itself",
                new="row_count, col_count = row_count, col_count",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "The loss and its gradients are right however far the logits are spread",
        tests=[
            "losses/test_accuracy.py::test_unnormalised_features_accurate",
            "backends/test_cpu.py::test_every_instruction_set_accurate",
        ],
        breaks=[
            Break(
                "log-sum-exps rounded to fp32",
                "fastclip/_backends/cpu/contrastive.py",
                old="torch.where(rounded.abs() < 2.0**40, exact - rounded, 0.0)",
                new="torch.zeros_like(exact)",
            ),
            Break(
                "forward guard",
                "csrc/cpu/contrastive_fwd_tile.h",
                old="if (!one_exponential(t, image, text, keep, also, row, col)) two",
                new="if (!one_exponential(t, image, text, keep, also, row, col) && t.M < 0) two",
            ),
            Break(
                "backward guard",
                "csrc/cpu/contrastive_bwd_tile.h",
                old="check(b, size_b);",
                new="check(b, size_b); s.close = true;",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "Results are finite and right for any scale, for rows of zeros, and for huge and tiny norms",
        tests=[
            "losses/test_accuracy.py::test_extreme_norms_finite_and_accurate",
            "losses/test_accuracy.py::test_zero_rows_finite",
            "losses/test_accuracy.py::test_norm_below_the_bound_is_a_constant",
            "losses/test_accuracy.py::test_upstream_gradient_scales",
            "losses/test_accuracy.py::test_enormous_scales_accurate",
        ],
        breaks=[
            Break(
                "the largest logit is rounded away from itself",
                "csrc/cpu/tile_common.h",
                old="if (coarse) return Simd::sub",
                new="if (coarse && j < 0) return Simd::sub",
            ),
            Break(
                "no bound on norms",
                "csrc/cpu/entry_points.cpp",
                old="norm[i] < kSmallestNorm ? kSmallestNorm : norm[i]",
                new="norm[i]",
            ),
            Break(
                "huge norms multiplied as they are",
                "csrc/cpu/entry_points.cpp",
                old="const bool is_large = outer != nullptr && norm[i] > kLargeNorm;",
                new="const bool is_large = outer != nullptr && norm[i] < 0.0;",
            ),
            Break(
                "huge norms multiplied as they are beside statistics",
                "fastclip/_backends/cpu/blocks.py",
                old="large = inv_norm * _LARGE_NORM < 1",
                new="large = inv_norm < 0",
            ),
            Break(
                "a bounded norm is projected",
                "csrc/cpu/rows_tile.h",
                old="f.inv_norm == nullptr || f.inv_norm[i] * static_cast<float>(fastclip::kSmallestNorm) >= 1.0f",
                new="f.inv_norm == nullptr",
            ),
            Break(
                "subnormal weights",
                "fastclip/_backends/cpu/contrastive.py",
                old="return 2.0 ** -math.frexp(largest)[1]",
                new="return 1.0",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "Label smoothing and the detection of ties are right for features of any norm",
        tests=[
            "losses/test_accuracy.py::test_label_smoothing_of_extreme_norms_accurate",
            "losses/test_stats.py::test_ties_of_extreme_norms",
        ],
        breaks=[
            Break(
                "another norm, in float32",
                "fastclip/losses/contrastive.py",
                old="r, c = _unit_factors(image, normalize), _unit_factors(text, normalize)",
                new="r, c = (1 / torch.linalg.vector_norm(x.float(), dim=1).clamp_min(1e-12) for x in (image, text))",
            ),
            Break(
                "two norms multiplied",
                "fastclip/losses/contrastive.py",
                old="diagonal = torch.linalg.vecdot(unit_rows(image, r), unit_rows(text, c))",
                new="diagonal = r * c * torch.linalg.vecdot(image, text)",
            ),
            Break(
                "ties by float32's norms",
                "fastclip/losses/inputs/limits.py",
                old="row, col = norms(p.image), norms(p.text)",
                new="row, col = (torch.linalg.vector_norm(x, dim=1) for x in p[:2])",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "NaN and Inf in the features appear in the loss and its gradients",
        tests=[
            "losses/test_accuracy.py::test_nan_and_inf_propagate",
            "backends/test_native.py::test_native_code",
        ],
        breaks=[
            Break(
                "NaN becomes 0 in exp2",
                "csrc/cpu/simd_avx512.h",
                old="_mm512_cmp_ps_mask(x, set1(floor), _CMP_NLT_UQ)",
                new="_mm512_cmp_ps_mask(x, set1(floor), _CMP_GE_OQ)",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "Batches of more than 2^31 pairs and features of more than 2^31 elements give the right results",
        tests=[
            "losses/test_large_batch.py::test_loss_of_more_than_two_to_the_31_pairs",
            "backends/test_native.py::test_native_code",
        ],
        breaks=[
            Break(
                "32-bit offset of a tile",
                "csrc/cpu/entry_points.cpp",
                old="{b.dot + i * b.row_stride + j,",
                new="{b.dot + static_cast<int>(i * b.row_stride + j),",
            ),
            Break(
                "32-bit offset of a row",
                "csrc/cpu/tile_common.h",
                old="dot(t.dot + i * t.row_stride)",
                new="dot(t.dot + static_cast<int>(i * t.row_stride))",
            ),
            Break(
                "thousands of terms one after the other",
                "fastclip/_backends/cpu/blocks.py",
                old="if b.shape[1] == 1:",
                new="if b.shape[1] == 0:",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "Random shapes, layouts, dtypes, labels and options meet the same tolerances",
        tests=[
            "losses/test_fuzz.py::test_contrastive_loss_accurate_on_anything",
        ],
        breaks=[
            Break(
                "a stride is taken for 1",
                "fastclip/_backends/cpu/blocks.py",
                old="self.row_stride, column_stride = x.stride()",
                new="self.row_stride, column_stride = x.shape[1], x.stride(1)",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "A hundred training steps agree to 1e-5 with the dense loss, and with stored runs",
        tests=[
            "training/test_hundred_steps.py::test_float32_training_agrees_with_the_dense_loss",
        ],
        breaks=[
            Break(
                "a gradient off by 1e-4",
                "fastclip/_backends/cpu/contrastive.py",
                old="plan.backward(s / gain,",
                new="plan.backward(1.0001 * s / gain,",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "Float64 features are computed in float64, by the reference backend",
        tests=[
            "losses/test_interface.py::test_explicit_backend_that_cannot_serve_says_why",
        ],
        breaks=[
            Break(
                "the CPU backend takes it",
                "fastclip/_backends/cpu/__init__.py",
                old="image.dtype not in FUSED_DTYPES",
                new="not image.dtype.is_floating_point",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "A label of -1 is an error; with `ignore_label` the loss is the same as if the ignored rows were removed",
        tests=[
            "losses/test_ignored_labels.py::test_loss_is_that_without_the_rows",
            "losses/test_ignored_labels.py::test_reductions",
            "losses/test_ignored_labels.py::test_any_label_can_be_ignored",
            "losses/test_ignored_labels.py::test_what_does_not_fit_is_refused",
            "losses/test_ignored_labels.py::test_graphs_assert_that_every_row_has_a_label",
            "losses/test_ignored_labels.py::test_ranks_have_the_loss_of_one_process",
        ],
        breaks=[
            Break(
                "labels: -1 is a class, in silence",
                "fastclip/losses/inputs/labels.py",
                old="if bool((labels == -1).any()):",
                new="if False:",
            ),
            Break(
                "labels: -1 is a class in graphs and on a GPU",
                "fastclip/losses/inputs/labels.py",
                old="torch._assert_async((labels != -1).all(), message)",
                new="pass",
            ),
            Break(
                "labels: rows without one are a class",
                "fastclip/losses/inputs/labels.py",
                old="(y.long() != ignored).nonzero()",
                new="(y.long() >= -(2**62)).nonzero()",
            ),
            Break(
                "labels: 255 without a sign is -1",
                "fastclip/losses/inputs/labels.py",
                old="(y.long() != ignored).nonzero()",
                new="(y != torch.tensor(ignored).to(y.dtype)).nonzero()",
            ),
            Break(
                "labels: rows without one have a loss",
                "fastclip/losses/inputs/labels.py",
                old="x.new_full((size,), fill)",
                new="x.new_full((size,), 1)",
            ),
        ],
    ),
]
