"""Rows of GPU measurements other than steps of the losses, written to results/gpu_ten.csv as they are measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.device import Gpu
from benchmarks.harness import append, quantile
from fastclip.system.durable import write_text

NAME = "gpu_ten.csv"
STEPS = "cuda.csv"  # for steps of the losses, in the columns of `make bench`


@dataclass
class Log:
    """The rows of one part, which ends on its own when `end` is near."""

    part: str
    rows: Path  # the folder
    gpu: Gpu
    end: float  # by time.monotonic()
    markers: Path  # a folder with one file per finished piece
    code: str = ""  # hash of the code to which the pieces belong
    about: dict[str, Any] = field(init=False)
    complete: bool = True  # False if a piece had no time

    def __post_init__(self) -> None:
        self.about = self.gpu.about()

    def row(
        self,
        case: str,
        provider: str,
        measure: str,
        unit: str,
        values: float | Sequence[float],
        *,
        status: str = "",
        digits: int = 4,
    ) -> None:
        """Write a figure: one value, or the median of one value per round."""
        many = [values] if isinstance(values, (int, float)) else list(values)
        spread = [quantile(many, q) for q in (0.2, 0.8)] if len(many) > 1 else ["", ""]
        figures = [x if x == "" else round(x, digits) for x in (statistics.median(many), *spread)]
        self._write(case, provider, measure, unit, *figures, len(many), status)

    def status(self, case: str, provider: str, status: str) -> None:
        """Write a row with the reason why there are no figures."""
        self._write(case, provider, "", "", "", "", "", "", status)

    def no_time(self, case: str, provider: str = "", pieces: str = "") -> None:
        """Write a row that reports missing time; the part then counts as incomplete."""
        self.complete = False
        self.status(case, provider, f"no time was left{pieces and ' for ' + pieces}: {max(self.left(), 0):.0f} s")

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.monotonic()

    def done(self, piece: str) -> bool:
        """Return True if an earlier run on the same code finished this piece of the part."""
        marker = self.markers / f"{self.part}-{piece}"
        return marker.exists() and marker.read_text() == self.code

    def mark_done(self, piece: str) -> None:
        self.markers.mkdir(parents=True, exist_ok=True)
        write_text(self.markers / f"{self.part}-{piece}", self.code)

    def _write(self, *cells: Any) -> None:
        columns = ("part", "case", "provider", "measure", "unit", "value", "p20", "p80", "rounds", "status")
        row = dict(zip(columns, (self.part, *cells), strict=True))
        append(self.rows / NAME, [row], self.about)
        print(*(cell for cell in row.values() if cell != ""), sep="  ", flush=True)
