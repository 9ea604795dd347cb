"""Limits of the negatives: pairs far above the positive of their row or column are probably no negatives."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastclip._backends.problem import Problem
from fastclip._backends.reference import inv_norms, norms, unit_rows
from fastclip.distributed import Shards, gather_rows, largest_over_ranks, sharded_statistics
from fastclip.losses.inputs.arguments import number
from fastclip.losses.inputs.ties import TIE
from fastclip.ops import contrastive_statistics, no_autocast

__all__ = ["check_margin", "negative_limits", "ties"]

_Pair = tuple[Tensor, Tensor]  # (of the rows, of the columns)


def check_margin(negative_margin: Any) -> float | None:
    """Return the margin as a float, or None. Raise TypeError unless it is a number, ValueError unless it is finite."""
    if negative_margin is None:
        return None
    margin = number("negative_margin", negative_margin, "a number or None")
    if not -math.inf < margin < math.inf:
        raise ValueError(f"negative_margin must be finite or None, got {negative_margin}")
    return margin


def ties(p: Problem, shards: Shards | None, after: Tensor | None = None) -> _Pair:
    """Return the differences below which rounding decides between two logits: of a row (M,) and of a column (N,).

    With shards, the texts of `p` are those of this rank, and `after` is the result of the previous collective.
    """
    near = p.scale.abs() * TIE
    if p.normalize:
        return near.expand(len(p.image)), near.expand(len(p.text))
    row, col = norms(p.image), norms(p.text)
    if shards is None:
        row_top, col_top = row.amax(), col.amax()
    else:
        row_top, col_top = largest_over_ranks((row, col), shards, after).unbind()
    return near * row * col_top, near * col * row_top


@torch.no_grad()
def negative_limits(
    p: Problem, margin: float, counts: _Pair | None, shards: Shards | None, comm: str, backend: str | None
) -> _Pair:
    """Return the `limits` of a problem: the positive logit of a row or column, plus the margin and the tie.

    With several positives it is their mean, which takes one more product of the features. Without a positive the limit
    is infinite. With shards, `p` has the texts of this rank, and the result has the limits of this rank's images and of
    all texts.
    """
    sides = _positive_logits(p, counts, shards, comm, backend)
    near = margin * p.scale.abs()
    dtype = p.scale.dtype
    margins = ties(p, shards, after=sides[1])
    row, col = ((positive + near + tie).to(dtype) for positive, tie in zip(sides, margins))
    if shards is not None:
        col = gather_rows(col, shards.texts, shards.group, after=row)
    return row, col


def _positive_logits(p: Problem, counts: _Pair | None, shards: Shards | None, comm: str, backend: str | None) -> _Pair:
    """Return the mean positive logit of every row and of every column, infinite where there is none."""
    if counts is None:
        with no_autocast(p.image.device):
            image, text = (unit_rows(x, inv_norms(x, p.normalize)) for x in (p.image, p.text))
            diagonal = torch.linalg.vecdot(p.scale * image, text)
        return diagonal, diagonal
    sides = contrastive_statistics(p, backend) if shards is None else sharded_statistics(p, shards, comm, backend)
    row, col = (torch.where(count > 0, side.pos / count.clamp_min(1), torch.inf) for side, count in zip(sides, counts))
    return row, col
