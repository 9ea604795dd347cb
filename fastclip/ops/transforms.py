"""What torch differentiates or batches by its own formulas only: torch.func's transforms and forward mode.

An op hides its formula from them: its tangent would be 0. There the losses are the reference's dense torch.
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
    """Return True where calls are recorded or imitated by a trace, a dispatch mode or a subclass.

    Whoever asks has seen to torch.compile.
    """
    if torch._C._is_tracing() or torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH):  # make_fx and torch.export
        return True
    if not tensors:
        return False
    return not {type(x) for x in tensors} <= TENSORS


def direct(d_loss: Tensor) -> bool:
    """Return True for an upstream gradient that a kernel may read at its address.

    False where torch has to see what is done with it: in transforms and forward mode, in the batches of torch.autograd
    (is_grads_batched), in dispatch modes, for subclasses and for what is negated lazily.
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
    """Return True if torch.func.vmap runs over one of them."""
    return any(torch._C._functorch.is_batchedtensor(x) for x in tensors)


def needs_dense(backend: str | None, *tensors: Tensor) -> bool:
    """Return True where dense torch has to serve, as `transformed` says; the log tells it once a process.

    Raises RuntimeError if another backend than the reference was asked for by name.
    """
    global _warned
    if not transformed(*tensors):
        return False
    name = backend or env.backend()
    check_name(name)
    if name not in (None, "reference"):
        raise RuntimeError(
            f"backend={name!r} cannot serve this call: torch.func's transforms and forward-mode derivatives need "
            f"dense torch; pass backend='reference' or leave the choice open"
        )
    if name is None and not _warned and not torch.compiler.is_compiling():
        _warned = True
        logger.warning(
            "dense torch computes the loss under torch.func's transforms and in forward mode, and stores the N x N "
            "similarities (with backend='reference' this line is not shown)"
        )
    return True
