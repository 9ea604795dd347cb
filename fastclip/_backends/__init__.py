"""The backends and the choice between them.

Each backend is a module with the same functions:

``missing()``
    Return None if the backend can run on this machine, else the reason why not.
``refuses(image, named)``
    Return None if the backend supports the device and dtype of these features, else the reason why not. `named` is True
    if the caller named the backend.
``contrastive_fwd(...)``, ``contrastive_bwd(...)``, ``sigmoid_fwd(...)``, ``sigmoid_bwd(...)``
    Compute the operations that `reference` defines, on a `Problem`.
``distill_fwd(...)``, ``distill_bwd(...)``
    Compute the operations on the `Problem` of a student and those of its teachers, as `reference` defines them.
``plain_saved(N)``, ``plain_fwd(...)``, ``plain_bwd(...)``
    Compute the mean loss of pairs without labels and its gradients, as `reference` defines them. torch.autocast may
    be enabled when they run: pass ``out=`` to products, which autocast does not cast.
``direction_fits(image, text)``, ``direction_fwd(...)``, ``direction_bwd(...)``
    Compute the loss of the rows alone, and its gradients, in one pass over the logits. `direction_fits` returns False
    for sizes at which that is not possible. A backend may lack all three.
"""

from __future__ import annotations

import logging
from types import ModuleType

import torch
from torch import Tensor

from fastclip._backends import cpu, cuda, reference, triton
from fastclip._backends.advice import mending
from fastclip._backends.problem import DTYPES, FUSED_DTYPES, Problem
from fastclip._version import __version__
from fastclip.system import env
from fastclip.system.installed import installed_version

__all__ = [
    "DTYPES",
    "FUSED_DTYPES",
    "backends",
    "build_info",
    "check_name",
    "pick",
    "serving",
    "serving_pairs",
]

logger = logging.getLogger(__name__)
_BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "triton": triton, "cpu": cpu, "reference": reference}
# backend=None takes the first of these that supports the features. ROCm devices have the type cuda
_OF_DEVICES = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def backends() -> dict[str, str]:
    """Return every backend of this version with ``"available"``, or with the reason why it is not available.

    ``"available"`` means that the backend runs on this machine. The documentation lists the devices and dtypes that
    each backend supports. If ``backend=`` names one that does not support the features, the loss raises an error with
    the reason.
    """
    return {name: module.missing() or "available" for name, module in _BACKENDS.items()}


def build_info() -> dict[str, str]:
    """Return the versions and builds of this installation, for bug reports.

    Keys: ``fastclip``, ``torch``, ``triton`` (versions, "" if not installed), ``cpu`` (the instruction set in use) and
    ``cuda`` (nvcc's version and the architecture). The last two hold the reason if the native module is missing.
    """
    return {
        "fastclip": __version__,
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "cpu": cpu.missing() or cpu.build(),
        "cuda": cuda.build(),
    }


def check_name(name: str | None) -> None:
    """Raise ValueError unless `name` is a backend or None."""
    if name is not None and name not in _BACKENDS:
        raise ValueError(f"backend={name!r} is unknown; this version of fastclip has {', '.join(map(repr, _BACKENDS))}")


def pick(name: str | None, image: Tensor) -> tuple[str, ModuleType]:
    """Return the name and the module of the named backend, or of the best backend for features like `image`.

    If a backend is named (by the argument, else by FASTCLIP_BACKEND) and does not support the features, raise
    RuntimeError with the reason. An automatic choice continues with the next backend.
    """
    if name is None:
        name = env.backend()
    if name is not None:
        check_name(name)
        module = _BACKENDS[name]
        reason = module.missing() or module.refuses(image, named=True)
        if reason:
            raise RuntimeError(
                f"backend={name!r} cannot serve this call: {reason}. To let fastclip choose a backend, pass "
                f"backend=None and unset FASTCLIP_BACKEND"
            )
        return name, module
    for name in _OF_DEVICES.get(image.device.type, ()):
        module = _BACKENDS[name]
        if not (module.refuses(image, named=False) or module.missing()):
            return name, module
    return "reference", reference


def serving(name: str | None, p: Problem) -> ModuleType:
    """Return the backend module that computes the loss of `p`.

    This is the choice of `pick`, or the reference if `p` has no images or no texts, as on a rank with an empty shard.

    If the reference is used although nobody named it, a warning with the reason is logged once per process and type of
    device.
    """
    if p.image.shape[0] == 0 or p.text.shape[0] == 0:
        return reference
    return serving_pairs(name, p.image)


def serving_pairs(name: str | None, image: Tensor) -> ModuleType:
    """Return the backend module for features that are not empty (see `serving`)."""
    module = pick(name, image)[1]
    # No warning for float64, which is documented to use the reference
    if module is reference and (name or env.backend()) is None and image.dtype in FUSED_DTYPES:
        _warn_of_reference(image)
    return module


_warned: set[str] = set()  # types of devices


def _warn_of_reference(image: Tensor) -> None:
    device = image.device.type
    if device in _warned:
        return
    _warned.add(device)
    name = {"cpu": "cpu", "cuda": "triton"}.get(device, "")
    reason, todo = f"no other backend supports {device} tensors", ""
    if name:
        module = _BACKENDS[name]
        reason = str(module.missing() or module.refuses(image, named=False))
        todo = mending(name, reason)
    logger.warning(
        "the reference backend computes the loss: it stores the N x N similarities and takes several times as long. No "
        "faster backend can be used, because %s%s "
        "(pass backend='reference' to silence this warning)",
        *(reason, todo and f"; to fix it: {todo}"),
    )
