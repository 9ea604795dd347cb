"""How many numbers a model holds, and how FSDP parts them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from fastclip.models.dual_encoder import DualEncoder
from fastclip.training.parallel import fsdp_blocks

__all__ = ["Sizes", "sizes_of"]


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements of a model."""

    parameters: int
    trainable: int
    buffers: int  # bytes
    block: int  # of the largest block that FSDP gathers by itself
    rest: int  # of what is in no such block, gathered as long as a pass lasts
    trainable_rest: int


def sizes_of(model: DualEncoder) -> Sizes:
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
