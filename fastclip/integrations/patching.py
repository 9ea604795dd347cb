"""What the patches share: the ``forward`` of a class is replaced, after the class was seen to be the one that is known.

A class stays what it is, wherever it was imported to: instances and subclasses, made before or after, take the new
forward, and ``isinstance`` and checkpoints see no change.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor

__all__ = ["Calls", "check_same_loss", "check_version", "original", "replace", "unpatch"]

logger = logging.getLogger(__name__)

_RELATIVE = 1e-9  # of losses and gradients, in float64
_patches: dict[str, dict[type, tuple[Callable[..., Any], Callable[..., Any]]]] = {}  # of a package: before, and ours


def unpatch() -> None:
    """Undo every patch of `fastclip.integrations`: each class has the very forward it had before. Without one, nothing.

    A forward that something else has put there since goes with ours, and a warning says so.
    """
    for package in [*_patches]:
        _restore(package)


def replace(package: str, forwards: Mapping[type, Callable[..., Any]]) -> None:
    """Give each class its new forward, in place of those of an earlier patch of the package."""
    _restore(package)
    _patches[package] = {owner: (vars(owner)["forward"], forward) for owner, forward in forwards.items()}
    for owner, forward in forwards.items():
        owner.forward = forward  # type: ignore[attr-defined]


def original(package: str, owner: Any) -> Callable[..., Any]:
    """Return the forward of a class without the patch.

    Raises:
        RuntimeError: something else has put another there since.
    """
    forward = vars(owner)["forward"]
    before, ours = _patches.get(package, {}).get(owner, (forward, forward))
    if forward is not ours:  # a second patch would silently drop what another package has put on top
        raise RuntimeError(
            f"{package}'s {owner.__name__}.forward was replaced by something else since it was patched: undo that, or "
            "call fastclip.integrations.unpatch, which undoes both"
        )
    return before


def _restore(package: str) -> None:
    for owner, (before, ours) in _patches.pop(package, {}).items():
        if vars(owner)["forward"] is not ours:
            logger.warning("what has replaced the patched %s.forward of %s is undone, too", owner.__name__, package)
        owner.forward = before  # type: ignore[attr-defined]


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names that a function looks up, also in the functions and comprehensions inside it."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


class Calls:
    """What a forward calls and others may replace: methods of its class, functions of its module.

    A forward that takes its place calls none of them, `honoured` ones apart.
    """

    def __init__(self, owner: type, forward: Callable[..., Any], honoured: Sequence[str] = ()) -> None:
        self.owner, self._honoured = owner, honoured
        self._methods: dict[str, Any] = {}
        self._functions: dict[str, tuple[dict[str, Any], Any]] = {}  # with the names of their module
        self._messages: set[str] = set()
        self._find(inspect.unwrap(forward))

    def _find(self, function: Any) -> None:
        if not inspect.isfunction(function):  # a method that another package replaced by a callable object
            return
        for name in _names(function.__code__):
            of_class: Any = vars(self.owner).get(name)
            of_module: Any = function.__globals__.get(name)
            # wrappers, such as transformers' decorators, call nothing of the loss: what they wrap does
            if self._is_own(of_class) and name not in (*self._methods, *self._honoured):
                self._methods[name] = of_class
                self._find(inspect.unwrap(of_class))
            if self._is_own(of_module) and name not in self._functions:
                self._functions[name] = function.__globals__, of_module
                self._find(inspect.unwrap(of_module))

    def _is_own(self, x: Any) -> bool:
        # functions of other modules, such as torch's, are no steps that somebody replaces to change this loss
        return inspect.isfunction(x) and x.__module__ == self.owner.__module__

    def replaced(self, model: Any) -> bool:
        """Return True if a subclass, the instance or a patch has another one; the log says so once."""
        kind = type(model)
        names = [
            f"{kind.__name__}.{name}"
            for name, known in self._methods.items()
            if name in vars(model) or getattr(kind, name) is not known
        ]
        names += [name for name, (module, known) in self._functions.items() if module[name] is not known]
        if names:
            self.warn_once(
                f"the loss of {kind.__name__} is left to {self.owner.__module__}: it replaces {', '.join(names)}, "
                "which fastclip's loss does not call"
            )
        return bool(names)

    def warn_once(self, message: str) -> None:
        """Log a message that every step would repeat."""
        if message not in self._messages:
            self._messages.add(message)
            logger.warning("%s", message)


def check_version(package: str, version: str, oldest: tuple[int, int], newest: tuple[int, int], instead: str) -> None:
    """
    Raises:
        RuntimeError: major and minor number of `version` are not in the range, its ends included.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and oldest <= (int(numbers[1]), int(numbers[2])) <= newest:
        return
    known = " to ".join(f"{major}.{minor}" for major, minor in dict.fromkeys((oldest, newest)))
    raise RuntimeError(f"{package} {version} is not known to be patched safely, {known} is: install that, or {instead}")


def check_same_loss(what: str, theirs: Callable[[], Any], ours: Callable[[], Any], leaves: Sequence[Tensor]) -> None:
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
