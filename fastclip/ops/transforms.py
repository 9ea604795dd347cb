"""Calls under torch.func transforms and forward mode, which need torch's formula for every operation.

A custom op hides its formula from torch, and its tangent would be 0. In these cases the losses are computed by the
reference backend, which consists of plain torch operations.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastclip._backends import check_name
from fastclip.system import env

__all__ = ["TENSORS", "batched", "direct", "needs_dense", "recorded", "transformed"]

TENSORS = {Tensor, torch.nn.Parameter}  # not their subclasses
logger = logging.getLogger(__name__)
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
_warned = False


def transformed(*values: Tensor | float) -> bool:
    """Return True under a torch.func transform (grad, vmap, jvp, ...), or if a tensor has a forward-mode tangent."""
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in values)


def recorded(*tensors: Tensor) -> bool:
    """Return True if calls are recorded or replaced by a trace, a dispatch mode or a tensor subclass.

    torch.compile is not covered: callers check it themselves.
    """
    if torch._C._is_tracing() or torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH):  # make_fx and torch.export
        return True
    if not tensors:
        return False
    return not {type(x) for x in tensors} <= TENSORS


def direct(d_loss: Tensor) -> bool:
    """Return True if a kernel may read the upstream gradient d_loss at its address.

    False if torch must see the operations on it: under torch.func transforms and in forward mode, in batches of
    torch.autograd (is_grads_batched), under dispatch modes, for subclasses and for lazily negated tensors.
    """
    return (
        type(d_loss) in TENSORS
        and forward_ad._current_level < 0
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._functorch.is_legacy_batchedtensor(d_loss)
        and not d_loss.is_neg()
    )


def batched(*tensors: Tensor) -> bool:
    """Return True if torch.func.vmap maps over one of the tensors."""
    return any(torch._C._functorch.is_batchedtensor(x) for x in tensors)


def needs_dense(backend: str | None, *tensors: Tensor) -> bool:
    """Return True if the reference must compute the loss, because the call is `transformed`.

    A warning is logged once per process. Raise RuntimeError if a backend other than the reference was named.
    """
    global _warned
    if not transformed(*tensors):
        return False
    name = backend or env.backend()
    check_name(name)
    if name not in (None, "reference"):
        raise RuntimeError(
            f"backend={name!r} cannot serve this call: torch.func transforms and forward-mode derivatives need the "
            f"reference backend. Pass backend='reference', or pass backend=None and unset FASTCLIP_BACKEND"
        )
    if name is None and not _warned and not torch.compiler.is_compiling():
        _warned = True
        logger.warning(
            "under torch.func transforms and in forward mode the reference backend computes the loss, and stores the "
            "N x N similarities (pass backend='reference' to silence this warning)"
        )
    return True
