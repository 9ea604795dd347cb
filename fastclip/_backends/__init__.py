"""The backends and the choice between them.

Each backend is a module with the same functions:

``missing()``
    None when the backend can run on this machine, else the reason why not.
``refuses(image, named)``
    None when the backend serves features of this device and dtype, else the reason why not; `named` when the caller
    asked for this very backend.
``contrastive_fwd(...)``, ``contrastive_bwd(...)``, ``sigmoid_fwd(...)``, ``sigmoid_bwd(...)``
    the operations on a `Problem`; `reference.py` states them.
``plain_saved(N)``, ``plain_fwd(...)``, ``plain_bwd(...)``
    the mean loss of pairs without labels, and its gradients; `reference.py` states them. They may find torch.autocast
    on: products have an ``out=``, which it leaves alone.
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

__all__ = ["DTYPES", "FUSED_DTYPES", "backends", "build_info", "check_name", "pick", "serving", "serving_pairs"]

logger = logging.getLogger(__name__)
_BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "triton": triton, "cpu": cpu, "reference": reference}
# What backend=None may choose for a device, in order of preference: the first that serves the features. ROCm's are cuda
_OF_DEVICES = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def backends() -> dict[str, str]:
    """Every backend of this version: ``"available"``, or the reason why it is not.

    ``available`` says that the backend runs on this machine; which devices and dtypes each one serves is in its
    documentation, and an explicit ``backend=`` that cannot serve a tensor says why.
    """
    return {name: module.missing() or "available" for name, module in _BACKENDS.items()}


def build_info() -> dict[str, str]:
    """What this installation is made of, for reports of faults: versions, and how the native modules were built.

    Keys ``fastclip``, ``torch``, ``triton`` (versions, "" where there is none), ``cpu`` (the instruction set in use),
    ``cuda`` (nvcc's version and the architecture); the last two say why where there is no module.
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
    """The named backend, or the best for features like `image`.

    An explicit name (the argument, else FASTCLIP_BACKEND) that cannot serve raises RuntimeError and says why; an
    automatic choice falls through to the next.
    """
    if name is None:
        name = env.backend()
    if name is not None:
        check_name(name)
        module = _BACKENDS[name]
        reason = module.missing() or module.refuses(image, named=True)
        if reason:
            raise RuntimeError(f"backend={name!r} cannot serve this call: {reason}")
        return name, module
    for name in _OF_DEVICES.get(image.device.type, ()):
        module = _BACKENDS[name]
        if not (module.refuses(image, named=False) or module.missing()):
            return name, module
    return "reference", reference


def serving(name: str | None, p: Problem) -> ModuleType:
    """What computes a problem: `pick`'s choice, but the reference where an empty shard leaves nothing to compute.

    The log says, once a process, why the reference serves a caller who did not ask for it.
    """
    if p.image.shape[0] == 0 or p.text.shape[0] == 0:
        return reference
    return serving_pairs(name, p.image)


def serving_pairs(name: str | None, image: Tensor) -> ModuleType:
    """`serving` of features that are not empty."""
    module = pick(name, image)[1]
    if (
        module is reference and (name or env.backend()) is None and image.dtype in FUSED_DTYPES
    ):  # float64 is the reference's, as documented
        _warn_of_reference(image)
    return module


_warned: set[str] = set()  # devices


def _warn_of_reference(image: Tensor) -> None:
    device = image.device.type
    if device in _warned:
        return
    _warned.add(device)
    name = {"cpu": "cpu", "cuda": "triton"}.get(device, "")
    reason, todo = f"no other backend serves {device} tensors", ""
    if name:
        module = _BACKENDS[name]
        reason = str(module.missing() or module.refuses(image, named=False))
        todo = mending(name, reason)
    logger.warning(
        "dense torch computes the loss, stores the N x N similarities and takes several times as long: %s%s "
        "(with backend='reference' this line is not shown)",
        *(reason, todo and f"; what helps: {todo}"),
    )
