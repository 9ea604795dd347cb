"""The contrastive statistics and their gradients, as `reference` defines them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fastclip._backends.cpu import native
from fastclip._backends.cpu.blocks import (
    Plan,
    factors,
    features_of,
    inv_norms,
    native_block,
    workspace,
)
from fastclip._backends.native import address
from fastclip._backends.problem import Problem, Side, SideGrads, Sides

__all__ = ["LOG2E", "State", "Weights", "contrastive_bwd", "contrastive_fwd", "gain_of"]

LOG2E, _LN2 = math.log2(math.e), math.log(2)


def _in_log2(limits: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the limits in units of log 2, fp32."""
    if limits is None:
        return None, None
    return (limits[0].double() * LOG2E).float(), (limits[1].double() * LOG2E).float()


def _int32(labels: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    if labels is None:
        return None, None
    return labels[0].int().contiguous(), labels[1].int().contiguous()


class State:
    """Running statistics of one side, in fp64 and in units of log 2."""

    def __init__(
        self,
        size: int,
        factors: dict[str, Tensor | None],
        label: Tensor | None,
        limit: Tensor | None = None,
        maxima: bool = False,
        other_factor: Tensor | None = None,
    ) -> None:
        self.has_labels = label is not None
        self.neg_max, self.neg_sum, self.pos, self.pos_max, self.pos_sum, self.neg_other = torch.zeros(
            6, size, dtype=torch.float64, device="cpu"
        )
        names = ("neg_max", "neg_sum", "pos", "pos_max", "pos_sum")
        self.limit = limit  # kept alive
        tensors = {**factors, "label": label, "limit": limit, **{name: getattr(self, name) for name in names}}
        tops = torch.full((2, size if maxima else 0), -torch.inf, dtype=torch.float32, device="cpu")
        self.neg_top, self.pos_top = tops
        tensors["neg_top"] = self.neg_top if maxima else None
        tensors["pos_top"] = self.pos_top if maxima and self.has_labels else None
        tensors["other_factor"] = other_factor
        tensors["neg_other"] = None if other_factor is None else self.neg_other
        self.native = native.module.FwdSide(**{name: address(x) for name, x in tensors.items()})

    def results(self, inv_norm: Tensor) -> Side:
        """Return all statistics except the maxima, in fp64 and natural units."""
        neg = (self.neg_max + self.neg_sum.log2()) * _LN2
        pos_lse = (self.pos_max + self.pos_sum.log2()) * _LN2 if self.has_labels else neg.new_empty(0)
        return Side(neg, self.pos * _LN2, pos_lse, inv_norm)

    def maxima(self, offset: int, across: int) -> tuple[Tensor, Tensor]:
        """Return the largest negative and the largest positive, in fp64 and natural units, -inf if there are none.

        Without labels the positive of k is number k + offset of the `across` rows on the other side.
        """
        pos_top = self.pos_top
        if not self.has_labels:
            partner = torch.arange(len(self.pos), device="cpu") + offset
            pos_top = torch.where((partner >= 0) & (partner < across), self.pos, -torch.inf)
        return self.neg_top.double() * _LN2, pos_top.double() * _LN2


def contrastive_fwd(p: Problem, maxima: bool = False) -> Sides:
    """Compute `reference.contrastive_fwd`."""
    r, c = inv_norms(p.image, p.normalize), inv_norms(p.text, p.normalize)
    image, image_inv_norm = features_of(p.image, r, p.normalize)
    text, text_inv_norm = features_of(p.text, c, p.normalize)
    plan = Plan(image, text)
    image_label, text_label = _int32(p.labels)
    image_factors, text_factors = factors(image_inv_norm, text_inv_norm, float(p.scale) * LOG2E)
    row_limit, col_limit = _in_log2(p.limits)
    row_state = State(image.M, image_factors, image_label, row_limit, maxima)
    col_state = State(text.M, text_factors, text_label, col_limit, maxima)
    for block in plan.blocks:
        _, dots = plan.dots(block)
        native_dot = native_block(dots, p.offset, p.exclude_self)
        native.module.contrastive_fwd(native_dot, row_state.native, col_state.native, plan.workers)
        workspace.keep(r, block)
    rows, cols = row_state.results(r), col_state.results(c)
    if not maxima:
        return rows, cols
    (row_neg, row_pos), (col_neg, col_pos) = row_state.maxima(p.offset, text.M), col_state.maxima(-p.offset, image.M)
    return rows._replace(neg_top=row_neg, pos_top=row_pos), cols._replace(neg_top=col_neg, pos_top=col_pos)


class Weights:
    """Inputs of the backward pass for one side, in fp32, with log-sum-exps in units of log 2."""

    def __init__(
        self,
        factors: dict[str, Tensor | None],
        inv_norm: Tensor,
        label: Tensor | None,
        stats: Side,
        grads: SideGrads,
        gain: float,
        limit: Tensor | None = None,
    ) -> None:
        d_neg, d_pos, d_pos_lse = (d * gain for d in grads)
        self.tensors: dict[str, Tensor | None] = {**factors, "inv_norm": inv_norm, "label": label, "limit": limit}
        self.tensors["neg"], self.tensors["d_neg"] = _exact_weight(stats.neg, d_neg)
        self.tensors["d_pos"] = d_pos.float().contiguous()
        self.tensors["pos_lse"], self.tensors["d_pos_lse"] = (
            (None, None) if label is None else _exact_weight(stats.pos_lse, d_pos_lse)
        )
        self.native = native.module.BwdSide(**{name: address(x) for name, x in self.tensors.items()})


def _exact_weight(lse: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Return lse rounded to fp32, in units of log 2, and d adjusted so that the weight d exp(z - lse) is unchanged.

    d is the upstream gradient of lse. It is multiplied by the factor that compensates the rounding error of lse, except
    if |lse| is above 2^40, where a float64 has no digits left for the error.
    """
    exact = lse.double() * LOG2E
    rounded = exact.float()
    lost = torch.where(rounded.abs() < 2.0**40, exact - rounded, 0.0)
    return rounded, (d.double() * torch.exp2(-lost)).float()


def gain_of(grads: Iterable[Tensor]) -> float:
    """Return a power of two that scales the largest upstream gradient to about 1.

    Without this factor, upstream gradients of 1e-30 or less would give weights that are flushed to zero, or subnormal
    weights, which slow the products down.
    """
    largest = max((float(d.abs().amax()) for d in grads if d.numel()), default=0.0)
    if not math.isfinite(largest) or largest == 0.0:
        return 1.0
    return 2.0 ** -math.frexp(largest)[1]


def contrastive_bwd(
    p: Problem, stats: Sides, grads: tuple[SideGrads, SideGrads], needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute `reference.contrastive_bwd`."""
    (rows, cols), (d_rows, d_cols) = stats, grads
    image, image_inv_norm = features_of(p.image, rows.inv_norm, p.normalize)
    text, text_inv_norm = features_of(p.text, cols.inv_norm, p.normalize)
    plan = Plan(image, text, owner=rows.inv_norm)
    image_label, text_label = _int32(p.labels)
    s, gain = float(p.scale), gain_of((*d_rows, *d_cols))
    image_factors, text_factors = factors(image_inv_norm, text_inv_norm, s * LOG2E)
    row_limit, col_limit = _in_log2(p.limits)
    row_weights = Weights(image_factors, image_inv_norm, image_label, rows, d_rows, gain, row_limit)
    col_weights = Weights(text_factors, text_inv_norm, text_label, cols, d_cols, gain, col_limit)
    d_image = p.image.new_empty(p.image.shape) if needs[0] else None
    d_text = p.text.new_empty(p.text.shape) if needs[1] else None
    d_scale = 0.0
    for dots in plan.backward(s / gain, d_image, d_text):
        native_dot = native_block(dots, p.offset, p.exclude_self)
        d_scale += native.module.contrastive_bwd(native_dot, row_weights.native, col_weights.native, plan.workers)
    return d_image, d_text, p.scale.new_tensor(d_scale / gain) if needs[2] else None
