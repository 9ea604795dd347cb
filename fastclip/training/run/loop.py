"""The loop of a run, from its last checkpoint to its end or to a signal. Training and fine-tuning share it.

OUTPUT/metrics.jsonl        one line per logged step, with TensorBoard's events in tensorboard/
       checkpoints/         from which the run resumes
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
from fastclip.models.transforms import pixel_transform, training_side
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
from fastclip.training.run.loss_state import add_loss_state, load_loss_state
from fastclip.training.run.metrics import Meter, Metrics, cut_metrics
from fastclip.training.run.skipped import Skipped
from fastclip.training.signals import Interrupted, Signals
from fastclip.training.step.moving_average import MovingAverage
from fastclip.training.step.optim import warmup_cosine
from fastclip.training.step.update import FAILED, seed_step

__all__ = ["Loop", "Update"]

logger = logging.getLogger(__name__)


class Update(NamedTuple):
    """Report of one update. It is the same on every rank."""

    loss: float
    values: dict[str, float]  # further metrics to log; may be empty if the step is not logged
    status: int  # 0 to continue, else the exit status: FAILED (checkpoint not written), 143 or 130 (signal)
    tokens: int = 0  # tokens of all texts, without padding


@dataclass
class Loop:
    """The loop over the steps of a run. Call `resume`, then `run`."""

    options: TrainOptions | FinetuneOptions  # with lr and warmup filled in
    folder: Path  # owned by this run (`fastclip.system.owner`)
    world: World
    source: Source
    config: ModelConfig  # determines the transform of images
    tokenize: Tokenize
    order: Order
    steps: int  # length of the whole schedule
    model: nn.Module  # module whose state a checkpoint holds
    optimizer: torch.optim.Optimizer
    update: Callable[..., Update]  # (batch, step, logged=bool, status=() -> exit status): updates the model
    hint: str  # tells the user how to resume after a signal
    ema: MovingAverage | None = None
    loss: nn.Module | None = None  # a loss with state, which a checkpoint holds, too
    about: dict[str, Any] = field(default_factory=dict)  # about the run, stored in each checkpoint
    validate: Callable[[], dict[str, float]] | None = None
    val_every: int | None = None  # steps between validations; the last step is always validated
    async_save: bool = True
    wandb: str | None = None
    utilisation: Callable[[int, int, float], float | None] = lambda *_: None  # as in `Meter`

    def __post_init__(self) -> None:
        self.skipped = Skipped(self.order, self.options.max_bad, self.world)
        self.saver, self.signals = Saver(background=self.async_save), Signals()
        self.first = 0  # updates made before this call
        self.validated = True  # False: the validation after update `first` is still to be made

    def resume(self, which: str | None, compare: Callable[[Path, bool], None] = lambda path, ended: None) -> None:
        """Load the checkpoint to resume from, if there is one, and prepare the folder.

        Args:
            which: value of ``--resume``; None starts a new run.
            compare: function called before a checkpoint is loaded, with its path and whether model/ exists.
        """
        checkpoints, model, path, ended = self.folder / "checkpoints", self.folder / "model", None, False
        with one_for_all(self.world):
            if self.world.rank == 0:  # one process only: two that repair the same folder could lose files
                mend_checkpoints(checkpoints)
                mend_folders(self.folder, model.name)
                path, ended = find_checkpoint(which, self.folder) if which else None, model.exists()
        path, ended = of_all_ranks((path, ended), self.world)[0]  # on a network disk, others may not see it yet
        if path is not None:
            compare(path, ended)
            self.first = load_checkpoint(path, self.model, self.optimizer, ema=self.ema)
            if self.loss is not None:
                load_loss_state(path, self.loss)
            self.skipped.load(read_state(path, "skipped")["skipped"], path)
            logger.info("resuming from %s, after %d of %d steps", path, self.first, self.steps)
        validated = None
        with one_for_all(self.world):
            if self.world.rank == 0:
                if self.first < self.steps:  # otherwise no checkpoint will be written
                    check_room(checkpoints, self.model, ema=self.ema is not None)
                if path is not None and path.parent.resolve() != checkpoints.resolve():
                    set_aside_run(self.folder)
                set_aside_after(checkpoints, self.first)
                if path is not None and self.first < self.steps and model.exists():  # from an earlier, shorter schedule
                    logger.warning("the run continues: %s is renamed to %s", model, set_aside(model).name)
                validated = cut_metrics(self.folder / "metrics.jsonl", self.first)
        self.validated = of_all_ranks(validated, self.world)[0] in (None, self.first)  # None: no step was logged yet

    @property
    def last(self) -> int:
        """Number of updates after which this call ends."""
        stop_after = self.options.stop_after
        return self.steps if stop_after is None else min(self.steps, self.first + stop_after)

    def run(self) -> list[float]:
        """Make the remaining updates of the schedule, or --stop-after of them, and return their losses.

        Raises:
            Interrupted: the process received a signal and has written a checkpoint.
            OSError, ValueError, FloatingPointError: as in `fastclip.training.train`.
        """
        options, world, losses = self.options, self.world, []
        with one_for_all(world):
            self._metrics = None
            if world.rank == 0:
                self._metrics = Metrics(self.folder, options=asdict(options), wandb=self.wandb, first=self.first)
        shown = world.rank == 0 and (self.first < self.last or not self.validated)
        self._progress = Progress("training", self.steps, done=self.first, unit="step", shown=shown)
        try:
            # `watched` is left last: until then a first signal lets `saver` finish the checkpoint that it is writing,
            # and a second one ends the process
            with self.signals.watched(), self.saver, self._progress:
                # An earlier process may have died during the validation of this step
                if not self.validated and self._validation_is_due(self.first):
                    self._validate(self.first)
                batches, meter = self._batches(), Meter(options.batch_size, self.utilisation)
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
        assert not isinstance(options.micro_batch, str), "auto is replaced by a number before the first step"
        return training_batches(
            self.source,
            pixel_transform(self.config, train=True),
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
        """Make one update, log it, save and validate if due, and return the loss."""
        self.skipped.count(batch, step)  # before the update, because it may end the run
        self.model.train()  # validation leaves it in eval mode
        assert self.options.lr is not None and self.options.warmup is not None
        lr = self.options.lr * warmup_cosine(step, warmup_steps=self.options.warmup, steps=self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        seed_step(self.options.seed, step, self.world.rank)
        done = step + 1
        logged = done % self.options.log_every == 0 or done == self.last
        update = self.update(batch, step, logged=logged, status=self._status)
        meter.stepped(update.tokens)
        self._progress.count()
        if logged:
            values = {"loss": update.loss, "lr": lr, **update.values, "skipped": self.skipped.tally.total}
            values |= {"epoch": self.order.position(step)[0], **meter.read()}
            self._write(done, values)
            self._progress.show(values)
        with meter.paused():  # the throughput excludes validation and checkpoints
            self._after(done, update.status)
        return update.loss

    def _after(self, done: int, status: int) -> None:
        """Save and validate after update `done` if due, and end the run if `status` is not 0.

        A signal after the last update is ignored, because the run ends anyway.
        """
        if status == FAILED:
            self._wait_for_saver()  # raises the error of the failed write on every rank
        stops = status and done < self.steps
        if stops or done == self.last or _due(done, self.options.save_every):
            self._save(done)  # before validation, which may fail or outlast the grace period after a signal
        if self._validation_is_due(done):
            self._validate(done)
        if stops:
            self._wait_for_saver()
            logger.warning("stopped by a signal after step %d, with a checkpoint: %s", done, self.hint)
            raise Interrupted(status, done)

    def _status(self) -> int:
        """Return the exit status with which this process needs to end, or 0 to continue."""
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
            self.saver.wait()  # before the next snapshot, so that only one is in memory
            if self._metrics is not None:
                self._metrics.flush()  # a checkpoint must not be newer than its metrics
        about = {**self.about, "skipped": self.skipped.state()}
        writes = self.world.rank == 0
        snapshot = take_snapshot(self.model, self.optimizer, step=done, about=about, ema=self.ema, writes=writes)
        if snapshot is not None:
            if self.loss is not None:
                add_loss_state(snapshot, self.loss)
            self.saver.start(write_snapshot, self.folder / "checkpoints", snapshot, keep=self.options.keep)


def _due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0
