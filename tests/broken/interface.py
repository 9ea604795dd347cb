"""The functions and modules as torch and users call them."""

from __future__ import annotations

from broken import COST, KEEP, NUMBERS, TORCH, Break, Promise

PROMISES = [
    Promise(
        TORCH,
        "All ops pass the checks of torch.library.opcheck for the schema, fake tensors and autograd",
        tests=[
            "losses/test_contrastive_torch.py::test_ops_pass_opcheck",
            "losses/test_sigmoid.py::test_sigmoid_op_passes_opcheck",
            "losses/test_stats.py::test_maxima_op_passes_opcheck",
        ],
        breaks=[
            Break(
                "a fake of another dtype",
                "fastclip/ops/contrastive.py",
                old="(x.new_empty(n, dtype=wide)",
                new="(x.new_empty(n)",
            ),
        ],
    ),
    Promise(
        TORCH,
        "`torch.compile(fullgraph=True)` compiles the losses, also if the batch size changes",
        tests=[
            "losses/test_contrastive_torch.py::test_compiles_whole",
            "losses/test_contrastive_torch.py::test_compiles_with_changing_batch",
        ],
        breaks=[
            Break(
                "a number is read from a tensor",
                "fastclip/losses/inputs/arguments.py",
                old="if torch.compiler.is_compiling() or x.device.type",
                new="if x.device.type",
            ),
        ],
    ),
    Promise(
        TORCH,
        "Autocast rounds the features and leaves logit_scale and logit_bias in float32",
        tests=[
            "losses/test_contrastive_torch.py::test_autocast_rounds_features_and_not_the_scale",
            "losses/test_sigmoid.py::test_sigmoid_autocast_rounds_features_and_not_the_scalars",
        ],
        breaks=[
            Break(
                "the scale is rounded",
                "fastclip/ops/autocast.py",
                old="(x.to(torch.promote_types(image.dtype, torch.float32)) for x in scalars)",
                new="(x.to(image.dtype).to(torch.promote_types(image.dtype, torch.float32)) for x in scalars)",
            ),
            Break(
                "products inside the ops are rounded",
                "fastclip/ops/autocast.py",
                old="return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()",
                new="return nullcontext()",
            ),
        ],
    ),
    Promise(
        TORCH,
        "The reference backend computes second derivatives, and the other backends raise an error",
        tests=[
            "losses/test_contrastive_torch.py::test_second_derivatives_of_cpu_raise",
            "losses/test_contrastive_torch.py::test_reference_gradcheck_twice",
            "losses/test_sigmoid.py::test_sigmoid_reference_gradcheck_twice",
        ],
        breaks=[
            Break(
                "silence",
                "fastclip/ops/backward.py",
                old='if name != "reference":',
                new='if name == "nothing":',
            ),
            Break(
                "a term is dropped",
                "fastclip/ops/sigmoid.py",
                old="else factor.to(d.dtype) * d for d in first]",
                new="else d for d in first]",
            ),
        ],
    ),
    Promise(
        TORCH,
        "Gradients are right for every subset of the inputs, any upstream gradient and a second backward pass",
        tests=[
            "losses/test_contrastive_torch.py::test_every_subset_of_gradients",
            "losses/test_contrastive_invariants.py::test_graph_can_be_used_twice",
        ],
        breaks=[
            Break(
                "texts' gradient instead of images'",
                "fastclip/ops/contrastive.py",
                old="needs = list(ctx.needs_input_grad[:3])",
                new="needs = [True, False, True]",
            ),
            Break(
                "the gradient of the first use is scaled in place",
                "fastclip/ops/contrastive.py",
                old="upstream = derivatives(stats, grads)",
                new="stats[0].add_(1.0); upstream = derivatives(stats, grads)",
            ),
        ],
    ),
    Promise(
        TORCH,
        "The losses work after a fork, from several threads and beside PyTorch's OpenMP runtime",
        tests=[
            "losses/test_contrastive_invariants.py::test_native_passes_work_after_fork",
            "losses/test_contrastive_invariants.py::test_threads_of_python_do_not_disturb_each_other",
            "losses/test_interface.py::test_no_second_openmp_runtime_is_loaded",
            "losses/test_interface.py::test_native_module_names_no_openmp_runtime",
        ],
        breaks=[
            Break(
                "borrowed threads after fork",
                "csrc/cpu/thread_pool.cpp",
                old="g_forked.store(true);",
                new="",
            ),
            Break(
                "an OpenMP runtime is linked",
                "CMakeLists.txt",
                old="PUBLIC Threads::Threads ${CMAKE_DL_LIBS}",
                new="PUBLIC Threads::Threads ${CMAKE_DL_LIBS} -Wl,--no-as-needed gomp",
            ),
            Break(
                "one workspace for all threads",
                "fastclip/_backends/cpu/blocks.py",
                old="class _Workspace(threading.local):",
                new="class _Workspace:",
            ),
        ],
    ),
    Promise(
        TORCH,
        "If two tensors do not fit each other, an error names both before anything is computed",
        tests=[
            "losses/test_interface.py::test_misfit_raises_before_any_work",
            "losses/test_interface.py::test_sigmoid_misfit_raises_before_any_work",
        ],
        breaks=[
            Break(
                "M and N are not compared",
                "fastclip/losses/inputs/arguments.py",
                old="if paired and image.shape[0] != text.shape[0]:",
                new="if False:",
            ),
            Break(
                "labels of any dtype",
                "fastclip/losses/inputs/arguments.py",
                old="if str(labels.dtype).removeprefix",
                new="if labels.dtype is torch.bool and str(labels.dtype).removeprefix",
            ),
        ],
    ),
    Promise(
        KEEP,
        "`ClipLoss` has the signature, the values and the gradients of open_clip's class",
        tests=[
            "losses/test_interface.py::test_clip_loss_has_open_clip_signature",
            "losses/test_interface.py::test_clip_loss_equals_open_clip",
        ],
        breaks=[
            Break(
                "it normalises",
                "fastclip/losses/modules.py",
                old="logit_scale, normalize=False",
                new="logit_scale * 1.001, normalize=False",
            ),
        ],
    ),
    Promise(
        KEEP,
        "`SigLipLoss` has the values and gradients of open_clip's class, and accepts its dist_impl and chunk_size",
        tests=[
            "losses/test_sigmoid.py::test_siglip_loss_equals_open_clip",
            "losses/test_interface.py::test_siglip_loss_takes_every_way_to_the_same_loss",
        ],
        breaks=[
            Break(
                "sign of d_bias",
                "fastclip/_backends/cpu/sigmoid.py",
                old="bias.new_full((), d_bias / divisor)",
                new="bias.new_full((), -d_bias / divisor)",
            ),
            Break(
                "divided by the pairs",
                "fastclip/losses/sigmoid.py",
                old="divisor = image.shape[0] if",
                new="divisor = image.shape[0] ** 2 if",
            ),
            Break(
                "one exchange is refused",
                "fastclip/losses/modules.py",
                old='("bidir", "shift", "reduce", "gather")',
                new='("bidir", "shift", "gather")',
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "The sigmoid loss meets the same tolerances, and keeps its digits when it is near 0",
        tests=[
            "losses/test_sigmoid_accuracy.py::test_sigmoid_confident_loss_keeps_digits",
            "losses/test_sigmoid_accuracy.py::test_sigmoid_accurate",
        ],
        breaks=[
            Break(
                "log(1 + t)",
                "csrc/cpu/sigmoid_fwd_tile.h",
                old="Simd::fma(p, t, Simd::max(x, zero))",
                new="Simd::add(Simd::sub(Simd::add(one, t), one), Simd::max(x, zero))",
            ),
            Break(
                "a coefficient of log1p",
                "csrc/cpu/sigmoid_fwd_tile.h",
                old="1.060332805e-01f",
                new="1.070332805e-01f",
            ),
            Break(
                "the positives' sign",
                "csrc/cpu/sigmoid_fwd_tile.h",
                old="const double g = -(x < 0.0",
                new="const double g = (x < 0.0",
            ),
        ],
    ),
    Promise(
        COST,
        "The sigmoid loss and its gradients take three matrix products, which are 6 M N D operations",
        tests=[
            "losses/test_sigmoid.py::test_sigmoid_work_is_three_products",
        ],
        breaks=[
            Break(
                "the block is multiplied twice",
                "fastclip/_backends/cpu/blocks.py",
                old="self.text.rows(j0, j1).T, out=dot)",
                new="self.text.rows(j0, j1).T, out=dot); torch.mm(dot, dot.T)",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "Float16 gradients of the sigmoid loss neither underflow nor overflow if the loss is a mean over many pairs",
        tests=[
            "losses/test_sigmoid_accuracy.py::test_sigmoid_float16_gradient_of_a_mean_over_many_keeps_digits",
        ],
        breaks=[
            Break(
                "it waits in float16",
                "fastclip/_backends/reference/matrix.py",
                old="return torch.float32 if x.dtype == torch.float16 else x.dtype",
                new="return x.dtype",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "`multiview_loss` is the sum of the losses of all pairs of views, or of the pairs of a core view "
        "with each other view",
        tests=[
            "losses/test_multiview.py::test_multiview_equals_sum_of_pairs",
            "losses/test_multiview.py::test_multiview_misfit_raises",
        ],
        breaks=[
            Break(
                "the core view is forgotten",
                "fastclip/losses/multiview.py",
                old="if core is None:",
                new="if core is None or core == 2:",
            ),
            Break(
                "each pair twice",
                "fastclip/losses/multiview.py",
                old="for j in range(i + 1, count)]",
                new="for j in range(count) if j != i]",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "`contrastive_stats` computes log-sum-exps, losses and top-1 accuracy with one matrix product; a tie is a miss",
        tests=[
            "losses/test_stats.py::test_stats_accurate",
            "losses/test_stats.py::test_a_tie_is_a_miss",
            "losses/test_stats.py::test_stats_use_one_product",
        ],
        breaks=[
            Break(
                "rounding decides a tie",
                "fastclip/losses/inputs/ties.py",
                old="TIE = 2.0**-20",
                new="TIE = -(2.0**-20)",
            ),
            Break(
                "a column's maximum from the last tile only",
                "csrc/cpu/entry_points.cpp",
                old="side.neg_top[at] = std::max(side.neg_top[at], *partials.top(0, tile, k));",
                new="side.neg_top[at] = *partials.top(0, tile, k);",
            ),
            Break(
                "log-sum-exp without the positive",
                "fastclip/losses/stats.py",
                old="return torch.logaddexp(side.neg, torch.where(side.pos_top == -torch.inf, -torch.inf, pos))",
                new="return side.neg",
            ),
        ],
    ),
]
