"""Samples per second of a pass over tar shards, compared with webdataset's pipeline. Rows go to results/data.csv.

    python -m benchmarks.data --sizes 512x384,1024x768 --workers 2 --rounds 5

The script first writes shards of JPEGs. Every provider takes the same crops (open_clip's for training, to 224 pixels),
and has the same tokenizer and the same number of workers, which each pass starts again. `webdataset` is its usual
pipeline, with open_clip's transform: shards in random order, a shuffle buffer of 1,000 samples, decode, transform,
batches. `fastclip` reads as `fastclip train` does. `fastclip_whole` decodes every JPEG at its full size, and
`fastclip_pillow` resizes with Pillow, not with native code. `fastclip_packed` reads the shards that `fastclip data pack
--size 256` makes of the same images.
Before any timing, the passes are compared: they must yield the same captions.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose

from benchmarks.harness import Timings, append, machine, quantile
from fastclip.data import open_source, training_batches
from fastclip.data.pack import pack_source
from fastclip.models import get_tokenizer
from fastclip.models.config import load_config
from fastclip.models.transforms import image_transform, pixel_transform, training_side
from fastclip.system.installed import installed_version

RESULTS = Path(__file__).parent / "results" / "data.csv"
MODEL, PEER = "ViT-B-32", "webdataset"
DISTINCT = 50  # images; the samples repeat them in turn
PACKED_SIDE = 256  # shorter side of packed images, in pixels
BUFFER = 1000  # samples in webdataset's shuffle buffer

Pass = Callable[[], Iterator[tuple[Tensor, Tensor]]]  # yields images and token ids of each batch


@dataclass
class Spent(Timings):
    """Timings with the CPU seconds of this process and its finished workers, which hardly depend on other load."""

    cpu: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    width: int
    height: int
    samples: int
    shards: int
    batch_size: int
    workers: int


def jpeg(case: Case, generator: np.random.Generator) -> bytes:
    """Return a JPEG of noise with a photograph's spectrum, in which every octave is equally strong."""
    pixels = np.zeros((case.height, case.width, 3))
    scale = 1
    while case.width // scale > 2:
        size = max(2, case.width // scale), max(2, case.height // scale)
        octave = Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        pixels += np.asarray(octave.resize((case.width, case.height), Image.Resampling.BICUBIC)) - 127.5
        scale *= 2
    pixels *= 50 / pixels.std()
    file = io.BytesIO()
    Image.fromarray((pixels + 127.5).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def write_shards(case: Case, folder: Path) -> str:
    """Write the shards, and return their brace pattern."""
    generator = np.random.default_rng(0)
    pictures = [jpeg(case, generator) for _ in range(DISTINCT)]
    for shard in range(case.shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for k in range(shard, case.samples, case.shards):
                caption = f"picture {k} of many, taken at random".encode()
                for suffix, data in (("jpg", pictures[k % DISTINCT]), ("txt", caption)):
                    info = tarfile.TarInfo(f"{k:09d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(folder / f"{{00000..{case.shards - 1:05d}}}.tar")


def ours(case: Case, pattern: str, *, scaled: bool, native: bool = True) -> Pass:
    config = load_config(MODEL)
    transform, tokenize = pixel_transform(config, train=True), get_tokenizer(MODEL)
    if not native:
        transform = with_pillow(transform)
    source = open_source(pattern)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        steps = training_batches(
            source,
            transform,
            tokenize,
            batch_size=case.batch_size,
            last_step=case.samples // case.batch_size,
            workers=case.workers,
            min_side=training_side(config) if scaled else None,
        )
        return ((batch.images, batch.ids) for (batch,) in steps)

    return batches


def with_pillow(transform: Compose) -> Compose:
    """Return the transform with torchvision's crop, which resizes with Pillow."""
    checked, crop, *rest = transform.transforms
    return Compose([checked, crop.crop, *rest])


def packed(case: Case, pattern: str) -> Pass:
    folder = Path(pattern).with_name("packed")
    pack_source(
        open_source(pattern),
        folder,
        samples_per_shard=case.samples // case.shards,
        image_size=PACKED_SIDE,
        workers=case.workers,
    )
    return ours(case, str(folder), scaled=True)


def theirs(case: Case, pattern: str) -> Pass:
    import webdataset as wds

    transform, tokenize = with_pillow(image_transform(load_config(MODEL), train=True)), get_tokenizer(MODEL)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        dataset = (
            wds.WebDataset(pattern, shardshuffle=case.shards, seed=0)
            .shuffle(BUFFER)
            .decode("pilrgb")
            .to_tuple("jpg", "txt")
            .map_tuple(transform, lambda text: tokenize([text])[0])
            .batched(case.batch_size)
        )
        loader = wds.WebLoader(dataset, batch_size=None, num_workers=case.workers)
        return ((images, ids) for images, ids in loader)

    return batches


PROVIDERS: dict[str, Callable[[Case, str], Pass]] = {
    "fastclip": partial(ours, scaled=True),
    "fastclip_whole": partial(ours, scaled=False),
    "fastclip_pillow": partial(ours, scaled=True, native=False),
    "fastclip_packed": packed,
    PEER: theirs,
}


def go_through(batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    for _ in batches:
        pass


def check(passes: dict[str, Pass], case: Case) -> None:
    """Check that every pass yields images of the right shape, and each caption once."""
    captions = {}
    for name, one in passes.items():
        images, ids = zip(*one())
        assert {tuple(image.shape[1:]) for image in images} == {(3, 224, 224)}, name
        captions[name] = sorted(map(tuple, torch.cat(ids).tolist()))
        if len(captions[name]) != case.samples or captions[name] != next(iter(captions.values())):
            raise RuntimeError(f"{name} reads {len(captions[name])} of {case.samples} samples, or other samples")


def measure(case: Case, names: list[str], rounds: int, folder: Path) -> Spent:
    """Run rounds in which every provider takes a turn."""
    pattern = write_shards(case, folder)
    passes = {name: PROVIDERS[name](case, pattern) for name in names}
    check(passes, case)
    spent = Spent()
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            before = sum(os.times()[:4])
            seconds = spent.clock(lambda one=passes[name]: go_through(one()))
            spent.rounds.setdefault(name, []).append(seconds)
            spent.cpu.setdefault(name, []).append(sum(os.times()[:4]) - before)
    return spent


def rows(case: Case, timings: Spent) -> list[dict[str, Any]]:
    out = []
    for name, seconds in timings.rounds.items():
        out.append(
            {
                **asdict(case),
                "provider": name,
                "rounds": len(seconds),
                "median_s": round(statistics.median(seconds), 3),
                "p20_s": round(quantile(seconds, 0.2), 3),
                "p80_s": round(quantile(seconds, 0.8), 3),
                "samples_per_second": round(case.samples / statistics.median(seconds), 1),
                f"speedup_over_{PEER}": timings.ratio(name, PEER, 3),
                "cpu_ms_per_sample": round(1e3 * statistics.median(timings.cpu[name]) / case.samples, 3),
                "load": round(os.getloadavg()[0], 1),
            }
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes",
        default="512x384,1024x768",
        help="sizes of the JPEGs as WIDTHxHEIGHT, separated by commas (default: %(default)s)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=2048,
        help="number of samples, a multiple of the batch size (default: %(default)s)",
    )
    parser.add_argument("--shards", type=int, default=4, help="number of tar shards (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per batch (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each provider (default: %(default)s)")
    parser.add_argument(
        "--providers", default=",".join(PROVIDERS), help="providers, separated by commas (default: %(default)s)"
    )
    parser.add_argument("--rows", type=Path, default=RESULTS, help="CSV file to add rows to (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for size in arguments.sizes.split(","):
        width, height = map(int, size.split("x"))
        case = Case(width, height, arguments.samples, arguments.shards, arguments.batch_size, arguments.workers)
        with tempfile.TemporaryDirectory() as folder:
            timings = measure(case, arguments.providers.split(","), arguments.rounds, Path(folder))
        measured = rows(case, timings)
        append(
            arguments.rows,
            measured,
            machine() | {"webdataset": installed_version("webdataset"), "pillow": installed_version("pillow")},
        )
        for row in measured:
            print(*row.values(), sep="\t", flush=True)


if __name__ == "__main__":
    main()
