"""torch.func's transforms and forward mode through the losses give the numbers of the dense formula, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import fastclip
from fastclip.ops import transforms
from fastclip.parity.truth import sigmoid_loss_of

Loss = Callable[[Tensor, Tensor], Tensor]  # takes images and scale
N = 6
Y = torch.arange(N) // 2
LABELS = {"image_labels": Y, "text_labels": Y}
_random = torch.Generator().manual_seed(0)
IMAGE, TEXT, TANGENT = torch.randn(3, N, 5, generator=_random).unbind(0)
SCALE, ONE = torch.tensor(7.0), torch.tensor(1.0)
IMAGES, SCALES = torch.stack([IMAGE, IMAGE.flip(0), 3 * IMAGE]), torch.tensor([1.0, 5.0, 9.0])


def cross_entropy(z: Tensor, positive: Tensor, smoothing: float = 0.0, weight: float = 0.5) -> Tensor:
    """Loss of both directions for logits whose every row has a positive, in operations that torch.func supports."""

    def direction(z: Tensor, positive: Tensor) -> Tensor:
        target = (1 - smoothing) * positive / positive.sum(1, keepdim=True) + smoothing / N
        return -(target * z.log_softmax(1)).sum(1).mean()

    return weight * direction(z, positive) + (1 - weight) * direction(z.T, positive.T)


def logits(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T


def of_units(module: torch.nn.Module, *scalars: Tensor) -> Loss:
    return lambda x, s: module(F.normalize(x, dim=-1), F.normalize(TEXT, dim=-1), s, *scalars)


OWN, SAME = torch.eye(N, dtype=torch.bool), Y[:, None] == Y
SMOOTH = {"label_smoothing": 0.2, "image_weight": 0.3}
VIEW = 2 * TEXT + IMAGE
LOSSES: dict[str, tuple[Loss, Loss]] = {  # fastclip's loss, the dense loss
    "pairs": (
        lambda x, s: fastclip.contrastive_loss(x, TEXT, s),
        lambda x, s: cross_entropy(logits(x, TEXT, s), OWN),
    ),
    "labels": (
        lambda x, s: fastclip.contrastive_loss(x, TEXT, s, **LABELS, **SMOOTH),
        lambda x, s: cross_entropy(logits(x, TEXT, s), SAME, 0.2, 0.3),
    ),
    "self pairs": (
        lambda x, s: fastclip.contrastive_loss(x, TEXT, s, exclude_self=True, **LABELS),
        lambda x, s: cross_entropy(logits(x, TEXT, s).masked_fill(OWN, -1e9), SAME & ~OWN),
    ),
    "sigmoid": (
        lambda x, s: fastclip.sigmoid_loss(x, TEXT, s, s - 15),
        lambda x, s: sigmoid_loss_of(logits(x, TEXT, s) + s - 15),
    ),
    "views": (
        lambda x, s: fastclip.multiview_loss([x, TEXT, VIEW], s, core=0),
        lambda x, s: cross_entropy(logits(x, TEXT, s), OWN) + cross_entropy(logits(x, VIEW, s), OWN),
    ),
    "prefixes": (
        lambda x, s: fastclip.matryoshka_loss(x, TEXT, s, prefixes=(3, TEXT.shape[1])),
        lambda x, s: sum(cross_entropy(logits(x[:, :d], TEXT[:, :d], s), OWN) for d in (3, TEXT.shape[1])),
    ),
    "ClipLoss": (
        of_units(fastclip.ClipLoss()),
        lambda x, s: cross_entropy(logits(x, TEXT, s), OWN),
    ),
    "SigLipLoss": (
        of_units(fastclip.SigLipLoss(), torch.tensor(-5.0)),
        lambda x, s: sigmoid_loss_of(logits(x, TEXT, s) - 5),
    ),
}


def dual(loss: Loss) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(IMAGE, TANGENT), SCALE)).tangent


def dual_gradient(loss: Loss) -> Tensor | None:
    """Record a graph of plain tensors, then request its gradient with an upstream gradient that has a tangent."""
    x = IMAGE.clone().requires_grad_()
    value = loss(x, SCALE)
    with forward_ad.dual_level():
        (gradient,) = torch.autograd.grad(value, x, forward_ad.make_dual(ONE, 2 * ONE))
        return forward_ad.unpack_dual(gradient).tangent


def of_a_module(loss: Loss) -> Any:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return loss(x, self.scale)

    module = Scaled()
    return grad(lambda weights: functional_call(module, weights, (IMAGE,)))({"scale": SCALE})["scale"]


TRANSFORMS: dict[str, Callable[[Loss], Any]] = {
    "jvp": lambda loss: jvp(loss, (IMAGE, SCALE), (TANGENT, ONE))[1],
    "vjp": lambda loss: vjp(loss, IMAGE, SCALE)[1](ONE),
    "grad": lambda loss: grad(loss, argnums=(0, 1))(IMAGE, SCALE),
    "vmap": lambda loss: vmap(loss)(IMAGES, SCALES),
    "vmap of scales": lambda loss: vmap(loss, in_dims=(None, 0))(IMAGE, SCALES),
    "vmap of grad": lambda loss: vmap(grad(loss))(IMAGES, SCALES),
    "jacrev": lambda loss: jacrev(loss)(IMAGE, SCALE),
    "hessian": lambda loss: hessian(loss)(IMAGE, SCALE),
    "dual": dual,
    "dual gradient": dual_gradient,
    "functional_call": of_a_module,
}


@pytest.mark.fault(
    "Forward-mode derivatives or torch.func are used",
    "The results are those of plain PyTorch formulas that store the N x N matrix. A named backend raises an error",
)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_transforms_have_the_numbers_of_the_dense_formula(name: str, transform: str) -> None:
    ours, theirs = (TRANSFORMS[transform](loss) for loss in LOSSES[name])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=3e-5, check_dtype=False)


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        ("sigmoid", "grad"),
        *(pytest.param("labels", transform, marks=pytest.mark.full) for transform in ("grad", "vmap", "jvp")),
    ],
)
def test_transforms_compile(name: str, transform: str) -> None:
    ours, _ = LOSSES[name]

    def whole(image: Tensor, scale: Tensor) -> Any:
        if transform == "grad":
            return grad(ours)(image, scale)
        if transform == "vmap":
            return vmap(ours, in_dims=(0, None))(torch.stack([image, -image]), scale)
        return jvp(ours, (image, scale), (TANGENT, ONE))[1]

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")(IMAGE, SCALE)
    torch.testing.assert_close(compiled, whole(IMAGE, SCALE), rtol=1e-4, atol=3e-5)


def test_statistics_under_vmap() -> None:
    found = vmap(lambda x: tuple(fastclip.contrastive_stats(x, TEXT, 5.0, **LABELS)))(IMAGES)
    for k, image in enumerate(IMAGES):
        for ours, theirs in zip(found, fastclip.contrastive_stats(image, TEXT, 5.0, **LABELS)):
            torch.testing.assert_close(ours[k], theirs, rtol=1e-5, atol=1e-6)


def test_transforms_under_autocast() -> None:
    """Autocast rounds the features but not the dense formula."""
    rounded = IMAGE.bfloat16().float(), TEXT.bfloat16().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = vmap(lambda x: fastclip.contrastive_loss(x, TEXT, 7.0))(IMAGE[None])[0]
    torch.testing.assert_close(found, fastclip.contrastive_loss(*rounded, 7.0), rtol=1e-5, atol=0)


def test_dense_torch_under_a_transform_is_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transforms, "_warned", False)
    x, y = torch.randn(2, 4, 3).unbind()
    for backend in ("reference", None, None):
        torch.func.grad(lambda z, backend=backend: fastclip.contrastive_loss(z, y, 5.0, backend=backend))(x)
    assert [record.message for record in caplog.records if "stores the N x N" in record.message] != []
    assert len(caplog.records) == 1


def siglip_dense(x: Tensor, s: Tensor) -> Tensor:
    return sigmoid_loss_of(logits(x, TEXT, s) - 5)


@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap", "dual", "dual gradient"])
@pytest.mark.parametrize("function", ["contrastive", "sigmoid", "stats"])
def test_named_backend_does_not_pretend(function: str, transform: str) -> None:
    def loss(x: Tensor, s: Tensor) -> Tensor:
        if function == "sigmoid":
            return fastclip.sigmoid_loss(x, TEXT, s, -5.0, backend="cpu")
        if function == "stats":
            return fastclip.contrastive_stats(x, TEXT, s, backend="cpu").row_loss.sum()
        return fastclip.contrastive_loss(x, TEXT, s, backend="cpu")

    if (function, transform) == ("stats", "dual gradient"):
        pytest.skip("statistics have no gradient")
    if transform == "dual gradient":  # a multiple of the gradient, which any backend can serve
        dense = LOSSES["pairs"][1] if function == "contrastive" else siglip_dense
        torch.testing.assert_close(dual_gradient(loss), dual_gradient(dense))
        return
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot serve this call: torch\.func.*backend='reference'"):
        TRANSFORMS[transform](loss)


def test_tangents_of_others_leave_the_backend_alone() -> None:
    """Within a dual level, features without a tangent are served by the named backend as usual."""
    with forward_ad.dual_level():
        forward_ad.make_dual(IMAGE, TANGENT)
        assert fastclip.contrastive_loss(TEXT, VIEW, backend="cpu").isfinite()
