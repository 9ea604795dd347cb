"""Mining of hard negatives: the texts that are most similar to each image without belonging to it."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip._backends.problem import Problem
from fastclip._backends.reference import inv_norms, norms, unit_rows
from fastclip.distributed import Shards, check_group, gather_rows, reported, with_all_texts
from fastclip.losses.inputs.batch import Batch, prepare
from fastclip.losses.inputs.ties import TIE
from fastclip.losses.largest import largest
from fastclip.ops import no_autocast, transformed
from fastclip.system import env
from fastclip.system.rounding import ceil_div

__all__ = ["HardestNegatives", "hardest_negatives"]

_BYTES = 16  # per similarity of a block, beside its value: indices of equal ones, masks and what topk needs


class HardestNegatives(NamedTuple):
    """Result of `hardest_negatives`, detached and sorted from the most similar text to the least."""

    values: Tensor  # (M, k) similarities, fp32 or fp64; -inf where the image has fewer than k negatives
    indices: Tensor  # (M, k) int64, rows of the texts; -1 where the image has fewer than k negatives


def hardest_negatives(
    image_features: Tensor,
    text_features: Tensor,
    k: int,
    *,
    normalize: bool = True,
    image_labels: Tensor | None = None,
    text_labels: Tensor | None = None,
    exclude_self: bool = False,
    ignore_label: int | None = None,
    group: Any = None,
    equal_shards: bool = False,
    backend: str | None = None,
) -> HardestNegatives:
    """Find the k texts with the largest similarities to each image that are not its positives.

    The similarities are ``<image_i, text_j>``, cosines unless ``normalize=False``. They are computed block by block in
    one pass of 2 M N D operations, in a workspace of bounded size. Swap the arguments to find images for each text.
    There is no gradient: use the indices to select features, and pass these to a loss.

    Similarities that differ by at most 2^-20 ||image|| max ||text|| (2^-49 for float64 features) are equal, and equal
    ones are ordered by index, so that rounding and the size of the blocks do not change the order. If more than 8 texts
    besides the k are equal to the last of them, their block of images is computed twice.

    NaN is larger than every number: an image that contains NaN has NaN values with the indices of the first texts that
    are not its positives, and a text that contains NaN comes first for every image, with the value NaN.

    Args:
        image_features, text_features, normalize: as in `contrastive_loss`.
        k: number of texts per image, at least 1. An image with fewer negatives has the value -inf and the index -1 in
            the remaining columns.
        image_labels, text_labels: integers, (M,) and (N,). Every pair with equal labels is a positive. The batch may
            have no positive pair at all. Without labels, M = N and text i is the only positive of image i.
        exclude_self: with labels, leave out pair (i, i) as well, which is not a positive then.
        ignore_label: label that marks rows without a class. Such an image has no negatives, and such a text is the
            negative of no image.
        group: process group or device mesh over which the batch is sharded, as in `contrastive_loss`. The images of
            this rank are compared with the texts of all ranks, which are gathered.
        equal_shards: as in `contrastive_loss`.
        backend: a name from `fastclip.backends()`, which is checked as in `contrastive_loss`. The result does not
            depend on it, because all backends share this code.

    Returns:
        `HardestNegatives`: values (M, k), float32 (float64 for float64 features), and indices (M, k) int64. If
        ``group`` is given, the indices count the texts of all ranks in rank order. With N texts on every rank, index j
        is row ``j % N`` of rank ``j // N``.

    Raises:
        ValueError: k is below 1. Also the errors of `contrastive_loss`.
        TypeError: k is not an integer. Also the errors of `contrastive_loss`.
        RuntimeError: the call is under a torch.func transform or has forward-mode tangents. Also the errors of
            `contrastive_loss`.
    """
    group = check_group(group)
    with reported(group, equal_shards, image_features):
        k = _check_k(k)
        if transformed(image_features, text_features):
            raise RuntimeError(
                "hardest_negatives does not support torch.func transforms and forward-mode derivatives: call it "
                "outside of them"
            )
    with torch.no_grad():
        batch = prepare(
            image_features,
            text_features,
            1.0,
            normalize=normalize,
            image_labels=image_labels,
            text_labels=text_labels,
            exclude_self=exclude_self,
            ignore_label=ignore_label,
            label_smoothing=0.0,
            group=group,
            agreed={"function": "hardest_negatives", "k": k},
            equal_shards=equal_shards,
            backend=backend,
            needs_positive=False,
        )
        problem = batch.problem if batch.shards is None else with_all_texts(batch.problem, batch.shards)
        with no_autocast(problem.image.device):
            found = _search(problem, k)
        return found if batch.kept is None else _spread(found, batch)


def _check_k(k: Any) -> int:
    if isinstance(k, bool) or not hasattr(k, "__index__"):
        raise TypeError(f"k must be a positive integer, got {type(k).__name__}")
    if (k := operator.index(k)) < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return k


def _search(p: Problem, k: int) -> HardestNegatives:
    """Return the result for the images (M, D) and all texts (N, D) of a problem."""
    (M, N), device = (len(x) for x in p[:2]), p.image.device
    r, c = inv_norms(p.image, p.normalize), inv_norms(p.text, p.normalize)
    values = r.new_full((M, k), -torch.inf)
    indices = torch.full((M, k), -1, dtype=torch.int64, device=device)
    ties = _ties(p, r)
    room = env.workspace_bytes("cpu" if device.type == "cpu" else "cuda") // (r.element_size() + _BYTES)
    width = _even(N, math.isqrt(room))
    height = _even(M, min(math.isqrt(room), room // (width + 2 * min(k, N))))
    blocks = [slice(j, min(j + width, N)) for j in range(0, N, width)]
    for i in range(0, M, height):
        rows = slice(i, min(i + height, M))
        found = largest(_Negatives(p, r, c, rows), blocks, k, ties[rows], masked=True)
        at = rows, slice(found.values.shape[1])
        values[at], indices[at] = found.values, found.indices.where(found.values != -torch.inf, -1)
    return HardestNegatives(values, indices)


def _even(size: int, most: int) -> int:
    """Return the length of equal parts of `size` that are at most about `most` long, at least 1."""
    return max(ceil_div(size, ceil_div(size, max(most, 1)) or 1), 1)


def _ties(p: Problem, r: Tensor) -> Tensor:
    """Return the difference (M, 1) up to which two similarities of an image are equal."""
    near = TIE * torch.finfo(r.dtype).eps / torch.finfo(torch.float32).eps
    if p.normalize:
        return torch.full_like(r, near)[:, None]
    row, col = (torch.where(x.isfinite(), x, 0.0) for x in map(norms, (p.image, p.text)))
    return (near * row * col.amax()).to(r.dtype)[:, None]


def _sums_in_fp32(x: Tensor) -> bool:
    """Return True if torch's product of 16-bit features like `x` can have fp32 results, as on NVIDIA GPUs."""
    return x.dtype in (torch.bfloat16, torch.float16) and x.is_cuda and not torch.version.hip


