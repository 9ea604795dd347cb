"""Reading of the folder of a run."""

from __future__ import annotations

import logging
from array import array
from dataclasses import MISSING, fields
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastclip.system.reading import parse_json, read_json, read_yaml
from fastclip.training.options import TrainOptions

__all__ = ["RunRecord", "Series", "read_run"]

logger = logging.getLogger(__name__)


_NUMBER = (int, float, type(None))  # null is read as NaN
_TEXT = (str, type(None))
_NEEDED: dict[str, Any] = {
    "data": str,
    "model": str,
    "val_data": _TEXT,
    "precision": _TEXT,
    "max_steps": (int, type(None)),
}


class Series(NamedTuple):
    """Values of one metric."""

    steps: NDArray[np.float64]  # (P,), updates made
    values: NDArray[np.float64]  # (P,), NaN for null


class RunRecord(NamedTuple):
    """Options and metrics of a run, as far as they are written."""

    folder: Path
    options: dict[str, Any]
    changed: dict[str, Any]  # options that differ from the defaults of `TrainOptions`
    series: dict[str, Series]  # metric, as named in metrics.jsonl -> values
    unread: int  # lines of metrics.jsonl that cannot be read
    ended: bool  # model/ exists, which is written at the end of the schedule
    written: datetime  # time of the last change of metrics.jsonl, in local time
    versions: dict[str, str]  # versions of fastclip and torch in training; empty if there is no checkpoint

    @property
    def steps(self) -> int:
        """Number of updates made, as far as they are logged."""
        return int(max((series.steps[-1] for series in self.series.values()), default=0))


def read_run(folder: str | Path) -> RunRecord:
    """Read the options and metrics of a run of ``fastclip train``, which may be in progress or have been killed.

    Lines of metrics that are incomplete or not JSON are left out and counted.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: config.yaml is damaged.
    """
    folder = Path(folder)
    config, metrics = folder / "config.yaml", folder / "metrics.jsonl"
    for file in (config, metrics):
        if not file.is_file():
            raise FileNotFoundError(f"{folder} is not a run of fastclip train: it holds no {file.name}")
    options = read_yaml(config)
    for name, kind in _NEEDED.items():
        if not isinstance(options.get(name), kind):
            raise ValueError(
                f"{config} must hold the options of a run, such as `model: ViT-B-32`: {name} is missing or invalid"
            )
    defaults = {f.name: None if f.default is MISSING else f.default for f in fields(TrainOptions)}
    defaults = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    series, unread = _read_metrics(metrics)
    return RunRecord(
        folder=folder,
        options=options,
        changed={name: value for name, value in options.items() if value != defaults.get(name)},
        series=series,
        unread=unread,
        ended=(folder / "model").is_dir(),
        written=datetime.fromtimestamp(metrics.stat().st_mtime),
        versions=_versions(folder),
    )


def _read_metrics(file: Path) -> tuple[dict[str, Series], int]:
    """Return the values by metric, and the number of lines that could not be read."""
    columns: dict[str, tuple[array[float], array[float]]] = {}  # compact, 16 bytes per value: a run may have millions
    unread = 0
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                values = parse_json(line, str(file))
                step = float(int(values.pop("step")))
                numbers = {k: float("nan" if v is None else v) for k, v in values.items() if isinstance(v, _NUMBER)}
            except (ValueError, TypeError, KeyError, OverflowError):
                unread += bool(line.strip())
                continue
            for name, value in numbers.items():
                column = columns.setdefault(name, (array("d"), array("d")))
                column[0].append(step)
                column[1].append(value)
    if unread:
        logger.warning("%s: %d lines cannot be read and are left out", file, unread)
    return {name: Series(*map(np.asarray, pair)) for name, pair in columns.items()}, unread


def _versions(folder: Path) -> dict[str, str]:
    """Return the versions in the newest checkpoint that can be read: others may be damaged or just removed."""
    for file in sorted(folder.glob("checkpoints/step-*/state.json"), reverse=True):
        try:
            state = read_json(file)
            return {name: str(state[name]) for name in ("fastclip", "torch") if name in state}
        except (ValueError, OSError):
            continue
    return {}
