"""What the patches share: the ``forward`` of a class is replaced, after the class was seen to be the one that is known.

A class stays what it is, wherever it was imported to: instances and subclasses, made before or after, take the new
forward, and ``isinstance`` and checkpoints see no change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_same_loss", "check_version", "original", "replace", "unpatch"]

_RELATIVE = 1e-9  # of losses and gradients, in float64
_originals: dict[str, dict[type, Callable[..., Any]]] = {}  # by package


def unpatch() -> None:
    """Undo every patch of `fastclip.integrations`: each class has the very forward it had before. Without one, nothing.

    A forward that something else has put there since goes with ours.
    """
    for package in [*_originals]:
        _restore(package)


def replace(package: str, forwards: Mapping[type, Callable[..., Any]]) -> None:
    """Give each class its new forward, in place of those of an earlier patch of the package."""
    _restore(package)
    _originals[package] = {owner: vars(owner)["forward"] for owner in forwards}
    for owner, forward in forwards.items():
        owner.forward = forward  # type: ignore[attr-defined]


def original(package: str, owner: Any) -> Callable[..., Any]:
    """The forward of the class without the patch."""
    return _originals.get(package, {}).get(owner) or vars(owner)["forward"]


def _restore(package: str) -> None:
    for owner, forward in _originals.pop(package, {}).items():
        owner.forward = forward  # type: ignore[attr-defined]


def check_version(package: str, found: str, oldest: tuple[int, int], newest: tuple[int, int], instead: str) -> None:
    """
    Raises:
        RuntimeError: major and minor number of `found` are not in the range, its ends included.
    """
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers and oldest <= (int(numbers[1]), int(numbers[2])) <= newest:
        return
    known = " to ".join(f"{major}.{minor}" for major, minor in dict.fromkeys((oldest, newest)))
    raise RuntimeError(f"{package} {found} is not known to be patched safely, {known} is: install that, or {instead}")


def check_same_loss(
    what: str, theirs: Callable[[], Tensor], ours: Callable[[], Tensor], leaves: Sequence[Tensor]
) -> None:
    """
    Raises:
        RuntimeError: losses or gradients differ: it is not the formula that is to be replaced.
    """
    with torch.enable_grad():
        (loss, *grads), (our_loss, *our_grads) = (
            (value.detach(), *torch.autograd.grad(value, leaves, materialize_grads=True))
            for value in (theirs(), ours())
        )
    pairs = [(loss, our_loss), *zip(grads, our_grads)]
    if not all(torch.allclose(a, b, rtol=_RELATIVE, atol=_RELATIVE) for a, b in pairs):
        raise RuntimeError(
            f"{what} is not the function it is known as, perhaps because something else has patched it: its loss is "
            f"{float(loss)} where {float(our_loss)} was expected, or its gradients differ; it was left as it is"
        )
