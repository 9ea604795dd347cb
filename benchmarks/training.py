"""Time and memory of a training step against the batch size, compared with open_clip's trainer. Rows go to
results/training.csv.

    python -m benchmarks.training --model ViT-tiny --batches 256/256,1024/256,4096/256 --rounds 5
    python -m benchmarks.training --model ViT-tiny --batches 32768/256 --rounds 1 --providers fastclip
    python -m benchmarks.training --model ViT-B-32 --precision bf16 --batches 32768/1024 --rounds 3 --device cuda

A batch is SIZE/MICRO, with micro-batches of MICRO pairs. Both trainers start from the same weights and take the same
random batch from the host's memory (pinned for a GPU), as each one's data workers hand it over: fastclip takes uint8
images and normalises them in the step, open_clip takes normalised ones. A batch of more than 4,096 images contains each
several times, with other texts. The first losses are compared before any timing.

Texts are captions of 8 to 20 words, each equally likely, tokenized by the model's tokenizer, or with `--texts uniform`
random tokens, whose number is uniform up to the context length.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Timings, append, machine, quantile
from benchmarks.losses.peak_memory import peak_of, return_what_is_freed
from benchmarks.texts import captions, uniform
from fastclip.data.batch import Batch
from fastclip.models import DualEncoder, create_model
from fastclip.models.config import ModelConfig
from fastclip.models.convert import convert
from fastclip.models.transforms import PixelNormalization
from fastclip.training.from_options import placed
from fastclip.training.ranks import World
from fastclip.training.step.compiled import Compilation
from fastclip.training.step.losses import NamedLoss, named_loss
from fastclip.training.step.optim import build_optimizer
from fastclip.training.step.update import Stepper

RESULTS = Path(__file__).parent / "results" / "training.csv"
PEER = "open_clip"
POOL = 4096  # largest number of different images
LR, DECAY, BETAS, EPS = 5e-4, 0.2, (0.9, 0.98), 1e-6
AGREE = 1e-4  # relative, for the losses of two implementations of the encoders
AGREE_BF16 = 1e-2

Step = Callable[[], float]  # returns the loss


@dataclass(frozen=True)
class Case:
    model: str
    precision: str  # fp32, bf16
    batch_size: int
    micro_batch: int
    texts: str = "captions"  # captions, uniform
    keep_graphs: int = 0  # fastclip's --keep-graphs
    device: str = "cpu"


class Shares:
    """Seconds of the loss, forward and backward, in each step."""

    def __init__(self, device: str) -> None:
        self.seconds: list[float] = []
        self._gpu = device == "cuda"

    def timed(self, loss: NamedLoss) -> NamedLoss:
        def function(image: Tensor, text: Tensor, *rest: Tensor) -> Tensor:
            start = self._now()
            image, text = image.view_as(image), text.view_as(text)  # their gradients are computed last
            ends: list[Any] = []
            for x in (image, text):
                x.register_hook(lambda d: ends.append(self._now()))
            value = loss.function(image, text, *rest)
            value.register_hook(lambda d: ends.append(self._now()))
            self._finish = lambda: self.seconds.append(max(self._between(start, end) for end in ends))
            return value

        return loss._replace(function=function)

    def finish(self) -> None:
        self._finish()

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        if not self._gpu:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def pieces_of(case: Case, model: DualEncoder) -> list[Batch]:
    """Return micro-batches of random uint8 pixels and of texts of different lengths."""
    config = model.config
    assert config is not None
    generator = torch.Generator().manual_seed(0)
    pictures = min(case.batch_size, POOL // case.micro_batch * case.micro_batch or case.micro_batch)
    size = (pictures, 3, *(2 * (config.vision_cfg.image_size,)))
    images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    texts = captions if case.texts == "captions" else uniform
    ids = texts(case.batch_size, case.model, config, generator)
    if case.device == "cuda":
        images, ids = images.pin_memory(), ids.pin_memory()
    labels, keys = torch.arange(case.batch_size), tuple(map(str, range(case.batch_size)))
    return [
        Batch(images[k % pictures : k % pictures + (k1 - k)], ids[k:k1], labels[k:k1], keys[k:k1])
        for k in range(0, case.batch_size, case.micro_batch)
        for k1 in [min(k + case.micro_batch, case.batch_size)]
    ]


def ours(case: Case, model: DualEncoder, pieces: list[Batch], shares: Shares | None = None) -> Step:
    """Return a step of `fastclip train`, including the accuracy that it computes."""
    loss = named_loss("clip")
    assert model.config is not None
    placed(model, torch.device(case.device))
    compilation = Compilation(model) if case.device == "cuda" else None  # as `fastclip train` does
    stepper = Stepper(
        model,
        model,
        loss if shares is None else shares.timed(loss),
        build_optimizer("adamw", model, lr=LR, weight_decay=DECAY, betas=BETAS, eps=EPS),
        World(0, 1, torch.device(case.device), None),
        max_grad_norm=1.0,
        autocast=torch.bfloat16 if case.precision == "bf16" else None,
        keep_graphs=case.keep_graphs,
        normalize_pixels=PixelNormalization.of(model.config),
    )

    def step() -> float:
        model.train()
        with nullcontext() if compilation is None else compilation.of_step(0):
            value = stepper.step(pieces, step=0, accuracy=True).loss
        if shares is not None:
            shares.finish()
        return value

    return step


def their_model(model: DualEncoder) -> Any:
    """Return open_clip's model with the same architecture and weights."""
    import open_clip

    with TemporaryDirectory() as folder:
        config = model.config
        assert config is not None
        convert(model, Path(folder) / "weights.pt", form="open_clip")
        image, text = config.vision_cfg, config.text_cfg
        tower = {name: getattr(image, name) for name in ("layers", "width", "image_size", "head_width")}
        if hasattr(image, "patch_size"):
            tower["patch_size"] = image.patch_size
        words = {name: getattr(text, name) for name in ("context_length", "vocab_size", "width", "heads", "layers")}
        peer = open_clip.CLIP(config.embed_dim, vision_cfg=tower, text_cfg=words, output_dict=True)
        open_clip.load_checkpoint(peer, str(Path(folder) / "weights.pt"))
    return peer


