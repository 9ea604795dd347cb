"""The CPU backend: blocks of logits by torch.mm into one reused buffer, then one native pass a block (csrc/cpu).

The block is bounded by FASTCLIP_WORKSPACE_MB; nothing M x N exists. Features in fp32 are used where they lie, 16-bit
ones become fp32 block by block.
"""

from __future__ import annotations

import importlib
import importlib.resources
import math
import threading
from typing import Any

import torch
from torch import Tensor

from fastclip import _env
from fastclip._backends.reference import EPS, inv_norms

__all__ = ["contrastive_bwd", "contrastive_fwd", "missing", "refuses"]

_LOG2E, _LN2 = math.log2(math.e), math.log(2)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK_M = 4096  # rows of a block, where the workspace allows: short products are slow
_LARGE_NORM = 2.0**40  # norms beyond it could overflow the fp32 product of two unnormalised rows

_native: Any = None
_missing: str | None = None
try:
    _native = importlib.import_module("fastclip._cpu")
except ImportError as error:
    _missing = f"the native module fastclip._cpu does not load ({error})"
    _report = importlib.resources.files("fastclip") / "_build_report.txt"
    if _report.is_file():
        _missing = f"the native module was not built: {_report.read_text().strip()}"
else:
    try:
        _native.select_isa(_env.cpu_isa())
    except ValueError:
        _missing = f"FASTCLIP_CPU_ISA={_env.cpu_isa()!r} is not one that this processor runs"


def missing() -> str | None:
    return _missing


def refuses(image: Tensor) -> str | None:
    if image.device.type != "cpu":
        return f"it serves CPU tensors, not {image.device.type}"
    if image.dtype not in _DTYPES:
        return f"it serves float32, bfloat16 and float16, not {str(image.dtype).removeprefix('torch.')}"
    return None


def _blocks(size: int, block: int) -> list[tuple[int, int]]:
    return [(start, min(start + block, size)) for start in range(0, size, block)]


def _inv_norms(x: Tensor, normalize: bool) -> Tensor:
    """As `reference.inv_norms`, in fp32 where the squares allow it."""
    if normalize:
        norm = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
        if not norm.isinf().any():
            return norm.clamp_min(EPS).reciprocal()
    return inv_norms(x, normalize)


class _Features:
    """One side's rows as the products see them: fp32, `inv_norm` still to be multiplied in."""

    def __init__(self, x: Tensor, inv_norm: Tensor, normalize: bool) -> None:
        self.inv_norm = inv_norm.float().contiguous()  # what the kernels multiply a dot product with
        self.outer = None  # what remains of 1 / norm when the products get unit rows
        if normalize and x.numel() and inv_norm.amin() * _LARGE_NORM < 1:
            x = (x.double() * inv_norm.double()[:, None]).float()
            self.outer, self.inv_norm = inv_norm, torch.ones_like(self.inv_norm)
        # Where the norm was clamped it is a constant, and the gradient is not projected.
        self.projection = torch.where(inv_norm * EPS < 1, self.inv_norm.square(), 0.0) if normalize else None
        self.x = x if 1 in x.stride() or x.numel() == 0 else x.contiguous()
        self.block: Tensor | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        """fp32 rows, to be used before the next call: 16-bit ones share one buffer."""
        if self.x.dtype == torch.float32:
            return self.x[start:stop]
        if self.block is None or self.block.shape[0] < stop - start:
            self.block = torch.empty(stop - start, self.x.shape[1])
        return self.block[: stop - start].copy_(self.x[start:stop])

    def finish(self, raw: Tensor, start: int, stop: int, factor: float, out: Tensor) -> None:
        """out = factor (raw - u <u, raw>), u the unit rows; raw (stop - start, D) fp32 is overwritten."""
        if self.projection is not None:
            x = self.rows(start, stop)
            along = torch.linalg.vecdot(raw, x) * self.projection[start:stop]
            raw.addcmul_(x, along[:, None], value=-1)
        if self.outer is not None:
            raw.mul_(self.outer[start:stop, None])
        torch.mul(raw, factor, out=raw)
        if out.data_ptr() != raw.data_ptr():
            out.copy_(raw)


class _Workspace(threading.local):
    """This thread's buffer of logits, kept between calls: fresh pages cost more than a pass over them (8 ms for 32
    MiB), and the block that a forward pass leaves in it needs no second product in the backward pass that follows.
    """

    buffer: Tensor | None = None
    # Whose block of dot products the buffer holds, and which one. A forward pass is known by its inverse norms, which
    # it made itself: while this reference lives, no other tensor can be at their address.
    owner: Tensor | None = None
    block: tuple[int, int, int, int] | None = None

    def reserve(self, size: int) -> Tensor:
        if self.buffer is None or self.buffer.numel() < size or self.buffer.numel() * 4 > _env.workspace_bytes():
            self.forget()
            self.buffer = None  # freed before the new one is made
            self.buffer = torch.empty(size)
        return self.buffer

    def keep(self, owner: Tensor, block: tuple[int, int, int, int]) -> None:
        self.owner, self.block = owner, block

    def forget(self) -> None:
        self.owner = self.block = None

    def holds(self, owner: Tensor, block: tuple[int, int, int, int]) -> bool:
        return self.owner is not None and self.owner.data_ptr() == owner.data_ptr() and self.block == block


