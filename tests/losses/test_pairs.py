"""The loss of pairs as a single op, and where it must agree with the path that all other losses share
(`comm="ring"`).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import fastclip
from fastclip.parity.truth import truth
from support.accuracy import leaves, pairs

LOSSES: dict[str, Callable[..., Tensor]] = {
    "contrastive": lambda *x: fastclip.contrastive_loss(*x),
    "statistics": lambda *x: fastclip.contrastive_loss(*x, comm="ring"),
    "sigmoid": lambda *x: fastclip.sigmoid_loss(*x, -3.0),
}
RECORDED = {
    **LOSSES,
    "labels": lambda *x: fastclip.contrastive_loss(*x[:3], image_labels=x[3], text_labels=x[3]),
    "ignored": lambda *x: fastclip.contrastive_loss(*x[:3], image_labels=x[3], text_labels=x[3], ignore_label=0),
}


def problem(N: int = 20, D: int = 8) -> list[Tensor]:
    return list(leaves(*pairs(N, N, D), 5.0))


@pytest.mark.parametrize("name", LOSSES)
def test_training_after_validation_in_inference_mode(name: str) -> None:
    """The buffer of logits outlives a call, so it must not become an inference tensor."""
    larger = [x.detach() for x in problem(300)]
    with torch.inference_mode():
        LOSSES[name](*larger)
    given = problem(300)
    torch.autograd.grad(LOSSES[name](*given), given)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_default_device_is_none_of_the_features_business(name: str, dtype: torch.dtype) -> None:
    image, text, scale = problem(400)
    given = [image.detach().to(dtype).requires_grad_(), text.detach().to(dtype).requires_grad_(), scale]
    expected = torch.autograd.grad(LOSSES[name](*given), given)
    with torch.device("meta"):
        found = torch.autograd.grad(LOSSES[name](*given), given)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_second_derivatives_of_the_reference_under_a_dispatch_mode() -> None:
    given = problem()
    with FlopCounterMode(display=False):
        loss = fastclip.contrastive_loss(*given, backend="reference")
        (gradient,) = torch.autograd.grad(loss, given[0], create_graph=True)
        gradient.square().sum().backward()
    assert given[0].grad is not None


def test_compiles_with_many_weights_of_directions() -> None:
    """Changing weights of the directions, more than torch's limit of recompilations, compile with fullgraph=True."""
    given = problem()
    compiled = torch.compile(
        lambda *x, w: fastclip.contrastive_loss(*x, image_weight=w), fullgraph=True, backend="aot_eager"
    )
    for k in range(11):
        expected = fastclip.contrastive_loss(*given, image_weight=0.1 * k)
        torch.testing.assert_close(compiled(*given, w=0.1 * k), expected)


def test_batched_upstream_gradients_of_float16_features() -> None:
    """The factor of a gradient scaler does not overflow, and the weights do not flush to zero before it is applied."""
    image, text = (x.half() for x in pairs(64, 64, 32, aligned=1.0, noise=0.5))
    expected = truth(image, text, 40.0)
    image.requires_grad_()
    loss = fastclip.contrastive_loss(image, text, 40.0)
    (found,) = torch.func.vmap(lambda k: torch.autograd.grad(loss, image, k))(torch.tensor([65536.0]))
    error = (found[0].double() / 65536 - expected.d_image).norm() / expected.d_image.norm()
    assert error < 2e-3


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_before_dispatch(name: str) -> None:
    """Calls can be recorded before dispatch, as torch.export records them; the losses must not read the recorded
    tensors.
    """
    labels = [] if name in LOSSES else [torch.arange(20) % 7]
    given = [*(x.detach() for x in problem()), *labels]
    graph = make_fx(RECORDED[name], pre_dispatch=True)(*given)
    torch.testing.assert_close(graph(*given), RECORDED[name](*given))


@pytest.mark.parametrize("name", ["contrastive", "sigmoid"])
def test_upstream_gradients_that_no_kernel_may_read(name: str) -> None:
    """Upstream gradients whose memory no kernel may read give the right gradients: batches of torch.autograd, tangents,
    and tensors with torch's lazy negation.
    """
    given = problem()
    loss = LOSSES[name](*given)
    one = torch.autograd.grad(loss, given, retain_graph=True)
    factors = torch.tensor([1.0, 2.0, -3.0])
    batch = torch.autograd.grad(loss, given, factors, retain_graph=True, is_grads_batched=True)
    negated = torch.complex(torch.zeros(()), torch.tensor(-3.0)).conj().imag
    assert negated.is_neg() and negated == 3.0
    thrice = torch.autograd.grad(loss, given, negated, retain_graph=True)
    with forward_ad.dual_level():
        dual = torch.autograd.grad(loss, given, forward_ad.make_dual(torch.tensor(3.0), torch.tensor(2.0)))
        tangents = [forward_ad.unpack_dual(x).tangent for x in dual]
    for gradient, of_factors, of_three, tangent in zip(one, batch, thrice, tangents, strict=True):
        torch.testing.assert_close(of_factors, torch.stack([x * gradient for x in factors]))
        torch.testing.assert_close(of_three, 3 * gradient)
        torch.testing.assert_close(tangent, 2 * gradient)


def test_saved_tensors_come_back_with_other_strides() -> None:
    given = problem()
    expected = torch.autograd.grad(fastclip.contrastive_loss(*given), given)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: torch.stack([x, x], -1)[..., 0]):
        found = torch.autograd.grad(fastclip.contrastive_loss(*given), given)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_fake_scale_with_real_features_raises(name: str) -> None:
    image, text, _ = problem()
    with FakeTensorMode():
        fake = torch.tensor(5.0)
    with pytest.raises(Exception, match="FakeTensor"):
        LOSSES[name](image, text, fake)


@pytest.mark.parametrize("backend", ["", 0, False])
def test_name_of_no_backend_raises(backend: object) -> None:
    image, text, scale = problem()
    for function, more in ((fastclip.contrastive_loss, ()), (fastclip.sigmoid_loss, (-3.0,))):
        with pytest.raises(ValueError, match="is unknown"):
            function(image, text, scale, *more, backend=backend)  # type: ignore[operator]


def test_ops_refuse_what_does_not_fit() -> None:
    image, text, scale = (x.detach() for x in problem())
    with pytest.raises(ValueError, match="pairs"):
        torch.ops.fastclip.plain_fwd(image, text[:3], scale, 0.5, True, None)
    _, saved = torch.ops.fastclip.plain_fwd(image, text, scale, 0.5, True, None)
    with pytest.raises(ValueError, match="plain_fwd"):
        torch.ops.fastclip.plain_bwd(image, text, scale, saved[:9], 0.5, True, None, torch.tensor(1.0), [True] * 3)


def test_wrong_dtypes_are_told_before_a_wrong_scale() -> None:
    image, text, _ = problem()
    with pytest.raises(TypeError, match="one dtype"):
        fastclip.contrastive_loss(image, text.half(), torch.ones(3))
