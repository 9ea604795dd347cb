"""Shared parts of the patches, which replace the ``forward`` of a class after checking that it computes a known loss.

The class object stays the same. Instances and subclasses, created before or after, take the new forward, and
``isinstance`` and checkpoints are not affected.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor

__all__ = ["Calls", "check_names", "check_same_loss", "check_version", "original", "replace", "unpatch"]

logger = logging.getLogger(__name__)

_RELATIVE = 1e-9  # tolerance of losses and gradients in float64, relative and absolute
# package -> class -> (original forward, fastclip's forward)
_patches: dict[str, dict[type, tuple[Callable[..., Any], Callable[..., Any]]]] = {}


def unpatch() -> None:
    """Undo all patches of `fastclip.integrations`: each class gets back the forward that it had before the patch.

    If other code has replaced the patched forward since, that replacement is undone too, and a warning is logged.
    Without a patch nothing happens.
    """
    for package in [*_patches]:
        _restore(package)


def replace(package: str, forwards: Mapping[type, Callable[..., Any]]) -> None:
    """Set the new forward of each class, after undoing an earlier patch of the package."""
    _restore(package)
    _patches[package] = {owner: (vars(owner)["forward"], forward) for owner, forward in forwards.items()}
    for owner, forward in forwards.items():
        owner.forward = forward  # type: ignore[attr-defined]


def original(package: str, owner: Any) -> Callable[..., Any]:
    """Return the forward that a class had before the patch.

    Raises:
        RuntimeError: other code has replaced the patched forward since.
    """
    forward = vars(owner)["forward"]
    before, ours = _patches.get(package, {}).get(owner, (forward, forward))
    if forward is not ours:  # a second patch would silently drop the replacement by other code
        raise RuntimeError(
            f"{package}'s {owner.__name__}.forward was replaced by other code since it was patched: undo that "
            "replacement, or call fastclip.integrations.unpatch, which undoes both"
        )
    return before


def _restore(package: str) -> None:
    for owner, (before, ours) in _patches.pop(package, {}).items():
        if vars(owner)["forward"] is not ours:
            logger.warning("another replacement of the patched %s.forward of %s is undone too", owner.__name__, package)
        owner.forward = before  # type: ignore[attr-defined]


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names that a function looks up, including those in nested functions and comprehensions."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


class Calls:
    """Functions that a forward calls and other code may replace: methods of its class, functions of its module.

    The patched forward calls none of them except the methods in `honoured`. If one has been replaced, the original
    forward must therefore compute the loss.
    """

    def __init__(self, owner: type, forward: Callable[..., Any], honoured: Sequence[str] = ()) -> None:
        self.owner, self._honoured = owner, honoured
        self._methods: dict[str, Any] = {}
        self._functions: dict[str, tuple[dict[str, Any], Any]] = {}  # name -> (globals of its module, function)
        self._messages: set[str] = set()
        self._find(inspect.unwrap(forward))

    def _find(self, function: Any) -> None:
        if not inspect.isfunction(function):  # another package replaced the method by a callable object
            return
        for name in _names(function.__code__):
            of_class: Any = inspect.getattr_static(self.owner, name, None)
            of_module: Any = function.__globals__.get(name)
            # Wrappers, such as decorators of transformers, are followed to the function that they wrap
            if self._is_own(of_class) and name not in (*self._methods, *self._honoured):
                self._methods[name] = of_class
                self._find(inspect.unwrap(of_class))
            if self._is_own(of_module) and name not in self._functions:
                self._functions[name] = function.__globals__, of_module
                self._find(inspect.unwrap(of_module))

    def _is_own(self, x: Any) -> bool:
        # Functions of other modules, such as torch, are not replaced to change this loss
        return inspect.isfunction(x) and x.__module__ == self.owner.__module__

    def replaced(self, model: Any) -> bool:
        """Return True, and log a warning once, if a subclass, the instance or a patch replaces one of the functions."""
        kind = type(model)
        names = [
            f"{kind.__name__}.{name}"
            for name, known in self._methods.items()
            if name in vars(model) or getattr(kind, name) is not known
        ]
        names += [name for name, (module, known) in self._functions.items() if module[name] is not known]
        if names:
            self.warn_once(
                f"{self.owner.__module__} computes the loss of {kind.__name__}, because fastclip's loss would not call "
                f"functions that were replaced: {', '.join(names)}"
            )
        return bool(names)

    def warn_once(self, message: str) -> None:
        """Log a warning only once, because otherwise every step would repeat it."""
        if message not in self._messages:
            self._messages.add(message)
            logger.warning("%s", message)


def check_version(
    package: str, version: str, oldest: tuple[int, int], newest: tuple[int, int] | None, instead: str
) -> None:
    """Check that the major and minor numbers of `version` are between `oldest` and `newest`, inclusive.

    If `newest` is None, later versions are accepted too, and the caller checks what it replaces.

    Raises:
        RuntimeError: the version is outside this range. The message offers the instruction `instead` as an alternative.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    found = (int(numbers[1]), int(numbers[2])) if numbers else None
    if found and oldest <= found and (newest is None or found <= newest):
        return
    known = f"{oldest[0]}.{oldest[1]}"
    if newest != oldest:
        known += f" to {newest[0]}.{newest[1]}" if newest else " and newer"
    raise RuntimeError(
        f"fastclip can patch {package} {known}, but {version} is installed: install a supported version, or {instead}"
    )


def check_names(what: str, names: Iterable[str], known: Collection[str]) -> None:
    """Check that a later version has added nothing to the parameters or fields that a patch knows.

    Raises:
        RuntimeError: `names` has a name that is not in `known`, so that `what` must not be replaced.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        raise RuntimeError(f"fastclip does not know {', '.join(unknown)} of {what}; it was not patched")


def check_same_loss(what: str, theirs: Callable[[], Any], ours: Callable[[], Any], leaves: Sequence[Tensor]) -> None:
    """Check that two functions give the same loss and the same gradients of `leaves`.

    Raises:
        RuntimeError: they differ, so that `what` is not the known formula and must not be replaced.
    """
    with torch.enable_grad():
        (loss, *grads), (our_loss, *our_grads) = (
            (value.detach(), *torch.autograd.grad(value, leaves, materialize_grads=True))
            for value in (theirs(), ours())
        )
    pairs = [(loss, our_loss), *zip(grads, our_grads)]
    if not all(torch.allclose(a, b, rtol=_RELATIVE, atol=_RELATIVE) for a, b in pairs):
        raise RuntimeError(
            f"{what} does not compute the expected loss, perhaps because other code has patched it: its loss is "
            f"{float(loss)} where {float(our_loss)} was expected, or its gradients differ; it was not patched"
        )
