"""The losses on one process, and the package around them."""

from __future__ import annotations

from broken import Break, Promise

REFERENCE = "fastclip/_backends/reference.py"
BLOCKS = "fastclip/_backends/cpu/blocks.py"
CONTRASTIVE = "fastclip/_backends/cpu/contrastive.py"
SIGMOID = "fastclip/_backends/cpu/sigmoid.py"
FWD_TILE = "csrc/cpu/contrastive_fwd_tile.h"
BWD_TILE = "csrc/cpu/contrastive_bwd_tile.h"
ACCURACY = "losses/test_contrastive_accuracy.py"
INVARIANTS = "losses/test_contrastive_invariants.py"
TORCH = "losses/test_contrastive_torch.py"
INTERFACE = "losses/test_interface.py"
CUDA = "backends/test_cuda.py"

# fmt: off
PROMISES: dict[str, list[Promise]] = {
    "Layers": [
        Promise("imports go one way, and `import fastclip` needs torch only", ("package/test_layering.py::test_module_keeps_to_its_layer",), (Break("labels import the trainer", "fastclip/labels.py", "import torch\n", "import fastclip.training\n"),)),
        Promise(
            "`import fastclip` and the command line load no torch until a name needs it, and its ops where torch is loaded",
            ("package/test_lazy.py::test_import_loads_the_standard_library_only", "package/test_lazy.py::test_help_answers_in_half_a_second", "package/test_lazy.py::test_ops_are_there_where_torch_came_first", "package/test_lazy.py::test_command_answers_without_torch", "package/test_lazy.py::test_missing_package_is_named"),
            (
                Break("lazy: the ops come later", "fastclip/__init__.py", '"torch" in sys.modules:', "False:"),
                Break("lazy: not at all", "fastclip/__init__.py", '"torch" in sys.modules:', "True:"),
                Break("lazy: no word of what is not installed", "fastclip/__init__.py", 'if not _LAZY[name].startswith("fastclip.models."):', "if True:"),
                Break("lazy: models load torch", "fastclip/models/__init__.py", "\nif TYPE_CHECKING:", "\nimport fastclip.models.factory\nif TYPE_CHECKING:"),
            ),
        ),
        Promise("no torch or Python header below the binding", ("package/test_layering.py::test_native_code_is_free_of_frameworks",), (Break("a header", "csrc/cpu/tile.h", "#pragma once\n", "#pragma once\n#if 0\n#include <Python.h>\n#endif\n"),)),
        Promise("a missing native module is a reason in `backends()`, not an import error", (f"{INTERFACE}::test_missing_native_module_is_a_reason",), (Break("not caught", "fastclip/_backends/native.py", "except ImportError as", "except KeyError as"),)),
        Promise("the package installs without a compiler and says what was missing", ("package/test_packaging.py::test_package_works_without_compiler",), (Break("the build is required", "setup.py", '            if WANTED[kind] == "1":', '            if WANTED[kind] != "0":'),)),
        Promise(
            "likewise without nvcc or with an old one; a CUDA build that fails costs no CPU module",
            ("package/test_packaging.py::test_package_works_without_nvcc", "package/test_packaging.py::test_old_nvcc_is_told", "package/test_packaging.py::test_cuda_that_does_not_compile_costs_no_cpu_module"),
            (
                Break("any nvcc will do", "setup.py", "(int(version[1]), int(version[2])) < (12, 5)", "not version"),
                Break("CUDA's report is the CPU's", "setup.py", "f\"{module.split('.')[0]}_build_report.txt\"", '"_cpu_build_report.txt"'),
            ),
        ),
        Promise(
            "the CUDA module loads without a driver and beside any CUDA runtime",
            ("package/test_packaging.py::test_cuda_module_loads_without_driver",),
            (Break("a shared runtime", "CMakeLists.txt", "CMAKE_CUDA_RUNTIME_LIBRARY Static", "CMAKE_CUDA_RUNTIME_LIBRARY Shared"),),
        ),
        Promise("rebuilding in place leaves the module that a process has loaded", ("package/test_packaging.py::test_rebuilding_in_place_leaves_the_loaded_module",), (Break("written over", "setup.py", "os.replace(temporary, place)", "place.write_bytes(temporary.read_bytes())"),)),
    ],
    "Numbers": [
        Promise(
            "loss within 1e-5, gradients within 3e-5 (fp32) or one rounding (16-bit), never worse than twice dense torch",
            (f"{ACCURACY}::test_loss_and_gradients_accurate",),
            (
                Break("a coefficient of exp2", "csrc/cpu/tile_common.h", "5.550328642e-02f", "5.560328642e-02f"),
                Break("sign of d_scale", CONTRASTIVE, "new_tensor(d_scale / gain)", "new_tensor(-d_scale / gain)"),
                Break("log-sum-exps rounded to fp32", CONTRASTIVE, "torch.where(rounded.isfinite(), exact - rounded, 0.0)", "torch.zeros_like(exact)"),
                Break("normalised 16-bit features are rounded again", BLOCKS, "rows.copy_(self.x[start:stop])", "rows.copy_((self.x[start:stop].float() * self.inv_norm[start:stop, None]).to(self.x.dtype)).div_(self.inv_norm[start:stop, None])"),
                Break("the last columns of a row are read past its end", "csrc/cpu/tile_common.h", "  if (j < N) body(j, Simd::first(N - j));", "  if (j < N) body(j, Full{});"),
            ),
        ),
        Promise(
            "the same on every instruction set",
            (f"{ACCURACY}::test_every_instruction_set_accurate", "backends/test_native.py::test_native_code"),
            (Break("AVX2 shifts by more than an exponent holds", "csrc/cpu/simd_avx2.h", "_mm256_min_ps(n, set1(128.0f))", "n"), Break("portable max", "csrc/cpu/simd_portable.h", "a.v[k] > b.v[k] ? a.v[k] : b.v[k]", "a.v[k]")),
        ),
        Promise(
            "a confident loss keeps its digits down to 1e-20, positives being kept out of the log-sum-exp",
            (f"{ACCURACY}::test_confident_loss_keeps_digits",),
            (
                Break("logaddexp of pairs", "fastclip/loss.py", "loss = _softplus(neg - pos)", "loss = torch.logaddexp(pos, neg) - pos"),
                Break("logaddexp of labels", "fastclip/loss.py", "loss = _softplus(torch.where(some, neg, -torch.inf) - q)", "loss = torch.logaddexp(torch.where(some, neg, -torch.inf), q) - q"),
            ),
        ),
        Promise(
            "labels: loss and gradient over several positives; rows without one are left out of the mean; weights and smoothing",
            (f"{ACCURACY}::test_labels_accurate", f"{ACCURACY}::test_label_smoothing_accurate"),
            (
                Break("the mean counts all rows", "fastclip/loss.py", "((count > 0).sum().clamp_min(1) for count", "((count >= 0).sum() for count"),
                Break("weights of the directions swapped", "fastclip/loss.py", "torch.lerp(col_total, row_total, image_weight)", "torch.lerp(row_total, col_total, image_weight)"),
                Break("smoothing against the wrong mean", "fastclip/loss.py", "loss + smoothing * (mean_pos - mean_logit)", "loss + smoothing * (mean_pos + mean_logit)"),
            ),
        ),
        Promise(
            "own pairs can be left out: SimCLR and SupCon through labels",
            ("losses/test_self_pairs.py::test_simclr_through_labels", "losses/test_self_pairs.py::test_excluded_pairs_do_not_count"),
            (Break("forward forgets", "csrc/cpu/entry_points.cpp", "b.exclude_self != 0}", "false}"), Break("own pairs count", "fastclip/loss.py", "row_count, col_count = row_count - own, col_count - own", "row_count, col_count = row_count, col_count")),
        ),
        Promise(
            "right for logits of any spread, by repair where one exponential does not do",
            (f"{ACCURACY}::test_unnormalised_features_accurate", f"{ACCURACY}::test_every_instruction_set_accurate"),
            (Break("forward guard", FWD_TILE, "if (!one_exponential(t, image, text, keep, row, col)) two", "if (!one_exponential(t, image, text, keep, row, col) && t.M < 0) two"), Break("backward guard", BWD_TILE, "  check(b, size_b);\n", "  check(b, size_b);\n  s.close = true;\n")),
        ),
        Promise(
            "any scale, zero rows, huge and tiny norms: finite and right",
            (f"{ACCURACY}::test_extreme_norms_finite_and_accurate", f"{ACCURACY}::test_zero_rows_finite", f"{ACCURACY}::test_norm_below_the_bound_is_a_constant", f"{ACCURACY}::test_upstream_gradient_scales"),
            (
                Break("no bound on norms", BLOCKS, "return norm.clamp_min(EPS).reciprocal()", "return norm.reciprocal()"),
                Break("huge norms multiplied as they are", BLOCKS, "inv_norm.amin() * _LARGE_NORM < 1", "inv_norm.amin() < 0"),
                Break("a bounded norm is projected", BLOCKS, "torch.where(inv_norm * EPS < 1, self.inv_norm.square(), 0.0)", "self.inv_norm.square()"),
                Break("subnormal weights", CONTRASTIVE, "return 2.0 ** -math.frexp(largest)[1]", "return 1.0"),
            ),
        ),
        Promise("NaN and Inf propagate", (f"{ACCURACY}::test_nan_and_inf_propagate", "backends/test_native.py::test_native_code"), (Break("NaN becomes 0 in exp2", "csrc/cpu/simd_avx512.h", "_mm512_cmp_ps_mask(x, set1(floor), _CMP_NLT_UQ)", "_mm512_cmp_ps_mask(x, set1(floor), _CMP_GE_OQ)"),)),
        Promise(
            "more than 2^31 pairs, and rows beyond 2^31 elements",
            ("backends/test_native.py::test_native_code", "losses/test_large_batch.py::test_loss_of_more_than_two_to_the_31_pairs"),
            (
                Break("32-bit offset of a tile", "csrc/cpu/entry_points.cpp", "{b.dot + i * b.row_stride + j,", "{b.dot + static_cast<int>(i * b.row_stride + j),"),
                Break("32-bit offset of a row", "csrc/cpu/tile_common.h", "dot(t.dot + i * t.row_stride)", "dot(t.dot + static_cast<int>(i * t.row_stride))"),
                Break("thousands of terms one after the other", BLOCKS, "if b.shape[1] == 1:", "if b.shape[1] == 0:"),
            ),
        ),
        Promise(
            "anything a random draw of shapes, layouts, dtypes, labels and options finds",
            ("losses/test_fuzz.py::test_contrastive_loss_accurate_on_anything",),
            (Break("a stride is taken for 1", BLOCKS, "self.x = x if 1 in x.stride() or x.numel() == 0 else x.contiguous()", "self.x = x.as_strided(x.shape, (x.shape[1], 1)) if x.stride(0) >= x.shape[1] else x.contiguous()"),),
        ),
        Promise("a hundred training steps agree with the dense loss to 1e-5, and with golden runs", ("training/test_hundred_steps.py::test_float32_training_agrees_with_the_dense_loss",), (Break("a gradient off by 1e-4", CONTRASTIVE, "plan.backward(weigh, s / gain,", "plan.backward(weigh, 1.0001 * s / gain,"),)),
        Promise("fp64 goes to the reference", (f"{INTERFACE}::test_explicit_backend_that_cannot_serve_says_why",), (Break("the CPU backend takes it", "fastclip/_backends/cpu/__init__.py", "torch.bfloat16, torch.float16)", "torch.bfloat16, torch.float16, torch.float64)"),)),
    ],
    "Memory, work, order": [
        Promise(
            "memory of the features and one bounded workspace; nothing M x N",
            (f"{TORCH}::test_memory_is_of_the_features", f"{INVARIANTS}::test_workspace_stays_within_its_bound"),
            (Break("the whole matrix is made", CONTRASTIVE, "    rows = _State(plan.M", "    whole = torch.mm(plan.image.x.float(), plan.text.x.float().T)\n    rows = _State(plan.M + 0 * whole.numel()"), Break("the bound is not read", BLOCKS, "floats = _env.workspace_bytes() // 4", "floats = 2**26")),
        ),
        Promise(
            "four matrix products at most, 8 M N D operations; what the forward pass left is not multiplied again",
            (f"{INVARIANTS}::test_work_is_four_products_at_most",),
            (Break("one more product", BLOCKS, "            weigh(block, weights)\n", "            weigh(block, weights)\n            torch.mm(images, texts.T)\n"), Break("no block is kept", BLOCKS, "        self.owner, self.block = owner, block", "        self.owner, self.block = None, None")),
        ),
        Promise("the backward pass takes no other forward pass's block", (f"{INVARIANTS}::test_kept_block_is_the_forward_pass_own",), (Break("anybody's block", BLOCKS, "self.owner.data_ptr() == owner.data_ptr() and self.block == block", "self.block == block"),)),
        Promise(
            "bitwise repeatable, and the native passes the same on any number of threads",
            (f"{INVARIANTS}::test_native_passes_bitwise_equal_over_thread_counts", "backends/test_native.py::test_native_code"),
            (Break("a sum in the order of threads", "csrc/cpu/entry_points.cpp", "for (double part : d_scale) total += part;", "for (size_t k = 0; k < d_scale.size(); ++k) total += d_scale[(k + num_threads) % d_scale.size()];"),),
        ),
        Promise(
            "no data race, no access outside an array",
            ("backends/test_native.py::test_native_code",),
            (
                Break(
                    "the workers' counter is not atomic",
                    "csrc/cpu/thread_pool.cpp",
                    "  std::atomic<int64_t> next_{0};\n  void (*task_)",
                    "  struct {\n    int64_t value = 0;\n    void store(int64_t x, std::memory_order) { value = x; }\n    int64_t fetch_add(int64_t x, std::memory_order) { return (value += x) - x; }\n  } next_;\n  void (*task_)",
                ),
                Break("one label too far", "csrc/cpu/entry_points.cpp", "labels ? all.label + begin + k : nullptr", "labels ? all.label + begin + k + (all.label[begin + k] < 0) + 1 : nullptr"),
            ),
        ),
        Promise(
            "usable after fork, from several threads, and beside torch's OpenMP runtime, which stays the only one",
            (f"{INVARIANTS}::test_native_passes_work_after_fork", f"{INVARIANTS}::test_threads_of_python_do_not_disturb_each_other", f"{INTERFACE}::test_no_second_openmp_runtime_is_loaded"),
            (
                Break("borrowed threads after fork", "csrc/cpu/thread_pool.cpp", "      g_forked.store(true);", ""),
                Break("an OpenMP runtime is linked", "CMakeLists.txt", "PUBLIC Threads::Threads ${CMAKE_DL_LIBS}", "PUBLIC Threads::Threads ${CMAKE_DL_LIBS} -Wl,--no-as-needed gomp"),
                Break("one workspace for all threads", BLOCKS, "class _Workspace(threading.local):", "class _Workspace:"),
            ),
        ),
    ],
    "torch": [
        Promise(
            "library ops with fake and autograd, opcheck clean",
            (f"{TORCH}::test_ops_pass_opcheck", "losses/test_sigmoid.py::test_sigmoid_op_passes_opcheck", "losses/test_stats.py::test_maxima_op_passes_opcheck"),
            (Break("a fake of another dtype", "fastclip/ops/contrastive.py", "stats = (p.image.new_empty(size, dtype=wide)", "stats = (p.image.new_empty(size)"),),
        ),
        Promise(
            "`torch.compile(fullgraph=True)`, also with changing batch",
            (f"{TORCH}::test_compiles_whole", f"{TORCH}::test_compiles_with_changing_batch"),
            (Break("a number is read from a tensor", "fastclip/loss.py", " and not torch.compiler.is_compiling()", ""),),
        ),
        Promise(
            "under autocast the features take its dtype and the scalars stay fp32, on every backend",
            (f"{TORCH}::test_autocast_rounds_features_and_not_the_scale", "losses/test_sigmoid.py::test_sigmoid_autocast_rounds_features_and_not_the_scalars"),
            (
                Break("the scale is rounded", "fastclip/ops/autocast.py", "(x.to(torch.promote_types(image.dtype, torch.float32)) for x in scalars)", "(x.to(image.dtype).to(torch.promote_types(image.dtype, torch.float32)) for x in scalars)"),
                Break("products inside the ops are rounded", "fastclip/ops/autocast.py", "if not torch.is_autocast_enabled(image.device.type):", "if True:"),
            ),
        ),
        Promise(
            "second derivatives: an error that says so, and right on the reference",
            (f"{TORCH}::test_second_derivatives_of_cpu_raise", f"{TORCH}::test_reference_gradcheck_twice", "losses/test_sigmoid.py::test_sigmoid_reference_gradcheck_twice"),
            (Break("silence", "fastclip/ops/second.py", 'if name != "reference":', 'if name == "nothing":'), Break("a term is dropped", "fastclip/ops/sigmoid.py", "else factor.to(d.dtype) * d for d in kept]", "else d for d in kept]")),
        ),
        Promise(
            "every subset of gradients, any upstream gradient, the graph twice",
            (f"{TORCH}::test_every_subset_of_gradients", f"{INVARIANTS}::test_graph_can_be_used_twice"),
            (
                Break("texts' gradient instead of images'", "fastclip/ops/contrastive.py", "    needs = list(ctx.needs_input_grad[:3])", "    needs = [True, False, True]"),
                Break("the gradient of the first use is scaled in place", "fastclip/ops/contrastive.py", "    upstream = [torch.zeros_like(x)", "    stats[0].add_(1.0)\n    upstream = [torch.zeros_like(x)"),
            ),
        ),
    ],
    "Interface": [
        Promise(
            "what does not fit raises before any work and names both tensors",
            (f"{INTERFACE}::test_misfit_raises_before_any_work", f"{INTERFACE}::test_sigmoid_misfit_raises_before_any_work"),
            (Break("M and N are not compared", "fastclip/checks.py", "if paired and image.shape[0] != text.shape[0]:", "if False:"), Break("labels of any dtype", "fastclip/checks.py", "if labels.dtype not in (torch.int64,", "if labels.dtype in (torch.bool,) and labels.dtype not in (torch.int64,")),
        ),
        Promise(
            "`ClipLoss` is open_clip's: signature, values, gradients",
            (f"{INTERFACE}::test_clip_loss_has_open_clip_signature", f"{INTERFACE}::test_clip_loss_equals_open_clip"),
            (Break("it normalises", "fastclip/modules.py", "loss = contrastive_loss(image_features, text_features, logit_scale, normalize=False, group=group)", "loss = contrastive_loss(image_features, text_features, logit_scale * 1.001, normalize=False, group=group)"),),
        ),
        Promise(
            "`SigLipLoss` is open_clip's: signature, values, gradients, the bias's among them; `dist_impl` and `chunk_size` accepted",
            ("losses/test_sigmoid.py::test_siglip_loss_equals_open_clip", f"{INTERFACE}::test_siglip_loss_takes_every_way_to_the_same_loss"),
            (
                Break("sign of d_bias", SIGMOID, "bias.new_tensor(d_bias)", "bias.new_tensor(-d_bias)"),
                Break("divided by the pairs", "fastclip/sigmoid.py", "divisor = image.shape[0] if", "divisor = image.shape[0] ** 2 if"),
                Break("one exchange is refused", "fastclip/modules.py", '("bidir", "shift", "reduce", "gather")', '("bidir", "shift", "gather")'),
            ),
        ),
        Promise(
            "the sigmoid loss keeps the digits of small losses, and its gradients cost three products",
            ("losses/test_sigmoid.py::test_sigmoid_confident_loss_keeps_digits", "losses/test_sigmoid.py::test_sigmoid_work_is_three_products", "losses/test_sigmoid.py::test_sigmoid_accurate"),
            (
                Break("log(1 + t)", "csrc/cpu/sigmoid_fwd_tile.h", "Simd::fma(p, t, Simd::max(x, zero))", "Simd::add(Simd::sub(Simd::add(one, t), one), Simd::max(x, zero))"),
                Break("a coefficient of log1p", "csrc/cpu/sigmoid_fwd_tile.h", "1.060332805e-01f", "1.070332805e-01f"),
                Break("the positives' sign", "csrc/cpu/sigmoid_fwd_tile.h", "const double g = -(x < 0.0", "const double g = (x < 0.0"),
                Break("the block is multiplied twice", BLOCKS, "            torch.mm(images, texts.T, out=dot)", "            torch.mm(images, texts.T, out=dot)\n            torch.mm(images, texts.T, out=dot)"),
            ),
        ),
        Promise("a float16 gradient that waits for its upstream factor neither flushes nor overflows", ("losses/test_sigmoid.py::test_sigmoid_float16_gradient_of_a_mean_over_many_keeps_digits",), (Break("it waits in float16", REFERENCE, "return torch.float32 if x.dtype == torch.float16 else x.dtype", "return x.dtype"),)),
        Promise(
            "`multiview_loss`: all pairs, or the core view against the rest",
            ("losses/test_multiview.py::test_multiview_equals_sum_of_pairs", "losses/test_multiview.py::test_multiview_misfit_raises"),
            (Break("the core view is forgotten", "fastclip/multiview.py", "    if core is None:\n", "    if core is None or core == 2:\n"), Break("each pair twice", "fastclip/multiview.py", "for j in range(i + 1, len(views))]", "for j in range(len(views)) if j != i]")),
        ),
        Promise(
            "`contrastive_stats`: log-sum-exps, losses and top-1 in one pass; a tie is a miss",
            ("losses/test_stats.py::test_stats_accurate", "losses/test_stats.py::test_a_tie_is_a_miss", "losses/test_stats.py::test_stats_use_one_product"),
            (
                Break("rounding decides a tie", "fastclip/stats.py", "_TIE = 2.0**-20", "_TIE = -(2.0**-20)"),
                Break("a column's maximum from the last tile only", "csrc/cpu/entry_points.cpp", "side.neg_top[at] = std::max(side.neg_top[at], *partials.top(0, tile, k));", "side.neg_top[at] = *partials.top(0, tile, k);"),
                Break("log-sum-exp without the positive", "fastclip/stats.py", "return torch.logaddexp(neg, torch.where(top_pos == -torch.inf, -torch.inf, pos))", "return neg"),
            ),
        ),
    ],
}
# fmt: on
