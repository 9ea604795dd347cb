"""What the benchmark runs: features, losses of the providers, and the matrix products nobody can avoid."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import open_clip.loss
import torch
import torch.nn.functional as F
from torch import Tensor

import fastclip
from benchmarks.harness import Case, Provider, Step

Loss = Callable[..., Tensor]  # image, text, scale and, of the sigmoid loss, bias

PEER, FLOOR = "open_clip", "floor"


def linear_cross_entropy(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """torch's own fused loss, a call for each direction: the other modality's features are the linear weight."""
    labels = torch.arange(image.shape[0])
    options = torch.nn.LinearCrossEntropyOptions()  # torch's own choice of chunks and precision
    by_image = F.linear_cross_entropy(scale * image, text, labels, options=options)
    by_text = F.linear_cross_entropy(scale * text, image, labels, options=options)
    return (by_image + by_text) / 2


def _losses(name: str) -> dict[str, Loss]:
    """What this machine can run, in the order of a round."""
    theirs, ours = getattr(open_clip.loss, name), getattr(fastclip, name)
    losses: dict[str, Loss] = {PEER: theirs()}
    if shutil.which(os.environ.get("CXX", "g++")):  # what torch.compile compiles with
        # fullgraph: what cannot be compiled is an error, not a loss that runs uncompiled
        losses["open_clip_compiled"] = torch.compile(theirs(), fullgraph=True, dynamic=False)
    if name == "ClipLoss" and hasattr(F, "linear_cross_entropy"):  # newer than the oldest torch that fastclip supports
        losses["linear_cross_entropy"] = linear_cross_entropy
    # The same class with the same arguments as open_clip's: what a user changes is the import
    losses["fastclip"] = ours()
    return losses


LOSSES = {"softmax": _losses("ClipLoss"), "sigmoid": _losses("SigLipLoss")}
SCALARS = {"softmax": (20.0,), "sigmoid": (10.0, -10.0)}  # scale, and bias
MODES = {"softmax": ("forward", "backward", "both"), "sigmoid": ("both",)}

# Compiled anew for every shape
COMPILED = frozenset({"open_clip_compiled"})
# Both directions' N x N logits and their gradients are in memory at once
DENSE = frozenset({"open_clip", "open_clip_compiled"})
# Gradients are computed in the forward pass, from which no halves can be told apart: `forward` would time nearly
# everything, and `backward` a multiplication by the upstream gradient
WHOLE_STEP_ONLY = frozenset({"linear_cross_entropy"})


def features(N: int, D: int, dtype: str) -> tuple[Tensor, Tensor]:
    """Normalised features (N, D), each text as far from its image as in training; leaves that want a gradient."""
    generator = torch.Generator().manual_seed(N)
    image = F.normalize(torch.randn(N, D, generator=generator), dim=1)
    text = F.normalize(image + 3.0 * F.normalize(torch.randn(N, D, generator=generator), dim=1), dim=1)
    image, text = (x.to(getattr(torch, dtype)).requires_grad_() for x in (image, text))
    return image, text


def named(names: str | None) -> list[str]:
    """The providers of a list separated by commas; all of them without one. ValueError where one cannot run here."""
    known = list(dict.fromkeys(name for losses in LOSSES.values() for name in losses))
    wanted = names.split(",") if names else known
    if unknown := sorted(set(wanted) - set(known)):
        raise ValueError(f"no provider {', '.join(unknown)} here, only {', '.join(known)}")
    return wanted


def selected(case: Case, wanted: Iterable[str], available: float) -> dict[str, Loss]:
    """The losses among `wanted` that mean something in this mode and fit into `available` bytes."""
    names = set(wanted)
    if case.mode != "both":
        names -= WHOLE_STEP_ONLY
    if _dense_bytes(case) + _floor_bytes(case) > available:
        names -= DENSE
    return {name: loss for name, loss in LOSSES[case.loss].items() if name in names}


def leaves_of(case: Case) -> tuple[Tensor, ...]:
    """Image and text features, scale and, of the sigmoid loss, bias."""
    scalars = (torch.tensor(value, requires_grad=True) for value in SCALARS[case.loss])
    return *features(case.N, case.D, case.dtype), *scalars


def setup(case: Case, wanted: Iterable[str]) -> list[Provider]:
    """The floor and every selected loss on the same features, checked against each other first."""
    leaves = leaves_of(case)
    image, text = leaves[:2]

    def prepare(loss: Loss) -> Step:
        for x in leaves:
            x.grad = None
        if case.mode == "backward":
            value = loss(*leaves)
            return lambda: value.backward()
        if case.mode == "forward":
            return lambda: (loss(*leaves), None)[1]
        return lambda: loss(*leaves).backward()

    torch.compiler.reset()  # a compiled loss keeps eight shapes at most
    available = available_bytes()
    losses = selected(case, wanted, available)
    check(leaves, losses, LOSSES[case.loss][PEER])
    providers = [Provider(name, lambda loss=loss: prepare(loss)) for name, loss in losses.items()]
    if _floor_bytes(case) > available:
        return providers
    return [Provider(FLOOR, _floor(image.detach().float(), text.detach().float(), case)), *providers]


def check(leaves: tuple[Tensor, ...], losses: dict[str, Loss], peer: Loss) -> None:
    """Same value and gradients as `peer`, to what the dtype allows; N is cut where dense memory would not do."""
    few = tuple(x[:1024].detach().requires_grad_() if x.dim() else x for x in leaves)
    rtol = 1e-4 if leaves[0].dtype == torch.float32 else 2e-2
    expected = peer(*few)
    theirs = torch.autograd.grad(expected, few)
    for name, loss in losses.items():
        found = loss(*few)
        torch.testing.assert_close(
            found.float(), expected.float(), rtol=rtol, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
        for x, y in zip(torch.autograd.grad(found, few), theirs):
            error = (x.double() - y.double()).norm() / y.double().norm()
            assert error < 5 * rtol, f"{name}: gradients differ by {error:.1e}"


def available_bytes() -> float:
    """Memory that can be had without swapping; unlimited where the system does not say."""
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else []:
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return math.inf


def _dense_bytes(case: Case) -> float:
    """Logits and their gradients in both directions, and a quarter for what comes and goes beside them."""
    return 1.25 * 4 * case.N**2 * getattr(torch, case.dtype).itemsize


def _floor_bytes(case: Case) -> float:
    return 2 * case.N**2 * 4


def _floor(image: Tensor, text: Tensor, case: Case) -> Callable[[], Step]:
    """The products of 2 N^2 D operations that cannot be avoided, in fp32 (what the CPU backend multiplies in), into
    memory that is already there: logits, twice where the backward pass makes them again, and the gradients."""
    N, D = image.shape
    logits, weights = torch.empty(N, N), torch.randn(N, N)
    d_image, d_text = torch.empty(N, D), torch.empty(N, D)

    def step() -> None:
        for _ in range(1 if case.mode == "forward" else case.products - 2):
            torch.mm(image, text.T, out=logits)
        if case.mode != "forward":
            torch.mm(weights, text, out=d_image)
            torch.mm(weights.T, image, out=d_text)

    return lambda: step
