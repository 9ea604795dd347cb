"""Labels in the form that the kernels take: small ids, counts of positives per row, and the rows that have a label."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip.losses.inputs.arguments import can_be_read
from fastclip.ops import batched

__all__ = ["KeptRows", "MatchedLabels", "keep_labelled", "match_labels"]


class MatchedLabels(NamedTuple):
    """Labels as small ids, and the number of positives of every image and text."""

    ids: tuple[Tensor, Tensor]  # (M,), (N,) int32; equal where the labels are equal
    image_count: Tensor  # (M,) int64: texts with the image's label
    text_count: Tensor  # (N,) int64: images with the text's label


def match_labels(image_labels: Tensor, text_labels: Tensor) -> MatchedLabels:
    """Return ids and counts of integer labels (M,) and (N,).

    Sorting avoids an M x N comparison, and no shape depends on the data. The id of a label is its first position among
    the sorted text labels. All image labels that no text has share the id -1.
    """
    image_labels, text_labels = image_labels.long(), text_labels.long()
    sorted_images, sorted_texts = image_labels.sort().values, text_labels.sort().values

    def count(labels: Tensor, among: Tensor) -> Tensor:
        return torch.searchsorted(among, labels, right=True) - torch.searchsorted(among, labels)

    image_count, text_count = count(image_labels, sorted_texts), count(text_labels, sorted_images)
    image_id = torch.where(image_count > 0, torch.searchsorted(sorted_texts, image_labels), -1)
    text_id = torch.searchsorted(sorted_texts, text_labels)
    return MatchedLabels((image_id.int(), text_id.int()), image_count, text_count)


class KeptRows(NamedTuple):
    """Indices of the images and texts that have a label, in ascending order, and the original sizes M and N."""

    images: Tensor  # int64, indices below M
    texts: Tensor  # int64, indices below N
    M: int
    N: int

    def of(self, rows: Any, columns: Any) -> tuple[Tensor, Tensor]:
        """Return the kept rows of two tensors (M, ...) and (N, ...)."""
        return rows.index_select(0, self.images), columns.index_select(0, self.texts)

    def spread(self, rows: Tensor, columns: Tensor, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """Scatter values of the kept rows and columns to full size, (M,) and (N,), with `fill` at the others."""
        sides = (rows, self.images, self.M), (columns, self.texts, self.N)
        row, column = (x.new_full((size,), fill).index_copy(0, places, x) for x, places, size in sides)
        return row, column


def keep_labelled(
    image_labels: Tensor | None,
    text_labels: Tensor | None,
    ignore_label: Any,
    exclude_self: bool,
    group: Any,
    equal_shards: bool,
) -> KeptRows | None:
    """Return the rows whose label is not `ignore_label`, or None to keep all rows.

    The host waits for the device, because it needs the number of remaining rows.

    Raises:
        TypeError: `ignore_label` is not an integer.
        ValueError: a label is -1 and `ignore_label` is None, labels are missing, all labels of a side are ignored, the
            ignored rows of images and texts differ although `exclude_self` is set, or the host cannot wait (under
            torch.compile or torch.func.vmap, in a CUDA graph, or if `equal_shards` is set).
    """
    labels = {"image": image_labels, "text": text_labels}
    if ignore_label is None:
        for side, y in labels.items():
            if y is not None and y.dtype.is_signed:
                _refuse_none(side, y)
        return None
    if isinstance(ignore_label, bool) or not hasattr(ignore_label, "__index__"):
        raise TypeError(f"ignore_label must be an integer or None, got {type(ignore_label).__name__}")
    ignored = operator.index(ignore_label)
    if image_labels is None or text_labels is None:
        raise ValueError("ignore_label needs image_labels and text_labels")
    equal_shards = equal_shards and group is not None
    captured = image_labels.is_cuda and torch.cuda.is_current_stream_capturing()
    if equal_shards or captured or torch.compiler.is_compiling() or batched(image_labels, text_labels):
        what = "equal_shards=True" if equal_shards else "torch.compile, CUDA graphs and torch.func.vmap"
        raise ValueError(
            f"ignore_label leaves out a data-dependent number of rows, which {what} cannot handle: filter the rows "
            f"before the call, features[labels != {ignored}] with labels[labels != {ignored}]"
        )
    images, texts = ((y.long() != ignored).nonzero().squeeze(1) for y in (image_labels, text_labels))
    for side, rows in (("image", images), ("text", texts)):
        if group is None and not len(rows):
            raise ValueError(f"no pair remains: every {side} label is ignore_label={ignored}")
    if exclude_self and not torch.equal(images, texts):
        raise ValueError("exclude_self needs ignore_label in the same rows of image_labels and text_labels")
    return KeptRows(images, texts, len(image_labels), len(text_labels))


def _refuse_none(side: str, labels: Tensor) -> None:
    """Raise ValueError if a label is -1.

    If reading the labels would make the host wait, or the call is traced, this is a device-side assertion, which
    raises a RuntimeError.
    """
    message = (
        f"{side}_labels contains -1: to leave these rows out, pass ignore_label=-1. If -1 is a class, number the "
        "classes from 0."
    )
    if can_be_read(labels):
        if bool((labels == -1).any()):
            raise ValueError(message)
    elif labels.device.type in ("cpu", "cuda", "meta") and not batched(labels):  # other devices may lack the assertion
        torch._assert_async((labels != -1).all(), message)
