"""Validation during training: zero-shot accuracy and retrieval on held-out samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastclip.data.faults import Tally
from fastclip.data.identity import one_a_picture
from fastclip.data.loading.batches import evaluation_batches
from fastclip.data.source import Source, class_captions
from fastclip.data.sources.subset import evenly
from fastclip.distributed import check_group, gather_rows
from fastclip.evaluation.classification import class_ranks, mean_directions
from fastclip.evaluation.retrieval import recall, retrieval_recalls, unit_rows
from fastclip.models.dual_encoder import without_padding
from fastclip.models.transforms import split_normalization
from fastclip.system.rounding import ceil_div

__all__ = ["Texts", "metrics_of", "texts_of", "validate"]

logger = logging.getLogger(__name__)


@torch.no_grad()
def validate(
    model: Any,
    source: Source,
    transform: Callable[[Any], Tensor],
    tokenize: Callable[[list[str]], Tensor],
    *,
    batch_size: int = 256,
    workers: int = 0,
    group: Any = None,
    max_samples: int | None = None,
) -> dict[str, float]:
    """Compute the metrics of a model on a source.

    If the source has classes, ``zero_shot_top1`` is the share of images whose class is ranked first. If it has at least
    ten classes, ``zero_shot_top5`` is the share whose class is among the first five. With fewer classes, more than half
    of the images would be correct by chance, so ``zero_shot_top5`` is left out (`classification_metrics` follows
    CLIP_benchmark, which reports top-5 from five classes on). A class is represented by the mean of its captions
    (`class_embeddings`), and ties count against the model. ``image_retrieval_recall@K`` and ``text_retrieval_recall@K``
    are given for K = 1, 5, 10 (`retrieval_recalls`). Equal captions are merged into one text, which belongs to every
    image that has it.

    Samples that cannot be used are left out, and their number is logged. Rows of a table that share an image are one
    sample with several captions.

    The model runs in eval mode and without gradients. Afterwards, the mode of every module and torch's random state are
    restored. To use autocast, call the function in an autocast context.

    Args:
        model: a `DualEncoder`, or a wrapper with ``encode_image`` (images (B, 3, H, W) -> features (B, D)),
            ``encode_text`` (token ids (B, L) -> features (B, D)) and ``logit_scale`` (inputs are moved to its device).
        source: dataset with at least one sample.
        transform: deterministic image transform, a PIL image -> (3, H, W) float32. The normalisation of a model's own
            transform is done on the model's device.
        tokenize: tokenizer, B texts -> token ids (B, L).
        batch_size: images or captions per forward pass on each rank.
        workers: worker processes that read images (0: read in this process).
        group: process group. Every rank must call the function with the same source; each encodes its share, in the
            same number of batches. With None, this process encodes all samples.
        max_samples: maximum number of samples, spread evenly over the source (default: all).

    Returns:
        Metrics by name, each from 0 to 1, with the same values on every rank.

    Raises:
        ValueError: the source is empty or damaged, an option is not positive, or a sample is unusable and so are
            all 99 random samples that are tried in its place.
        OSError: a file of the source cannot be read.
    """
    for name, value in (("batch_size", batch_size), ("max_samples", max_samples)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not len(source):
        raise ValueError(f"{source.spec}: no samples to validate on")
    group = check_group(group)
    rank, ranks = _place(group)
    source = evenly(one_a_picture(source), max_samples)
    skipped, (pixels_of, normalize) = Tally(), split_normalization(transform)
    with _undisturbed(model):
        batches = evaluation_batches(
            source, pixels_of, batch_size=batch_size, rank=rank, ranks=ranks, workers=workers, skipped=skipped
        )
        image_features, labels, kept = _image_features(model, normalize, batches, len(source), group)
        if len(kept) < len(source):
            message = "%s: %d of %d samples cannot be used and are left out; causes seen by this process: %s"
            logger.warning(message, source.spec, len(source) - len(kept), len(source), skipped)
        texts = texts_of(source, kept)
        text_features = _text_features(model, tokenize, texts.texts, batch_size, group)
    return _of_first_rank(metrics_of(image_features, labels, text_features, texts), labels.device, group)


class Texts(NamedTuple):
    """Distinct texts of a source: the captions of images, then the captions of classes that no image has.

    Captions are in the order of the first image that has them, captions of classes in the order of the classes.
    """

    texts: list[str]
    captions: int  # number of texts, counted from the first, that are captions of images
    pairs: Tensor  # (P, 2) int64, indices of an image and a caption that belong together
    classes: Tensor  # (C, T) int64, indices of the captions of each class
    class_names: tuple[str, ...]


def metrics_of(image_features: Tensor, labels: Tensor, text_features: Tensor, texts: Texts) -> dict[str, float]:
    """Compute the metrics of `validate` from features.

    Args:
        image_features: unit vectors of the images, (M, D).
        labels: classes of the images, (M,) int64, -1 for images without a class.
        text_features: unit vectors of `texts`, (N, D).
        texts: the result of `texts_of`.
    """
    metrics = {}
    has_class = labels >= 0
    if texts.classes.numel() and bool(has_class.any()):
        classes = mean_directions(text_features[texts.classes])
        ranks = class_ranks(image_features[has_class], classes, labels[has_class], texts.class_names)
        metrics = {f"zero_shot_top{k}": recall(ranks, k) for k in ((1, 5) if len(classes) >= 10 else (1,))}
    return metrics | retrieval_recalls(image_features, text_features[: texts.captions], texts.pairs)


def texts_of(source: Source, kept: list[int]) -> Texts:
    """Collect the texts of the samples with the indices `kept`; image i of the result is sample ``kept[i]``."""
    numbers: dict[str, int] = {}
    pairs = [(i, numbers.setdefault(text, len(numbers))) for i, k in enumerate(kept) for text in source.captions(k)]
    size = len(numbers)
    prompts = [class_captions(name, source.templates) for name in source.class_names]
    classes = [[numbers.setdefault(text, len(numbers)) for text in captions] for captions in prompts]
    return Texts(list(numbers), size, torch.tensor(pairs), torch.tensor(classes), source.class_names)


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Switch to eval mode, and restore the mode of every module and torch's random state afterwards."""
    device = model.logit_scale.device
    modes = {module: module.training for module in model.modules()}
    # A loader draws its seed from torch's generator, but the random numbers of the next training step must not depend
    # on whether the model was validated before.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _place(group: Any) -> tuple[int, int]:
    """Return the rank of this process and the world size."""
    return (0, 1) if group is None else (group.rank(), group.size())


