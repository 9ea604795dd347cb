"""Every promise, the tests that hold it, and a way to break it, after which one of those tests must fail.

    python tests/breaks.py                 breaks every promise, one at a time, in a copy of the repository
    python tests/breaks.py memory fork     those whose text contains one of the words
    python tests/breaks.py --write         docs/promises.md from this table

The copy is made from a checkout whose package is installed for development (`make test` does so).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from native_build import PATH, ROOT

DOCUMENT = ROOT / "docs" / "promises.md"


class Break(NamedTuple):
    what: str
    file: str
    old: str  # occurs once in the file
    new: str


class Promise(NamedTuple):
    text: str
    tests: tuple[str, ...]  # file::function
    breaks: tuple[Break, ...]


REFERENCE, BLOCKS = "fastclip/_backends/reference.py", "fastclip/_backends/cpu/blocks.py"
CONTRASTIVE, SIGMOID = "fastclip/_backends/cpu/contrastive.py", "fastclip/_backends/cpu/sigmoid.py"
FWD_TILE, BWD_TILE = "csrc/cpu/contrastive_fwd_tile.h", "csrc/cpu/contrastive_bwd_tile.h"
ACCURACY, INVARIANTS = "test_contrastive_accuracy.py", "test_contrastive_invariants.py"
TORCH, INTERFACE = "test_contrastive_torch.py", "test_interface.py"
TRITON, COMPILED, KERNELS = "test_triton.py", "test_triton_compiled.py", "triton_kernels/"
GPU, GPU_SIGMOID = "test_kernels.py", "test_kernels_sigmoid.py"
CUDA, CUDA_COMPILED, TILE = "test_cuda.py", "test_cuda_compiled.py", "csrc/cuda/tile.cuh"
FWD_CU, BWD_CU, SIGMOID_CU = "csrc/cuda/contrastive_fwd.cu", "csrc/cuda/contrastive_bwd.cu", "csrc/cuda/sigmoid_fwd.cu"
MODELS, CHECKPOINTS, PREPROCESS = "test_models.py", "test_models_checkpoints.py", "test_models_preprocess.py"
REFUSED = "test_models_refused.py"
DISTRIBUTED, PARTS = "test_distributed.py", "fastclip/distributed/"

# fmt: off
PROMISES: dict[str, list[Promise]] = {
    "Layers": [
        Promise("imports go one way, and `import fastclip` needs torch only", ("test_layering.py::test_module_keeps_to_its_layer",), (Break("labels import the trainer", "fastclip/labels.py", "import torch\n", "import fastclip.training\n"),)),
        Promise("no torch or Python header below the binding", ("test_layering.py::test_native_code_is_free_of_frameworks",), (Break("a header", "csrc/cpu/tile.h", "#pragma once\n", "#pragma once\n#if 0\n#include <Python.h>\n#endif\n"),)),
        Promise("a missing native module is a reason in `backends()`, not an import error", (f"{INTERFACE}::test_missing_native_module_is_a_reason",), (Break("not caught", "fastclip/_backends/native.py", "except ImportError as", "except KeyError as"),)),
        Promise("the package installs without a compiler and says what was missing", ("test_packaging.py::test_package_works_without_compiler",), (Break("the build is required", "setup.py", '            if WANTED[kind] == "1":', '            if WANTED[kind] != "0":'),)),
        Promise(
            "likewise without nvcc or with an old one; a CUDA build that fails costs no CPU module",
            ("test_packaging.py::test_package_works_without_nvcc", "test_packaging.py::test_old_nvcc_is_told", "test_packaging.py::test_cuda_that_does_not_compile_costs_no_cpu_module"),
            (
                Break("any nvcc will do", "setup.py", "(int(version[1]), int(version[2])) < (12, 5)", "not version"),
                Break("CUDA's report is the CPU's", "setup.py", "f\"{module.split('.')[0]}_build_report.txt\"", '"_cpu_build_report.txt"'),
            ),
        ),
        Promise(
            "the CUDA module loads without a driver and beside any CUDA runtime",
            ("test_packaging.py::test_cuda_module_loads_without_driver",),
            (Break("a shared runtime", "CMakeLists.txt", "CMAKE_CUDA_RUNTIME_LIBRARY Static", "CMAKE_CUDA_RUNTIME_LIBRARY Shared"),),
        ),
        Promise("rebuilding in place leaves the module that a process has loaded", ("test_packaging.py::test_rebuilding_in_place_leaves_the_loaded_module",), (Break("written over", "setup.py", "os.replace(temporary, place)", "place.write_bytes(temporary.read_bytes())"),)),
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
            (f"{ACCURACY}::test_every_instruction_set_accurate", "test_native.py::test_native_code"),
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
            ("test_self_pairs.py::test_simclr_through_labels", "test_self_pairs.py::test_excluded_pairs_do_not_count"),
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
        Promise("NaN and Inf propagate", (f"{ACCURACY}::test_nan_and_inf_propagate", "test_native.py::test_native_code"), (Break("NaN becomes 0 in exp2", "csrc/cpu/simd_avx512.h", "_mm512_cmp_ps_mask(x, set1(floor), _CMP_NLT_UQ)", "_mm512_cmp_ps_mask(x, set1(floor), _CMP_GE_OQ)"),)),
        Promise(
            "more than 2^31 pairs, and rows beyond 2^31 elements",
            ("test_native.py::test_native_code", "test_large_batch.py::test_loss_of_more_than_two_to_the_31_pairs"),
            (
                Break("32-bit offset of a tile", "csrc/cpu/entry_points.cpp", "{b.dot + i * b.row_stride + j,", "{b.dot + static_cast<int>(i * b.row_stride + j),"),
                Break("32-bit offset of a row", "csrc/cpu/tile_common.h", "dot(t.dot + i * t.row_stride)", "dot(t.dot + static_cast<int>(i * t.row_stride))"),
                Break("thousands of terms one after the other", BLOCKS, "if b.shape[1] == 1:", "if b.shape[1] == 0:"),
            ),
        ),
        Promise(
            "anything a random draw of shapes, layouts, dtypes, labels and options finds",
            ("test_fuzz.py::test_contrastive_loss_accurate_on_anything",),
            (Break("a stride is taken for 1", BLOCKS, "self.x = x if 1 in x.stride() or x.numel() == 0 else x.contiguous()", "self.x = x.as_strided(x.shape, (x.shape[1], 1)) if x.stride(0) >= x.shape[1] else x.contiguous()"),),
        ),
        Promise("a hundred training steps agree with the dense loss to 1e-5, and with golden runs", ("test_training_run.py::test_float32_training_agrees_with_the_dense_loss",), (Break("a gradient off by 1e-4", CONTRASTIVE, "plan.backward(weigh, s / gain,", "plan.backward(weigh, 1.0001 * s / gain,"),)),
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
            (f"{INVARIANTS}::test_native_passes_bitwise_equal_over_thread_counts", "test_native.py::test_native_code"),
            (Break("a sum in the order of threads", "csrc/cpu/entry_points.cpp", "for (double part : d_scale) total += part;", "for (size_t k = 0; k < d_scale.size(); ++k) total += d_scale[(k + num_threads) % d_scale.size()];"),),
        ),
        Promise(
            "no data race, no access outside an array",
            ("test_native.py::test_native_code",),
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
            (f"{TORCH}::test_ops_pass_opcheck", "test_sigmoid.py::test_sigmoid_op_passes_opcheck", "test_stats.py::test_maxima_op_passes_opcheck"),
            (Break("a fake of another dtype", "fastclip/ops/contrastive.py", "stats = (p.image.new_empty(size, dtype=wide)", "stats = (p.image.new_empty(size)"),),
        ),
        Promise(
            "`torch.compile(fullgraph=True)`, also with changing batch",
            (f"{TORCH}::test_compiles_whole", f"{TORCH}::test_compiles_with_changing_batch"),
            (Break("a number is read from a tensor", "fastclip/loss.py", " and not torch.compiler.is_compiling()", ""),),
        ),
        Promise(
            "under autocast the features take its dtype and the scalars stay fp32, on every backend",
            (f"{TORCH}::test_autocast_rounds_features_and_not_the_scale", "test_sigmoid.py::test_sigmoid_autocast_rounds_features_and_not_the_scalars"),
            (
                Break("the scale is rounded", "fastclip/ops/autocast.py", "(x.to(torch.promote_types(image.dtype, torch.float32)) for x in scalars)", "(x.to(image.dtype).to(torch.promote_types(image.dtype, torch.float32)) for x in scalars)"),
                Break("products inside the ops are rounded", "fastclip/ops/autocast.py", "if not torch.is_autocast_enabled(image.device.type):", "if True:"),
            ),
        ),
        Promise(
            "second derivatives: an error that says so, and right on the reference",
            (f"{TORCH}::test_second_derivatives_of_cpu_raise", f"{TORCH}::test_reference_gradcheck_twice", "test_sigmoid.py::test_sigmoid_reference_gradcheck_twice"),
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
            ("test_sigmoid.py::test_siglip_loss_equals_open_clip", f"{INTERFACE}::test_siglip_loss_takes_every_way_to_the_same_loss"),
            (
                Break("sign of d_bias", SIGMOID, "bias.new_tensor(d_bias)", "bias.new_tensor(-d_bias)"),
                Break("divided by the pairs", "fastclip/sigmoid.py", "divisor = image.shape[0] if", "divisor = image.shape[0] ** 2 if"),
                Break("one exchange is refused", "fastclip/modules.py", '("bidir", "shift", "reduce", "gather")', '("bidir", "shift", "gather")'),
            ),
        ),
        Promise(
            "the sigmoid loss keeps the digits of small losses, and its gradients cost three products",
            ("test_sigmoid.py::test_sigmoid_confident_loss_keeps_digits", "test_sigmoid.py::test_sigmoid_work_is_three_products", "test_sigmoid.py::test_sigmoid_accurate"),
            (
                Break("log(1 + t)", "csrc/cpu/sigmoid_fwd_tile.h", "Simd::fma(p, t, Simd::max(x, zero))", "Simd::add(Simd::sub(Simd::add(one, t), one), Simd::max(x, zero))"),
                Break("a coefficient of log1p", "csrc/cpu/sigmoid_fwd_tile.h", "1.060332805e-01f", "1.070332805e-01f"),
                Break("the positives' sign", "csrc/cpu/sigmoid_fwd_tile.h", "const double g = -(x < 0.0", "const double g = (x < 0.0"),
                Break("the block is multiplied twice", BLOCKS, "            torch.mm(images, texts.T, out=dot)", "            torch.mm(images, texts.T, out=dot)\n            torch.mm(images, texts.T, out=dot)"),
            ),
        ),
        Promise("a float16 gradient that waits for its upstream factor neither flushes nor overflows", ("test_sigmoid.py::test_sigmoid_float16_gradient_of_a_mean_over_many_keeps_digits",), (Break("it waits in float16", REFERENCE, "return torch.float32 if x.dtype == torch.float16 else x.dtype", "return x.dtype"),)),
        Promise(
            "`multiview_loss`: all pairs, or the core view against the rest",
            ("test_multiview.py::test_multiview_equals_sum_of_pairs", "test_multiview.py::test_multiview_misfit_raises"),
            (Break("the core view is forgotten", "fastclip/multiview.py", "    if core is None:\n", "    if core is None or core == 2:\n"), Break("each pair twice", "fastclip/multiview.py", "for j in range(i + 1, len(views))]", "for j in range(len(views)) if j != i]")),
        ),
        Promise(
            "`contrastive_stats`: log-sum-exps, losses and top-1 in one pass; a tie is a miss",
            ("test_stats.py::test_stats_accurate", "test_stats.py::test_a_tie_is_a_miss", "test_stats.py::test_stats_use_one_product"),
            (
                Break("rounding decides a tie", "fastclip/stats.py", "_TIE = 2.0**-20", "_TIE = -(2.0**-20)"),
                Break("a column's maximum from the last tile only", "csrc/cpu/entry_points.cpp", "side.neg_top[at] = std::max(side.neg_top[at], *partials.top(0, tile, k));", "side.neg_top[at] = *partials.top(0, tile, k);"),
                Break("log-sum-exp without the positive", "fastclip/stats.py", "return torch.logaddexp(neg, torch.where(top_pos == -torch.inf, -torch.inf, pos))", "return neg"),
            ),
        ),
    ],
    "Many processes": [
        Promise(
            "the ranks' mean is one process's loss, and so are all gradients, in both forms: equal, unequal and empty shards, labels across ranks, smoothing",
            (f"{DISTRIBUTED}::test_exact_in_fp64", f"{DISTRIBUTED}::test_loss_and_gradients_accurate", f"{DISTRIBUTED}::test_groups", f"{DISTRIBUTED}::test_added_on_the_way"),
            (
                Break("ranks: a share is not multiplied by the ranks", "fastclip/loss.py", "batch.shards.ranks * total", "total"),
                Break("ranks: every shard starts at the first text", PARTS + "statistics.py", "offset=shards.own_texts.start, **options)\n    return _own", "offset=0, **options)\n    return _own"),
                Break("ranks: a column is its owner's rows", PARTS + "statistics.py", "columns = merge_logsumexp(col_neg), stats.col_pos[own]", "columns = stats.col_neg[own], stats.col_pos[own]"),
                Break("ranks: texts' gradients are not summed", PARTS + "collectives.py", ".sum(0, dtype=wide)", "[dist.get_rank(pg)]"),
                Break("ranks: smoothing's means are a rank's own", "fastclip/loss.py", "            image_sum, text_sum = sums\n", ""),
                Break("ranks: positives of a rank's own texts only", "fastclip/loss.py", "text_labels = gather_rows(text_labels.long(), shards.texts, shards.group, after=image_labels)", "text_labels = gather_rows(image_labels[shards.own_images] + 1, shards.images, shards.group)"),
                Break("ranks: a group's ranks are the world's", PARTS + "ring.py", "received, group=self.group, group_peer=", "received, group=self.group, peer="),
                Break("ranks: NCCL's padding stays", PARTS + "collectives.py", "return out[:own].to(x.dtype, copy=True)", "return out[most - own :].to(x.dtype, copy=True)"),
                Break("ranks: padding stays", PARTS + "collectives.py", "torch.cat([shard[:size] for", "torch.cat([shard[-size:] for"),
            ),
        ),
        Promise(
            "DDP's mean of the gradients trains as one process, encoders and logit_scale alike",
            (f"{DISTRIBUTED}::test_training_with_ddp_is_the_single_process",),
            (Break("ranks: what travelled back is halved", PARTS + "collectives.py", "adjoint)(d.contiguous(), ctx.sizes", "adjoint)(d.contiguous() / 2, ctx.sizes"),),
        ),
        Promise(
            "the ring holds a few shards of texts and gradients, and ranks that fall behind change no bit",
            (f"{DISTRIBUTED}::test_ring_holds_few_texts", f"{DISTRIBUTED}::test_bits_do_not_depend"),
            (
                Break("ranks: the ring keeps every block", PARTS + "ring.py", "            block, works = following, []\n", "            self.kept = [*getattr(self, 'kept', []), block]\n            block, works = following, []\n"),
                Break("ranks: a block is used before it is here", PARTS + "ring.py", "            for work in works:\n                work.wait()\n            block", "            block"),
                Break("ranks: sums are read before they are here", PARTS + "ring.py", "        for work in self.works:\n            work.wait()\n        self.works", "        self.works"),
            ),
        ),
        Promise("compiled ranks call their collectives in the uncompiled order, whatever their number of graphs", (f"{DISTRIBUTED}::test_compiled_order",), (Break("ranks: nothing orders the sums", "fastclip/loss.py", "sums, after = sum_over_ranks(torch.stack([image_sum, text_sum]), after, shards.group)", "sums, _ = sum_over_ranks(torch.stack([image_sum, text_sum]), image_sum, shards.group)"), Break("ranks: a graph for each of a rank's places", "fastclip/ops/contrastive.py", "Tensor? text_labels, SymInt offset", "Tensor? text_labels, int offset"))),
        Promise("a rank multiplies its share, 8 M N D / W operations", (f"{DISTRIBUTED}::test_a_rank_multiplies_its_share",), (Break("ranks: a block is computed twice", PARTS + "ring.py", "        of_block = _block_problem(ring, owner, block, problem)\n        found", "        of_block = _block_problem(ring, owner, block, problem)\n        torch.ops.fastclip.contrastive_fwd(*of_block)\n        found"),)),
        Promise(
            "ranks that disagree, or whose arguments are wrong, are an error on every rank within seconds; so is a rank that dies",
            (f"{DISTRIBUTED}::test_ranks_that_disagree_raise_everywhere", f"{DISTRIBUTED}::test_a_rank_that_dies_is_an_error_of_the_others"),
            (
                Break("ranks: scales may differ", PARTS + "agreement.py", "    for k, name in enumerate(scalar_names):\n", "    for k, name in enumerate(scalar_names[:0]):\n"),
                Break("ranks: gradients may differ", PARTS + "agreement.py", "(*options.values(), gradients)", "(*options.values(), 0)"),
                Break("ranks: a refusal stays on its rank", PARTS + "agreement.py", "        if line[0]:", "        if False:"),
            ),
        ),
        Promise("`fastclip parity` compares every form, backend and dtype that runs here, and finds a loss that is wrong", ("test_parity.py::test_parity_finds_a_broken_loss_under_torchrun", "test_parity.py::test_parity_compares_everything_that_runs_here"), (Break("parity: everything is ok", "fastclip/parity/compare.py", "return all(error <= self.budgets[name]", "return True or all(error <= self.budgets[name]"), Break("parity: one form is left out", "fastclip/parity/compare.py", "if case.equal or not equal_shards:", "if not equal_shards:"))),
        Promise("`ClipLoss` and `SigLipLoss` are open_clip's with local_loss and gather_with_grad, and every dist_impl", (f"{DISTRIBUTED}::test_modules_are_open_clips", f"{DISTRIBUTED}::test_modules_refuse_another_world"), (Break("ranks: the modules see one rank", "fastclip/modules.py", "    return dist.group.WORLD", "    return None"),)),
        Promise("the ring and 16-bit shards have no second derivatives, and say so; the gather form on the reference has", (f"{DISTRIBUTED}::test_second_derivatives_on_the_reference",), (Break("ranks: the ring has wrong ones", PARTS + "ring.py", "out = torch.ops.fastclip.ring_sigmoid_bwd(*inputs, needs, list(kept), d_loss)", "out = torch.ops.fastclip.sigmoid_bwd(*inputs, 1, 0, True, 'reference', needs, list(kept), d_loss)"),)),
    ],
    "Triton backend": [
        Promise(
            "loss and gradients as on a CPU, on fp32 and fp16, over shapes, labels, offsets, layouts and both ways of reading",
            (f"{GPU}::test_loss_and_gradients_accurate", f"{TRITON}::test_both_accesses_accurate", f"{GPU}::test_labels_accurate", f"{GPU}::test_offset_of_a_shard", f"{TRITON}::test_layouts", f"{GPU}::test_one_side_aligned"),
            (
                Break("columns beyond N count", KERNELS + "contrastive_fwd.py", "inside = lj[None, :] < N - j0", "inside = lj[None, :] < N - j0 + 1"),
                Break("sides of different width", KERNELS + "features.py", "aligned &= x.shape[1] % 8 == 0", "aligned &= x.shape[1] > 0"),
                Break("rows beyond M count", KERNELS + "contrastive_fwd.py", "offset2 = tl.where(li < M - i0, tl.load(constants_ptr + OFFSET2), INF)", "offset2 = tl.load(constants_ptr + OFFSET2) + 0.0 * li"),
                Break("masked tiles only where the diagonal starts", KERNELS + "contrastive_bwd.py", "(first > -BLOCK_M) & (first < BLOCK_N)", "(first >= 0) & (first < BLOCK_N)"),
                Break("an offset of the wrong sign", KERNELS + "contrastive_bwd_vectors.py", "block * BLOCK, M, N, offset, NORMALIZE", "block * BLOCK, M, N, -offset, NORMALIZE"),
                Break("the second part of a tile takes the first one's columns", KERNELS + "contrastive_bwd.py", "            j0 + BLOCK_N // 2, M, N, offset,", "            j0, M, N, offset,"),
            ),
        ),
        Promise("right where one exponential cannot serve all logits, forward and backward, and the device alone decides", (f"{GPU}::test_repair_met_by_nature", f"{TRITON}::test_repair_forced", f"{GPU}::test_repair_of_opposite_features"), (Break("no forward repair", KERNELS + "contrastive_fwd.py", "((total >= _SAFE_SUM) == 0)", "(total < 0)"), Break("no backward repair", KERNELS + "contrastive_bwd_vectors.py", "wanted & ((lse >= lowest) == 0)", "wanted & (lse != lse)"))),
        Promise("ordinary batches need no repair", (f"{GPU}::test_repair_not_needed_for_ordinary_batches",), (Break("always", KERNELS + "features.py", "    tl.store(constants_ptr + REPAIR, 0.0)", "    tl.store(constants_ptr + REPAIR, 1.0)"),)),
        Promise("a bounded workspace: row panels forward, row chunks and column blocks backward", (f"{GPU}::test_panels_and_blocks", f"{GPU}::test_workspace_bounded"), (Break("panels forget the ones before", KERNELS + "contrastive_fwd.py", "mask=some & (first == 0), other=0.0 if", "mask=some & (first == 2), other=0.0 if"), Break("chunks overwrite", KERNELS + "gradients.py", "x[i0:i1], keep=i0 > 0)", "x[i0:i1], keep=False)"), Break("all rows at once", KERNELS + "gradients.py", "self.block_m = min(_padded(self.M), max(rows, ALIGNMENT))", "self.block_m = _padded(self.M)"))),
        Promise("fp16 weights neither flush nor overflow, whatever the norms; zero rows spoil no other", (f"{GPU}::test_fp16_weights_do_not_flush", f"{GPU}::test_zero_rows_finite", f"{GPU}::test_extreme_norms_finite_and_accurate"), (Break("no gain", KERNELS + "contrastive_bwd_vectors.py", "    gain = 1024.0 / high_bit(", "    gain = 1.0 + 0.0 * high_bit("), Break("rows as they are", KERNELS + "features.py", "if aligned and not (normalize and x.dtype != torch.bfloat16):", "if aligned or x.shape[1] % 8 == 0:"))),
        Promise("rows beyond 2^31 elements", (f"{GPU}::test_rows_beyond_2_to_the_31",), (Break("32-bit base", KERNELS + "tile.py", "image + i0.to(tl.int64) * image_row_stride", "image + i0 * image_row_stride"),)),
        Promise("8 M N D operations, four launches after the norms forward, four before the products backward", (f"{GPU}::test_work_and_launches",), (Break("one more product", KERNELS + "gradients.py", "                if raw_text is not None:\n                    addmm", "                torch.mm(block, self.text.x[j0:j1])\n                if raw_text is not None:\n                    addmm"),)),
        Promise("the sigmoid loss on the same tiles, digits kept when solved, 6 M N D with gradients", (f"{GPU_SIGMOID}::test_sigmoid_accurate", f"{GPU_SIGMOID}::test_sigmoid_of_a_solved_batch_keeps_digits", f"{GPU_SIGMOID}::test_sigmoid_without_gradients_multiplies_once"), (Break("log of 1 + t", KERNELS + "sigmoid_fwd.py", "    return t * tl.fma(p, t, 0.99999994)", "    return tl.log(1.0 + t)"),)),
        Promise("no configuration spills registers, Hopper's use wgmma, one exponential a logit", (f"{COMPILED}::test_no_kernel_spills", f"{COMPILED}::test_tensor_cores", f"{COMPILED}::test_one_exponential_a_logit", f"{COMPILED}::test_every_configuration_is_compiled"), (Break("no parts", KERNELS + "launch.py", "Config(128, 128, 64, 4, 3, SPLIT=4)", "Config(128, 128, 64, 4, 3)"),)),
        Promise("the interpreter refuses bfloat16, and serves who asks by name", (f"{TRITON}::test_interpreter_serves_by_name_only",), (Break("bfloat16 too", "fastclip/_backends/triton.py", "if image.dtype == torch.bfloat16:", "if image.dtype == torch.complex64:"),)),
    ],
    "CUDA backend": [
        Promise(
            "every tile right against fp64, in any order that the hardware may take: each wait, barrier and fence is needed",
            (f"{CUDA}::test_statistics", f"{CUDA}::test_weights"),
            (
                Break("barriers are not fenced", TILE, "    mbarrier_init_fence();\n", ""),
                Break("the cluster does not wait for its barriers", TILE, "    mbarrier_init_fence();\n  }\n  cluster_sync();", "    mbarrier_init_fence();\n  }"),
                Break("a CTA leaves its neighbour alone", TILE, "  cluster_sync();  // the other CTA", "  // the other CTA"),
                Break("one CTA's warps release a stage", TILE, "mbarrier_init(&s.empty[k], 4 * kCluster);", "mbarrier_init(&s.empty[k], 4);"),
                Break("a stage is overwritten while it is read", TILE, "      mbarrier_wait(&s.empty[stage], parity);\n", ""),
                Break("the producer waits for a release of a fresh stage", TILE, "uint32_t parity = 1;  // a fresh", "uint32_t parity = 0;  // a fresh"),
                Break("bytes are not announced", TILE, "mbarrier_expect(&s.full[stage], Smem<Op>::kStageBytes);", "mbarrier_expect(&s.full[stage], 0);"),
                Break("the text block is not shared", TILE, "tile.j0 + rank * kShare, (1 << kCluster) - 1);", "tile.j0 + rank * kShare, 1 << rank);"),
                Break("nobody has the first turn", TILE, "  if (mine == 1) named_arrive(other_turn, 256);", "  if (mine == 2) named_arrive(other_turn, 256);"),
                Break("turns are not waited for, and the tile's vectors not published", TILE, "    named_sync(turn, 256);\n", "    named_arrive(turn, 256);\n"),
                Break("the turn is kept", TILE, "    if (k + 1 < count) named_arrive(other_turn, 256);\n", ""),
                Break("a stage is read before it is full", TILE, "      mbarrier_wait(&s.full[stage], parity);\n", ""),
                Break("products start without a fence", TILE, "      wgmma_fence();\n", ""),
                Break("a stage is released before its products are done", TILE, "      wgmma_wait<1>();\n", ""),
                Break("the last products are not waited for", TILE, "    wgmma_wait<0>();\n", ""),
                Break("the last stage is not released", TILE, "    if (lane < kCluster) mbarrier_arrive_in(&s.empty[last], lane);\n\n", "\n"),
                Break("stages of the other consumer are not skipped", TILE, "const uint32_t step = static_cast<uint32_t>(k) * p.k_blocks;", "const uint32_t step = static_cast<uint32_t>(k / 2) * p.k_blocks;"),
                Break("column sums are read before all warps wrote", FWD_CU, "    t.sync();\n", ""),
                Break("the TMA stores what it may not see", TILE, "    tma_store_fence();\n", ""),
                Break("a piece is stored before all threads wrote it", TILE, "    t.sync();\n    if (t.at.thread == 0) {", "    if (t.at.thread == 0) {"),
                Break("a buffer is written while it is stored", TILE, "tma_store_wait_read<S::kBuffers - 2>();", "tma_store_wait_read<S::kBuffers - 1>();"),
                Break("a CTA leaves while it stores", TILE, "  if (Op::kStores && thread == 0) tma_store_wait_all();\n", ""),
                Break("the swizzle of the stored pieces", TILE, "(((c + chunk) ^ swizzle) << 4)", "(((c + chunk) ^ (swizzle & 3)) << 4)"),
            ),
        ),
        Promise(
            "masks: own pairs, ragged edges, self pairs, repairs",
            (f"{CUDA}::test_statistics", f"{CUDA}::test_weights", f"{CUDA}::test_sigmoid", f"{CUDA}::test_statistics_with_labels", f"{CUDA}::test_weights_with_labels", f"{CUDA}::test_repaired_weights_are_left_alone", f"{CUDA}::test_exponentials_that_flush_are_no_empty_set"),
            (
                Break("rows past the last", TILE, "return 64 * half + 8 * h >= rows || 8 * c + e >= cols;", "return 8 * c + e >= cols;"),
                Break("columns past the last", TILE, "return 64 * half + 8 * h >= rows || 8 * c + e >= cols;", "return 64 * half + 8 * h >= rows;"),
                Break("the diagonal's upper end", TILE, "own > -kBlockM && own < Op::kBlockN", "own > -kBlockM + 1 && own < Op::kBlockN"),
                Break("the diagonal's lower end", TILE, "own > -kBlockM && own < Op::kBlockN", "own > -kBlockM && own < Op::kBlockN - 1"),
                Break("edges are no reason to mask", TILE, "const bool masked = edge || (", "const bool masked = (edge && false) || ("),
                Break("own pairs count, forward", FWD_CU, "mask.own(half, h, c, e) || mask.outside(half, h, c, e) ? 0.f", "mask.outside(half, h, c, e) ? 0.f"),
                Break("own pairs count, backward", BWD_CU, "if (kMask && (mask.outside(half, h, c, e) || mask.own(half, h, c, e))) g = 0.f;", "if (kMask && mask.outside(half, h, c, e)) g = 0.f;"),
                Break("own pairs count, sigmoid", SIGMOID_CU, "kMask && (mask.outside(half, h, c, e) || mask.own(half, h, c, e));", "kMask && mask.outside(half, h, c, e);"),
                Break("self pairs count, forward", FWD_CU, "(p.exclude_self && mask.own(half, h, c, e))", "false"),
                Break("self pairs count, backward", BWD_CU, "(t.p.exclude_self && mask.own(half, h, c, e))", "false"),
                Break("what flushes is an empty set", FWD_CU, "value[0] < kSmallest ? kSmallest : value[0]", "value[0]"),
                Break("repairs are not left to the repair", BWD_CU, "kSkipsRepairs = true", "kSkipsRepairs = false"),
            ),
        ),
        Promise("the same in the launchers: loss and gradients in bfloat16 and float16, repairs, panels, blocks, offsets", (f"{GPU}::test_loss_and_gradients_accurate", f"{GPU}::test_labels_accurate", f"{GPU}::test_panels_and_blocks", f"{GPU}::test_offset_of_a_shard", f"{GPU_SIGMOID}::test_sigmoid_accurate"), (Break("column blocks share an offset", KERNELS + "contrastive_bwd.py", "at = offset + i0 - j0", "at = offset + i0"), Break("labels are forgotten", KERNELS + "contrastive_bwd.py", "_side(row_vec[:, i0:], has_labels)", "_side(row_vec[:, i0:], False)"), Break("the base of the exponential", TILE, "__ldg(constants + FASTCLIP_SCALE) * 1.4426950408889634)", "__ldg(constants + FASTCLIP_SCALE) * 1.4429)"))),
        Promise("no spills, no local memory, no serialised products; wgmma, TMA and one exponential a logit in the machine code", (f"{CUDA_COMPILED}::test_every_kernel_is_compiled_without_spills", f"{CUDA_COMPILED}::test_products_are_not_serialised", f"{CUDA_COMPILED}::test_instructions_as_planned", f"{CUDA_COMPILED}::test_one_exponential_a_logit"), (Break("accumulators are touched between the products", TILE, "      wgmma_commit();\n", "      wgmma_commit();\n      acc[0][0] *= 2.f;\n"), Break("all columns at once", SIGMOID_CU, "      for (int c = 0; c < kBlockN / 8; ++c)  // outside: the other way round it spills\n#pragma unroll\n        for (int half = 0; half < kHalves; ++half)\n", "      for (int half = 0; half < kHalves; ++half)\n#pragma unroll\n        for (int c = 0; c < kBlockN / 8; ++c)\n"), Break("a second exponential", BWD_CU, "g *= factor;", "g *= factor * exp2_fast(0.f * g);"))),
        Promise("the C interface refuses what it cannot do, and says so by a code", (f"{CUDA}::test_c_interface_refuses_bad_arguments", f"{CUDA}::test_refusals_become_messages"), (Break("unaligned features", "csrc/cuda/launch.cu", "reinterpret_cast<uintptr_t>(data) % 16 == 0 && ", ""), Break("a stride too short", "csrc/cuda/launch.cu", " && row_stride >= cols;", ";"))),
        Promise("a driver that is missing or too old, another GPU, another dtype: a reason, not a crash", (f"{CUDA}::test_backend_says_why_not", f"{CUDA}::test_machine_without_hopper_is_a_reason", f"{CUDA}::test_other_gpus_and_dtypes_are_refused", f"{CUDA}::test_module_without_a_driver"), (Break("old drivers", "fastclip/_backends/cuda.py", "if driver // 1000 < built // 1000:", "if driver < 0:"), Break("any GPU", "fastclip/_backends/cuda.py", "!= (9, 0):", "< (8, 0):"), Break("another code", "csrc/cuda/launch.cu", "  if (!encode) return FASTCLIP_NO_DRIVER;", "  if (!encode) return FASTCLIP_CUDA_ERROR;"))),
        Promise("cuda before triton before cpu", (f"{CUDA}::test_preferred_to_triton",), (Break("after", "fastclip/_backends/__init__.py", '{"cuda": cuda, "triton": triton,', '{"triton": triton, "cuda": cuda,'),)),
    ],
    "Encoders": [
        Promise(
            "encoder features equal open_clip's and Hugging Face's on the same weights, in both directions",
            (f"{CHECKPOINTS}::test_open_clip_both_ways", f"{CHECKPOINTS}::test_hugging_face_clip_both_ways", f"{CHECKPOINTS}::test_hugging_face_align_both_ways"),
            (
                Break("encoder: projections are not transposed", "fastclip/models/conversion.py", 'Rule(r"text\\.text_projection", "text_projection.weight", TRANSPOSED)', 'Rule(r"text\\.text_projection", "text_projection.weight")'),
                Break("encoder: keys before queries", "fastclip/models/conversion.py", '_QKV = ("q_proj", "k_proj", "v_proj")', '_QKV = ("k_proj", "q_proj", "v_proj")'),
                Break("encoder: the temperature is the scale", "fastclip/models/conversion.py", "-theirs[0].reshape(()).log()", "theirs[0].reshape(()).log()"),
                Break("encoder: ALIGN pads both sides", "fastclip/models/image_towers.py", "size // 2 if both_sides else size // 2 - 1", "size // 2"),
                Break("encoder: GELU in the ViT whatever the name", "fastclip/models/image_towers.py", "act_layer=QuickGELU if quick_gelu else nn.GELU", "act_layer=nn.GELU"),
            ),
        ),
        Promise("encoder sizes are the published ones", (f"{MODELS}::test_clip_has_open_clips_parameters", f"{MODELS}::test_published_parameters"), (Break("encoder: a bias on the projection", "fastclip/models/image_towers.py", "nn.Linear(width, embed_dim, bias=False)", "nn.Linear(width, embed_dim)"),)),
        Promise("encoder weights start as published", (f"{MODELS}::test_clip_weights_start_as_published",), (Break("encoder: attention pooling starts as any layer", "fastclip/models/image_towers.py", "nn.init.normal_(linear.weight, std=pool.in_features**-0.5)", "pass"),)),
        Promise("CoSwin is Swin but for its embedding and every merging", (f"{MODELS}::test_coswin_is_swin_with_convolutions_around_its_blocks", f"{MODELS}::test_coswin_windows_overlap"), (Break("encoder: Swin's last merging stays", "fastclip/models/coswin.py", "range(1, len(config.layers)):", "range(1, len(config.layers) - 1):"), Break("encoder: Swin's embedding", "fastclip/models/coswin.py", "embed_layer=ConvEmbed", "embed_layer=PatchEmbed"))),
        Promise("no pickle of a checkpoint runs", (f"{REFUSED}::test_no_pickle_runs",), (Break("encoder: pickles run", "fastclip/models/checkpoint.py", "weights_only=True", "weights_only=False"),)),
        Promise("a checkpoint that does not fit names missing, unexpected and mis-shaped parameters", (f"{REFUSED}::test_checkpoint_that_does_not_fit_names_the_parameters",), (Break("encoder: what is missing stays random", "fastclip/models/factory.py", "if missing or unexpected or shapes:", "if unexpected or shapes:"),)),
        Promise(
            "OpenAI's files mean QuickGELU, and it is said; a Hugging Face activation that contradicts the name raises",
            (f"{CHECKPOINTS}::test_openai_means_quick_gelu", f"{CHECKPOINTS}::test_hugging_face_activation_must_be_the_names"),
            (
                Break("encoder: OpenAI is not recognised", "fastclip/models/checkpoint.py", 'if archive or "input_resolution" in tensors:', "if False:"),
                Break("encoder: contradictions pass", "fastclip/models/factory.py", "        if theirs is not None:\n            kinds", "        if False:\n            kinds"),
            ),
        ),
        Promise("position embeddings interpolate as open_clip's, and it is said", (f"{CHECKPOINTS}::test_other_resolutions_interpolate_as_open_clip",), (Break("encoder: the class token is interpolated too", "fastclip/models/factory.py", "num_prefix_tokens=1)", "num_prefix_tokens=0)"), Break("encoder: interpolation is silent", "fastclip/models/factory.py", 'logger.warning("%s interpolated', 'logger.debug("%s interpolated'))),
        Promise("tokenizers never fail on a text, and cut texts keep their end", (f"{PREPROCESS}::test_no_text_fails", f"{PREPROCESS}::test_wordpiece_is_transformers"), (Break("encoder: half surrogates", "fastclip/models/wordpiece.py", '.encode("utf-8", "replace").decode()', ""),)),
        Promise("the image transforms are open_clip's", (f"{PREPROCESS}::test_clip_transforms_are_open_clips",), (Break("encoder: transforms resize bilinearly", "fastclip/models/transforms.py", "InterpolationMode(options.interpolation)", "InterpolationMode.BILINEAR"),)),
        Promise("a locked tower stays as it is, BatchNorm included", (f"{MODELS}::test_locked_tower_stays_as_it_is",), (Break("encoder: locked statistics move", "fastclip/models/dual_encoder.py", "        for name in self._locked:\n            self.get_submodule(name).eval()\n        return self", "        return self"),)),
        Promise("gradient checkpointing keeps less and changes no gradient", (f"{MODELS}::test_checkpointed_gradients_are_the_same",), (Break("encoder: one tower only", "fastclip/models/dual_encoder.py", "for tower in (self.visual, self.text):", "for tower in (self.text,):"),)),
    ],
    "Training": [
        Promise(
            "the cached step has the one-shot step's gradients, temperature included; dropout, autocast and buffers as in one pass",
            ("test_cached_step.py::test_gradients_are_the_one_shot_steps", "test_cached_step.py::test_dropout_is_replayed", "test_cached_step.py::test_autocast", "test_cached_step.py::test_batch_norm_is_a_micro_batchs_and_its_statistics_move_once"),
            (
                Break("cached: the temperature counts in every micro-batch", "fastclip/training/cached.py", "[x.grad for x in rest if last]", "[x.grad for x in rest]"),
                Break("cached: other masks in the second pass", "fastclip/training/cached.py", "            torch.set_rng_state(cpu_state)\n", ""),
                Break("cached: statistics move twice", "fastclip/training/cached.py", "            x.copy_(kept)", "            pass"),
            ),
        ),
        Promise("it keeps one micro-batch's graph at a time", ("test_cached_step.py::test_one_graph_at_a_time",), (Break("cached: the first pass has graphs", "fastclip/training/cached.py", "with torch.no_grad(), _no_exchange(modules):", "with _no_exchange(modules):"),)),
        Promise("DDP exchanges gradients once a step, whatever each rank's micro-batches are", ("test_cached_step.py::test_ddp_exchanges_once",), (Break("cached: every micro-batch is exchanged", "fastclip/training/cached.py", "with nullcontext() if last else _no_exchange(modules):", "with nullcontext():"),)),
    ],
}
# fmt: on


def document() -> str:
    lines = [
        "# Promises",
        "",
        "What fastclip holds to, the tests that fail when it does not, and how each was broken to see them fail.",
        "`python tests/breaks.py` breaks every one again; `--write` makes this file from the table there.",
    ]
    for section, promises in PROMISES.items():
        lines += ["", f"## {section}", "", "| promise | tests | broken by |", "|---|---|---|"]
        for promise in promises:
            tests = "<br>".join(f"`{name}`" for name in promise.tests)
            breaks = "<br>".join(f"{one.what} (`{one.file}`)" for one in promise.breaks)
            lines.append(f"| {promise.text} | {tests} | {breaks} |")
    return "\n".join(lines) + "\n"


def build(copy: Path, folder: Path, kind: str) -> str | None:
    """Rebuild the native module of the copy for the CPU or CUDA; what the compiler said where it fails."""
    pybind11 = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True).strip()
    configure = [
        "cmake",
        "-S",
        copy,
        "-B",
        folder,
        f"-Dpybind11_DIR={pybind11}",
        f"-DPython_EXECUTABLE={sys.executable}",
        *(f"-DFASTCLIP_BUILD_{other}={'ON' if other == kind else 'OFF'}" for other in ("CPU", "CUDA")),
    ]
    for command in (configure, ["cmake", "--build", folder]):
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": PATH})
        if done.returncode:
            return done.stdout[-800:] + done.stderr[-800:]
    for module in folder.glob(f"_{kind.lower()}.*"):
        shutil.copy(module, copy / "fastclip")
    return None


def try_break(one: Break, tests: tuple[str, ...], folder: Path) -> str:
    """ "caught by ..." or what went wrong instead."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "runs", "__pycache__", "*.egg-info", ".*_cache")
    # without the times of the files: what the last break changed must be compiled again
    shutil.copytree(ROOT, copy, ignore=ignored, copy_function=shutil.copy)
    # beside an editable installation the copy's own kernels must be found first
    (copy / "fastclip" / "triton_kernels").symlink_to(copy / "triton_kernels")
    path = copy / one.file
    path.write_text(path.read_text().replace(one.old, one.new))
    kind = "CUDA" if "cuda" in one.file else "CPU"
    emulated = kind == "CUDA" and not any(test.endswith("test_module_without_a_driver") for test in tests)
    if (
        one.file.startswith("csrc/") or one.file == "CMakeLists.txt"
    ) and not emulated:  # those tests build what they run
        if kind == "CUDA" and shutil.which("nvcc", path=PATH) is None:
            print(f"{one.what}: nvcc was not found, {one.file} is not compiled")
        elif error := build(copy, folder / kind, kind):
            return f"NOT BUILT: {error}"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(f"tests/{t}" for t in tests)]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return "MISSED"
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    if failed:
        return f"caught by {failed[0]}"
    return "caught by a crash" if done.returncode < 0 else f"NOT RUN: {(done.stdout + done.stderr)[-800:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="promises or breaks that contain one of these (default: all)")
    parser.add_argument("--write", action="store_true", help="write docs/promises.md instead")
    arguments = parser.parse_args()
    if arguments.write:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(document())
        return
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        for promise in (promise for promises in PROMISES.values() for promise in promises):
            for one in promise.breaks:
                if arguments.words and not any(word in promise.text + one.what for word in arguments.words):
                    continue
                result = try_break(one, promise.tests, Path(name))
                missed += not result.startswith("caught")
                print(f"{one.what}: {result}", flush=True)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
