"""Select the pairs of a dataset whose image and caption agree, by LAION's rule, and write them as shards."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from fastclip.curation.near_duplicates import near_duplicates
from fastclip.data.identity import picture_places
from fastclip.data.pack import pack_source
from fastclip.data.picture import older_limit
from fastclip.data.source import Record, Source
from fastclip.data.sources.subset import Subset
from fastclip.data.spec import spec_places
from fastclip.embedding.features import FeatureStore
from fastclip.embedding.pairs import Pairs, call_options, contents_of, embed_pairs, faults_of, utf8
from fastclip.evaluation.results import write_results
from fastclip.models.embedder import Embedder
from fastclip.system.claim import claim
from fastclip.system.durable import new_file
from fastclip.system.owner import check_writable, output_path, owning
from fastclip.system.progress import Progress
from fastclip.system.reading import parse_json

__all__ = ["filter_source"]

logger = logging.getLogger(__name__)
# The states of samples, as stored in similarities.parquet
_STATES = ("unusable", "similarity is not finite", "scored", "below threshold", "near duplicate", "kept")
_UNUSABLE, _NOT_FINITE, _SCORED, _BELOW, _DUPLICATE, _KEPT = range(len(_STATES))
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_THRESHOLDS = (0.15, 0.2, 0.25, 0.28, 0.3, 0.35)  # LAION-400M's is 0.3, LAION-5B's 0.28 for English
_ROWS = 100_000  # rows of the table to write at a time
Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
States = npt.NDArray[np.int8]


@owning
def filter_source(
    embedder: Embedder,
    source: Source,
    output: Path,
    *,
    threshold: float | None = None,
    dedup: float | None = None,
    samples_per_shard: int = 10_000,
    scores: str | Path | None = None,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Keep the captions that are similar to their image, and the samples with at least one such caption.

    The similarity is the cosine of the vectors of an image and a caption. LAION-400M (Schuhmann et al. 2021) keeps
    pairs with a similarity of 0.3 or more, computed by CLIP's ViT-B/32.

    The kept samples are written to `output`, as shards in the format of `pack_source`, numbered without gaps.
    "similarity" in a .json is that of the best caption, and "similarities" lists those of all kept captions if there
    are several. similarities.parquet has the key, the similarity and the state of every sample of the source.
    histogram.png shows the similarities of all captions. summary.json holds the returned values. The similarities are
    stored in `scores`, so that another threshold needs no new embedding. Repeat the same call to resume an interrupted
    one; the result is byte-identical. A single process does all the work.

    Args:
        threshold: the least similarity to keep, inclusive and compared in float32. None computes the similarities and
            writes no shards.
        dedup: the least cosine at which two images are near duplicates (None: keep them all). Samples are taken in the
            order of the source, and a sample is dropped if its image is a near duplicate of an image that was kept
            earlier (`near_duplicates`). The kept vectors are held in memory. With `dedup`, the vectors of all images
            are stored in `scores` too, and similarities that were computed without `dedup` are computed again.
        scores: folder for the similarities, which calls with other thresholds may share (default: `output`/scores).
        batch_size, workers, progress: as in `fastclip.embedding.features.image_features`.

    Returns:
        The content of summary.json: the options, "counts" of samples by state, "causes" of unusable samples,
        "similarity" statistics, and "samples_at_or_above" for several thresholds.

    Raises:
        ValueError: an option is out of range, `output` was written with other options or from other similarities,
            `output` or `scores` contains the data or is inside the data's folder, or no sample is kept.
        OSError, ChildProcessError: as in `pack_source`.
    """
    _check(threshold, dedup, samples_per_shard)
    _check_outside(source, output)
    if scores is not None:
        _check_outside(source, output_path(scores))
    folder = output / "scores" if scores is None else check_writable(scores)
    contents = contents_of(source)
    options = call_options(embedder, source) | {"max_pixels": Image.MAX_IMAGE_PIXELS, "pictures and captions": contents}
    options |= {"threshold": threshold, "dedup": dedup}
    if threshold is not None or (output / "options.json").is_file():
        claim(output, {**options, "samples_per_shard": samples_per_shard}, result="*.tar", older=older_limit)
    folder /= "similarities" if dedup is None else "similarities-and-images"
    store = FeatureStore(embedder, [contents], folder=folder, owned=scores is None)
    keep = partial(_kept_of, images=dedup is not None)
    embed_pairs(embedder, source, store, keep, batch_size=batch_size, workers=workers, progress=progress)
    samples = _scores(store)
    states = _states(source, output, samples, store, options, device=embedder.device, progress=progress)
    summary = options | {"model": embedder.name} | _summary(samples, states, store)
    _draw(output / "histogram.png", samples.similarities, threshold)
    write_results(output / "summary.json", summary)
    if threshold is not None:
        _pack(_Kept(source, np.flatnonzero(states == _KEPT), samples, threshold), output, samples_per_shard, workers)
    return summary


class _Scores(NamedTuple):
    """The similarities of all n samples of a source."""

    begins: Integers  # (n + 1,), sample i has similarities[begins[i] : begins[i + 1]]; unusable samples have none
    similarities: Floats  # (T,), of all captions
    best: Floats  # (n,), the largest similarity of each sample; NaN if it has none


