"""A training run from its options to the saved model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from fastclip._version import __version__
from fastclip.data.batch import Batch
from fastclip.data.identity import fingerprint
from fastclip.data.loading.order import Order
from fastclip.data.loading.workers import naming_dead_workers
from fastclip.data.picture import pixels_limited
from fastclip.data.sources.mixture import sample_count
from fastclip.data.spec import open_source
from fastclip.evaluation.validate import validate
from fastclip.models.config import load_config
from fastclip.models.dual_encoder import build_model as empty_model
from fastclip.models.factory import tokenizer_of
from fastclip.models.transforms import PixelNormalization, image_transform
from fastclip.system.durable import new_folder
from fastclip.system.owner import output_path
from fastclip.system.rounding import ceil_div
from fastclip.training.doubts import changes, doubts, doubts_of_device, doubts_of_labels
from fastclip.training.from_options import (
    build_loss,
    build_model,
    gamma_of,
    resolve,
    resolve_compile,
    served_by,
    tower_dtype,
)
from fastclip.training.options import TrainOptions, write_options
from fastclip.training.planning.choose import settle
from fastclip.training.ranks import World, joined, of_all_ranks, one_for_all, owned_together, reshard, wrap
from fastclip.training.run.checkpoints import model_state, read_state
from fastclip.training.run.loop import Loop, Update
from fastclip.training.run.torch_settings import settings_kept
from fastclip.training.run.utilisation import Utilisation
from fastclip.training.step.compiled import Compilation, eager, obstacle, untraceable
from fastclip.training.step.moving_average import MovingAverage
from fastclip.training.step.optim import build_optimizer
from fastclip.training.step.update import Stepper
from fastclip.training.teachers import build_distillation, check_distillation

__all__ = ["Run", "train"]

logger = logging.getLogger(__name__)
_VALIDATION_BATCH = 256


class Run(NamedTuple):
    """Result of a training run."""

    folder: Path
    steps: int  # updates made, including those before a resume
    losses: list[float]  # loss of every step of this call
    validation: dict[str, float]  # metrics of this call's last validation; empty if none ran
    seconds: float  # duration of all steps of this call, data loading included
    backend: str  # backend that computed the loss, a name of `fastclip.backends()`


def train(options: TrainOptions) -> Run:
    """Train a model as `options` describe, in a single process or as one of torchrun's processes.

    The same options give the same losses. The state of torch's random number generators and its deterministic mode are
    restored when the function returns.

    Raises:
        ValueError: options, data, model and checkpoint do not fit together, or too many samples cannot be used.
        OSError: a file cannot be read or written, another run owns the output (`fastclip.system.owner`), or a process
            that reads data was killed.
        ConnectionError: another process of the run is lost. This is a subclass of OSError.
        FloatingPointError: the loss or a gradient is not finite; the update was not made.
        Interrupted: the process received SIGTERM or Ctrl-C and has written a checkpoint. The exception is a SystemExit
            with status 143 or 130. A second signal ends the process at once if it comes
            more than a second after the first. Signals are handled only if this function
            is called in the main thread.
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
    """All parts of a run, built in the order in which they are needed."""

    def __init__(self, options: TrainOptions, world: World) -> None:
        config = load_config(options.model)
        options = resolve(options, config)
        self.world, self.folder = world, output_path(options.output)
        self._check(options)  # before data and weights are loaded, which may take minutes
        self.compile_asked = options.compile
        options = self._resolve_compile(options, lambda: obstacle(world.device, deterministic=options.deterministic))

        self.source = open_source(options.data)
        self.fingerprint = fingerprint(self.source)
        self._check_same_data()
        self.order = Order(len(self.source), options.batch_size, options.seed)
        self.steps = options.max_steps or self.order.steps(options.epochs)
        warmup = min(2000, self.steps // 10) if options.warmup is None else options.warmup
        self.options = replace(options, max_steps=self.steps, warmup=warmup)
        self.val_source = None if options.val_data is None else open_source(options.val_data, held_out=True)

        self.backend = served_by(self.options, world.device)
        self.loss = build_loss(self.options, world, samples=sample_count(self.source))
        self.model = build_model(self.options, self.loss, world)
        assert self.model.config is not None
        self.config = self.model.config
        self.tokenize = tokenizer_of(self.config, options.model)
        self.distillation = build_distillation(self.options, self.config, world)
        self.validation: dict[str, float] = {}
        self.options = self._resolve_compile(self.options, lambda: untraceable(self.model, tower_dtype(self.options)))
        deterministic = self.options.deterministic
        self.compilation = Compilation(self.model, deterministic=deterministic) if self.options.compile else None
        self.stepper = self._make_stepper()

    def _resolve_compile(self, options: TrainOptions, trial: Callable[[], str | None]) -> TrainOptions:
        return resolve_compile(options, self.world, trial, asked=self.compile_asked)

    def _make_stepper(self) -> Stepper:
        options, wrapped = self.options, wrap(self.model, self.world, self.options.parallel)
        assert options.optimizer is not None and options.lr is not None and options.weight_decay is not None
        optimizer = build_optimizer(
            options.optimizer,
            self.model,  # already sharded by `wrap` under FSDP
            lr=options.lr,
            weight_decay=options.weight_decay,
            betas=options.betas,
            eps=options.eps,
        )
        return Stepper(
            self.model,
            wrapped,
            self.loss,
            optimizer,
            self.world,
            ema=None if options.ema is None else MovingAverage(self.model, options.ema),
            max_grad_norm=options.max_grad_norm,
            autocast=tower_dtype(options),
            keep_on="cpu" if options.features_on == "cpu" else None,
            normalize_pixels=PixelNormalization.of(self.config),
            few_lengths=self.compilation is not None,
            distillation=self.distillation,
        )

    def _choose_micro_batch(self, before: Mapping[str, Any] | None = None) -> None:
        """Replace `--micro-batch auto` by a number, and set how a step uses gradient caching.

        Args:
            before: contents of state.json of the checkpoint from which the run resumes.
        """
        teachers = () if self.distillation is None else [one.model for one in self.distillation.teachers]
        samples = 0 if self.loss.module is None else self.loss.module.samples
        chosen = settle(self.options, self.model, self.world, before=before, teachers=teachers, samples=samples)
        self.options = replace(self.options, micro_batch=chosen.micro_batch)
        self._check_micro_batches(self.options)
        self.stepper.cached, self.stepper.keep_graphs = self.options.is_cached(self.world.ranks), chosen.keep_graphs

    def _digests(self) -> list[str]:
        return [] if self.distillation is None else [teacher.digest for teacher in self.distillation.teachers]

    def _make_loop(self) -> Loop:
        about = {
            "options": {},  # filled in by `run`, which knows the micro-batch
            "ranks": self.world.ranks,
            "samples": len(self.source),
            "fingerprint": self.fingerprint,
            "teachers": self._digests(),
            "fastclip": __version__,
            "torch": torch.__version__,
        }
        return Loop(
            options=self.options,
            folder=self.folder,
            world=self.world,
            source=self.source,
            config=self.config,
            tokenize=self.tokenize,
            order=self.order,
            steps=self.steps,
            model=self.model,
            optimizer=self.stepper.optimizer,
            update=self._update,
            hint="--resume auto continues the run",
            ema=self.stepper.ema,
            loss=self.loss.module,
            about=about,
            validate=None if self.val_source is None else self._validate,
            val_every=self.options.val_every,
            async_save=self.options.async_save,
            wandb=self.options.wandb,
            utilisation=Utilisation(
                self.model,
                self.world,
                batch_size=self.options.batch_size,
                autocast=self.stepper.autocast,
                prefixes=self.options.prefixes,
            ),
        )

    def _check(self, options: TrainOptions) -> None:
        check_distillation(options)
        B, ranks = options.batch_size, self.world.ranks
        if ranks > B:
            raise ValueError(f"--batch-size {B} is too small for {ranks} processes: each needs at least one pair")
        if options.features_on == "cpu":
            if self.world.device.type == "cuda" and self.world.group is not None:
                raise ValueError("--features-on cpu works with one process only: NCCL cannot exchange host memory")
            given = isinstance(options.micro_batch, int)
            cached = options.is_cached(ranks) if given else options.largest_share(ranks) > 1
            if not cached:
                raise ValueError(
                    "--features-on cpu requires gradient caching: set --micro-batch below the batch size of a process"
                )
        self._check_micro_batches(options)
        file = self.folder / "metrics.jsonl"
        if options.resume is None and file.is_file() and file.stat().st_size:  # empty if no step was made
            raise ValueError(
                f"--output {self.folder} already holds a run: --resume auto continues it; "
                "choose another folder for a new run"
            )

    def _check_micro_batches(self, options: TrainOptions) -> None:
        B, K, ranks = options.batch_size, options.micro_batch, self.world.ranks
        if not isinstance(K, int):
            return  # not chosen yet
        # Distinct numbers of micro-batches per process
        counts = {ceil_div((r + 1) * B // ranks - r * B // ranks, K) for r in range(ranks)}
        # Every micro-batch gathers the parameters, and all ranks must take part in each of these collectives
        if options.parallel == "fsdp" and len(counts) > 1:
            raise ValueError(
                "--parallel fsdp needs the same number of micro-batches on every process. With --batch-size "
                f"{B}, the {ranks} processes have {' or '.join(map(str, sorted(counts)))} micro-batches of {K}. Choose "
                f"a --batch-size that is a multiple of {ranks}"
            )

    def _check_same_data(self) -> None:
        """Raise ValueError if the ranks have opened datasets of different size, first key or fingerprint."""
        views = of_all_ranks((len(self.source), self.source.key(0), self.fingerprint), self.world)
        if len(set(views)) > 1:
            listed = (
                f"rank {k} has {n:,} samples, of which the first is {key} (digest {x})"
                for k, (n, key, x) in enumerate(views)
            )
            raise ValueError(
                f"--data {self.source.spec}: the processes see different data: {', '.join(listed)}. "
                "Make sure that all machines have the same files"
            )

    def run(self) -> Run:
        asked, world = self.options, self.world
        loop = self._make_loop()  # not an attribute: the loop refers to this object, and a cycle keeps the model alive
        loop.resume(asked.resume, self._compare)
        if self.options is asked:  # no checkpoint was compared
            self._choose_micro_batch()
        options = loop.options = self.options
        loop.about["options"] = asdict(options)
        self.first = loop.first
        with one_for_all(world):
            if world.rank == 0:
                # Not what the default of --compile is here: the file may be used on another machine
                write_options(replace(options, compile=self.compile_asked), self.folder / "config.yaml")
        about: dict[str, Any] = {
            "samples": len(self.source),
            "ranks": world.ranks,
            "with_labels": self.loss.with_labels,
            "embed_dim": self.config.embed_dim,
        }
        about |= {"resumed": loop.first > 0, "chosen": asked.micro_batch == "auto"}
        _warn(doubts(options, **about))
        _warn(doubts_of_device(options, world.device))
        start = time.perf_counter()
        losses = loop.run()
        if loop.last == self.steps:
            self._save_model()
        return Run(self.folder, loop.last, losses, self.validation, time.perf_counter() - start, self.backend)

    def _compare(self, path: Path, ended: bool) -> None:
        """Warn of changes since the checkpoint `path`, and raise ValueError if no steps are left."""
        state = read_state(path, "options", "samples")
        self._choose_micro_batch(state)
        changed = changes(state, self.options, self.source, self.fingerprint, self._digests(), ranks=self.world.ranks)
        _warn(f"changed since {path}: {change}" for change in changed)
        ours = path.parent.resolve() == (self.folder / "checkpoints").resolve()
        # A finished checkpoint of this run may be resumed: the run may have died before it wrote model/
        if (done := state["step"]) > self.steps or (done == self.steps and (ended or not ours)):
            raise ValueError(f"{path} was written after step {done} of {self.steps}: nothing is left to train")

    def _update(self, batch: Sequence[Batch], step: int, *, logged: bool, status: Callable[[], int]) -> Update:
        if step == self.first:
            labels = [micro_batch.labels for micro_batch in batch]
            _warn(doubts_of_labels(labels, self.options.loss, with_labels=self.loss.with_labels))
        if self.loss.module is not None:
            epoch, epochs = self.order.position(step)[0], self.order.position(self.steps - 1)[0] + 1
            self.loss.module.gamma = gamma_of(self.options, epoch, epochs)
        with nullcontext() if self.compilation is None else self.compilation.of_step(step):
            report = self.stepper.step(batch, step=step, accuracy=logged, status=status)
        values = {}
        if logged:
            values = {
                "logit_scale": report.logit_scale,
                "grad_norm": report.grad_norm,
                "image_top1": report.image_top1 or 0.0,
                "text_top1": report.text_top1 or 0.0,
            }
            if report.loss_contrastive is not None and report.loss_distillation is not None:
                values["loss_contrastive"] = report.loss_contrastive
                values["loss_distillation"] = report.loss_distillation
        return Update(report.loss, values, report.status, report.tokens)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Give the model the weights of its moving average inside the context, if there is one."""
        ema = self.stepper.ema
        if ema is None:
            yield
            return
        ema.swap()
        reshard(self.model)
        try:
            yield
        finally:
            ema.swap()
            reshard(self.model)

    def _validate(self) -> dict[str, float]:
        assert self.val_source is not None
        micro_batch = self.options.micro_batch if self.options.is_cached(self.world.ranks) else _VALIDATION_BATCH
        assert isinstance(micro_batch, int)
        dtype = self.stepper.autocast
        if self.world.group is not None:  # each rank has its own BatchNorm statistics; rank 0's are saved
            for x in self.model.buffers():
                dist.broadcast(x, src=0, group=self.world.group)
        autocast = torch.autocast(self.world.device.type, dtype, enabled=dtype is not None)
        with self._averaged(), autocast, nullcontext() if self.compilation is None else eager():
            self.validation = validate(
                self.model,
                self.val_source,
                image_transform(self.config),
                self.tokenize,
                batch_size=micro_batch,
                workers=self.options.workers,
                group=self.world.group,
            )
        return self.validation

    def _save_model(self) -> None:
        with self._averaged():
            state = model_state(self.model)
            with one_for_all(self.world):
                if self.world.rank == 0:  # `state` is unsharded; `self.model` is not under FSDP
                    whole = empty_model(self.config, device="meta")
                    whole.load_state_dict(state, assign=True)
                    with new_folder(self.folder / "model") as half:
                        whole.save_pretrained(half)


def _warn(messages: Iterable[str]) -> None:
    for message in messages:
        logger.warning("%s", message)
