"""Image-text retrieval on a dataset in which each image appears once, with all of its captions."""

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
    """Images of a source, each once, with their captions."""

    source: Subset  # one sample per image
    captions: list[tuple[str, ...]]  # captions of each image
    skipped: int  # number of images without a usable caption


class Retrieval(NamedTuple):
    """Results of `evaluate_retrieval` on the M usable images and N usable captions."""

    metrics: dict[str, float]  # values from 0 to 1, under CLIP_benchmark's names
    keys: list[str]  # M keys of the images
    texts: list[str]  # N captions
    pairs: Tensor  # (P, 2) int64, indices of an image and a caption that belong together
    of_images: Tensor  # (M,) int64, `best_ranks` of the images among the captions
    of_texts: Tensor  # (N,) int64, `best_ranks` of the captions among the images
    image_features: Tensor  # (M, D) float32, unit vectors
    text_features: Tensor  # (N, D) float32, unit vectors
    skipped: int  # number of images that cannot be used
    repeated: int  # number of captions whose text another image has as well
    stores: tuple[FeatureStore, ...]  # stores to `clear` once the result is written

    def details(self, *, top: int = 5) -> Iterator[dict[str, Any]]:
        """Yield the rank and the `top` most similar items of every caption and then of every image.

        Unlike `best_ranks`, ranks are counted from 1: the rank is 1 if the most similar item belongs to the query.
        """
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
    """Group the samples of a source that share an image, such as rows of a table.

    Different spellings of a path, relative paths and links count as the same image (`picture_places`). Each further
    sample of an image adds the captions that the image does not have yet; differences in white space are ignored.
    Samples whose captions cannot be used are left out, and their number is logged.

    Args:
        source: dataset to group.
        captions: maximum number of captions per image, of which the first ones are taken (default: all).

    Raises:
        ValueError: no image has a usable caption.
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
        logger.info("%s: %d image names are other spellings of the same files", source.spec, len(keys) - len(places))
    if bad.total:
        logger.warning("%s: captions that cannot be used are left out: %s", source.spec, bad)
    if not firsts:
        raise ValueError(f"{source.spec}: no image has a usable caption")
    pictures = Subset(source, list(firsts.values()))
    return Captioned(pictures, [tuple(texts[:captions]) for texts in captions_of.values()], len(places) - len(firsts))


def picture_features(
    embedder: Embedder, source: Source, *, folder: Path | None = None, **options: Any
) -> tuple[ImageFeatures, FeatureStore]:
    """Embed the images of a source, keeping the progress in a store.

    Args:
        embedder: model to embed the images with.
        source: dataset to read the images from.
        folder: folder for the store (default: FASTCLIP_CACHE).
        **options: further options of `image_features`.

    Returns:
        The features, and the store to `clear` once the result is written.

    Raises:
        ValueError: no image can be used, or no feature is finite.
    """
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
    """Evaluate image-text retrieval: recall at 1, 5 and 10 in both directions, over all usable images.

    As in CLIP_benchmark, every caption is a separate query that belongs to one image. If another image has the same
    caption, that caption is a wrong answer that ties with the right one, and counts against the model.

    Args:
        embedder: model to evaluate.
        source: dataset with captions.
        captions: maximum number of captions per image, of which the first ones are taken (default: all).
        unique: merge identical captions into one that belongs to all of their images.
        batch_size, workers, progress: as in `image_features`.
        folder: folder for the progress (default: FASTCLIP_CACHE). An interrupted evaluation continues from there when
            it is started again.

    Returns:
        The metrics (`retrieval_recalls`), with the ranks and features that they are computed from.

    Raises:
        ValueError: `captions` is below 1, or no image can be used.
        OSError: a file of the source cannot be read.
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
    device = embedder.device  # compare on the GPU if the embedder is there
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
    """Count the captions whose text several images have."""
    pictures = Counter(text for _, text in set(owners))
    return sum(pictures[text] > 1 for _, text in owners)