class _Kept(Subset):
    """The kept samples of a source, each with its captions at or above the threshold."""

    def __init__(self, source: Source, indices: Integers, scores: _Scores, threshold: float) -> None:
        super().__init__(source, indices.tolist())
        self._scores, self.threshold, self._least = scores, threshold, np.float32(threshold)

    def read(self, index: int, *, min_side: int | None = None) -> Record:
        record = super().read(index, min_side=min_side)
        return record._replace(captions=self._above(index, record.captions))

    def captions(self, index: int) -> tuple[str, ...]:
        return self._above(index, super().captions(index))

    def fields(self, index: int) -> dict[str, Any]:
        similarities = self._similarities(index)
        above = similarities[similarities >= self._least].tolist()
        # If the source was written by an earlier call, its field "similarities" may list captions that are dropped now.
        known = {k: v for k, v in super().fields(index).items() if k != "similarities"}
        return {**known, "similarity": max(above)} | ({"similarities": above} if len(above) > 1 else {})

    def _above(self, index: int, captions: tuple[str, ...]) -> tuple[str, ...]:
        similarities = self._similarities(index)
        if len(captions) != len(similarities):
            raise ValueError(f"{self.key(index)}: its captions have changed since their similarities were computed")
        return tuple(text for text, similarity in zip(captions, similarities) if similarity >= self._least)

    def _similarities(self, index: int) -> Floats:
        sample = self.indices[index]
        return self._scores.similarities[self._scores.begins[sample] : self._scores.begins[sample + 1]]


def _check(threshold: float | None, dedup: float | None, samples_per_shard: int) -> None:
    if threshold is not None and not -1 <= threshold <= 1:
        raise ValueError(f"threshold must be between -1 and 1, got {threshold}")
    if dedup is not None and not 0 < dedup <= 1:
        raise ValueError(f"dedup must be above 0 and at most 1, got {dedup}")
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}")


def _check_outside(source: Source, output: Path) -> None:
    """Raise ValueError if `output` contains the data or is inside the data's folder.

    The next call would otherwise read the written shards as data.
    """
    inside = os.path.join(os.path.realpath(output), "")
    folders = [os.path.join(os.path.realpath(place), "") for place in spec_places(source.spec) if place.is_dir()]
    if inside.startswith(tuple(folders)) or any(file.startswith(inside) for file, _ in picture_places(source)):
        raise ValueError(
            f"{output} contains the data, or is inside the data's folder: choose a folder outside {source.spec}"
        )


def _kept_of(pairs: Pairs, *, images: bool) -> dict[str, Tensor]:
    counts = torch.tensor([len(texts) for texts in pairs.captions], dtype=torch.int64)
    similarities = (pairs.images.repeat_interleave(counts, 0) * pairs.texts).sum(1)
    return {"counts": counts, "similarities": similarities} | ({"images": pairs.images} if images else {})


def _scores(store: FeatureStore) -> _Scores:
    counts, similarities = list[Integers](), list[Floats]()
    for part in store.walk("used", "counts", "similarities"):
        every = np.zeros(len(part["used"]), np.int64)
        every[part["used"].numpy()] = part["counts"].numpy()
        counts.append(every)
        similarities.append(part["similarities"].numpy())
    number, flat = np.concatenate(counts), np.concatenate(similarities)
    begins = np.concatenate([[0], number.cumsum()])
    best = np.full(len(number), np.nan, np.float32)  # stays NaN too if none of a sample's similarities is finite
    if len(flat):
        best[number > 0] = np.fmax.reduceat(flat, begins[:-1][number > 0])
    return _Scores(begins, flat, best)


def _digest(scores: _Scores) -> str:
    return hashlib.blake2b(scores.begins.tobytes() + scores.similarities.tobytes(), digest_size=16).hexdigest()


def _decide(scores: _Scores, threshold: float | None) -> tuple[States, Integers]:
    """Return the state of every sample before near duplicates are dropped, and an array filled with -1.

    For each near duplicate, `_drop_duplicates` stores the index of the kept sample that it resembles in this array.
    """
    states, near_to = np.full(len(scores.best), _SCORED, np.int8), np.full(len(scores.best), -1)
    states[np.isnan(scores.best)] = _NOT_FINITE
    states[np.diff(scores.begins) == 0] = _UNUSABLE
    if threshold is not None:
        states[states == _SCORED] = _BELOW
        states[scores.best >= np.float32(threshold)] = _KEPT
    return states, near_to


def _states(
    source: Source,
    output: Path,
    scores: _Scores,
    store: FeatureStore,
    options: dict[str, Any],
    *,
    device: torch.device,
    progress: bool,
) -> States:
    """Return the state of every sample: read the states that an earlier call has written, or decide and write them.

    A resumed call therefore packs exactly the samples that the first call had chosen.
    """
    file, options = output / "similarities.parquet", {**options, "scores": _digest(scores)}
    if (states := _decided(file, options)) is not None:
        return states
    if (old := next(output.glob("*_stats.json"), None)) is not None:
        raise ValueError(
            f"{old} was written from other similarities than those now computed: remove {output}, or choose another "
            "folder"
        )
    states, near_to = _decide(scores, options["threshold"])
    if options["dedup"] is not None:
        _drop_duplicates(states, near_to, store, options["dedup"], device, progress)
    _write_table(file, source, scores, states, near_to, options)
    return states


