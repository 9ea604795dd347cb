"""Seconds of `fastclip search`: a query, the start of the command, and indexing; rows in results/search.csv.

    python -m benchmarks.search --pictures 100000 --dim 512 --rounds 9

| what | |
|---|---|
| `query` | find the 10 best of the vectors in memory |
| `read` | read the vectors of a folder from its index |
| `start` | the whole command with `-n`, from start to end, for a text that was searched for before |
| `index` | read JPEGs of 512 x 384, embed them with `--model` (random weights) and write them into an index |

Before a query is timed, its results are compared with those of double precision.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.data import Case, jpeg
from benchmarks.harness import Step, append, machine, quantile, wall_clock
from fastclip.models import create_model
from fastclip.search.engine import SearchEngine
from fastclip.search.index import Seen
from fastclip.search.model import CheckpointModel
from fastclip.search.rank import top
from fastclip.system.installed import installed_version

RESULTS = Path(__file__).parent / "results" / "search.csv"
TEXT = "a red car"
COMMAND = "import sys; from fastclip.cli import main; sys.exit(main(sys.argv[1:]))"


def unit_vectors(count: int, dim: int) -> np.ndarray:
    vectors = np.random.default_rng(0).standard_normal((count, dim), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def check(engine: SearchEngine, vectors: np.ndarray, query: np.ndarray) -> None:
    """Raise RuntimeError unless the 10 results have the highest scores; rounding may order equal scores."""
    scores = vectors.astype(np.float64) @ query
    places = [int(Path(one.path).stem) for one in engine.find_vector(query, 10)]
    highest = np.sort(scores)[::-1][: len(places)]
    apart = np.abs(scores[places] - highest).max() / np.linalg.norm(query)
    if len(set(places)) != min(10, len(scores)) or apart > 2.0**-20:
        raise RuntimeError(f"the scores of {places} differ from the highest by {apart:.1e} of the query's length")


def row(what: str, pictures: int, dim: int, seconds: list[float]) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "what": what,
        "pictures": pictures,
        "dim": dim,
        "rounds": len(seconds),
        "median_s": round(median, 5),
        "p20_s": round(quantile(seconds, 0.2), 5),
        "p80_s": round(quantile(seconds, 0.8), 5),
        "pictures_per_second": round(pictures / median, 1),
        "load": round(os.getloadavg()[0], 1),
    }


def searching(folder: Path, pictures: int, dim: int, rounds: int) -> list[dict[str, Any]]:
    """Measure queries over random vectors; the query is the remembered vector of a text."""
    checkpoint, photos = folder / "tiny", folder / "photos"
    create_model("ViT-tiny").save_pretrained(checkpoint)
    photos.mkdir()
    engine = SearchEngine(CheckpointModel(checkpoint, device="cpu", folder=folder), photos, indices=folder)
    vectors, inside = unit_vectors(pictures, dim), os.fsencode(engine.folder)
    rows = (Seen(inside + b"/%07d.jpg" % k, "", b"%020d" % k, vectors[k]) for k in range(pictures))
    engine._index.add(list(rows))
    query = vectors[0] + vectors[1]
    engine._index.keep_text(TEXT, query)
    check(engine, vectors, query)
    known = engine._index.pictures(inside)
    words = ["search", TEXT, str(photos), "-n", "--checkpoint", str(checkpoint), "--device", "cpu"]
    environment = os.environ | {"FASTCLIP_CACHE": str(folder)}

    def start() -> None:
        done = subprocess.run([sys.executable, "-c", COMMAND, *words], env=environment, capture_output=True, check=True)
        assert done.stdout.count(b"\n") == 10, done

    steps: dict[str, Step] = {
        "query": lambda: void(top(known, query, 10)),
        "read": lambda: void(engine._index.pictures(inside)),
        "start": start,
    }
    return [row(what, pictures, dim, [wall_clock(step) for _ in range(rounds)]) for what, step in steps.items()]


def indexing(folder: Path, pictures: int, model: str, workers: int, rounds: int) -> dict[str, Any]:
    checkpoint, photos = folder / model, folder / "jpegs"
    create_model(model).save_pretrained(checkpoint)
    photos.mkdir()
    generator = np.random.default_rng(0)
    for k in range(pictures):
        (photos / f"{k}.jpg").write_bytes(jpeg(Case(512, 384, 0, 0, 0, 0), generator))
    known = CheckpointModel(checkpoint, device="cpu", folder=folder)
    dim, seconds = known.embedder.dim, []
    for k in range(rounds):
        engine = SearchEngine(known, photos, indices=folder / str(k))
        seconds.append(wall_clock(lambda engine=engine: void(engine.update(workers=workers))))
        assert len(engine.find_vector(np.zeros(dim, np.float32), pictures + 1)) == pictures
    return row(f"index {model}", pictures, dim, seconds)


def void(_: object) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pictures",
        type=int,
        default=100_000,
        help="number of images for query, read and start (default: %(default)s)",
    )
    parser.add_argument("--dim", type=int, default=512, help="width of the vectors (default: %(default)s)")
    parser.add_argument("--jpegs", type=int, default=256, help="number of JPEGs for index (default: %(default)s)")
    parser.add_argument("--model", default="ViT-B-32", help="name of the model for index (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="threads that read images (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=9, help="timed rounds; index has a third of them (default: %(default)s)"
    )
    parser.add_argument("--rows", type=Path, default=RESULTS, help="CSV file to add rows to (default: %(default)s)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        measured = searching(Path(name), arguments.pictures, arguments.dim, arguments.rounds)
        options = {name: getattr(arguments, name) for name in ("model", "workers")}
        measured.append(indexing(Path(name), arguments.jpegs, rounds=max(1, arguments.rounds // 3), **options))
    append(arguments.rows, measured, machine() | {"numpy": np.__version__, "pillow": installed_version("pillow")})
    for one in measured:
        print(*one.values(), sep="\t", flush=True)


if __name__ == "__main__":
    main()
