"""What the contrastive benchmark runs: features, losses of the providers, and the matrix products nobody can avoid."""

from __future__ import annotations

from collections.abc import Callable

import open_clip.loss
import torch
import torch.nn.functional as F
from torch import Tensor

import fastclip
from benchmarks.harness import Case, Provider, Step

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

# The same class with the same arguments: what a user changes is the import.
LOSSES: dict[str, Loss] = {"fastclip": fastclip.ClipLoss(), "open_clip": open_clip.loss.ClipLoss()}
PEER, FLOOR = "open_clip", "floor"


def features(N: int, D: int, dtype: str) -> tuple[Tensor, Tensor]:
    """Normalised features (N, D), each text as far from its image as in training; leaves that want a gradient."""
    generator = torch.Generator().manual_seed(N)
    image = F.normalize(torch.randn(N, D, generator=generator), dim=1)
    text = F.normalize(image + 3.0 * F.normalize(torch.randn(N, D, generator=generator), dim=1), dim=1)
    image, text = (x.to(getattr(torch, dtype)).requires_grad_() for x in (image, text))
    return image, text


def setup(case: Case) -> list[Provider]:
    """The floor and every loss on the same features, checked against each other first."""
    image, text = features(case.N, case.D, case.dtype)
    scale = torch.tensor(20.0, requires_grad=True)
    leaves = (image, text, scale)

    def prepare(loss: Loss) -> Step:
        for x in leaves:
            x.grad = None
        if case.mode == "backward":
            value = loss(*leaves)
            return lambda: value.backward()
        if case.mode == "forward":
            return lambda: (loss(*leaves), None)[1]
        return lambda: loss(*leaves).backward()

    _check(leaves, case)
    providers = [Provider(name, lambda loss=loss: prepare(loss)) for name, loss in LOSSES.items()]
    return [Provider(FLOOR, _floor(image.detach().float(), text.detach().float(), case.mode)), *providers]


def _check(leaves: tuple[Tensor, Tensor, Tensor], case: Case) -> None:
    """Same value and same gradients, to what the dtype allows; N is cut where dense memory would not do."""
    few = tuple(x[:1024].detach().requires_grad_() if x.dim() else x for x in leaves)
    found = {name: loss(*few) for name, loss in LOSSES.items()}
    rtol = 1e-4 if case.dtype == "float32" else 2e-2
    torch.testing.assert_close(found["fastclip"].float(), found[PEER].float(), rtol=rtol, atol=0)
    ours, theirs = (torch.autograd.grad(found[name], few) for name in ("fastclip", PEER))
    for x, y in zip(ours, theirs):
        error = (x.double() - y.double()).norm() / y.double().norm()
        assert error < 5 * rtol, f"gradients differ by {error:.1e}"


def _floor(image: Tensor, text: Tensor, mode: str) -> Callable[[], Step]:
    """One product of 2 N^2 D operations forward, three backward, in fp32 (what the CPU backend multiplies in), into
    memory that is already there."""
    N, D = image.shape
    logits, weights = torch.empty(N, N), torch.randn(N, N)
    d_image, d_text = torch.empty(N, D), torch.empty(N, D)

    def step() -> None:
        if mode != "backward":
            torch.mm(image, text.T, out=logits)
        if mode != "forward":
            torch.mm(image, text.T, out=logits)
            torch.mm(weights, text, out=d_image)
            torch.mm(weights.T, image, out=d_text)

    return lambda: step
