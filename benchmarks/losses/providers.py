"""Features, the providers' losses and their check, and on a CPU the matrix products that no provider can avoid."""

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
# Each backend for GPUs is a separate provider
OURS: dict[str, dict[str, str | None]] = {
    "cpu": {"fastclip": None},
    "cuda": {"fastclip_triton": "triton", "fastclip_cuda": "cuda"},
}


def ours(backend: str | None, loss: str) -> Loss:
    """Return fastclip on a GPU backend. Without a backend, return the class with open_clip's name and arguments, for
    which a user changes only the import.
    """
    if backend is None:
        return {"softmax": fastclip.ClipLoss, "sigmoid": fastclip.SigLipLoss}[loss]()
    reason = fastclip.backends().get(backend, "not in this version")
    if reason != "available":
        raise Unavailable(f"not available: {reason}")
    functions: dict[str, Callable[..., Any]] = {"softmax": fastclip.contrastive_loss, "sigmoid": fastclip.sigmoid_loss}
    return functools.partial(functions[loss], normalize=False, backend=backend)


def names(loss: str, device: str) -> list[str]:
    """List every provider that this loss can have on this kind of device, in the order of a round."""
    peers = [name for name, peer in PEERS.items() if loss in peer.build and not (peer.gpu_only and device == "cpu")]
    return [*peers, *OURS[device]]


def load_losses(loss: str, device: str, wanted: Iterable[str]) -> tuple[dict[str, Loss], dict[str, str]]:
    """Return the losses among `wanted` that can run here, and the reasons why the others cannot."""
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
    """Return the losses of all providers that can run here without a GPU."""
    return load_losses(loss, "cpu", names(loss, "cpu"))[0]


def named(wanted: str | None, device: str = "cpu") -> list[str]:
    """Return the providers of a comma-separated list, or all without one. Raises ValueError for one that cannot run
    here.
    """
    if device == "cpu":
        known = list(dict.fromkeys(name for loss in MODES for name in cpu_losses(loss)))
    else:
        known = list(dict.fromkeys(name for loss in MODES for name in names(loss, device)))
    chosen = wanted.split(",") if wanted else known
    if unknown := sorted(set(chosen) - set(known)):
        raise ValueError(f"no provider {', '.join(unknown)} here: choose from {', '.join(known)}")
    return chosen


def fitting(case: Case, wanted: Iterable[str], available: float) -> list[str]:
    """Return the providers among `wanted` that are meaningful in this mode and fit into `available` bytes."""
    chosen = [name for name in wanted if case.mode == "both" or name not in WHOLE_STEP_ONLY]
    return [name for name in chosen if name not in DENSE or case.dense_bytes <= available]


def selected(case: Case, wanted: Iterable[str], available: float) -> dict[str, Loss]:
    """Return the losses among `wanted` that a CPU runs in this mode with `available` bytes, those of the floor
    included.
    """
    chosen = set(fitting(case, wanted, available - _floor_bytes(case)))
    return {name: loss for name, loss in cpu_losses(case.loss).items() if name in chosen}


def setup(case: Case, wanted: Iterable[str]) -> list[Provider]:
    """Return the floor and every selected loss on the same features on a CPU, after a check against each other."""
    leaves = leaves_of(case)
    image, text = leaves[:2]
    torch.compiler.reset()  # a compiled loss keeps at most eight shapes
    available = available_bytes()
    losses = selected(case, wanted, available)
    check(leaves, losses, cpu_losses(case.loss)[PEER])
    providers = [Provider(name, functools.partial(step_of, case, loss, leaves)) for name, loss in losses.items()]
    if _floor_bytes(case) > available:
        return providers
    return [Provider(FLOOR, _floor(image.detach().float(), text.detach().float(), case)), *providers]


def check(leaves: tuple[Tensor, ...], losses: dict[str, Loss], peer: Loss) -> None:
    """Check that the losses agree with `peer` in value and gradients, within the dtype's tolerance. N is cut to
    limit the dense peer's memory.
    """
    few = tuple(x[:1024].detach().requires_grad_() if x.dim() else x for x in leaves)
    value = peer(*few)
    expected = (value.detach(), *torch.autograd.grad(value, few))
    for name, loss in losses.items():
        check_one(name, loss, few, expected)


def check_one(name: str, loss: Loss, leaves: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Raise CheckFailed unless value and gradients are `expected`, within the tolerance of the leaves' dtype."""
    fastclip.bench.losses.check_one(name, loss, leaves, expected[:3] if name in CONSTANT_SCALE else expected)


def _floor_bytes(case: Case) -> float:
    return 2 * case.N**2 * 4


def _floor(image: Tensor, text: Tensor, case: Case) -> Callable[[], Step]:
    """Return the loss's matrix products, each of 2 N^2 D operations, in fp32 as on the CPU backend. They write to
    existing memory: logits (twice if the backward pass computes them again) and gradients.
    """
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
