"""Fine-tuning of an image tower with a linear head that begins as the zero-shot classifier.

OUTPUT/finetune.json        what the run depends on: another run refuses the folder
       metrics.jsonl        a line a logged step; TensorBoard's events beside it
       checkpoints/         from which the same call goes on
       model/               image-text model with the tuned image tower, head.safetensors, classes.json
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastclip import _env
from fastclip.data.batch import Batch
from fastclip.data.identity import fingerprint
from fastclip.data.loader import training_batches
from fastclip.data.order import Order
from fastclip.data.picture import USUAL_PIXELS
from fastclip.data.source import Source
from fastclip.data.spec import absolute_spec
from fastclip.data.workers import naming_dead_workers
from fastclip.durable import mend_folders, new_folder, write_json
from fastclip.evaluation.zero_shot import class_embeddings, templates_for
from fastclip.models.classifier import ImageClassifier, save_classifier
from fastclip.models.embedder import Embedder
from fastclip.models.transforms import image_transform, training_side
from fastclip.owner import LOCK, owning
from fastclip.reading import read_json
from fastclip.training.checkpoint import (
    check_room,
    latest_checkpoint,
    load_checkpoint,
    mend_checkpoints,
    read_state,
    set_aside_after,
    take_snapshot,
    write_snapshot,
)
from fastclip.training.doubts import doubts_of_schedule
from fastclip.training.ensemble import interpolate
from fastclip.training.kept import settings_kept
from fastclip.training.metrics import Meter, Metrics, Progress, cut_metrics
from fastclip.training.optim import build_optimizer, clip_gradients, gradient_norm, warmup_cosine
from fastclip.training.parallel import World
from fastclip.training.saver import Saver
from fastclip.training.signals import Interrupted, Signals
from fastclip.training.skipped import Skipped
from fastclip.training.step import seed_step

__all__ = ["FinetuneOptions", "Finetuned", "finetune", "zero_shot_head"]

logger = logging.getLogger(__name__)
_MAY_CHANGE = ("workers", "log_every", "save_every", "keep", "max_bad", "stop_after")
_SHOWN = 5  # names in an error


@dataclass(frozen=True)
class FinetuneOptions:
    """The defaults are those of Wortsman et al. 2022 on ImageNet."""

    epochs: float = 10
    batch_size: int = 512  # pictures a step
    micro_batch: int | None = None  # whose activations are kept at a time; default: all of a step
    lr: float = 3e-5  # at the end of the warm-up
    weight_decay: float = 0.1  # of matrices; biases and norms have none
    warmup: int | None = None  # steps; default: 500, or a tenth of all if that is less
    max_grad_norm: float = 1.0  # a longer gradient is scaled down to it
    freeze_image: bool = False  # only the head learns
    grad_checkpointing: bool = False  # keep the blocks' inputs only
    seed: int = 0  # of order, crops and dropout
    workers: int = 2  # processes that read pictures
    log_every: int = 1  # steps
    save_every: int | None = None  # steps between checkpoints; default: those of an epoch
    keep: int = 2  # checkpoints that stay
    max_bad: float = 0.01  # the largest share of pictures that cannot be used
    stop_after: int | None = None  # steps of this call, which then ends with a checkpoint

    def __post_init__(self) -> None:
        """ValueError for a value that no run can have."""
        for name in ("batch_size", "micro_batch", "log_every", "save_every", "keep", "stop_after"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("epochs", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and above 0, got {getattr(self, name)}")
        if not self.max_grad_norm > 0:  # infinity clips nothing
            raise ValueError(f"max_grad_norm must be above 0, got {self.max_grad_norm}")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad must be between 0 and 1, got {self.max_bad}")
        for name in ("weight_decay", "warmup", "seed", "workers"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {value}")


class Finetuned(NamedTuple):
    """What `finetune` made; the classifier, and the embedder's image tower with it, has the tuned weights."""

    folder: Path
    embedder: Embedder
    steps: int  # made, those of earlier calls included
    losses: list[float]  # of this call's steps
    classifier: ImageClassifier
    zero_shot: dict[str, Tensor]  # the classifier's state before the first step, on the host
    tuned: dict[str, Tensor]  # and after the last
    complete: bool  # the schedule is at its end

    def mix(self, alpha: float) -> None:
        """Give the classifier the weights that `interpolate` makes of the two."""
        self.classifier.load_state_dict(interpolate(self.zero_shot, self.tuned, alpha))
        vars(self.embedder).pop("identity", None)  # it is another model now

    def save(self) -> Path:
        """Write ``model/`` with the weights that the classifier has."""
        with new_folder(self.folder / "model") as half:
            save_classifier(self.classifier, self.embedder.model, half)
        return self.folder / "model"


