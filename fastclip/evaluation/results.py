"""Write results as JSON in the format of CLIP_benchmark, and format them as tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastclip.system.durable import new_file, write_text

__all__ = ["result", "table", "write_lines", "write_results"]


def result(
    *, dataset: str, task: str, model: str, pretrained: str, metrics: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """Return a result as a dictionary in the format of CLIP_benchmark (LAION, ``clip_benchmark/cli.py``).

    Args:
        dataset: name of the dataset.
        task: ``zeroshot_classification``, ``zeroshot_retrieval``, ``linear_probe`` ...
        model: name of the model.
        pretrained: name of the weights.
        metrics: metrics under CLIP_benchmark's names.
        **more: further values, for which CLIP_benchmark has no key.
    """
    return {
        "dataset": dataset,
        "model": model,
        "pretrained": pretrained,
        "task": task,
        "metrics": dict(metrics),
        **more,
    }


def write_results(path: str | Path, results: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Write one result as a JSON object, or several as a list.

    Numbers that are not finite become null, because JSON cannot represent them.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(_finite(results), indent=2, allow_nan=False) + "\n")


def write_lines(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, with numbers as in `write_results`; the file appears only once it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as half, half.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _finite(inside) for name, inside in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inside) for inside in value]
    return value


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a table as text, with the first column aligned left and the others aligned right.

    Floats are shown with one decimal, None as a dash.
    """
    cells = [[_cell(value) for value in row] for row in (head, *rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(head))]
    lines = [
        "  ".join(x.ljust(w) if k == 0 else x.rjust(w) for k, (x, w) in enumerate(zip(row, widths))) for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)
