"""The rows that a benchmark has written."""

from __future__ import annotations

import csv
from pathlib import Path


def rows_of(folder: Path, name: str = "gpu_ten.csv") -> list[dict[str, str]]:
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))
