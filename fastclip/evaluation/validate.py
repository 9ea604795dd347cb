"""Validation of a training run: zero-shot accuracy and retrieval on samples that are held out."""

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
    """Metrics of a model on a source; every value is between 0 and 1, and the same on every rank.

    ``zero_shot_top1``, and with ten classes or more ``zero_shot_top5``, where the source has classes: the share of the
    pictures whose class is among the first K, each class being the mean of its captions (`class_embeddings`); a tie
    counts against the model. ``image_retrieval_recall@K`` and ``text_retrieval_recall@K`` for K = 1, 5, 10
    (`retrieval_recalls`): captions of the same text are one text, which belongs to every picture that has it. A sample
    that cannot be used is left out, and the log says how many are. Rows of a table that have one picture are one sample
    with several captions.

    The model computes in eval mode and without gradients; afterwards every module is in the mode it was in, and torch's
    random numbers go on as if nothing had been. Autocast is the caller's: call it inside.

    Args:
        model: has ``encode_image``, images (B, 3, H, W) -> features (B, D), ``encode_text``, token ids (B, L) ->
            features (B, D), and ``logit_scale``, on whose device it computes; a `DualEncoder`, or what wraps one.
        source: one of at least one sample.
        transform: a picture -> (3, H, W) float32, without chance.
        tokenize: B texts -> token ids (B, L).
        batch_size: pictures, or captions, of a rank at a time.
        workers: processes that read pictures; 0 reads in this one.
        group: process group; every rank calls with the same source and encodes its share, in as many batches as the
            others. None: this process does it all.
        max_samples: at most so many, evenly spread over the source.

    Raises:
        ValueError: an empty source, options that are not positive.
        OSError, ValueError: what the samples are read from cannot be, or 100 tries find no sample that can be used.
    """
    for name, value in (("batch_size", batch_size), ("max_samples", max_samples)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not len(source):
        raise ValueError(f"{source.spec}: no samples to validate on")
    group = check_group(group)
    rank, ranks = _place(group)
    source = evenly(one_a_picture(source), max_samples)
    skipped = Tally()
    with _undisturbed(model):
        batches = evaluation_batches(
            source, transform, batch_size=batch_size, rank=rank, ranks=ranks, workers=workers, skipped=skipped
        )
        image_features, labels, kept = _image_features(model, batches, len(source), group)
        if len(kept) < len(source):
            message = "%s: %d of %d samples cannot be used and are left out; this process met %s"
            logger.warning(message, source.spec, len(source) - len(kept), len(source), skipped)
        texts = texts_of(source, kept)
        text_features = _text_features(model, tokenize, texts.texts, batch_size, group)
    return _of_first_rank(metrics_of(image_features, labels, text_features, texts), labels.device, group)


class Texts(NamedTuple):
    """The texts of a source, each once: the captions in the order of their first picture, then what classes add."""

    texts: list[str]
    captions: int  # how many of them
    pairs: Tensor  # (P, 2) int64, picture and caption
    classes: Tensor  # (C, T) int64, where the captions of every class are
    class_names: tuple[str, ...]


def metrics_of(image_features: Tensor, labels: Tensor, text_features: Tensor, texts: Texts) -> dict[str, float]:
    """Return the metrics of unit vectors (M, D), classes (M,), -1 without, and the unit vectors (N, D) of `texts`."""
    metrics = {}
    has_class = labels >= 0
    if texts.classes.numel() and bool(has_class.any()):
        classes = mean_directions(text_features[texts.classes])
        ranks = class_ranks(image_features[has_class], classes, labels[has_class], texts.class_names)
        metrics = {f"zero_shot_top{k}": recall(ranks, k) for k in ((1, 5) if len(classes) >= 10 else (1,))}
    return metrics | retrieval_recalls(image_features, text_features[: texts.captions], texts.pairs)


def texts_of(source: Source, kept: list[int]) -> Texts:
    """Collect the texts of the samples `kept`, whose pictures are counted from 0."""
    numbers: dict[str, int] = {}
    pairs = [(i, numbers.setdefault(text, len(numbers))) for i, k in enumerate(kept) for text in source.captions(k)]
    size = len(numbers)
    prompts = [class_captions(name, source.templates) for name in source.class_names]
    classes = [[numbers.setdefault(text, len(numbers)) for text in captions] for captions in prompts]
    return Texts(list(numbers), size, torch.tensor(pairs), torch.tensor(classes), source.class_names)


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Eval mode inside; afterwards every module's mode and torch's random numbers are what they were."""
    device = model.logit_scale.device
    modes = {module: module.training for module in model.modules()}
    # a loader draws its seed from torch's numbers, and the next step's must not depend on validation
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _place(group: Any) -> tuple[int, int]:
    """Rank of this process, and how many there are."""
    return (0, 1) if group is None else (group.rank(), group.size())


def _image_features(
    model: Any, batches: Iterable[tuple[Tensor, Tensor, Tensor]], size: int, group: Any
) -> tuple[Tensor, Tensor, list[int]]:
    """Unit vectors (K, D), labels (K,), -1 without, and indices of the `size` samples in order, without those that
    cannot be used; batches of this rank's."""
    device = model.logit_scale.device
    features, labels, indices = [], [], []
    for images, places, classes in batches:
        features.append(unit_rows(model.encode_image(images.to(device))))
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
    """Unit vectors (N, D)."""
    device = model.logit_scale.device
    rank, ranks = _place(group)
    share = ceil_div(len(texts), ranks)
    mine = [texts[i % len(texts)] for i in range(rank, share * ranks, ranks)]  # as many on every rank
    chunks = [mine[start : start + batch_size] for start in range(0, share, batch_size)]
    features = [unit_rows(model.encode_text(tokenize(chunk).to(device))) for chunk in chunks]
    return _in_order(torch.cat(features), len(texts), group)


def _in_order(rows: Tensor, size: int, group: Any) -> Tensor:
    """Rows of every rank, which has r, r + ranks, ... and some padding at the end -> the `size` rows in order."""
    if group is None:
        return rows
    every = gather_rows(rows, [len(rows)] * group.size(), group.group_name)
    return every.unflatten(0, (group.size(), -1)).transpose(0, 1).flatten(0, 1)[:size]


def _of_first_rank(metrics: dict[str, float], device: torch.device, group: Any) -> dict[str, float]:
    """Return the first rank's values: those of another kind of processor may differ in a last digit."""
    if group is None:
        return metrics
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=device)
    dist.broadcast(values, group=group, group_src=0)
    return dict(zip(metrics, values.tolist()))
