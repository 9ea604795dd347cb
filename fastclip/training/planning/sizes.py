"""Sizes of a model, as far as they decide how much memory a training step takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from fastclip.models.dual_encoder import DualEncoder
from fastclip.training.ranks import fsdp_blocks

__all__ = ["Sizes", "sizes_of"]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, in elements unless noted."""

    parameters: int
    trainable: int
    buffers: int  # bytes
    block: int  # parameters of the largest block, which FSDP gathers separately
    rest: int  # parameters outside of all blocks, which stay gathered throughout a pass
    trainable_rest: int  # those of `rest` that are trained


def sizes_of(model: DualEncoder) -> Sizes:
    """Return the sizes of a model, which may be on the meta device."""
    parameters = list(model.parameters())
    blocks = list(fsdp_blocks(model))
    in_blocks = {id(p) for block in blocks for p in block.parameters()}
    rest = [p for p in parameters if id(p) not in in_blocks]
    return Sizes(
        parameters=_count(parameters),
        trainable=_count(p for p in parameters if p.requires_grad),
        buffers=sum(x.numel() * x.element_size() for x in model.buffers()),
        block=max((_count(block.parameters()) for block in blocks), default=0),
        rest=_count(rest),
        trainable_rest=_count(p for p in rest if p.requires_grad),
    )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