class _Negatives:
    """The similarities of some rows (B, D) with any block of texts, with -inf in place of positives."""

    def __init__(self, p: Problem, r: Tensor, c: Tensor, rows: slice) -> None:
        self.p, self.r, self.c, self.rows = p, r, c, rows
        self.fused = _sums_in_fp32(p.image)
        self.image = p.image[rows] if self.fused else unit_rows(p.image[rows], r[rows])

    def __call__(self, block: slice) -> Tensor:
        p, rows = self.p, self.rows
        if self.fused:
            z = torch.mm(self.image, p.text[block].T, out_dtype=torch.float32)
            z *= self.r[rows, None]
            z *= self.c[block]
        else:
            z = torch.mm(self.image, unit_rows(p.text[block], self.c[block]).T)
        if p.labels is not None:
            z.masked_fill_(p.labels[0][rows, None] == p.labels[1][block], -torch.inf)
        if p.labels is None or p.exclude_self:
            shift = block.start - rows.start - p.offset  # the pairs (i, i + offset) are a diagonal of the block
            z[max(shift, 0) :, max(-shift, 0) :].diagonal().fill_(-torch.inf)
        return z


def _spread(found: HardestNegatives, batch: Batch) -> HardestNegatives:
    """Return the result for the caller's rows, from that for the rows whose label is not ignored."""
    assert batch.kept is not None
    images, texts, M, N = batch.kept
    if batch.shards is not None:
        texts = _places(texts, N, batch.shards)
    indices = torch.where(found.indices >= 0, texts[found.indices.clamp_min(0)], -1)
    values = found.values.new_full((M, found.values.shape[1]), -torch.inf)
    return HardestNegatives(
        values.index_copy(0, images, found.values),
        torch.full_like(values, -1, dtype=torch.int64).index_copy(0, images, indices),
    )


def _places(texts: Tensor, N: int, shards: Shards) -> Tensor:
    """Return the places of all ranks' remaining texts among all texts, ignored ones included.

    texts: rows of this rank's remaining texts among its N texts.
    """
    sizes = gather_rows(texts.new_tensor([N]), [1] * shards.ranks, shards.group)
    first = sizes[: shards.rank].sum()
    return gather_rows(texts + first, shards.texts, shards.group, after=sizes)
