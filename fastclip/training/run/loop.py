"""The loop of a run, from its last checkpoint to its end or to a signal, whatever it trains.

OUTPUT/metrics.jsonl        a line a logged step; TensorBoard's events beside it
       checkpoints/         from which the run goes on
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastclip.data.batch import Batch
from fastclip.data.loading.batches import Tokenize, training_batches
from fastclip.data.loading.order import Order
from fastclip.data.source import Source
from fastclip.models.config import ModelConfig
from fastclip.models.transforms import image_transform, training_side
from fastclip.system.durable import mend_folders, set_aside
from fastclip.system.progress import Progress
from fastclip.training.options import FinetuneOptions, TrainOptions
from fastclip.training.ranks import World, of_all_ranks, one_for_all
from fastclip.training.run.background_saver import Saver
from fastclip.training.run.checkpoints import (
    check_room,
    find_checkpoint,
    load_checkpoint,
    mend_checkpoints,
    read_state,
    set_aside_after,
    set_aside_run,
    take_snapshot,
    write_snapshot,
)
from fastclip.training.run.metrics import Meter, Metrics, cut_metrics
from fastclip.training.run.skipped import Skipped
from fastclip.training.signals import Interrupted, Signals
from fastclip.training.step.moving_average import MovingAverage
from fastclip.training.step.optim import warmup_cosine
from fastclip.training.step.update import FAILED, seed_step

__all__ = ["Loop", "Update"]

logger = logging.getLogger(__name__)


class Update(NamedTuple):
    """What one update reports; the same on every rank."""

    loss: float
    values: dict[str, float]  # what is logged besides; may be empty where the step is not
    status: int  # 0: go on; else exit status to end with: FAILED to write a checkpoint, 143 or 130 for a signal


@dataclass
class Loop:
    """The parts of a run and its steps: `resume`, then `run`."""

    options: TrainOptions | FinetuneOptions  # with lr and warmup
    folder: Path  # this run's own (`fastclip.system.owner`)
    world: World
    source: Source
    config: ModelConfig  # tells how pictures become tensors
    tokenize: Tokenize
    order: Order
    steps: int  # of the whole schedule
    model: nn.Module  # what a checkpoint holds
    optimizer: torch.optim.Optimizer
    update: Callable[..., Update]  # (batch, step, logged=whether it is, status=() -> exit status), of the model
    hint: str  # how a run that a signal has ended goes on
    ema: MovingAverage | None = None
    about: dict[str, Any] = field(default_factory=dict)  # of the run, in each checkpoint
    validate: Callable[[], dict[str, float]] | None = None
    val_every: int | None = None  # steps; the last one is validated as well
    async_save: bool = True
    wandb: str | None = None

    def __post_init__(self) -> None:
        self.skipped = Skipped(self.order, self.options.max_bad, self.world)
        self.saver, self.signals = Saver(background=self.async_save), Signals()
        self.first = 0  # updates made before this call
        self.validated = True  # no validation after update `first` is outstanding

    def resume(self, which: str | None, compare: Callable[[Path, bool], None] = lambda path, ended: None) -> None:
        """Fill the parts from a checkpoint, where there is one, and prepare the folder.

        Args:
            which: as ``--resume``; None is a new run.
            compare: called with the checkpoint before it is loaded, and whether model/ is there.
        """
        checkpoints, model, path, ended = self.folder / "checkpoints", self.folder / "model", None, False
        with one_for_all(self.world):
            if self.world.rank == 0:  # alone: what two mend at once may be lost
                mend_checkpoints(checkpoints)
                mend_folders(self.folder, model.name)
                path, ended = find_checkpoint(which, self.folder) if which else None, model.exists()
        path, ended = of_all_ranks((path, ended), self.world)[0]  # of rank 0 alone: a network disk may show others less
        if path is not None:
            compare(path, ended)
            self.first = load_checkpoint(path, self.model, self.optimizer, ema=self.ema)
            self.skipped.load(read_state(path, "skipped")["skipped"], path)
            logger.info("goes on from %s, after %d of %d steps", path, self.first, self.steps)
        validated = None
        with one_for_all(self.world):
            if self.world.rank == 0:
                if self.first < self.steps:  # else no checkpoint is left to write
                    check_room(checkpoints, self.model, ema=self.ema is not None)
                if path is not None and path.parent.resolve() != checkpoints.resolve():
                    set_aside_run(self.folder)
                set_aside_after(checkpoints, self.first)
                if path is not None and self.first < self.steps and model.exists():  # of an earlier end of this run
                    logger.warning("the run goes on, and %s is called %s now", model, set_aside(model).name)
                validated = cut_metrics(self.folder / "metrics.jsonl", self.first)
        self.validated = of_all_ranks(validated, self.world)[0] in (None, self.first)  # None: no step is logged yet

    @property
    def last(self) -> int:
        """Number of updates after which this call ends."""
        stop_after = self.options.stop_after
        return self.steps if stop_after is None else min(self.steps, self.first + stop_after)

    def run(self) -> list[float]:
        """Make the updates that are left, or those of this call; returns their losses.

        Raises:
            Interrupted: a signal came, and a checkpoint is written.
            OSError, ValueError, FloatingPointError: as `fastclip.train` raises them.
        """
        options, world, losses = self.options, self.world, []
        with one_for_all(world):
            self._metrics = None
            if world.rank == 0:
                self._metrics = Metrics(self.folder, options=asdict(options), wandb=self.wandb, first=self.first)
        shown = world.rank == 0 and (self.first < self.last or not self.validated)
        self._progress = Progress("training", self.steps, done=self.first, unit="step", shown=shown)
        try:
            # On the way out a checkpoint that is being written ends first, unless a second signal comes
            with self.signals.watched(), self.saver, self._progress:
                if not self.validated and self._validation_is_due(self.first):  # a run may have died in it
                    self._validate(self.first)
                batches, meter = self._batches(), Meter(options.batch_size)
                for step in range(self.first, self.last):
                    with meter.waiting():
                        batch = next(batches)
                    losses.append(self._step(batch, step, meter))
                self._wait_for_saver()
        finally:
            if self._metrics is not None:
                self._metrics.close()
        if self.skipped.tally.total:
            logger.warning(self.skipped.summary(self.last * options.batch_size))
        return losses

    def _batches(self) -> Iterator[Sequence[Batch]]:
        options, world = self.options, self.world
        return training_batches(
            self.source,
            image_transform(self.config, train=True),
            self.tokenize,
            batch_size=options.batch_size,
            micro_batch=options.micro_batch,
            seed=options.seed,
            first_step=self.first,
            last_step=self.last,
            rank=world.rank,
            ranks=world.ranks,
            workers=options.workers,
            pin_memory=world.device.type == "cuda",
            min_side=training_side(self.config),
        )

    def _step(self, batch: Sequence[Batch], step: int, meter: Meter) -> float:
        """Make an update, log it and save what is due; returns the loss."""
        self.skipped.count(batch, step)  # first: it may end the run
        self.model.train()  # validation leaves it in eval mode
        assert self.options.lr is not None and self.options.warmup is not None
        lr = self.options.lr * warmup_cosine(step, warmup_steps=self.options.warmup, steps=self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        seed_step(self.options.seed, step, self.world.rank)
        done = step + 1
        logged = done % self.options.log_every == 0 or done == self.last
        update = self.update(batch, step, logged=logged, status=self._status)
        meter.stepped()
        self._progress.count()
        if logged:
            values = {"loss": update.loss, "lr": lr, **update.values, "skipped": self.skipped.tally.total}
            values |= {"epoch": self.order.position(step)[0], **meter.read()}
            self._write(done, values)
            self._progress.show(values)
        with meter.paused():  # validation and checkpoints are no part of the throughput
            self._after(done, update.status)
        return update.loss

    def _after(self, done: int, status: int) -> None:
        """Save and validate update `done` where that is due, and end where a process wants to: `status` is not 0.

        After the last update a signal changes nothing.
        """
        if status == FAILED:
            self._wait_for_saver()  # which raises the failure, on every rank
        stops = status and done < self.steps
        if stops or done == self.last or _due(done, self.options.save_every):
            self._save(done)  # at once: validation may fail, and who sent a signal may not wait for long
        if self._validation_is_due(done):
            self._validate(done)
        if stops:
            self._wait_for_saver()
            logger.warning("stopped by a signal after step %d, with a checkpoint: %s", done, self.hint)
            raise Interrupted(status, done)

    def _status(self) -> int:
        """Return the exit status with which this process wants to end, or 0."""
        return FAILED if self.saver.failed else self.signals.status

    def _write(self, done: int, values: dict[str, float]) -> None:
        if self._metrics is not None:
            self._metrics.write(done, values)

    def _validation_is_due(self, done: int) -> bool:
        return self.validate is not None and (_due(done, self.val_every) or done == self.steps)

    def _validate(self, done: int) -> None:
        assert self.validate is not None
        values = self.validate()
        self._write(done, {f"val/{name}": value for name, value in values.items()})
        self._progress.show(values)

    def _wait_for_saver(self) -> None:
        with one_for_all(self.world):
            self.saver.wait()

    def _save(self, done: int) -> None:
        with one_for_all(self.world):
            self.saver.wait()  # before the next copy: there is one at a time
            if self._metrics is not None:
                self._metrics.flush()  # a checkpoint may not be newer than its metrics
        about = {**self.about, "skipped": self.skipped.state()}
        writes = self.world.rank == 0
        snapshot = take_snapshot(self.model, self.optimizer, step=done, about=about, ema=self.ema, writes=writes)
        if snapshot is not None:
            self.saver.start(write_snapshot, self.folder / "checkpoints", snapshot, keep=self.options.keep)


def _due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0