def normalized(pieces: list[Batch], config: ModelConfig, device: str) -> list[Tensor]:
    """Return the normalised images of each micro-batch, as open_clip's data workers hand them over.

    Large batches repeat their images, which are then normalised once.
    """
    normalize, pinned = PixelNormalization.of(config), device == "cuda"
    done: dict[int, Tensor] = {}  # by address
    for images in (piece.images for piece in pieces):
        if images.data_ptr() not in done:
            whole = normalize(images)
            done[images.data_ptr()] = whole.pin_memory() if pinned else whole
    return [done[piece.images.data_ptr()] for piece in pieces]


def theirs(case: Case, model: DualEncoder, pieces: list[Batch], *, compiled: bool = False) -> Step:
    """Return one step of open_clip_train's `train_one_epoch`, with `accum_freq` as the number of micro-batches."""
    from open_clip.loss import ClipLoss
    from open_clip_train.train import train_one_epoch

    peer = their_model(model)
    peer.to(case.device)
    gain = [p for name, p in peer.named_parameters() if p.ndim < 2 or "logit_scale" in name]
    rest = [p for name, p in peer.named_parameters() if not (p.ndim < 2 or "logit_scale" in name)]
    groups = [{"params": gain, "weight_decay": 0.0}, {"params": rest, "weight_decay": DECAY}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)

    class Loader(list):  # type: ignore[type-arg]
        num_batches, num_samples = len(pieces), case.batch_size

    assert model.config is not None
    images = normalized(pieces, model.config, case.device)
    loader = Loader((x, piece.ids) for x, piece in zip(images, pieces))
    losses: list[float] = []

    class Loss(ClipLoss):  # type: ignore[misc]
        def forward(self, *args: Any, **options: Any) -> Any:
            outputs = super().forward(*args, **options)
            losses.append(outputs["contrastive_loss"].item())
            return outputs

    arguments = SimpleNamespace(
        device=case.device,
        precision="fp32" if case.precision == "fp32" else "amp_bf16",
        distill=False,
        accum_freq=len(pieces),
        skip_scheduler=True,
        horovod=False,
        grad_clip_norm=1.0,
        log_every_n_steps=1,
        rank=0,
        local_rank=0,
        log_local=False,
        batch_size=case.micro_batch,
        world_size=1,
        wandb=False,
    )
    data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
    loss = Loss()
    trained = torch.compile(peer) if compiled else peer  # as --torchcompile does

    def step() -> float:
        losses.clear()
        train_one_epoch(trained, data, loss, 0, optimizer, None, None, None, arguments)
        return losses[0]

    return step


def build(case: Case, provider: str, shares: Shares | None = None) -> Step:
    torch.manual_seed(0)
    model = create_model(case.model)
    pieces = pieces_of(case, model)
    if provider == "fastclip":
        return ours(case, model, pieces, shares)
    return theirs(case, model, pieces, compiled=provider == f"{PEER}_compiled")


