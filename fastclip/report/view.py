"""Contents of the page as plain values for its template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastclip._version import __version__
from fastclip.data.source import Source
from fastclip.report.charts import charts_of, short
from fastclip.report.examples import Confusion, Examined, Example
from fastclip.report.pictures import heat_map, thumbnail
from fastclip.report.run import RunRecord, Series
from fastclip.system.reading import read_json

__all__ = ["about_run", "of_examined", "read_results"]

_NUMBERED = 30  # classes up to which the confusion matrix shows numbers; a larger one is an image
_MOST = 1e300  # largest metric: larger integers would overflow a float
_MOST_TEXT = 300  # characters of a text that are shown
_BEST = ("zero_shot_top1", "image_retrieval_recall@1", "text_retrieval_recall@1")


class Figure(NamedTuple):
    """A key figure."""

    name: str
    value: str
    note: str


def about_run(run: RunRecord) -> dict[str, Any]:
    """Return the contents of the sections that need no model."""
    return {
        "run": run,
        "name": run.folder.resolve().name,
        "figures": _figures(run),
        "charts": charts_of(run.series),
        "made": datetime.now(),
        "version": __version__,
    }


def _figures(run: RunRecord) -> list[Figure]:
    figures, planned = [], run.options.get("max_steps")
    if (loss := run.series.get("loss")) is not None:
        figures.append(Figure("loss", short(loss.values[-1]), f"at step {loss.steps[-1]:,.0f}"))
    for name in _BEST:
        series = run.series.get(f"val/{name}")
        if series is not None and np.isfinite(series.values).any():
            best = int(np.nanargmax(series.values))
            note = f"best, at step {series.steps[best]:,.0f}; last {series.values[-1]:.4f}"
            figures.append(Figure(_in_words(name), f"{series.values[best]:.4f}", note))
    figures.append(Figure("steps", f"{run.steps:,}", f"of {planned:,}" if isinstance(planned, int) and planned else ""))
    if (speed := _median(run.series.get("samples_per_second"))) is not None:
        wait = _median(run.series.get("data_wait"))
        note = "" if wait is None else f"{wait:.0%} of the time spent waiting for data"
        figures.append(Figure("samples per second", f"{speed:,.0f}", note))
    if (share := _median(run.series.get("mfu"))) is not None:
        figures.append(Figure("model FLOP utilisation", f"{share:.1%}", "of the measured rate of matrix products"))
    if (skipped := run.series.get("skipped")) is not None and skipped.values[-1] > 0:
        figures.append(Figure("skipped samples", f"{skipped.values[-1]:,.0f}", "that could not be used"))
    return figures


def _median(series: Series | None) -> float | None:
    return None if series is None or not np.isfinite(series.values).any() else float(np.nanmedian(series.values))


def _in_words(metric: str) -> str:
    """Return a metric's name for the page: zero_shot_top1 becomes zero-shot top-1."""
    words = {"zero_shot_top": "zero-shot top-", "image_retrieval_": "text → image ", "text_retrieval_": "image → text "}
    for part, plain in words.items():
        metric = metric.replace(part, plain)
    return metric


def of_examined(source: Source, examined: Examined, run: RunRecord, *, same: bool) -> dict[str, Any]:
    """Return the contents of the sections that need a model.

    Args:
        source: dataset that was examined.
        examined: result of `examine`.
        run: run that trained the model.
        same: dataset and model are those of the run's last validation, whose metrics are then shown, too.
    """
    last = {name: run.series[f"val/{name}"] for name in examined.metrics if same and f"val/{name}" in run.series}
    step = max((series.steps[-1] for series in last.values()), default=0)
    pictures: dict[int, dict[str, str]] = {}

    def picture(number: int) -> dict[str, str]:
        if number not in pictures:
            record = source[examined.kept[number]]
            pictures[number] = {"url": thumbnail(record.image), "key": record.key}
        return pictures[number]

    def text(number: int) -> str:
        whole = examined.texts[number]
        return whole if len(whole) <= _MOST_TEXT else whole[:_MOST_TEXT] + "…"

    def shown(example: Example, query: Any, item: Any) -> dict[str, Any]:
        hits = [(hit, item(hit.item)) for hit in example.hits]
        return {"query": query(example.query), "place": example.place, "hits": hits}

    return {
        "spec": source.spec,
        "pictures": len(examined.kept),
        "captions": examined.captions,
        "step": int(step),
        "metrics": [
            (_in_words(name), value, float(last[name].values[-1]) if name in last else None)
            for name, value in examined.metrics.items()
        ],
        "confusion": None if examined.confusion is None else _matrix(examined.confusion, source.class_names),
        "of_texts": [[shown(example, text, picture) for example in part] for part in examined.of_texts],
        "of_images": [[shown(example, picture, text) for example in part] for part in examined.of_images],
    }


def _matrix(confusion: Confusion, names: Sequence[str]) -> dict[str, Any]:
    counts, rows, url = confusion.counts, list[Any](), None
    if counts is not None:
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)  # classes without images have shares of 0
        if len(names) <= _NUMBERED:
            rows = [(name, list(zip(*cells))) for name, *cells in zip(names, counts.tolist(), shares.tolist())]
        else:
            url = heat_map(shares)
    pairs = [(names[i], names[j], count, share) for i, j, count, share in confusion.pairs]
    return {"names": names, "rows": rows, "map": url, "pairs": pairs}


def read_results(paths: Sequence[Path]) -> dict[str, Any]:
    """Read result files in CLIP_benchmark's JSON format into a table.

    Each numeric metric has a row. A column is a combination of file, model and weights, with the alpha of
    fine-tuned weights. A second result for the same cell goes to a separate, numbered column.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is not a result file of ``fastclip eval``. The message names it.
    """
    columns: dict[tuple[str, str, str], None] = {}
    rows: dict[tuple[str, str, str], dict[tuple[str, str, str], float]] = {}
    for path in paths:
        contents = read_json(path, object)
        results = contents if isinstance(contents, list) else [contents]
        for result in results or [None]:  # an empty list has no results, which is an error
            if not isinstance(result, Mapping) or not isinstance(result.get("metrics"), Mapping):
                raise ValueError(f'{path} is not a result file of fastclip eval: a result has no "metrics"')
            values = {
                (str(result.get("task", "")), str(result.get("dataset", "")), name): value
                for name, value in result["metrics"].items()
                if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _MOST
            }
            weights = str(result.get("pretrained", "")) + (f", alpha {result['alpha']}" if "alpha" in result else "")
            column, number = (str(path), str(result.get("model", "")), weights), 1
            while any(column in rows.get(row, ()) for row in values):
                number += 1
                column = (*column[:2], f"{weights} ({number})")
            columns[column] = None
            for row, value in values.items():
                rows.setdefault(row, {})[column] = value
    ordered = sorted(rows)
    return {"columns": list(columns), "rows": [(row, [rows[row].get(column) for column in columns]) for row in ordered]}
