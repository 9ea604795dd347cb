"""Batches that are compared, and their truth: the dense formula of the whole batch in float64.

Nothing here uses the package's losses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FP32_SUMS", "Case", "Truth", "cases", "truth"]

SCALE, SIGMOID = 14.25, (10.0, -10.0)  # exact in every dtype
FP32_SUMS = 2.0**-21  # a few roundings of a sum of products, relative to the sum of their magnitudes
_FP32_MEANS = 2.0**-18  # likewise of label smoothing's means over all rows


class Case(NamedTuple):
    """A whole batch in float64, and how it lies on the ranks."""

    name: str
    image: Tensor  # (M, D)
    text: Tensor  # (N, D)
    images: list[int]  # of every rank
    texts: list[int]
    options: dict[str, Any]
    labels: tuple[Tensor, Tensor] | None = None
    scalars: tuple[float, ...] = (SCALE,)  # the sigmoid loss has a bias too

    @property
    def equal(self) -> bool:
        return len(set(self.images)) == len(set(self.texts)) == 1


class Truth(NamedTuple):
    loss: Tensor  # (), or with reduction="none" (M + N,)
    grads: list[Tensor]  # by image, text, scale, bias
    sums: list[Tensor]  # of the magnitudes each is made of
    upstream: Tensor  # the derivative by the loss


def cases(ranks: int, batch: int, dim: int, seed: int) -> list[Case]:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    same = [batch] * ranks
    uneven = [0 if ranks > 2 and r == 1 else batch - r * batch // (ranks + 1) for r in range(ranks)]

    def features(images: list[int], texts: list[int]) -> tuple[Tensor, Tensor, list[int], list[int]]:
        """Every other text is its image and noise, so that there are peaked and flat rows."""
        M, N = sum(images), sum(texts)
        image, text = (torch.randn(n, dim, dtype=torch.float64, generator=generator) for n in (M, N))
        text[: min(M, N) : 2] = image[: min(M, N) : 2] + 0.5 * text[: min(M, N) : 2]
        return image, text, images, texts

    more = [n + n // 4 for n in same]
    M, N, classes = sum(same), sum(more), max(sum(same) // 3, 2)
    # Each about three times on every side, on several ranks; a quarter of them on one side only
    labels = torch.arange(M) % classes, torch.arange(N) % classes + classes // 4
    twins = torch.arange(M) % -(-M // 2)
    image, text = features(same, same)[:2]
    unit = F.normalize(image), F.normalize(text)
    found = [
        Case("plain", *features(same, same), {}),
        Case("labels, M != N", *features(same, more), {}, labels),
        Case("label_smoothing, image_weight", *features(same, same), {"label_smoothing": 0.1, "image_weight": 0.75}),
        Case("exclude_self", *features(same, same), {"exclude_self": True}, (twins, twins)),
        Case("reduction=sum", *features(same, same), {"reduction": "sum"}),
        Case("reduction=none", *features(same, same), {"reduction": "none"}),
        Case("normalize=False", *unit, same, same, {"normalize": False}),
        Case("sigmoid", *features(same, same), {}, scalars=SIGMOID),
    ]
    if ranks > 1:
        y = torch.arange(sum(uneven)) % classes, (torch.arange(sum(uneven)) + classes // 4) % (classes + 1)
        found.append(Case("unequal shards", *features(uneven, uneven), {}))
        found.append(Case("labels, unequal shards", *features(uneven, uneven), {}, y))
        found.append(Case("sigmoid, unequal shards", *features(uneven, uneven), {}, scalars=SIGMOID))
    return found


def truth(case: Case, dtype: torch.dtype, device: torch.device) -> Truth:
    """Loss and gradients of the whole batch, its features rounded to dtype."""
    image, text = (x.to(dtype).to(device, torch.float64).requires_grad_() for x in (case.image, case.text))
    scalars = [torch.tensor(x, dtype=torch.float64, device=device, requires_grad=True) for x in case.scalars]
    normalize = case.options.get("normalize", True)
    u, v = (F.normalize(x, dim=1) if normalize else x for x in (image, text))
    cosine = u @ v.T
    z = scalars[0] * cosine + sum(scalars[1:])
    formula = _sigmoid if len(scalars) > 1 else _softmax
    loss = formula(z, case, False)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=device).view_as(loss)
    G, *grads = torch.autograd.grad(loss, (z, image, text, *scalars), upstream, retain_graph=True)
    size = G.abs()
    if case.options.get("label_smoothing"):  # means over all rows, added and taken away
        means = torch.autograd.grad(formula(z, case, True), z)[0]
        size = size + means * (_FP32_MEANS / FP32_SUMS if dtype == torch.float32 else 1.0)
    with torch.no_grad():
        r, c = (1 / x.norm(dim=1, keepdim=True) if normalize else 1.0 for x in (image, text))
        s = case.scalars[0]
        sums = [s * r * (size @ v.abs()), s * c * (size.T @ u.abs()), (size * cosine).abs().sum(), G.abs().sum()]
    return Truth(loss.detach(), grads, sums, upstream)


def _sigmoid(z: Tensor, case: Case, means: bool) -> Tensor:
    sign = 2 * torch.eye(len(z), dtype=z.dtype, device=z.device) - 1
    return -F.logsigmoid(sign * z).sum() / len(z)


def _softmax(z: Tensor, case: Case, means: bool) -> Tensor:
    """The contrastive loss of logits (M, N). means: in its place the sum of what label smoothing takes from it."""
    own = torch.eye(*z.shape, dtype=torch.bool, device=z.device)
    kept = ~own if case.options.get("exclude_self") else torch.ones_like(own)
    labels = None if case.labels is None else [y.to(z.device) for y in case.labels]
    positive = own if labels is None else (labels[0][:, None] == labels[1]) & kept
    eps, w = (case.options.get(name, default) for name, default in (("label_smoothing", 0.0), ("image_weight", 0.5)))

    def direction(z: Tensor, positive: Tensor, kept: Tensor) -> Tensor:
        some = positive.any(1)
        z, positive, kept = z[some], positive[some], kept[some]
        pos, mean = ((z * of).sum(1) / of.sum(1) for of in (positive, kept))
        lse = z.masked_fill(~kept, -torch.inf).logsumexp(1)
        return eps * (pos + mean) if means else lse - (1 - eps) * pos - eps * mean

    row, col = direction(z, positive, kept), direction(z.T, positive.T, kept.T)
    reduction = case.options.get("reduction", "mean")
    if reduction == "none":
        return torch.cat([row, col])
    return w * row.sum() + (1 - w) * col.sum() if reduction == "sum" else w * row.mean() + (1 - w) * col.mean()
