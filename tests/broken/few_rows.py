"""The loss of pairs as one op forward and one backward, which bounds the time of a step on few rows."""

from __future__ import annotations

from broken import COST, NUMBERS, TORCH, Break, Promise

_LOSS = "csrc/cpu/loss.cpp"
_PLAIN = "fastclip/_backends/cpu/plain.py"

PROMISES = [
    Promise(
        COST,
        "On a CPU, a step on a small batch without labels makes at most 150 function calls, 5 allocations and 3 "
        "matrix products",
        tests=[
            "backends/test_cpu.py::test_calls_and_allocations_of_a_step_on_few_rows",
            "backends/test_cpu.py::test_three_products_of_few_rows",
        ],
        breaks=[
            Break(
                "the loss of pairs is made of the statistics",
                "fastclip/ops/plain.py",
                old='if name == "reference":',
                new="if name:",
            ),
            Break(
                "the checks are all made again",
                "fastclip/losses/inputs/arguments.py",
                old="        or image.device.type not in",
                new="        or check_features(image, text, paired=True, backend=None)\n"
                "        or image.device.type not in",
            ),
            Break(
                "the backward pass multiplies again",
                _PLAIN,
                old="        workspace.keep(saved, block)\n",
                new="",
            ),
            Break(
                "the sigmoid loss goes through the dispatcher",
                "fastclip/ops/sigmoid.py",
                old="if module is None or module is reference:",
                new="if True:",
            ),
        ],
    ),
    Promise(
        NUMBERS,
        "The loss without labels, which is a single op, meets the same tolerances, also if it is near 0",
        tests=[
            "losses/test_accuracy.py::test_loss_and_gradients_accurate",
            "losses/test_accuracy.py::test_confident_loss_keeps_digits",
            "losses/test_accuracy.py::test_gradients_of_a_loss_below_float32_keep_digits",
            "losses/test_accuracy.py::test_unnormalised_features_accurate",
            "losses/test_accuracy.py::test_weights_of_directions_accurate",
            "losses/test_accuracy.py::test_zero_rows_finite",
            "losses/test_accuracy.py::test_extreme_norms_finite_and_accurate",
            "backends/test_cpu.py::test_many_blocks_accurate",
        ],
        breaks=[
            Break(
                "log1p is a logarithm",
                _LOSS,
                old="std::log1p(e)",
                new="std::log(1.0 + e)",
            ),
            Break(
                "subnormal weights of pairs",
                _LOSS,
                old="*s.gain = std::ldexp(1.0, std::min(-exponent, 1000));",
                new="*s.gain = 1.0 + 0 * exponent;",
            ),
            Break(
                "what rounding took from a log-sum-exp is lost",
                _LOSS,
                old="d * std::exp2(-lost)",
                new="d * std::exp2(-0.0 * lost)",
            ),
            Break(
                "the weight of images is that of texts",
                _LOSS,
                old="return image_weight * sums[0] + text_weight * sums[1];",
                new="return text_weight * sums[0] + image_weight * sums[1];",
            ),
            Break(
                "positives have no gradient",
                _LOSS,
                old="static_cast<float>(-d);",
                new="static_cast<float>(-0.0 * d);",
            ),
            Break(
                "the loss starts again with every row of blocks",
                _LOSS,
                old="if (block->i0 == 0 && block->j0 == 0)",
                new="if (block->j0 == 0)",
            ),
            Break(
                "large rows are not told to the backward pass",
                _PLAIN,
                old="if large:",
                new="if large > 1:",
            ),
            Break(
                "the gradient does not go through the norm",
                "csrc/cpu/rows_tile.h",
                old="Simd::fma(load(lanes, x + j), minus_along, load(lanes, raw + j))",
                new="load(lanes, raw + j)",
            ),
        ],
    ),
    Promise(
        TORCH,
        "On a CPU, the loss without labels and its gradients are bit-identical with and without torch.compile",
        tests=[
            "losses/test_contrastive_torch.py::test_op_of_pairs_is_the_loss",
            "losses/test_contrastive_torch.py::test_ops_of_pairs_pass_opcheck",
            "losses/test_contrastive_torch.py::test_gradients_of_many_upstream_gradients_at_once",
            "losses/test_pairs.py::test_upstream_gradients_that_no_kernel_may_read",
            "backends/test_sigmoid_kernels.py::test_gradients_lie_apart_and_follow_any_upstream",
            "losses/test_contrastive_torch.py::test_second_derivatives_of_cpu_raise",
            "losses/test_transforms.py::test_named_backend_does_not_pretend",
            "losses/test_sigmoid.py::test_sigmoid_op_passes_opcheck",
        ],
        breaks=[
            Break(
                "the op leaves the image's weight out",
                "fastclip/ops/plain.py",
                old="serving_pairs(backend, image).plain_fwd(image, text, scale, image_weight, normalize)",
                new="serving_pairs(backend, image).plain_fwd(image, text, scale, 0.5, normalize)",
            ),
            Break(
                "second derivatives are 0",
                "fastclip/ops/plain.py",
                old="if torch.is_grad_enabled():  # create_graph",
                new="if False:  # create_graph",
            ),
            Break(
                "tangents of upstream gradients are not seen",
                "fastclip/ops/transforms.py",
                old="        and forward_ad._current_level < 0\n",
                new="",
            ),
            Break(
                "batches of upstream gradients are not seen",
                "fastclip/ops/transforms.py",
                old="        and not torch._C._functorch.is_legacy_batchedtensor(d_loss)\n",
                new="",
            ),
            Break(
                "an upstream gradient's sign is not seen",
                "fastclip/ops/transforms.py",
                old="        and not d_loss.is_neg()\n",
                new="",
            ),
        ],
    ),
    Promise(
        TORCH,
        "Inference mode, default devices, dispatch modes and hooks do not change the loss without labels",
        tests=[
            "losses/test_pairs.py::test_training_after_validation_in_inference_mode",
            "losses/test_pairs.py::test_default_device_is_none_of_the_features_business",
            "losses/test_pairs.py::test_compiles_with_many_weights_of_directions",
            "losses/test_pairs.py::test_recorded_before_dispatch",
            "losses/test_pairs.py::test_saved_tensors_come_back_with_other_strides",
            "losses/test_pairs.py::test_fake_scale_with_real_features_raises",
        ],
        breaks=[
            Break(
                "the buffer of logits is an inference tensor",
                "fastclip/_backends/cpu/blocks.py",
                old="with torch.inference_mode(False):",
                new="if True:",
            ),
            Break(
                "a buffer on the default device",
                "fastclip/_backends/cpu/blocks.py",
                old='torch.empty(rows, columns, dtype=torch.float32, device="cpu")',
                new="torch.empty(rows, columns, dtype=torch.float32)",
            ),
            Break(
                "every weight of directions is compiled anew",
                "fastclip/ops/plain.py",
                old="if compiling and image_weight != 0.5:",
                new="if compiling and image_weight < 0.0:",
            ),
            Break(
                "what is recorded before dispatch is not seen",
                "fastclip/ops/transforms.py",
                old="if torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH):",
                new="if False:",
            ),
            Break(
                "strides of what was saved are not looked at",
                "fastclip/ops/plain.py",
                old="saved.contiguous()  # a hook",
                new="saved  # a hook",
            ),
            Break(
                "a scale's type is not looked at",
                "fastclip/losses/inputs/arguments.py",
                old="if type(problem[-1]) not in TENSORS or type(problem[2]) not in TENSORS:",
                new="if False:",
            ),
        ],
    ),
]
