"""Embed a dataset and write the vectors to files in the layout of clip-retrieval."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from fastclip.data.faults import Tally
from fastclip.data.source import Source
from fastclip.data.sources.subset import Subset
from fastclip.embedding.features import FeatureStore
from fastclip.embedding.pairs import Pairs, call_options, contents_of, embed_pairs, faults_of, utf8
from fastclip.models.embedder import Embedder
from fastclip.system.claim import claim
from fastclip.system.durable import mend_files, new_file
from fastclip.system.owner import owning
from fastclip.system.plural import counted
from fastclip.system.reading import parse_json

__all__ = ["Embedded", "embed_source"]

logger = logging.getLogger(__name__)
_PARTS = ".parts"
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class Embedded(NamedTuple):
    """The counts of files and samples that `embed_source` has written."""

    files: int  # number of files of each kind
    samples: int
    faults: Tally
    kept: int  # files that an earlier call had finished


@owning
def embed_source(
    embedder: Embedder,
    source: Source,
    output: Path,
    *,
    dtype: str = "float16",
    samples_per_file: int = 1_000_000,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = False,
    texts: bool = True,
) -> Embedded:
    """Write unit vectors of images and captions, as ``clip-retrieval inference`` writes them (its ``writer.py``).

    The files with the number K hold up to `samples_per_file` samples, from sample K * samples_per_file on:
    ``img_emb/img_emb_K.npy`` and ``text_emb/text_emb_K.npy``, both (n, D) of `dtype`, and
    ``metadata/metadata_K.parquet`` with the columns "image_path" (the sample's key) and "caption" (its first caption).
    Row i of the three files belongs to the same sample. As in clip-retrieval, K is padded with zeros to as many digits
    as the total number of files has. Samples that cannot be used, or whose vectors are not finite, are left out of all
    three files.

    A file appears only when it is complete, and the .parquet appears last. Vectors that are not yet in a file are in
    ``.parts``. Repeat the same call to resume an interrupted one; the result is byte-identical. Files whose images or
    captions have changed are written again, and the log counts them. A single process does all the work.

    Args:
        dtype: "float16", as clip-retrieval uses, or "float32".
        batch_size, workers, progress: as in `fastclip.embedding.features.image_features`.
        texts: False leaves out text_emb/ and the column "caption", for images without captions
            (`fastclip.data.sources.folder.Uncaptioned`).

    Raises:
        ValueError: an option is out of range, `output` was begun with other arguments, or no sample can be used.
        OSError, ChildProcessError: as in `embed_pairs`.
    """
    if dtype not in _DTYPES or samples_per_file < 1:
        got = f"got {dtype} and {samples_per_file}"
        raise ValueError(f"dtype must be float16 or float32 and samples_per_file at least 1, {got}")
    kinds = ("img", "text") if texts else ("img",)
    asked = {"dtype": dtype, "samples_per_file": samples_per_file, "texts": texts}
    claim(output, call_options(embedder, source) | asked, result="*/*_emb_*.npy")
    for name in (*(f"{kind}_emb" for kind in kinds), "metadata"):
        (output / name).mkdir(exist_ok=True)
        mend_files(output / name, owned=True)
    starts = range(0, len(source), samples_per_file)
    reading = {"batch_size": batch_size, "workers": workers, "progress": progress}
    files, samples, faults, ways = 0, 0, Tally(), Counter[str]()
    for number, start in enumerate(starts):
        part = Subset(source, range(start, min(start + samples_per_file, len(source))))
        place = _Place(output, f"{number:0{len(str(len(starts)))}d}", kinds, dtype)
        written, way = _embed_part(embedder, part, place, **reading)
        ways[way] += 1
        files, samples = files + (written.successes > 0), samples + written.successes
        faults.merge(written.faults.counts, written.faults.keys)
    shutil.rmtree(output / _PARTS, ignore_errors=True)
    if changed := ways["changed"]:
        message = "%s: %s written again, because images, captions or --max-pixels have changed"
        logger.warning(message, source.spec, counted(changed, "file"))
    if not samples:
        raise ValueError(f"{source.spec}: none of {len(source)} samples can be used: {faults}")
    return Embedded(files, samples, faults, ways["kept"])


class _Place(NamedTuple):
    """The files of consecutive samples: their vectors and their table."""

    output: Path
    name: str  # the number K of the files
    kinds: tuple[str, ...]  # "img", and "text" if captions are embedded
    dtype: str

    @property
    def table(self) -> Path:
        return self.output / "metadata" / f"metadata_{self.name}.parquet"

    def vectors(self, kind: str) -> Path:
        return self.output / f"{kind}_emb" / f"{kind}_emb_{self.name}.npy"


class _Written(NamedTuple):
    """The metadata of a table that `embed_source` has written."""

    contents: str  # digest of the samples, as `contents_of` computes it
    successes: int
    faults: Tally


def _embed_part(embedder: Embedder, part: Source, place: _Place, **reading: Any) -> tuple[_Written, str]:
    """Write the files of a part, unless they exist; return their metadata, and "kept", "changed" or "new"."""
    contents, before = contents_of(part), _written(place.table) if place.table.is_file() else None
    if before is not None and before.contents == contents and all(map(Path.is_file, map(place.vectors, place.kinds))):
        return before, "kept"
    way = "new" if before is None or before.contents == contents else "changed"
    return _write_part(embedder, part, place, contents, **reading), way


def _write_part(embedder: Embedder, part: Source, place: _Place, contents: str, **reading: Any) -> _Written:
    """Write one file of each kind, the table last, and replace older files. Write none if no sample can be used."""
    store = FeatureStore(embedder, [contents], folder=place.output / _PARTS, owned=True)
    keep = partial(_kept_of, dtype=_DTYPES[place.dtype])
    embed_pairs(embedder, part, store, keep, first_caption=True, finite=True, **reading)
    rows = sum(int(part["used"].sum()) for part in store.walk("used"))
    written = _Written(contents, rows, faults_of(store))
    place.table.unlink(missing_ok=True)  # first, because vectors without a table are treated as unfinished
    if not rows:  # embedding_reader cannot read a file without rows
        for old in place.output.glob(f"*_emb/*_emb_{place.name}.npy"):
            old.unlink()
        return written
    for kind in place.kinds:
        _write_vectors(place.vectors(kind), store, kind, (rows, embedder.dim), place.dtype)
    _write_table(place, part, store, written)
    store.clear()
    return written


def _kept_of(pairs: Pairs, dtype: torch.dtype) -> dict[str, Tensor]:
    # Each sample has at most one caption here, so that the join below returns it unchanged.
    texts = [" ".join(captions).encode("utf-8", "backslashreplace") for captions in pairs.captions]
    data = torch.from_numpy(np.frombuffer(b"".join(texts), np.uint8).copy())
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64)
    return {"img": pairs.images.to(dtype), "text": pairs.texts.to(dtype), "captions": data, "lengths": lengths}


def _write_vectors(file: Path, store: FeatureStore, kind: str, shape: tuple[int, int], dtype: str) -> None:
    """Write a .npy file one part at a time, so that memory holds a single part."""
    head = {"shape": shape, "fortran_order": False, "descr": np.lib.format.dtype_to_descr(np.dtype(dtype))}
    with new_file(file) as half, half.open("wb") as out:
        np.lib.format.write_array_header_1_0(out, head)
        for part in store.walk(kind):
            out.write(part[kind].numpy().tobytes())


def _write_table(place: _Place, source: Source, store: FeatureStore, written: _Written) -> None:
    stats: dict[str, Any] = {"contents": written.contents, "count": len(source), "successes": written.successes}
    stats |= {"failures": written.faults.counts, "failed": written.faults.keys}
    names = ["image_path", "caption"] if "text" in place.kinds else ["image_path"]
    schema = pa.schema([(name, pa.string()) for name in names], metadata={"fastclip": json.dumps(stats)})
    with new_file(place.table) as half, pq.ParquetWriter(half, schema) as writer:
        start = 0
        for part in store.walk("used", "captions", "lengths"):
            keys = [source.key(start + k) for k in part["used"].nonzero().flatten().tolist()]
            columns = {"image_path": list(map(utf8, keys)), "caption": list(_captions(part))}
            writer.write_table(pa.table({name: columns[name] for name in names}, schema=schema))
            start += len(part["used"])


def _written(table: Path) -> _Written:
    try:
        stats = parse_json((pq.read_schema(table).metadata or {}).get(b"fastclip", b""), "its metadata")
        return _Written(str(stats["contents"]), int(stats["successes"]), Tally.of(stats["failures"], stats["failed"]))
    except (ValueError, KeyError, TypeError) as error:  # pyarrow's errors are ValueErrors
        raise ValueError(f"{table} was not written by this command ({error}): choose another folder") from error


def _captions(part: dict[str, Tensor]) -> Iterator[str]:
    data, start = part["captions"].numpy().tobytes(), 0
    for length in part["lengths"].tolist():
        yield data[start : start + length].decode()
        start += length