_workspace = _Workspace()


class _Plan:
    """Cuts the problem into blocks of at most the workspace's size, the matrix product of each into one buffer."""

    def __init__(self, image: _Features, text: _Features) -> None:
        self.image, self.text = image, text
        self.M, self.N = image.x.shape[0], text.x.shape[0]
        floats = _env.workspace_bytes() // 4
        copied = 0 if image.x.dtype == torch.float32 else image.x.shape[1]
        # 16-bit features need fp32 room out of the same workspace: d_text, the block's rows and their d_image
        floats -= min(self.N * copied, floats // 2)
        self.block_m = min(self.M, _BLOCK_M, max(floats // 256, 64))
        self.block_n = min(self.N, max((floats - 2 * self.block_m * copied) // (self.block_m + copied), 64))
        self.buffer = _workspace.reserve(self.block_m * self.block_n)

    def row_blocks(self) -> list[tuple[int, int]]:
        return _blocks(self.M, self.block_m)

    def column_blocks(self) -> list[tuple[int, int]]:
        return _blocks(self.N, self.block_n)

    def dots(self, image_rows: Tensor, text_rows: Tensor, block: tuple[int, int, int, int], owner: Tensor) -> Tensor:
        """<I_i, T_j> of a block (i0, i1, j0, j1) of the forward pass `owner`, computed unless the buffer has it."""
        i0, i1, j0, j1 = block
        dot = self.buffer[: (i1 - i0) * (j1 - j0)].view(i1 - i0, j1 - j0)
        if not _workspace.holds(owner, block):
            _workspace.forget()
            torch.mm(image_rows, text_rows.T, out=dot)
        return dot


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _block(dot: Tensor, i0: int, j0: int, offset: int) -> Any:
    M, N = dot.shape
    return _native.Block(dot=dot.data_ptr(), row_stride=dot.stride(0), M=M, N=N, i0=i0, j0=j0, offset=offset)


def _int32(labels: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    if labels is None:
        return None, None
    return labels[0].int().contiguous(), labels[1].int().contiguous()


def _factors(image: _Features, text: _Features, scale: float) -> tuple[dict[str, Tensor | None], ...]:
    """z in units of log 2 is dot times these: (M,) with the scale and log2 e, and what rounding took from it; (N,).

    Scale and log2 e rounded would shift logits of 1,000 by 3e-5, all in the same direction.
    """
    exact = image.inv_norm.double() * (scale * _LOG2E)
    high = exact.float()
    low = torch.where(high.isfinite(), exact - high, 0.0).float()
    return {"factor": high, "factor_low": low}, {"factor": text.inv_norm, "factor_low": None}


class _State:
    """Running statistics of one side: fp64, in units of log 2."""

    def __init__(self, size: int, factors: dict[str, Tensor | None], label: Tensor | None) -> None:
        self.has_labels = label is not None
        self.neg_max, self.neg_sum, self.pos, self.pos_max, self.pos_sum = torch.zeros(5, size, dtype=torch.float64)
        names = ("neg_max", "neg_sum", "pos", "pos_max", "pos_sum")
        tensors = {**factors, "label": label, **{name: getattr(self, name) for name in names}}
        self.native = _native.FwdSide(**{name: _pointer(x) for name, x in tensors.items()})

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """neg, pos, pos_lse: fp64, natural units."""
        neg = (self.neg_max + self.neg_sum.log2()) * _LN2
        if not self.has_labels:
            return neg, self.pos * _LN2, neg.new_empty(0)
        return neg, self.pos * _LN2, (self.pos_max + self.pos_sum.log2()) * _LN2


def contrastive_fwd(
    image: Tensor, text: Tensor, scale: Tensor, labels: tuple[Tensor, Tensor] | None, offset: int, normalize: bool
) -> tuple[Tensor, ...]:
    """As `reference.contrastive_fwd`."""
    r, c = _inv_norms(image, normalize), _inv_norms(text, normalize)
    plan = _Plan(_Features(image, r, normalize), _Features(text, c, normalize))
    image_label, text_label = _int32(labels)
    image_factors, text_factors = _factors(plan.image, plan.text, float(scale))
    rows, cols = _State(plan.M, image_factors, image_label), _State(plan.N, text_factors, text_label)
    threads = torch.get_num_threads()
    for i0, i1 in plan.row_blocks():
        images = plan.image.rows(i0, i1)
        for j0, j1 in plan.column_blocks():
            dot = plan.dots(images, plan.text.rows(j0, j1), (i0, i1, j0, j1), r)
            _native.contrastive_fwd(_block(dot, i0, j0, offset), rows.native, cols.native, threads)
            _workspace.keep(r, (i0, i1, j0, j1))
    row_neg, row_pos, row_pos_lse = rows.results()
    col_neg, col_pos, col_pos_lse = cols.results()
    return row_neg, col_neg, row_pos, col_pos, row_pos_lse, col_pos_lse, r, c


class _Weights:
    """What the backward pass needs of one side, fp32, log-sum-exps in units of log 2."""

    def __init__(
        self,
        factors: dict[str, Tensor | None],
        inv_norm: Tensor,
        label: Tensor | None,
        neg: Tensor,
        pos_lse: Tensor,
        grads: tuple[Tensor, Tensor, Tensor],
        gain: float,
    ) -> None:
        d_neg, d_pos, d_pos_lse = (d * gain for d in grads)
        self.tensors: dict[str, Tensor | None] = {**factors, "inv_norm": inv_norm, "label": label}
        self.tensors["neg"], self.tensors["d_neg"] = _exact_weight(neg, d_neg)
        self.tensors["d_pos"] = d_pos.float().contiguous()
        self.tensors["pos_lse"], self.tensors["d_pos_lse"] = (
            (None, None) if label is None else _exact_weight(pos_lse, d_pos_lse)
        )
        self.native = _native.BwdSide(**{name: _pointer(x) for name, x in self.tensors.items()})


def _exact_weight(lse: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 (lse, d) in units of log 2 with the same d exp(z - lse): what rounding takes from lse goes into d."""
    exact = lse.double() * _LOG2E
    rounded = exact.float()
    lost = torch.where(rounded.isfinite(), exact - rounded, 0.0)
    return rounded, (d.double() * torch.exp2(-lost)).float()


def _gain(grads: list[Tensor]) -> float:
    """A power of two that brings the largest upstream gradient near 1, so that a confident loss's weights, 1e-30 and
    less, neither flush to zero nor slow the products down as subnormals."""
    largest = max((float(d.abs().amax()) for d in grads if d.numel()), default=0.0)
    if not math.isfinite(largest) or largest == 0.0:
        return 1.0
    return 2.0 ** -math.frexp(largest)[1]


def contrastive_bwd(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    labels: tuple[Tensor, Tensor] | None,
    offset: int,
    normalize: bool,
    stats: list[Tensor],
    grads: list[Tensor],
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `reference.contrastive_bwd`."""
    row_neg, col_neg, _, _, row_pos_lse, col_pos_lse, r, c = stats
    plan = _Plan(_Features(image, r, normalize), _Features(text, c, normalize))
    image_label, text_label = _int32(labels)
    s, gain = float(scale), _gain(grads)
    image_factors, text_factors = _factors(plan.image, plan.text, s)
    row_grads, col_grads = (grads[0], grads[2], grads[4]), (grads[1], grads[3], grads[5])
    rows = _Weights(image_factors, plan.image.inv_norm, image_label, row_neg, row_pos_lse, row_grads, gain)
    cols = _Weights(text_factors, plan.text.inv_norm, text_label, col_neg, col_pos_lse, col_grads, gain)

    D = image.shape[1]
    d_image = image.new_empty(image.shape) if needs[0] else None
    d_text = text.new_empty(text.shape) if needs[1] else None
    # fp32 gradients are accumulated where they are returned
    raw_text = d_text if d_text is None or d_text.dtype == torch.float32 else torch.empty(plan.N, D)
    threads = torch.get_num_threads()
    raw_block = None if d_image is None or d_image.dtype == torch.float32 else torch.empty(plan.block_m, D)
    d_scale = 0.0
    # The blocks in the opposite order of the forward pass, whose last one may still be in the workspace
    for i, (i0, i1) in enumerate(reversed(plan.row_blocks())):
        images = plan.image.rows(i0, i1)
        raw_image = None
        if d_image is not None:
            raw_image = d_image[i0:i1] if raw_block is None else raw_block[: i1 - i0]
        for j, (j0, j1) in enumerate(reversed(plan.column_blocks())):
            texts = plan.text.rows(j0, j1)
            weights = plan.dots(images, texts, (i0, i1, j0, j1), r)
            _workspace.forget()
            d_scale += _native.contrastive_bwd(_block(weights, i0, j0, offset), rows.native, cols.native, threads)
            if raw_image is not None:
                torch.addmm(raw_image, weights, texts, beta=min(j, 1), out=raw_image)
            if raw_text is not None:
                rows_of_text = raw_text[j0:j1]
                torch.addmm(rows_of_text, weights.T, images, beta=min(i, 1), out=rows_of_text)
        if d_image is not None and raw_image is not None:
            plan.image.finish(raw_image, i0, i1, s / gain, d_image[i0:i1])
    if d_text is not None and raw_text is not None:
        for j0, j1 in _blocks(plan.N, _BLOCK_M):
            plan.text.finish(raw_text[j0:j1], j0, j1, s / gain, d_text[j0:j1])
    d_scale_tensor = scale.new_tensor(d_scale / gain) if needs[2] else None
    return d_image, d_text, d_scale_tensor
