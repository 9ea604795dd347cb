"""The losses under torch's other modes: transforms, checkpoints, fake tensors, changing numbers."""

from __future__ import annotations

from broken import TORCH, Break, Promise

PROMISES = [
    Promise(
        TORCH,
        "`torch.func` (grad, vmap, jvp, jacrev, hessian) and forward mode give the numbers of the dense formula",
        tests=[
            "losses/test_transforms.py::test_transforms_have_the_numbers_of_the_dense_formula",
            "losses/test_transforms.py::test_named_backend_does_not_pretend",
        ],
        breaks=[
            Break(
                "tangents are not seen",
                "fastclip/ops/transforms.py",
                old="if forward_ad._current_level < 0:",
                new="if forward_ad._current_level < 9:",
            ),
            Break(
                "a named backend is passed over",
                "fastclip/ops/transforms.py",
                old='if name not in (None, "reference"):',
                new='if name == "nothing":',
            ),
            Break(
                "the bias is forgotten",
                "fastclip/ops/sigmoid.py",
                old="reference.sigmoid_fwd(p, bias, divisor, [False] * 4, dtype)",
                new="reference.sigmoid_fwd(p, 0 * bias, divisor, [False] * 4, dtype)",
            ),
        ],
    ),
    Promise(
        TORCH,
        "Activation checkpointing and saved-tensor hooks change no gradient; an input changed in place raises an error",
        tests=[
            "losses/test_saved_tensors.py::test_checkpoints_and_hooks_change_nothing",
            "losses/test_saved_tensors.py::test_checkpoints_and_hooks_change_nothing_of_shards",
            "losses/test_saved_tensors.py::test_change_between_forward_and_backward_raises",
        ],
        breaks=[
            Break(
                "a saved tensor is read twice",
                "fastclip/ops/sigmoid.py",
                old="d.contiguous() for d in (d_image, d_text)]",
                new="d.contiguous() for d in ctx.saved_tensors[4:6]]",
            ),
            Break(
                "a saved tensor is read twice, of the ring and elsewhere",
                "fastclip/ops/backward.py",
                old="return inputs, saved[len(inputs) :]",
                new="return inputs, ctx.saved_tensors[len(inputs) :]",
            ),
            Break(
                "features are kept without their version",
                "fastclip/ops/backward.py",
                old="(x if isinstance(x, Tensor)",
                new="(x.detach().clone() if isinstance(x, Tensor)",
            ),
        ],
    ),
    Promise(
        TORCH,
        "Every loss works with fake tensors, meta tensors, `make_fx` and `torch.export`",
        tests=[
            "losses/test_tracing.py::test_fake_tensors_have_shapes",
            "losses/test_tracing.py::test_meta_tensors_have_shapes",
            "losses/test_tracing.py::test_recorded_graph_is_the_call",
            "losses/test_tracing.py::test_exported_program_is_the_call",
        ],
        breaks=[
            Break(
                "a fake label is read",
                "fastclip/losses/inputs/arguments.py",
                old="return not recorded(x) and not transformed(x)",
                new="return not transformed(x)",
            ),
            Break(
                "autocast is asked of any device",
                "fastclip/ops/autocast.py",
                old='device.type in ("cpu", "cuda") or torch.amp.is_autocast_available(device.type)',
                new="True",
            ),
        ],
    ),
    Promise(
        TORCH,
        "A compiled loss builds at most two graphs if its Python numbers (scale, bias, weights) change at each step",
        tests=[
            "losses/test_tracing.py::test_changing_numbers_compile_twice_at_most",
        ],
        breaks=[
            Break(
                "the scale is written into the graph",
                "fastclip/losses/inputs/arguments.py",
                old="return image.new_ones((), dtype=dtype) * value",
                new="return image.new_full((), value, dtype=dtype)",
            ),
            Break(
                "the weight is written into the graph",
                "fastclip/losses/contrastive.py",
                old="total = image_weight * row_total + (1.0 - image_weight) * col_total",
                new="total = torch.lerp(col_total, row_total, image_weight)",
            ),
        ],
    ),
]
