"""The micro-batches of a step on the training device, with texts of like length together and without their padding.

The image tower and the text tower of a model meet only in the loss. A step may therefore embed the texts of its batch
in another order than the images, as long as the loss finds the features of a pair in the same row. Texts are sorted by
length, so that a call of the text tower takes texts of about the same length, cut to the longest of them. The features
are the same to rounding, because padding influences no feature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastclip.data.batch import Batch
from fastclip.models.dual_encoder import DualEncoder
from fastclip.system.rounding import ceil_div

__all__ = ["MicroBatch", "TextOrder", "by_length", "micro_batches", "to_device"]


class MicroBatch:
    """Images and texts of one micro-batch on the device. The texts need not belong to the images."""

    def __init__(self, images: Tensor, ids: tuple[Tensor, ...], copied: Any = None) -> None:
        self._images, self._ids, self._copied = images, ids, copied

    def arguments(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the images and the token ids, in groups of texts of like length, once the device has received them."""
        if self._copied is not None:
            stream = torch.cuda.current_stream(self._images.device)
            stream.wait_event(self._copied)
            self._images.record_stream(stream)  # the memory was allocated on the stream that copied
        return self._images, self._ids


class TextOrder:
    """Order in which a step embeds its N texts.

    Args:
        order: (N,) int64 on the device, the row in the batch of each text in the order of embedding. None if both
            orders are the same.
        tokens: number of tokens of all texts without padding.
    """

    def __init__(self, order: Tensor | None, tokens: int) -> None:
        self._order, self.tokens = order, tokens

    def in_batch_order(self, features: Tensor) -> Tensor:
        """Return features (N, D), which are in the order of embedding, in the order of the batch."""
        if self._order is None:
            return features
        order = self._order.to(features.device)
        return _Reordered.apply(features, order.argsort(), order)


class _Reordered(torch.autograd.Function):
    """Rows of a tensor in another order. The gradient of indexing would add rows one by one; here it is a copy, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


def micro_batches(
    batches: Sequence[Batch],
    model: DualEncoder,
    device: torch.device,
    *,
    length_multiple: int = 1,
    group: int | None = None,
) -> tuple[list[MicroBatch], TextOrder]:
    """Copy a rank's micro-batches to the device, each image once, and sort their texts by length.

    On a GPU the images are copied on a stream of their own, while the first micro-batches are already embedded. They
    must be in pinned memory for this.

    Args:
        batches: micro-batches of this rank, on the host. Texts that are on a GPU already are neither sorted nor cut,
            because their lengths would have to be waited for.
        model: model whose text tower may have a method ``lengths`` (`TextTransformer.lengths`). Without it, texts are
            neither sorted nor cut.
        length_multiple: texts are cut to a multiple of this number of tokens, or to the context length if that is less.
            A GPU computes multiples of 16 faster, and compiled towers need fewer graphs.
        group: number of texts that the text tower takes at a time, within a micro-batch (default: all of them). Fewer
            texts have less padding.
    """
    lengths_of = getattr(model.text, "lengths", None)
    ids = torch.cat([batch.ids for batch in batches]) if len(batches) > 1 else batches[0].ids
    sizes = [len(batch.keys) for batch in batches]
    if lengths_of is None or ids.device.type != "cpu":
        order, tokens, widths = None, ids.numel(), [[(size, ids.shape[1])] for size in sizes]
    else:
        lengths = lengths_of(ids)
        order, widths = by_length(lengths, sizes, multiple=length_multiple, context_length=ids.shape[1], group=group)
        tokens = int(lengths.sum())
    ids = to_device(ids, device)
    if order is not None:
        order = to_device(order, device)
        ids = ids.index_select(0, order)
    images = _images_on(device, [batch.images for batch in batches])
    pieces = []
    for part, groups, (image, copied) in zip(ids.split(sizes), widths, images, strict=True):
        texts = part.split([size for size, _ in groups])
        pieces.append(MicroBatch(image, tuple(x[:, :width] for x, (_, width) in zip(texts, groups)), copied))
    return pieces, TextOrder(order, tokens)


def by_length(
    lengths: Tensor, sizes: Sequence[int], *, multiple: int, context_length: int, group: int | None
) -> tuple[Tensor | None, list[list[tuple[int, int]]]]:
    """Sort N texts into calls of the text tower.

    Args:
        lengths: (N,) int64, tokens of each text.
        sizes: number of texts of each micro-batch.
        multiple, context_length, group: as in `micro_batches`.

    Returns:
        The order of the texts (N,), or None if one call takes them all; and for each micro-batch the number of texts
        and the width in tokens of each call.
    """
    splits = [_even(size, 1 if group is None else max(1, size // group)) for size in sizes]
    order = None
    if sum(map(len, splits)) > 1:
        # The longest come first, so that a GPU's allocator meets its largest blocks first and reuses them. The sort is
        # stable, because equal lengths in another order would change the rounding
        order = lengths.argsort(descending=True, stable=True)
        lengths = lengths[order]
    # Texts are cut to the longest of their call, which need not be the first if there is one call only
    longest = iter([int(x.max()) for x in lengths.split([size for split in splits for size in split])])
    return order, [
        [(size, min(context_length, multiple * ceil_div(next(longest), multiple))) for size in split]
        for split in splits
    ]


def _even(size: int, parts: int) -> list[int]:
    return [(k + 1) * size // parts - k * size // parts for k in range(parts)]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device, without waiting for it."""
    if device.type == "cuda" and x.device.type == "cpu" and not x.is_pinned():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def _images_on(device: torch.device, images: Sequence[Tensor]) -> Iterator[tuple[Tensor, Any]]:
    """Yield the images of each micro-batch on the device, with the event of the copy if it is on another stream."""
    if device.type != "cuda":
        yield from ((x.to(device), None) for x in images)
        return
    stream = _copy_stream(device)
    for x in images:
        with torch.cuda.stream(stream):
            on_device = x.to(device, non_blocking=True)
            yield on_device, stream.record_event()


@cache
def _copy_stream(device: torch.device) -> Any:
    """Return the stream on which images are copied. Each stream has memory of its own, so all steps share one."""
    return torch.cuda.Stream(device)
