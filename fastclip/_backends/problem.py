"""What every backend is handed, and the statistics that it hands back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DTYPES", "FUSED_DTYPES", "Problem", "Side", "SideGrads", "Sides", "in_turn"]

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what a backend besides the reference may serve
DTYPES = (*FUSED_DTYPES, torch.float64)


class Problem(NamedTuple):
    """The logits z_ij = scale r_i c_j <image_i, text_j>, and which of them are positives.

    r, c are inverse norms when `normalize`, else 1.
    """

    image: Tensor  # (M, D)
    text: Tensor  # (N, D)
    scale: Tensor  # ()
    labels: tuple[Tensor, Tensor] | None = None  # (M,), (N,) int32: pairs with equal labels are positives
    offset: int = 0  # row i's own column is i + offset: without labels its positive
    exclude_self: bool = False  # with labels: a row's own column is neither a positive nor a negative
    normalize: bool = True


class Side(NamedTuple):
    """Statistics of the logits of every row (M,), or of every column (N,)."""

    neg: Tensor  # log-sum-exp over the negatives, -inf where there are none
    pos: Tensor  # sum over the positives, 0 where there are none
    pos_lse: Tensor  # log-sum-exp over the positives, -inf where there are none; of size 0 without labels
    inv_norm: Tensor  # the r or c of the features
    neg_top: Tensor | None = None  # largest negative, -inf where there is none; None unless maxima are asked for
    pos_top: Tensor | None = None  # largest positive, likewise

    def tensors(self) -> list[Tensor]:
        """List the statistics that are not None, in the order of the fields, which is that of an op's outputs."""
        return [x for x in self if x is not None]


class SideGrads(NamedTuple):
    """The loss's derivatives by one side's statistics; by inverse norms there are none."""

    neg: Tensor
    pos: Tensor
    pos_lse: Tensor


Sides = tuple[Side, Side]  # of the rows, of the columns


def in_turn(rows: Sequence[Tensor], cols: Sequence[Tensor]) -> list[Tensor]:
    """List of each statistic the rows', then the columns': the order of the ops' tensors, and of Triton's launchers."""
    return [x for pair in zip(rows, cols) for x in pair]