def zero_shot_head(embedder: Embedder, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(C, D) float32: exp(logit_scale) times the class embeddings (`fastclip.evaluation.zero_shot`)."""
    scale = embedder.model.logit_scale.detach().exp().cpu()
    return scale * class_embeddings(embedder, class_names, templates)


@owning
def finetune(
    embedder: Embedder,
    source: Source,
    options: FinetuneOptions | None = None,
    *,
    output: str | Path,
    templates: Sequence[str] = (),
) -> Finetuned:
    """Train image tower and head with cross entropy over the classes of `source`, in this process alone.

    A call with the same arguments goes on where one that was stopped or killed has written its last checkpoint, and on
    a CPU ends with the same bits: batches, crops and dropout are functions of the seed, the step and the sample. AdamW
    with torch's betas, warm-up and a cosine to 0.

    Args:
        embedder: its image tower is trained in place, and in eval mode afterwards; its precision "bf16" is autocast.
        source: one with classes.
        output: folder of the run, a new or empty one, or this run's.
        templates: of the captions that make the head; default: the source's own, else CLIP's 80

    Raises:
        ValueError: `source` has no classes, or too many pictures cannot be used; `output` holds something else; several
            processes were started.
        FloatingPointError: loss or gradient is not finite; the update was not made.
        OSError: `output` is another process's (`fastclip.owner`), or cannot be written.
        Interrupted: SIGTERM or Ctrl-C came, and a checkpoint is written.
    """
    if not source.class_names:
        raise ValueError(f"{source.spec} has no classes")
    if (process := _env.launched()) is not None and process.ranks > 1:
        raise ValueError(f"fine-tuning runs in one process, and torchrun has started {process.ranks}")
    templates = tuple(templates) or templates_for(source)
    with settings_kept(), naming_dead_workers():
        return _Run(embedder, source, options or FinetuneOptions(), Path(output), templates).run()


class _Run:
    def __init__(
        self, embedder: Embedder, source: Source, options: FinetuneOptions, folder: Path, templates: Sequence[str]
    ) -> None:
        self.embedder, self.source, self.options, self.folder = embedder, source, options, folder
        self.order = Order(len(source), options.batch_size, options.seed)
        self.steps = self.order.steps(options.epochs)
        self.warmup = min(500, self.steps // 10) if options.warmup is None else options.warmup
        self._claim(templates)
        weight = zero_shot_head(embedder, source.class_names, templates).to(embedder.device)
        visual: Any = embedder.model.visual
        self.classifier = ImageClassifier(visual, weight, source.class_names, freeze_image=options.freeze_image)
        self.zero_shot = self._state()
        visual.set_grad_checkpointing(options.grad_checkpointing)
        self.optimizer = build_optimizer(
            "adamw", self.classifier, lr=options.lr, weight_decay=options.weight_decay, betas=(0.9, 0.999), eps=1e-8
        )
        world = World(0, 1, embedder.device, None)
        self.skipped, self.saver, self.signals = Skipped(self.order, options.max_bad, world), Saver(), Signals()

    def _claim(self, templates: Sequence[str]) -> None:
        """The folder is this run's.

        Raises:
            ValueError: the folder holds something else, or a run of other data or options; the message names these.
        """
        asked: dict[str, Any] = {
            "checkpoint": self.embedder.identity,  # its weights
            "data": absolute_spec(self.source.spec),
            "samples": len(self.source),
            "order and captions": fingerprint(self.source),
            "max_pixels": Image.MAX_IMAGE_PIXELS,
            "class_names": self.source.class_names,
            "templates": templates,
            **{name: value for name, value in asdict(self.options).items() if name not in _MAY_CHANGE},
        }
        asked = json.loads(json.dumps(asked))
        file = self.folder / "finetune.json"
        if not file.is_file():
            if any(inside.name != LOCK for inside in self.folder.iterdir()):
                raise ValueError(f"{self.folder} is not empty and holds no fine-tuning: give another folder")
            write_json(file, asked, indent=1)
            return
        unknown = {"order and captions": asked["order and captions"], "max_pixels": USUAL_PIXELS}  # to older files
        before = {**unknown, **read_json(file)}
        if not asked.keys() <= before.keys():
            raise ValueError(f"{self.folder} was begun by another version of fastclip: give another folder")
        before["data"] = absolute_spec(before["data"])  # of older ones it is as it was spelled
        if other := [name for name in asked if before[name] != asked[name]]:
            told = ", ".join(f"{name} was {_short(before[name])}, is {_short(asked[name])}" for name in other)
            raise ValueError(f"{self.folder} holds another fine-tuning: {told}; give another folder")

    def run(self) -> Finetuned:
        first = self._resume()
        for doubt in doubts_of_schedule(warmup=self.warmup, steps=self.steps, lr=self.options.lr):
            logger.warning("%s", doubt)
        last = self.steps if self.options.stop_after is None else min(self.steps, first + self.options.stop_after)
        every = self.options.save_every or max(1, self.order.epoch_length // self.options.batch_size)
        metrics = Metrics(self.folder, options=asdict(self.options), first=first)
        progress = Progress(first=first, steps=self.steps, shown=first < last)
        losses: list[float] = []
        try:
            with self.signals.watched(), self.saver:
                for done, loss in self._updates(first, last, metrics, progress):
                    losses.append(loss)
                    stops = self.signals.status and done < self.steps
                    if stops or done == last or done % every == 0:
                        self._save(done, metrics)
                    if stops:
                        self.saver.wait()
                        logger.warning("stopped by a signal after step %d, with a checkpoint: again, it goes on", done)
                        raise Interrupted(self.signals.status, done)
        finally:
            progress.close()
            metrics.close()
            self.classifier.eval()  # as the embedder's towers are
        if self.skipped.tally.total:
            logger.warning(self.skipped.told(last * self.options.batch_size))
        vars(self.embedder).pop("identity", None)  # it is another model now
        whole = last == self.steps
        return Finetuned(
            self.folder, self.embedder, last, losses, self.classifier, self.zero_shot, self._state(), whole
        )

    def _resume(self) -> int:
        """Updates that a checkpoint holds; 0 for a new run."""
        checkpoints = self.folder / "checkpoints"
        mend_checkpoints(checkpoints)
        mend_folders(self.folder, "model")
        path, first = latest_checkpoint(checkpoints), 0
        if path is not None:
            first = load_checkpoint(path, self.classifier, self.optimizer)
            self.skipped.load(read_state(path, "skipped")["skipped"], path)
            logger.info("goes on from %s, after %d of %d steps", path, first, self.steps)
        if first < self.steps:
            check_room(checkpoints, self.classifier)
        set_aside_after(checkpoints, first)
        cut_metrics(self.folder / "metrics.jsonl", first)
        return first

    def _updates(self, first: int, last: int, metrics: Metrics, progress: Progress) -> Iterator[tuple[int, float]]:
        """Each update, logged: the number of updates so far, and its loss."""
        options, config = self.options, self.embedder.model.config
        assert config is not None
        batches = training_batches(
            self.source,
            image_transform(config, train=True),
            _no_ids,
            batch_size=options.batch_size,
            micro_batch=options.micro_batch,
            seed=options.seed,
            first_step=first,
            last_step=last,
            workers=options.workers,
            pin_memory=self.embedder.device.type == "cuda",
            min_side=training_side(config),
        )
        meter = Meter(options.batch_size)
        for step in range(first, last):
            with meter.waiting():
                batch = next(batches)
            self.skipped.count(batch, step)
            lr = options.lr * warmup_cosine(step, warmup_steps=self.warmup, steps=self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            seed_step(options.seed, step, 0)
            loss, norm, accuracy = self._update(batch, step)
            meter.stepped()
            if (step + 1) % options.log_every == 0 or step + 1 == last:
                values = {"loss": loss, "lr": lr, "grad_norm": norm, "acc1": accuracy}
                values |= {"skipped": self.skipped.tally.total, "epoch": self.order.position(step)[0], **meter.read()}
                metrics.write(step + 1, values)
                progress.show(step + 1, values)
            progress.moved()
            with meter.paused():
                yield step + 1, loss

    def _update(self, batches: Sequence[Batch], step: int) -> tuple[float, float, float]:
        """Loss, gradient norm before clipping, and share of the pictures that are classified rightly."""
        device, classes = self.embedder.device, len(self.source.class_names)
        self.classifier.train()
        self.optimizer.zero_grad()
        losses, hits = [], 0
        for batch in batches:
            if bool((batch.labels >= classes).any()):  # a hash of the caption where a picture has no class
                unknown = [key for key, label in zip(batch.keys, batch.labels.tolist()) if label >= classes]
                raise ValueError(f"{self.source.spec}: pictures without a class: {', '.join(unknown[:_SHOWN])}")
            labels = batch.labels.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.embedder.precision == "bf16"):
                logits = self.classifier(batch.images.to(device, non_blocking=True))
            each = F.cross_entropy(logits, labels, reduction="none")
            (each.sum() / self.options.batch_size).backward()
            losses.append(each.detach())
            hits += int((logits.argmax(dim=1) == labels).sum())
        whole = torch.cat(losses)
        loss = float(whole.double().mean())
        if not math.isfinite(loss):
            keys = [key for batch in batches for key in batch.keys]
            named = [key for key, finite in zip(keys, whole.isfinite().tolist()) if not finite]
            raise FloatingPointError(
                f"the loss of step {step} is {loss}; training stopped before its update, at {', '.join(named[:_SHOWN])}"
            )
        norm = gradient_norm(self.classifier.parameters())
        if not norm.isfinite():
            raise FloatingPointError(f"the gradient of step {step} is {norm}; training stopped before its update")
        clip_gradients(self.classifier.parameters(), self.options.max_grad_norm, norm)
        self.optimizer.step()
        return loss, norm.item(), hits / self.options.batch_size

    def _save(self, done: int, metrics: Metrics) -> None:
        self.saver.wait()
        metrics.flush()
        about = {"skipped": self.skipped.state()}
        found = take_snapshot(self.classifier, self.optimizer, step=done, about=about)
        assert found is not None
        self.saver.start(write_snapshot, self.folder / "checkpoints", found, keep=self.options.keep)

    def _state(self) -> dict[str, Tensor]:
        return {name: x.detach().cpu().clone() for name, x in self.classifier.state_dict().items()}


def _no_ids(texts: list[str]) -> Tensor:
    return torch.empty(len(texts), 0, dtype=torch.int64)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
