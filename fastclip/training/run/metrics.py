"""Metrics of a run in metrics.jsonl, TensorBoard and Weights & Biases, and the throughput."""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastclip.system.durable import naming, write_bytes, write_text
from fastclip.system.reading import parse_json

__all__ = ["Meter", "Metrics", "cut_metrics"]

logger = logging.getLogger(__name__)
_WARM_UP = 10  # first steps of a meter, which are slower than others


class Metrics:
    """Writer of the metrics of a run. Only the process of rank 0 has one.

    Args:
        folder: folder of the run, for metrics.jsonl (one JSON object per line) and TensorBoard's ``tensorboard/``.
        options: options of the run, which are sent to Weights & Biases.
        wandb: project of Weights & Biases, or None. The run there has the folder's name and is resumed with this run.
        first: updates made before this call. TensorBoard hides its events of later steps.
    """

    def __init__(self, folder: Path, *, options: dict[str, Any], wandb: str | None = None, first: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._wandb = _wandb_run(wandb, folder, options) if wandb else None
        self._path = folder / "metrics.jsonl"
        self._file = self._path.open("a", encoding="utf-8")
        # Events of steps that this call repeats stay in the older files; purge_step hides them
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1 if first else None)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write the metrics after `step` updates. TensorBoard groups names by the part before the slash."""
        with naming(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()  # so that a killed process loses no line
        for name, value in values.items():
            self._board.add_scalar(name if "/" in name else f"train/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def flush(self) -> None:
        """Wait until all lines are on the disk."""
        with naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def cut_metrics(file: Path, step: int) -> int | None:
    """Remove the lines of metrics.jsonl after `step`, which a resumed run writes again, and an incomplete last line.

    Other lines that cannot be read are removed with a warning.

    Returns:
        The last step that was validated, 0 if none was, or None if no lines remain.
    """
    if not file.is_file():
        return None
    kept, lines, unread, validated = [], file.read_bytes().splitlines(), 0, 0
    for number, line in enumerate(lines, 1):
        try:
            values = parse_json(line, str(file))
            if (made := int(values["step"])) <= step:
                kept.append(line + b"\n")  # adds a line end that a crash may have cut off
                if any(name.startswith("val/") for name in values):
                    validated = made
        except (ValueError, KeyError, TypeError, OverflowError):
            if line.strip(b"\0 ") and number < len(lines):  # a crash may cut the last line or leave blocks of zeros
                unread += 1
    if unread:
        logger.warning("%s: %d lines cannot be read and are removed", file, unread)
    write_bytes(file, b"".join(kept))
    return validated if kept else None


class Meter:
    """Throughput of training between two calls of `read`.

    Args:
        batch_size: pairs of all processes in a step.
        utilisation: function of steps, tokens of their texts and seconds that returns the model FLOP utilisation, or
            None if it is not known. It is called in `read`, with the sums over steps after the first ten.
    """

    def __init__(
        self, batch_size: int, utilisation: Callable[[int, int, float], float | None] = lambda *_: None
    ) -> None:
        self._batch_size, self._utilisation = batch_size, utilisation
        self._total = 0  # steps
        self._begin()

    def _begin(self) -> None:
        self._waited, self._steps, self._tokens, self._since = 0.0, 0, 0, time.perf_counter()
        self._warm_up = (0, 0, 0.0)  # steps, tokens and seconds of these that are not of the utilisation

    def stepped(self, tokens: int = 0) -> None:
        """Count one step, with `tokens` of all texts."""
        self._steps += 1
        self._total += 1
        self._tokens += tokens
        if self._total <= _WARM_UP:
            self._warm_up = (self._steps, self._tokens, time.perf_counter() - self._since)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside the context as waiting for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the context from the throughput."""
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """Return samples per second, the share of time spent waiting for data and the model FLOP utilisation.

        All are of the time since the last call. The utilisation leaves out the first ten steps of all, and has
        no value if they are all or if it is not known.
        """
        seconds = time.perf_counter() - self._since
        rates = {"samples_per_second": self._steps * self._batch_size / seconds, "data_wait": self._waited / seconds}
        steps, tokens, warm_up = self._warm_up
        if self._steps > steps:
            share = self._utilisation(self._steps - steps, self._tokens - tokens, seconds - warm_up)
            if share is not None:
                rates["mfu"] = share
        self._begin()  # the first call of `utilisation` takes time, which is excluded
        return rates


def _wandb_run(project: str, folder: Path, options: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError("--wandb needs wandb, which is not installed: pip install wandb", name="wandb") from error
    file = folder / "wandb-id"  # lets a resumed run continue the same curves
    if not file.exists():
        write_text(file, secrets.token_hex(8))
    run = file.read_text(encoding="utf-8")
    return wandb.init(project=project, name=folder.name, dir=str(folder), config=options, id=run, resume="allow")
