"""A data set as vectors in files, in the layout of clip-retrieval."""

from __future__ import annotations

import json
import logging
import math
import shutil
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
from fastclip.data.spec import absolute_spec
from fastclip.data.subset import Subset
from fastclip.durable import mend_files, new_file
from fastclip.evaluation.features import FeatureStore
from fastclip.models.embedder import Embedder
from fastclip.owner import owning
from fastclip.reading import parse_json
from fastclip.search.claim import claim
from fastclip.search.pairs import Pairs, contents_of, embed_pairs, faults_of

__all__ = ["Embedded", "embed_source"]

logger = logging.getLogger(__name__)
_PARTS = ".parts"
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class Embedded(NamedTuple):
    """What `embed_source` leaves."""

    files: int  # of each of the three kinds
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
    """Unit vectors of pictures and captions, as ``clip-retrieval inference`` writes them (its ``writer.py``).

    ``img_emb/img_emb_K.npy`` and ``text_emb/text_emb_K.npy``, (n, D) of `dtype`, and ``metadata/metadata_K.parquet``
    with the columns "image_path", the key of the sample, and "caption", for the samples from K `samples_per_file` on.
    Row i of the three belongs together. K has leading zeros as clip-retrieval's: its digits are those of the number of
    files. Of several captions the first counts. Samples that cannot be used, or whose vectors are not finite, are in
    none of the three.

    A file appears when it is whole, the .parquet last. The same call goes on where one that was interrupted stopped,
    and the result is the same, byte by byte; files of which a picture or a caption has changed since are made anew, and
    the log counts them. What is not yet in a file lies in ``.parts``. One process does all.

    Args:
        dtype: "float16", clip-retrieval's, or "float32".
        batch_size, workers, progress: as `fastclip.evaluation.features.image_features`.
        texts: False leaves out text_emb/ and the column "caption", as of `fastclip.data.uncaptioned.Uncaptioned`.

    Raises:
        ValueError: an option is out of range, `output` is that of another call, or no sample can be used.
        OSError, ChildProcessError: as `embed_pairs`.
    """
    if dtype not in _DTYPES or samples_per_file < 1:
        raise ValueError(
            f"dtype must be float16 or float32, samples_per_file at least 1, got {dtype} and {samples_per_file}"
        )
    kinds = ("img", "text") if texts else ("img",)
    options: dict[str, Any] = {
        "source": absolute_spec(source.spec),
        "samples": len(source),
        "identity": embedder.identity,
    }
    options |= {"dtype": dtype, "samples_per_file": samples_per_file, "texts": texts}
    claim(output, options, result="*/*_emb_*.npy")
    for name in (*(f"{kind}_emb" for kind in kinds), "metadata"):
        (output / name).mkdir(exist_ok=True)
        mend_files(output / name, owned=True)
    total = -(-len(source) // samples_per_file)
    digits = int(math.log10(max(total, 1))) + 1
    files, samples, kept, changed, faults = 0, 0, 0, 0, Tally()
    for number in range(total):
        start = number * samples_per_file
        part, name = Subset(source, range(start, min(start + samples_per_file, len(source)))), f"{number:0{digits}d}"
        table, contents = _table(output, name), contents_of(part)
        told = _told(table) if table.is_file() else None
        vectors = [output / f"{kind}_emb" / f"{kind}_emb_{name}.npy" for kind in kinds]
        if told is not None and told.contents == contents and all(file.is_file() for file in vectors):
            kept += 1
        else:
            changed += told is not None and told.contents != contents
            store = FeatureStore(embedder, [contents], folder=output / _PARTS, owned=True)
            reading: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "progress": progress}
            reading |= {"first_caption": True, "finite": True}
            embed_pairs(embedder, part, store, partial(_kept_of, dtype=_DTYPES[dtype]), **reading)
            found = faults_of(store)
            _write_file(output, name, part, store, found, contents, dict.fromkeys(kinds, (embedder.dim, dtype)))
            if found.total == len(part):
                faults.merge(found.counts, found.keys)
                continue
            told = _told(table)
        files, samples = files + 1, samples + told.successes
        faults.merge(told.faults.counts, told.faults.keys)
    shutil.rmtree(output / _PARTS, ignore_errors=True)
    if changed:
        logger.warning(
            "%s: %d files are made anew: pictures, captions or max_pixels have changed", source.spec, changed
        )
    if not samples:
        raise ValueError(f"{source.spec}: none of {len(source)} samples can be used: {faults}")
    return Embedded(files, samples, faults, kept)