def _image_features(
    model: Any,
    normalize: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    size: int,
    group: Any,
) -> tuple[Tensor, Tensor, list[int]]:
    """Encode this rank's batches, and gather the results of all ranks in the order of the samples.

    Args:
        model: as in `validate`.
        normalize: normalisation of a batch of images on the model's device.
        batches: this rank's batches of images, indices (-1 if unusable) and labels.
        size: number of samples of the source.
        group: process group or None.

    Returns:
        Unit vectors (K, D), labels (K,), -1 for images without a class, and indices of the K usable samples.
    """
    device = model.logit_scale.device
    features, labels, indices = [], [], []
    for images, places, classes in batches:
        features.append(unit_rows(model.encode_image(normalize(images.to(device)))))
        labels.append(classes.to(device))
        indices.append(places.to(device))
    used = _in_order(torch.cat(indices), size, group) >= 0
    return (
        _in_order(torch.cat(features), size, group)[used],
        _in_order(torch.cat(labels), size, group)[used],
        used.nonzero().flatten().tolist(),
    )


def _text_features(
    model: Any, tokenize: Callable[[list[str]], Tensor], texts: Sequence[str], batch_size: int, group: Any
) -> Tensor:
    """Encode this rank's share of the texts, and return the unit vectors (N, D) of all N texts in order."""
    device = model.logit_scale.device
    rank, ranks = _place(group)
    share = ceil_div(len(texts), ranks)
    mine = [texts[i % len(texts)] for i in range(rank, share * ranks, ranks)]  # the same number on every rank
    chunks = [mine[start : start + batch_size] for start in range(0, share, batch_size)]
    features = [unit_rows(model.encode_text(without_padding(tokenize(chunk), model).to(device))) for chunk in chunks]
    return _in_order(torch.cat(features), len(texts), group)


def _in_order(rows: Tensor, size: int, group: Any) -> Tensor:
    """Gather the rows of all ranks and return the first `size` in order.

    Rank r has the rows r, r + ranks, r + 2 ranks ..., with padding at the end, so that every rank has the same number.
    """
    if group is None:
        return rows
    every = gather_rows(rows, [len(rows)] * group.size(), group.group_name)
    return every.unflatten(0, (group.size(), -1)).transpose(0, 1).flatten(0, 1)[:size]


def _of_first_rank(metrics: dict[str, float], device: torch.device, group: Any) -> dict[str, float]:
    """Return the first rank's values on every rank, because other processors may differ in the last digit."""
    if group is None:
        return metrics
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=device)
    dist.broadcast(values, group=group, group_src=0)
    return dict(zip(metrics, values.tolist()))