def _pack(kept: _Kept, output: Path, samples_per_shard: int, workers: int) -> None:
    if not len(kept):
        raise ValueError(
            f"{kept.spec}: no sample has a similarity of {kept.threshold} or more: lower the threshold "
            "(summary.json has the quantiles of the similarities)"
        )
    packed = pack_source(kept, output, samples_per_shard=samples_per_shard, workers=workers)
    if packed.faults.total:
        logger.warning("%s: samples that could be embedded but not packed are left out: %s", kept.spec, packed.faults)


def _drop_duplicates(
    states: States, near_to: Integers, store: FeatureStore, dedup: float, device: torch.device, progress: bool
) -> None:
    kept = np.flatnonzero(states == _KEPT)

    def images() -> Iterator[Tensor]:
        start = 0
        with Progress("near duplicates", len(kept), shown=progress) as bar:
            for part in store.walk("used", "images"):
                used = part["used"].numpy()
                vectors = part["images"][states[start : start + len(used)][used] == _KEPT]
                start += len(used)
                yield vectors
                bar.moved(len(vectors))

    place = near_duplicates(images(), dedup, device=device)
    again = place >= 0
    states[kept[again]], near_to[kept[again]] = _DUPLICATE, kept[place[again]]


def _write_table(
    file: Path,
    source: Source,
    scores: _Scores,
    states: States,
    near_to: Integers,
    options: dict[str, Any],
) -> None:
    dictionary = pa.dictionary(pa.int8(), pa.string())
    columns = [("key", pa.string()), ("similarity", pa.float32()), ("state", dictionary), ("duplicate_of", pa.string())]
    schema = pa.schema(columns, metadata={"fastclip": json.dumps(options)})
    with new_file(file) as half, pq.ParquetWriter(half, schema) as writer:
        for start in range(0, len(states), _ROWS):
            rows = range(start, min(start + _ROWS, len(states)))
            of = near_to[rows.start : rows.stop].tolist()
            state = pa.DictionaryArray.from_arrays(pa.array(states[rows.start : rows.stop]), pa.array(_STATES))
            arrays = [
                pa.array([utf8(source.key(k)) for k in rows]),
                pa.array(scores.best[rows.start : rows.stop], from_pandas=True),  # NaN becomes null
                state,
                pa.array([None if k < 0 else utf8(source.key(k)) for k in of], pa.string()),
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _decided(file: Path, options: dict[str, Any]) -> States | None:
    """Return the states that an earlier call with these options has written, or None."""
    if not file.is_file():
        return None
    numbers = {state: number for number, state in enumerate(_STATES)}
    try:
        metadata = (pq.read_schema(file).metadata or {}).get(b"fastclip", b"{}")
        if parse_json(metadata, "its metadata") != options:
            return None
        states = pq.read_table(file, columns=["state"])["state"].combine_chunks().to_numpy(zero_copy_only=False)
        return np.array([numbers[state] for state in states], np.int8)
    except (ValueError, KeyError) as error:  # pyarrow's errors are ValueErrors
        raise ValueError(f"{file} was not written by this command ({error}): remove it") from error


def _summary(scores: _Scores, states: States, store: FeatureStore) -> dict[str, Any]:
    finite = scores.similarities[np.isfinite(scores.similarities)]
    counts = {state: int((states == number).sum()) for number, state in enumerate(_STATES)}
    similarity: dict[str, Any] = {
        "captions": len(finite),
        "mean": float(finite.mean(dtype=np.float64)) if len(finite) else math.nan,
    }
    quantiles = np.quantile(finite, _QUANTILES) if len(finite) else [math.nan] * len(_QUANTILES)
    similarity |= {"quantiles": dict(zip(map(str, _QUANTILES), map(float, quantiles)))}
    at = {str(t): int((scores.best >= np.float32(t)).sum()) for t in _THRESHOLDS}
    faults = faults_of(store)
    return {
        "counts": {state: count for state, count in counts.items() if count},
        "causes": {cause: {"count": count, "first": faults.keys[cause]} for cause, count in faults},
        "similarity": similarity,
        "samples_at_or_above": at,
    }


def _draw(file: Path, similarities: Floats, threshold: float | None) -> None:
    finite = similarities[np.isfinite(similarities)]
    counts, edges = np.histogram(finite, bins=100)
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.stairs(counts, edges, fill=True)
    if threshold is not None:
        axes.axvline(threshold, color="black", linewidth=1, label=f"threshold {threshold:g}")
        axes.legend()
    axes.set_xlabel("cosine of image and caption")
    axes.set_ylabel(f"captions ({len(finite):,} in total)")
    with new_file(file) as half:
        figure.savefig(half, format="png", metadata={"Software": None})