def _write_file(
    output: Path,
    name: str,
    part: Source,
    store: FeatureStore,
    faults: Tally,
    contents: str,
    kinds: dict[str, tuple[int, str]],
) -> None:
    """One file of each kind, the table last, in the place of those of before."""
    _table(output, name).unlink(missing_ok=True)  # first: vectors without one count for nothing
    if faults.total == len(part):  # embedding_reader cannot read a file without rows
        for old in output.glob(f"*_emb/*_emb_{name}.npy"):
            old.unlink()
        return
    for kind, of in kinds.items():
        _write_vectors(output / f"{kind}_emb" / f"{kind}_emb_{name}.npy", store, kind, of)
    _write_table(_table(output, name), part, store, faults, contents, "text" in kinds)
    store.clear()


def _table(output: Path, name: str) -> Path:
    return output / "metadata" / f"metadata_{name}.parquet"


def _kept_of(pairs: Pairs, dtype: torch.dtype) -> dict[str, Tensor]:
    texts = [" ".join(captions).encode("utf-8", "backslashreplace") for captions in pairs.captions]  # one, or none
    data = torch.from_numpy(np.frombuffer(b"".join(texts), np.uint8).copy())
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64)
    return {"img": pairs.images.to(dtype), "text": pairs.texts.to(dtype), "captions": data, "lengths": lengths}


def _write_vectors(file: Path, store: FeatureStore, kind: str, of: tuple[int, str]) -> None:
    """A .npy file, a part at a time."""
    dim, dtype = of
    rows = sum(int(part["used"].sum()) for part in store.walk("used"))
    head = {"shape": (rows, dim), "fortran_order": False, "descr": np.lib.format.dtype_to_descr(np.dtype(dtype))}
    with new_file(file) as half, half.open("wb") as out:
        np.lib.format.write_array_header_1_0(out, head)
        for part in store.walk(kind):
            out.write(part[kind].numpy().tobytes())


def _write_table(file: Path, source: Source, store: FeatureStore, faults: Tally, contents: str, texts: bool) -> None:
    stats: dict[str, Any] = {"contents": contents, "count": len(source), "successes": len(source) - faults.total}
    stats |= {"failures": faults.counts, "failed": faults.keys}
    columns = [("image_path", pa.string()), ("caption", pa.string())][: 1 + texts]
    schema = pa.schema(columns, metadata={"fastclip": json.dumps(stats)})
    with new_file(file) as half, pq.ParquetWriter(half, schema) as writer:
        start = 0
        for part in store.walk("used", "captions", "lengths"):
            keys = [source.key(start + k) for k in part["used"].nonzero().flatten().tolist()]
            paths = [key.encode("utf-8", "backslashreplace").decode() for key in keys]
            writer.write_table(pa.table([paths, list(_captions(part))][: 1 + texts], schema=schema))
            start += len(part["used"])


class _Told(NamedTuple):
    contents: str  # of `contents_of`
    successes: int
    faults: Tally


def _told(table: Path) -> _Told:
    """What `_write_table` has written beside the rows."""
    try:
        stats = parse_json((pq.read_schema(table).metadata or {}).get(b"fastclip", b""), "its metadata")
        return _Told(str(stats["contents"]), int(stats["successes"]), Tally.of(stats["failures"], stats["failed"]))
    except (ValueError, KeyError, TypeError) as error:  # pyarrow's are ValueErrors
        raise ValueError(f"{table} is not what this command writes ({error}): take another folder") from error


def _captions(part: dict[str, Tensor]) -> Iterator[str]:
    data, start = part["captions"].numpy().tobytes(), 0
    for length in part["lengths"].tolist():
        yield data[start : start + length].decode()
        start += length