def measure(case: Case, names: list[str], rounds: int) -> tuple[Timings, Shares, dict[str, float]]:
    """Run rounds in which every provider takes a turn, after an untimed step whose losses are compared. On a GPU, one
    more step measures the peak memory.
    """
    shares = Shares(case.device)
    steps = {name: build(case, name, shares if name == "fastclip" else None) for name in names}
    first = {name: step() for name, step in steps.items()}
    agree = AGREE if case.precision == "fp32" else AGREE_BF16
    if len(set(first)) > 1 and abs(first["fastclip"] - first[PEER]) > agree * first[PEER]:
        raise RuntimeError(f"the first losses differ: {first}")
    peaks = {name: peak_on_gpu(step) for name, step in steps.items()} if case.device == "cuda" else {}
    shares.seconds.clear()
    timings = Timings()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            timings.rounds.setdefault(name, []).append(time.perf_counter() - start)
    return timings, shares, peaks


def peak_on_gpu(step: Step) -> float:
    """Return the MiB of a step beyond what is allocated between steps: models, gradients, states of the optimisers."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def peak(case: Case, provider: str) -> float:
    """Return the MiB of a step beyond the model, its gradients and optimiser states, and the batch, in this process."""
    return_what_is_freed()
    step = build(case, provider)
    small = build(replace(case, batch_size=2 * case.micro_batch), provider)
    small()  # loads libraries, starts threads
    del small
    build(replace(case, batch_size=8, micro_batch=4), provider)()
    return peak_of(lambda: void(step()))


def void(_: object) -> None:
    """Discard the loss that a step returns."""


def peak_in_child(case: Case, provider: str) -> float:
    words = ["--model", case.model, "--precision", case.precision, "--texts", case.texts]
    words += ["--keep-graphs", str(case.keep_graphs)]
    words += ["--batches", f"{case.batch_size}/{case.micro_batch}", "--peak-of", provider]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training", *words],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    return round(float(done.stdout.splitlines()[-1]), 1)


def rows(case: Case, timings: Timings, shares: Shares, peaks: dict[str, float]) -> list[dict[str, Any]]:
    out = []
    for name, seconds in timings.rounds.items():
        share = [100 * a / b for a, b in zip(shares.seconds, seconds)] if name == "fastclip" else []
        median = statistics.median(seconds)
        out.append(
            {
                **{name: value for name, value in asdict(case).items() if name != "device"},
                "provider": name,
                "rounds": len(seconds),
                "median_s": round(median, 4),
                "p20_s": round(quantile(seconds, 0.2), 4),
                "p80_s": round(quantile(seconds, 0.8), 4),
                "samples_per_second": round(case.batch_size / median, 1),
                f"speedup_over_{PEER}": timings.ratio(name, PEER, 3),
                "loss_percent": round(statistics.median(share), 2) if share else "",
                "peak_mib": peaks.get(name, ""),
            }
        )
    return out


def about(device: str) -> dict[str, Any]:
    """Return the description of the machine, with the name of the GPU if it is measured."""
    row = machine()
    return row if device == "cpu" else {**row, "machine": f"{torch.cuda.get_device_name()}; {row['machine']}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-tiny", help="name of the model (default: %(default)s)")
    parser.add_argument(
        "--precision", default="fp32", choices=["fp32", "bf16"], help="precision of the towers (default: %(default)s)"
    )
    parser.add_argument(
        "--batches",
        default="256/256,1024/256,4096/256",
        help="batches as SIZE/MICRO, separated by commas (default: %(default)s)",
    )
    parser.add_argument(
        "--texts",
        default="captions",
        choices=["captions", "uniform"],
        help="captions of 8 to 20 words, or texts of every length (default: %(default)s)",
    )
    parser.add_argument(
        "--keep-graphs", type=int, default=0, help="fastclip's option of this name (default: %(default)s)"
    )
    parser.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda"], help="device to compute on (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each provider (default: %(default)s)")
    parser.add_argument(
        "--providers",
        default="fastclip,open_clip",
        help="of fastclip, open_clip and open_clip_compiled, separated by commas (default: %(default)s)",
    )
    parser.add_argument("--rows", type=Path, default=RESULTS, help="CSV file to add rows to (default: %(default)s)")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable(logging.INFO)  # open_clip's trainer logs every step
    names = arguments.providers.split(",")
    for size, _, micro in (batch.partition("/") for batch in arguments.batches.split(",")):
        case = Case(
            arguments.model,
            arguments.precision,
            int(size),
            int(micro or size),
            arguments.texts,
            arguments.keep_graphs,
            arguments.device,
        )
        if arguments.peak_of:
            print(peak(case, arguments.peak_of))
            continue
        load = round(os.getloadavg()[0], 1)  # other processes may use the machine
        peaks = {name: peak_in_child(case, name) for name in names} if case.device == "cpu" else {}
        timings, shares, on_gpu = measure(case, names, arguments.rounds)
        measured = rows(case, timings, shares, peaks | on_gpu)
        append(arguments.rows, measured, {"load": load, **about(case.device)})
        for row in measured:
            print(*row.values(), sep="\t", flush=True)


if __name__ == "__main__":
    main()
