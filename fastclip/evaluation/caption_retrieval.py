"""Retrieval on a data set: its pictures, each once, with all of their captions."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip.data.faults import BadSample, Tally
from fastclip.data.identity import picture_places, picture_states
from fastclip.data.source import Source
from fastclip.data.sources.subset import Subset
from fastclip.embedding.features import FeatureStore, ImageFeatures, image_features, text_features
from fastclip.evaluation.retrieval import check_finite, recalls, retrieval_ranks, top_items
from fastclip.models.embedder import Embedder

__all__ = ["Captioned", "Retrieval", "by_picture", "evaluate_retrieval", "picture_features"]

logger = logging.getLogger(__name__)


class Captioned(NamedTuple):
    """The pictures of a source."""

    source: Subset  # one sample a picture
    captions: list[tuple[str, ...]]  # of each
    skipped: int  # pictures of which no sample has a caption that can be used


class Retrieval(NamedTuple):
    """The results of `evaluate_retrieval`; M pictures and N captions are those that could be used."""

    metrics: dict[str, float]  # of CLIP_benchmark's names, 0 to 1
    keys: list[str]  # of the pictures, M
    texts: list[str]  # N
    pairs: Tensor  # (P, 2) int64, picture and caption
    of_images: Tensor  # (M,) int64, `best_ranks` among the captions
    of_texts: Tensor  # (N,) int64, among the pictures
    image_features: Tensor  # (M, D) float32, unit vectors
    text_features: Tensor  # (N, D)
    skipped: int  # pictures that cannot be used
    repeated: int  # captions whose text is also that of another picture
    stores: tuple[FeatureStore, ...]  # to `clear` when the result is written

    def details(self, *, top: int = 5) -> Iterator[dict[str, Any]]:
        """Yield rank and most similar items of every caption, then of every picture; rank 1 where the best is right."""
        images, texts = self.image_features, self.text_features
        ways = (
            ("caption", self.texts, self.keys, self.of_texts, texts, images, self.pairs.flip(1)),
            ("picture", self.keys, self.texts, self.of_images, images, texts, self.pairs),
        )
        for kind, names, others, ranks, queries, items, pairs in ways:
            belonging: list[list[str]] = [[] for _ in names]
            for query, item in pairs.tolist():
                belonging[query].append(others[item])
            scores, places = (best.tolist() for best in top_items(queries, items, top))
            for k, rank in enumerate(ranks.tolist()):
                best = [{"item": others[i], "score": score} for i, score in zip(places[k], scores[k])]
                yield {"query": names[k], "of": kind, "rank": rank + 1, "belongs": belonging[k], "top": best}


def by_picture(source: Source, *, captions: int | None = None) -> Captioned:
    """Every picture once, with the captions of all its samples, such as the rows of a table.

    Spellings of one path, relative ones and links are the same picture (`picture_places`). A further sample of a
    picture adds the captions that the picture has not; white space makes no difference. Samples whose captions cannot
    be used are left out, and the log counts them.

    Args:
        captions: at most so many of a picture, the first ones.
    """
    firsts: dict[tuple[str, str], int] = {}
    captions_of: dict[tuple[str, str], list[str]] = {}
    bad, keys, places = Tally(), set(), set()
    for index, place in enumerate(picture_places(source)):
        keys.add(source.key(index))
        places.add(place)
        try:
            texts = [" ".join(text.split()) for text in source.captions(index)]
        except BadSample as error:
            bad.add([error.fault])
            continue
        firsts.setdefault(place, index)
        known = captions_of.setdefault(place, [])
        known.extend([text for text in texts if text not in known] if known else texts)
    if len(keys) > len(places):
        logger.info("%s: %d names of pictures are others' in another spelling", source.spec, len(keys) - len(places))
    if bad.total:
        logger.warning("%s: captions that cannot be used are left out: %s", source.spec, bad)
    if not firsts:
        raise ValueError(f"{source.spec}: no picture has a caption that can be used")
    pictures = Subset(source, list(firsts.values()))
    return Captioned(pictures, [tuple(texts[:captions]) for texts in captions_of.values()], len(places) - len(firsts))


def picture_features(
    embedder: Embedder, source: Source, *, folder: Path | None = None, **options: Any
) -> tuple[ImageFeatures, FeatureStore]:
    """`image_features` of the source, `options` being that function's, with a store of its own in `folder`."""
    store = FeatureStore(embedder, ["pictures", *source.class_names, *picture_states(source)], folder=folder)
    images = image_features(embedder, source, store=store, **options)
    check_finite(images.features, source.spec)
    return images, store


def evaluate_retrieval(
    embedder: Embedder,
    source: Source,
    *,
    captions: int | None = None,
    unique: bool = False,
    batch_size: int = 256,
    workers: int = 0,
    folder: Path | None = None,
    progress: bool = False,
) -> Retrieval:
    """Recall at 1, 5 and 10 in both directions (`retrieval_recalls`), over the pictures that can be used.

    As in CLIP_benchmark every caption is a query of its own and belongs to its one picture. A caption of the same words
    at another picture is then a wrong answer that ties, and counts against the model.

    Args:
        captions: at most so many of a picture, the first ones; default: all.
        unique: captions of the same words are one, which belongs to all pictures that have it.
        batch_size, workers, progress: as of `image_features`.
        folder: as of `FeatureStore`; what is embedded when the computation stops is there when it starts again.

    Raises:
        ValueError: no picture can be used, or `captions` is below 1; and as `image_features` does.
    """
    if captions is not None and captions < 1:
        raise ValueError(f"captions must be at least 1, got {captions}")
    pictures = by_picture(source, captions=captions)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    images, store = picture_features(embedder, pictures.source, folder=folder, workers=workers, **options)
    used = images.indices.tolist()
    owners = [(i, text) for i, k in enumerate(used) for text in pictures.captions[k]]
    words = list(dict.fromkeys(text for _, text in owners))
    texts_store = FeatureStore(embedder, ["captions", *words], folder=folder)
    features = text_features(embedder, words, store=texts_store, **options)
    check_finite(features, f"the captions of {source.spec}")
    places = {text: k for k, text in enumerate(words)}
    numbers = torch.tensor([places[text] for _, text in owners])
    texts = words
    if unique:
        pairs = torch.stack([torch.tensor([i for i, _ in owners]), numbers], 1).unique(dim=0)
    else:
        texts, features = [text for _, text in owners], features[numbers]
        pairs = torch.stack([torch.tensor([i for i, _ in owners]), torch.arange(len(owners))], 1)
    device = embedder.device  # a GPU compares too
    ranks = retrieval_ranks(images.features.to(device), features.to(device), pairs, progress=progress)
    of_images, of_texts = (way.cpu() for way in ranks)
    return Retrieval(
        metrics=recalls(of_images, of_texts),
        keys=[pictures.source.key(k) for k in used],
        texts=texts,
        pairs=pairs,
        of_images=of_images,
        of_texts=of_texts,
        image_features=images.features,
        text_features=features,
        skipped=pictures.skipped + len(pictures.source) - len(used),
        repeated=_repeated(owners),
        stores=(store, texts_store),
    )


def _repeated(owners: Sequence[tuple[int, str]]) -> int:
    """Captions whose text several pictures have."""
    pictures = Counter(text for _, text in set(owners))
    return sum(pictures[text] > 1 for _, text in owners)
