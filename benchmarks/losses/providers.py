"""Features, the providers' losses, their check, and on a CPU the products nobody can avoid."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import fastclip.bench.losses
from benchmarks.harness import Case, Provider, Step
from benchmarks.losses.peers import CONSTANT_SCALE, PEERS, Loss, Unavailable, build
from fastclip.bench.losses import CheckFailed, leaves_of, step_of
from fastclip.system.machine import available_bytes

__all__ = [
    "CheckFailed",
    "check",
    "check_one",
    "fitting",
    "load_losses",
    "leaves_of",
    "named",
    "names",
    "cpu_losses",
    "setup",
    "step_of",
]

PEER, FLOOR = "open_clip", "floor"
MODES = {"softmax": ("forward", "backward", "both"), "sigmoid": ("both",)}
COMPILED = frozenset(name for name, peer in PEERS.items() if peer.compiled)
DENSE = frozenset(name for name, peer in PEERS.items() if peer.dense)
WHOLE_STEP_ONLY = frozenset(name for name, peer in PEERS.items() if peer.whole_step_only)
# On a GPU every backend that has one is a provider of its own
OURS: dict[str, dict[str, str | None]] = {
    "cpu": {"fastclip": None},
    "cuda": {"fastclip_triton": "triton", "fastclip_cuda": "cuda"},
}


def ours(backend: str | None, loss: str) -> Loss:
    """fastclip on a GPU backend; without one the same class with the same arguments as open_clip's: what a user changes
    is the import."""
    if backend is None:
        return {"softmax": fastclip.ClipLoss, "sigmoid": fastclip.SigLipLoss}[loss]()
    reason = fastclip.backends().get(backend, "not in this version")
    if reason != "available":
        raise Unavailable(f"not available: {reason}")
    functions: dict[str, Callable[..., Any]] = {"softmax": fastclip.contrastive_loss, "sigmoid": fastclip.sigmoid_loss}
    return functools.partial(functions[loss], normalize=False, backend=backend)


def names(loss: str, device: str) -> list[str]:
    """Every provider that this loss may have on this kind of device, in the order of a round."""
    peers = [name for name, peer in PEERS.items() if loss in peer.build and not (peer.gpu_only and device == "cpu")]
    return [*peers, *OURS[device]]


def load_losses(loss: str, device: str, wanted: Iterable[str]) -> tuple[dict[str, Loss], dict[str, str]]:
    """Those of `wanted` that can run here, and why the others cannot."""
    losses: dict[str, Loss] = {}
    status: dict[str, str] = {}
    for name in names(loss, device):
        if name in set(wanted):
            try:
                losses[name] = build(name, loss) if name in PEERS else ours(OURS[device][name], loss)
            except Unavailable as reason:
                status[name] = str(reason)
    return losses, status


@functools.cache
def cpu_losses(loss: str) -> dict[str, Loss]:
    """Every provider's loss that can run here without a GPU."""
    return load_losses(loss, "cpu", names(loss, "cpu"))[0]


def named(wanted: str | None, device: str = "cpu") -> list[str]:
    """The providers of a list separated by commas; all of them without one. ValueError where one is not for here."""
    if device == "cpu":
        known = list(dict.fromkeys(name for loss in MODES for name in cpu_losses(loss)))
    else:
        known = list(dict.fromkeys(name for loss in MODES for name in names(loss, device)))
    chosen = wanted.split(",") if wanted else known
    if unknown := sorted(set(chosen) - set(known)):
        raise ValueError(f"no provider {', '.join(unknown)} here, only {', '.join(known)}")
    return chosen


def fitting(case: Case, wanted: Iterable[str], available: float) -> list[str]:
    """Those of `wanted` that mean something in this mode and fit into `available` bytes."""
    chosen = [name for name in wanted if case.mode == "both" or name not in WHOLE_STEP_ONLY]
    return [name for name in chosen if name not in DENSE or case.dense_bytes <= available]


def selected(case: Case, wanted: Iterable[str], available: float) -> dict[str, Loss]:
    """The losses among `wanted` that a CPU runs in this mode with `available` bytes, the floor's among them."""
    chosen = set(fitting(case, wanted, available - _floor_bytes(case)))
    return {name: loss for name, loss in cpu_losses(case.loss).items() if name in chosen}


def setup(case: Case, wanted: Iterable[str]) -> list[Provider]:
    """On a CPU: the floor and every selected loss on the same features, checked against each other first."""
    leaves = leaves_of(case)
    image, text = leaves[:2]
    torch.compiler.reset()  # a compiled loss keeps eight shapes at most
    available = available_bytes()
    losses = selected(case, wanted, available)
    check(leaves, losses, cpu_losses(case.loss)[PEER])
    providers = [Provider(name, functools.partial(step_of, case, loss, leaves)) for name, loss in losses.items()]
    if _floor_bytes(case) > available:
        return providers
    return [Provider(FLOOR, _floor(image.detach().float(), text.detach().float(), case)), *providers]


def check(leaves: tuple[Tensor, ...], losses: dict[str, Loss], peer: Loss) -> None:
    """Same value and gradients as `peer`, to what the dtype allows; N is cut where dense memory would not do."""
    few = tuple(x[:1024].detach().requires_grad_() if x.dim() else x for x in leaves)
    value = peer(*few)
    expected = (value.detach(), *torch.autograd.grad(value, few))
    for name, loss in losses.items():
        check_one(name, loss, few, expected)


def check_one(name: str, loss: Loss, leaves: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """CheckFailed unless value and gradients are `expected`, to what the leaves' dtype allows."""
    fastclip.bench.losses.check_one(name, loss, leaves, expected[:3] if name in CONSTANT_SCALE else expected)


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
