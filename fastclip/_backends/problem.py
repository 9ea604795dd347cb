"""What every backend is handed."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Problem"]


class Problem(NamedTuple):
    """The logits z_ij = scale r_i c_j <image_i, text_j>, and which of them are positives.

    r, c are inverse norms when `normalize`, else 1.
    """

    image: Tensor  # (M, D)
    text: Tensor  # (N, D)
    scale: Tensor  # ()
    labels: tuple[Tensor, Tensor] | None  # (M,), (N,) int32: pairs with equal labels are positives
    offset: int  # row i's own column is i + offset: without labels its positive
    exclude_self: bool  # with labels: a row's own column is neither a positive nor a negative
    normalize: bool
