"""A training run from its options to the saved model."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from fastclip._version import __version__
from fastclip.data.identity import fingerprint
from fastclip.data.loader import training_batches
from fastclip.data.order import Order
from fastclip.data.picture import pixels_limited
from fastclip.data.spec import open_source
from fastclip.data.workers import naming_dead_workers
from fastclip.durable import mend_folders, new_folder, set_aside
from fastclip.evaluation.validate import validate
from fastclip.models.config import load_config
from fastclip.models.dual_encoder import build_model as empty_model
from fastclip.models.factory import tokenizer_of
from fastclip.models.transforms import image_transform, training_side
from fastclip.owner import output_path
from fastclip.rounding import ceil_div
from fastclip.training.building import build_loss, build_model, resolve, served_by
from fastclip.training.checkpoint import (
    check_room,
    find_checkpoint,
    load_checkpoint,
    mend_checkpoints,
    model_state,
    read_state,
    set_aside_after,
    set_aside_run,
    take_snapshot,
    write_snapshot,
)
from fastclip.training.doubts import changes, doubts, doubts_of_device, doubts_of_labels
from fastclip.training.kept import settings_kept
from fastclip.training.metrics import Meter, Metrics, Progress, cut_metrics
from fastclip.training.optim import MovingAverage, build_optimizer, warmup_cosine
from fastclip.training.options import TrainOptions, write_options
from fastclip.training.parallel import World, joined, one_for_all, owned_together, reshard, wrap
from fastclip.training.saver import Saver
from fastclip.training.signals import Interrupted, Signals
from fastclip.training.skipped import Skipped
from fastclip.training.step import FAILED, Stepper, StepReport, seed_step

__all__ = ["Run", "train"]

logger = logging.getLogger(__name__)
_VALIDATION_BATCH = 256


class Run(NamedTuple):
    """What a run leaves."""

    folder: Path
    steps: int  # updates made, those before a resume included
    losses: list[float]  # of every step of this call
    validation: dict[str, float]  # the last one of this call; empty where it made none
    seconds: float  # of all steps of this call, data included
    backend: str  # that served the loss, a name of `fastclip.backends()`


def train(options: TrainOptions) -> Run:
    """Train as `options` say, alone or as one of torchrun's processes; the same options give the same losses.

    Torch's random numbers, and whether it is deterministic, are afterwards what they were before.

    Raises:
        ValueError: options, data, model and checkpoint do not fit together, or too many samples cannot be used.
        OSError: a file cannot be read or written, another run owns the output folder (`fastclip.owner`), or a process
            that reads data was killed; of its kind ConnectionError, another process is lost.
        FloatingPointError: loss or gradient is not finite; the update was not made.
        Interrupted: SIGTERM or Ctrl-C came, and a checkpoint is written; a SystemExit, of status 143 or 130. A second
            signal ends the process at once. In another thread than the main one signals are left alone.
    """
    with (
        joined(options.device, timeout=timedelta(seconds=options.timeout)) as world,
        owned_together(options.output, world, force=options.force),
        settings_kept(deterministic=options.deterministic),
        naming_dead_workers(),
        pixels_limited(options.max_pixels),
    ):
        return _Trainer(options, world).run()


class _Trainer:
    """Everything that a run holds, made in the order in which it is needed."""

    def __init__(self, options: TrainOptions, world: World) -> None:
        config = load_config(options.model)
        options = resolve(options, config)
        self.world, self.folder = world, output_path(options.output)
        self._check(options)

        self.source = open_source(options.data)
        self.fingerprint = fingerprint(self.source)
        self._check_same_data()
        self.order = Order(len(self.source), options.batch_size, options.seed)
        self.skipped = Skipped(self.order, options.max_bad, world)
        self.steps = options.max_steps or self.order.steps(options.epochs)
        warmup = min(2000, self.steps // 10) if options.warmup is None else options.warmup
        self.options = replace(options, max_steps=self.steps, warmup=warmup)
        self.val_source = None if options.val_data is None else open_source(options.val_data, held_out=True)

        self.backend = served_by(self.options, world.device)
        self.loss = build_loss(self.options, world)
        self.model = build_model(self.options, self.loss, world.device)
        assert self.model.config is not None
        self.config = self.model.config
        self.tokenize = tokenizer_of(self.config, options.model)
        self.wrapped = wrap(self.model, world, options.parallel)
        assert options.optimizer is not None and options.lr is not None and options.weight_decay is not None
        self.optimizer = build_optimizer(
            options.optimizer,
            self.model,
            lr=options.lr,
            weight_decay=options.weight_decay,
            betas=options.betas,
            eps=options.eps,
        )
        self.ema = None if options.ema is None else MovingAverage(self.model, options.ema)
        self.validation: dict[str, float] = {}
        self.saver = Saver(background=options.async_save)
        self.signals = Signals()

    def _check(self, options: TrainOptions) -> None:
        B, K, ranks = options.batch_size, options.micro_batch, self.world.ranks
        if ranks > B:
            raise ValueError(f"--batch-size {B} leaves nothing for some of {ranks} processes")
        if options.features_on == "cpu":
            if self.world.device.type == "cuda" and self.world.group is not None:
                raise ValueError("--features-on cpu is for one process: NCCL takes no features from the host")
            if not _is_cached(options, ranks):
                raise ValueError("--features-on cpu is of gradient caching: it needs a --micro-batch below the batch")
        counts = {ceil_div((r + 1) * B // ranks - r * B // ranks, K or B) for r in range(ranks)}
        if options.parallel == "fsdp" and len(counts) > 1:  # each micro-batch gathers parameters, on all processes
            raise ValueError(
                f"--parallel fsdp needs as many micro-batches on every process: --batch-size {B} over {ranks} of them "
                f"in micro-batches of {K} makes {' or '.join(map(str, sorted(counts)))}"
            )
        file = self.folder / "metrics.jsonl"
        if options.resume is None and file.is_file() and file.stat().st_size:  # a run that made no step left none
            raise ValueError(
                f"--output {self.folder} holds a run: --resume auto goes on with it, another folder begins a new one"
            )

    def _check_same_data(self) -> None:
        """All ranks have opened the same samples, as far as `fingerprint` tells."""
        if self.world.group is None:
            return
        size = len(self.source)
        told: list[Any] = [None] * self.world.ranks
        dist.all_gather_object(told, (size, self.source.key(0), self.fingerprint), group=self.world.group)
        if len(set(told)) > 1:
            seen = ", ".join(f"rank {k} {n:,} samples from {key} (digest {x})" for k, (n, key, x) in enumerate(told))
            raise ValueError(f"--data {self.source.spec}: the processes see different data: {seen}")

    def run(self) -> Run:
        options, world = self.options, self.world
        first, validated = self._resume()
        last = self.steps if options.stop_after is None else min(self.steps, first + options.stop_after)
        about: dict[str, Any] = {"samples": len(self.source), "ranks": world.ranks, "resumed": first > 0}
        _tell(doubts(self.options, with_labels=self.loss.with_labels, **about))
        _tell(doubts_of_device(self.options, world.device))
        with one_for_all(world):
            metrics = self._open_metrics(first)
        progress = Progress(first=first, steps=self.steps, shown=world.rank == 0)
        losses: list[float] = []
        start = time.perf_counter()
        try:
            with self.signals.watched(), self.saver:  # in this order: what is being written ends, or a second signal
                if not validated and self._validation_is_due(first):  # a run may have died in it
                    self._validate(first, metrics, progress)
                for done, report in self._updates(first, last, metrics, progress):
                    losses.append(report.loss)
                    self._after(done, done == last, report.status, metrics, progress)
                self._wait_for_saver()
        finally:
            progress.close()
            if metrics is not None:
                metrics.close()
        if self.skipped.tally.total:
            logger.warning(self.skipped.told(last * options.batch_size))
        if last == self.steps:
            self._save_model()
        return Run(self.folder, last, losses, self.validation, time.perf_counter() - start, self.backend)

    def _after(self, done: int, ends: bool, status: int, metrics: Metrics | None, progress: Progress) -> None:
        """Of update `done`, after which a process wants to end where `status` is not 0: validation and checkpoints.

        A run that has made its last step ends as ever.
        """
        if status == FAILED:
            self._wait_for_saver()
        stops = status and done < self.steps
        if stops or ends or _due(done, self.options.save_every):
            self._save(done, metrics)  # at once: validation may fail, and who sent a signal may not wait for long
        if self._validation_is_due(done):
            self._validate(done, metrics, progress)
        if stops:
            self._wait_for_saver()
            logger.warning("stopped by a signal after step %d, with a checkpoint: --resume auto goes on", done)
            raise Interrupted(status, done)

    def _validation_is_due(self, done: int) -> bool:
        return self.val_source is not None and (_due(done, self.options.val_every) or done == self.steps)

    def _wait_for_saver(self) -> None:
        with one_for_all(self.world):
            self.saver.wait()

    def _updates(
        self, first: int, last: int, metrics: Metrics | None, progress: Progress
    ) -> Iterator[tuple[int, StepReport]]:
        """Each update, logged: the number of updates so far, and its report."""
        options, world = self.options, self.world
        stepper = Stepper(
            self.model,
            self.wrapped,
            self.loss,
            self.optimizer,
            world,
            ema=self.ema,
            max_grad_norm=options.max_grad_norm,
            autocast=torch.bfloat16 if options.precision == "bf16" else None,
            keep_on="cpu" if options.features_on == "cpu" else None,
            cached=_is_cached(options, world.ranks),
        )
        batches = training_batches(
            self.source,
            image_transform(self.config, train=True),
            self.tokenize,
            batch_size=options.batch_size,
            micro_batch=options.micro_batch,
            seed=options.seed,
            first_step=first,
            last_step=last,
            rank=world.rank,
            ranks=world.ranks,
            workers=options.workers,
            pin_memory=world.device.type == "cuda",
            min_side=training_side(self.config),
        )
        assert options.lr is not None and options.warmup is not None
        meter = Meter(options.batch_size)
        for step in range(first, last):
            with meter.waiting():
                batch = next(batches)
            self.skipped.count(batch, step)
            if step == first:
                _tell(doubts_of_labels([one.labels for one in batch], options.loss, with_labels=self.loss.with_labels))
            self.model.train()
            lr = options.lr * warmup_cosine(step, warmup_steps=options.warmup, steps=self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            seed_step(options.seed, step, world.rank)
            logged = (step + 1) % options.log_every == 0 or step + 1 == last
            report = stepper.step(batch, step=step, accuracy=logged, status=self._status)
            meter.stepped()
            if logged:
                values = {
                    "loss": report.loss,
                    "lr": lr,
                    "logit_scale": float(self.model.logit_scale.detach().exp()),
                    "grad_norm": report.grad_norm,
                    "image_top1": report.image_top1 or 0.0,
                    "text_top1": report.text_top1 or 0.0,
                    "skipped": self.skipped.tally.total,
                    "epoch": self.order.position(step)[0],
                    **meter.read(),
                }
                if metrics is not None:
                    metrics.write(step + 1, values)
                progress.show(step + 1, values)
            progress.moved()
            with meter.paused():  # validation and checkpoints are no part of the throughput
                yield step + 1, report

    def _resume(self) -> tuple[int, bool]:
        """Updates that a checkpoint holds, 0 for a new run, and whether they are validated. Prepares the folder."""
        checkpoints, model = self.folder / "checkpoints", self.folder / "model"
        found: list[Any] = [None, False]  # the checkpoint; whether model/ is there, or not this run's to write
        with one_for_all(self.world):  # all have looked before rank 0 writes
            if self.world.rank == 0:
                mend_checkpoints(checkpoints)
                mend_folders(self.folder, model.name)
                path = find_checkpoint(self.options.resume, self.folder) if self.options.resume else None
                own = path is not None and path.parent.resolve() == checkpoints.resolve()
                found = [path, model.exists() or not own]
        if self.world.group is not None:
            dist.broadcast_object_list(found, src=0)
        path, ended = found  # a run may have died between its last checkpoint and model/
        first = 0
        if path is not None:
            state = read_state(path, "options", "samples", "skipped")
            _tell(f"changed since {path}: {one}" for one in changes(state, self.options, self.source, self.fingerprint))
            first = load_checkpoint(path, self.model, self.optimizer, ema=self.ema)
            logger.info("goes on from %s, after %d steps", path, first)
            self.skipped.load(state["skipped"], path)
            if first > self.steps or (first == self.steps and ended):
                raise ValueError(f"{path} has made {first} steps, and the schedule has {self.steps}: nothing is left")
        validated: list[int | None] = [None]
        with one_for_all(self.world):
            if self.world.rank == 0:
                check_room(checkpoints, self.model, ema=self.ema is not None)
                if path is not None and path.parent.resolve() != checkpoints.resolve():
                    set_aside_run(self.folder)
                set_aside_after(checkpoints, first)
                if path is not None and model.exists():  # of an earlier step of this run, which is about to go on
                    logger.warning("the run goes on, and %s is called %s now", model, set_aside(model).name)
                validated = [cut_metrics(self.folder / "metrics.jsonl", first)]
                write_options(self.options, self.folder / "config.yaml")
        if self.world.group is not None:
            dist.broadcast_object_list(validated, src=0)
        return first, validated[0] in (None, first)

    def _status(self) -> int:
        """With which this process wants to end; 0: it does not."""
        return FAILED if self.saver.failed else self.signals.status

    def _open_metrics(self, first: int) -> Metrics | None:
        if self.world.rank:
            return None
        return Metrics(self.folder, options=asdict(self.options), wandb=self.options.wandb, first=first)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model has its moving average's weights, where there is one."""
        if self.ema is None:
            yield
            return
        self.ema.swap()
        reshard(self.model)
        try:
            yield
        finally:
            self.ema.swap()
            reshard(self.model)

    def _validate(self, done: int, metrics: Metrics | None, progress: Progress) -> None:
        assert self.val_source is not None
        dtype = torch.bfloat16 if self.options.precision == "bf16" else None
        if self.world.group is not None:  # BatchNorm's statistics are every rank's own, and rank 0's are what is saved
            for x in self.model.buffers():
                dist.broadcast(x, src=0, group=self.world.group)
        with self._averaged(), torch.autocast(self.world.device.type, dtype, enabled=dtype is not None):
            self.validation = validate(
                self.model,
                self.val_source,
                image_transform(self.config),
                self.tokenize,
                batch_size=self.options.micro_batch or _VALIDATION_BATCH,
                workers=self.options.workers,
                group=self.world.group,
            )
        if metrics is not None:
            metrics.write(done, {f"val/{name}": value for name, value in self.validation.items()})
        progress.show(done, self.validation)

    def _save(self, done: int, metrics: Metrics | None) -> None:
        with one_for_all(self.world):
            self.saver.wait()  # before the next copy: there is one at a time
            if metrics is not None:
                metrics.flush()
        about = {
            "options": asdict(self.options),
            "samples": len(self.source),
            "fingerprint": self.fingerprint,
            "skipped": self.skipped.state(),
            "fastclip": __version__,
            "torch": torch.__version__,
        }
        writes = self.world.rank == 0
        found = take_snapshot(self.model, self.optimizer, step=done, about=about, ema=self.ema, writes=writes)
        if found is not None:
            self.saver.start(write_snapshot, self.folder / "checkpoints", found, keep=self.options.keep)

    def _save_model(self) -> None:
        with self._averaged():
            state = model_state(self.model)
            with one_for_all(self.world):
                if self.world.rank == 0:
                    whole = empty_model(self.config, device="meta")
                    whole.load_state_dict(state, assign=True)
                    with new_folder(self.folder / "model") as half:
                        whole.save_pretrained(half)


def _is_cached(options: TrainOptions, ranks: int) -> bool:
    """Gradient caching: somebody's share is more than a micro-batch."""
    return options.micro_batch is not None and options.micro_batch < ceil_div(options.batch_size, ranks)


def _due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0


def _tell(doubts: Iterable[str]) -> None:
    for doubt in doubts:
        logger.warning("%s", doubt)
