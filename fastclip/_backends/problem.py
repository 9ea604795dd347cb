"""The input of every backend, and the statistics that it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DTYPES", "FUSED_DTYPES", "Problem", "Side", "SideGrads", "Sides", "TeacherSide", "TeacherSides", "in_turn"]

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that backends other than the reference support
DTYPES = (*FUSED_DTYPES, torch.float64)


class Problem(NamedTuple):
    """The logits z_ij = scale r_i c_j <image_i, text_j>, and which of them are positives.

    r and c are the inverse norms of the rows if `normalize`, else 1.
    """

    image: Tensor  # (M, D)
    text: Tensor  # (N, D)
    scale: Tensor  # ()
    labels: tuple[Tensor, Tensor] | None = None  # (M,), (N,) int32: pairs with equal labels are positives
    offset: int = 0  # column i + offset is the text of image i, and its only positive if there are no labels
    exclude_self: bool = False  # with labels: pair (i, i + offset) is neither a positive nor a negative
    normalize: bool = True
    # (M,), (N,) fp32, or fp64 for fp64 features: a pair whose logit exceeds its row's limit is no negative of the row,
    # and a pair whose logit exceeds its column's limit is no negative of the column
    limits: tuple[Tensor, Tensor] | None = None


class Side(NamedTuple):
    """Statistics of the logits of every row (M,), or of every column (N,)."""

    neg: Tensor  # log-sum-exp over the negatives, -inf if there are none
    pos: Tensor  # sum over the positives, 0 if there are none
    pos_lse: Tensor  # log-sum-exp over the positives, -inf if there are none; of size 0 without labels
    inv_norm: Tensor  # r of the images, or c of the texts
    neg_top: Tensor | None = None  # largest negative, -inf if there is none; None unless maxima were requested
    pos_top: Tensor | None = None  # largest positive, -inf if there is none; None unless maxima were requested

    def tensors(self) -> list[Tensor]:
        """List the statistics that are not None, in the order of the fields, which is that of an op's outputs."""
        return [x for x in self if x is not None]


class SideGrads(NamedTuple):
    """Derivatives of the loss with respect to the statistics of one side. Inverse norms have no derivative."""

    neg: Tensor
    pos: Tensor
    pos_lse: Tensor


class TeacherSide(NamedTuple):
    """Statistics of the logits of K teachers of every row (K, M), or of every column (K, N)."""

    neg: Tensor  # log-sum-exp over the negatives, -inf if there are none
    pos: Tensor  # logit of the positive, 0 if there is none
    cosine: Tensor  # mean of the student's z / scale over the negatives with the weights exp(teacher's logit), or 0


Sides = tuple[Side, Side]  # of the rows, of the columns
TeacherSides = tuple[TeacherSide, TeacherSide]


def in_turn(rows: Sequence[Tensor], cols: Sequence[Tensor]) -> list[Tensor]:
    """Return each statistic of the rows, then of the columns: the order of the ops and of Triton's launchers."""
    return [x for pair in zip(rows, cols) for x in pair]
