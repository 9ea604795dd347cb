"""Curves as parts of an SVG, to which the page's style sheet gives light or dark colours.

An SVG written by matplotlib would not fit into the page: it has about 10 kB before the first point, fixed colours in
`style` attributes, and references to external addresses and to its own parts, which the page must not contain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fastclip.report.run import Series

__all__ = ["BOTTOM", "HEIGHT", "LEFT", "RIGHT", "TOP", "WIDTH", "Chart", "Curve", "charts_of", "short"]

WIDTH, HEIGHT = 400, 220  # in units of the SVG, about a pixel each
LEFT, RIGHT, TOP, BOTTOM = 52, 390, 10, 194  # edges of the plot area
_MOST = 400  # largest number of points of a curve
_DOTTED = 40  # up to this number, each point has a dot

# Title -> metrics in that chart and their names in the legend. Each other metric has a separate chart.
_TITLES: dict[str, dict[str, str]] = {
    "Loss": {"loss": "loss"},
    "Zero-shot accuracy": {f"val/zero_shot_top{k}": f"top-{k}" for k in (1, 5)},
    "Text → image retrieval": {f"val/image_retrieval_recall@{k}": f"recall@{k}" for k in (1, 5, 10)},
    "Image → text retrieval": {f"val/text_retrieval_recall@{k}": f"recall@{k}" for k in (1, 5, 10)},
    "Accuracy within the batch": {"image_top1": "image → text", "text_top1": "text → image"},
    "Logit scale": {"logit_scale": "logit_scale"},
    "Learning rate": {"lr": "lr"},
    "Gradient norm": {"grad_norm": "grad_norm"},
    "Samples per second": {"samples_per_second": "samples_per_second"},
    "Share of time spent waiting for data": {"data_wait": "data_wait"},
    "Model FLOP utilisation": {"mfu": "mfu"},
    "Skipped samples": {"skipped": "skipped"},
}
_NO_CHART = ("epoch",)
_LOGARITHMIC = ("grad_norm",)
_SPREAD = 50  # largest / smallest value above which the metrics in _LOGARITHMIC get a logarithmic axis


class Curve(NamedTuple):
    """One curve of a chart, in coordinates of the SVG unless noted."""

    name: str
    line: str  # an SVG path
    band: str  # SVG path around the ranges that the points summarise; empty if each is a single value
    dots: list[tuple[float, float]]  # all points if they are few, else only isolated ones
    points: list[tuple[float, float]]  # steps and values, shown when the user points at the chart


class Chart(NamedTuple):
    """A chart with its curves and axes."""

    title: str
    curves: list[Curve]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    last: float  # step at RIGHT; the step at LEFT is 0
    note: str  # how the values are transformed for drawing; may be empty

    @property
    def readings(self) -> list[tuple[str, list[tuple[float, float]]]]:
        """Name and points of each curve, for the page's script."""
        return [(curve.name, curve.points) for curve in self.curves]


def charts_of(series: Mapping[str, Series]) -> list[Chart]:
    """Return the charts of all metrics that have a finite value, in the order of `_TITLES`.

    The chart of skipped samples is left out if no sample was skipped.
    """
    known = {name for names in _TITLES.values() for name in names}
    titles = _TITLES | {name: {name: name} for name in series if name not in known and name not in _NO_CHART}
    last = max((1.0, *(float(metric.steps.max()) for metric in series.values())))
    charts = []
    for title, names in titles.items():
        drawn = {name: series[name] for name in names if name in series and np.isfinite(series[name].values).any()}
        if drawn and not (title == "Skipped samples" and not series["skipped"].values.any()):
            charts.append(_chart(title, drawn, names, last))
    return charts


def short(value: float, digits: int = 4) -> str:
    """Format a number in at most `digits` digits, such as 0.9944, 12.5k or 1e-05."""
    for least, size, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


class _Points(NamedTuple):
    """Points of a curve. If there were too many, each summarises several values."""

    steps: NDArray[np.float64]
    means: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def _chart(title: str, series: Mapping[str, Series], names: Mapping[str, str], last: float) -> Chart:
    points = {name: _thinned(metric) for name, metric in series.items()}
    low = min(float(np.nanmin(curve.low)) for curve in points.values())
    high = max(float(np.nanmax(curve.high)) for curve in points.values())
    logarithmic = all(name in _LOGARITHMIC for name in series) and low > 0 and high / low > _SPREAD
    ticks = _log_ticks(low, high) if logarithmic else _ticks(low, high)
    bottom, top = (low, high) if logarithmic else (ticks[0], ticks[-1])

    def x(step: Any) -> Any:
        return LEFT + (RIGHT - LEFT) * step / last

    def y(value: Any) -> Any:
        scale = np.log if logarithmic else np.asarray
        return BOTTOM - (BOTTOM - TOP) * (scale(value) - scale(bottom)) / (scale(top) - scale(bottom))

    curves = [
        _curve(names[name], curve, _Points(x(curve.steps), y(curve.means), y(curve.low), y(curve.high)))
        for name, curve in points.items()
    ]
    notes = ["logarithmic"] if logarithmic else []
    if any(curve.band for curve in curves):
        notes.append("mean and range of neighbouring steps")
    x_ticks = [step for step in MaxNLocator(4, integer=True).tick_values(0, last) if step <= last]
    return Chart(
        title,
        curves,
        [(round(x(step), 1), short(step, 6)) for step in x_ticks],
        [(round(float(y(value)), 1), short(value, 6)) for value in ticks],
        last,
        ", ".join(notes),
    )


def _thinned(series: Series) -> _Points:
    """Return the points of a metric; above `_MOST` values, each point summarises (almost) the same number of values."""
    steps, values = series
    values = np.where(np.isfinite(values), values, np.nan)
    if len(steps) <= _MOST:
        return _Points(steps, values, values, values)
    edges = np.linspace(0, len(steps), _MOST + 1).astype(int)
    rows = []
    for a, b in pairwise(edges):
        known = values[a:b][np.isfinite(values[a:b])]
        summary = (known.mean(), known.min(), known.max()) if len(known) else (np.nan, np.nan, np.nan)
        rows.append((steps[a:b].mean(), *summary))
    return _Points(*np.array(rows).T)


def _curve(name: str, points: _Points, place: _Points) -> Curve:
    """Return the curve of `points`, whose SVG coordinates are `place`. Lines are interrupted at values of NaN."""
    stretches = np.ma.clump_unmasked(np.ma.masked_invalid(points.means))  # type: ignore[no-untyped-call]
    line = "".join(_path(place.steps[there], place.means[there]) for there in stretches)
    band = ""
    if (points.high > points.low).any():
        for there in stretches:  # forward along the largest values and back along the smallest
            steps, low = place.steps[there], place.low[there]
            band += _path(np.concatenate([steps, steps[::-1]]), np.concatenate([place.high[there], low[::-1]])) + "Z"
    few = len(points.steps) <= _DOTTED
    dotted = [there for there in stretches if few or there.stop == there.start + 1]  # an isolated point has no line
    places = (zip(place.steps[there], place.means[there]) for there in dotted)
    dots = [(round(float(x), 1), round(float(y), 1)) for x, y in chain.from_iterable(places)]
    # five digits, to keep the page small: it contains every value
    read = [(float(step), float(f"{value:.5g}")) for step, value in zip(points.steps, points.means) if value == value]
    return Curve(name, line, band, dots, read)


def _path(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y))


def _ticks(low: float, high: float) -> list[float]:
    """Return round tick values that enclose the range from `low` to `high`."""
    if low == high:
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high if high == 1 else high + margin  # a share cannot exceed 1
    # ten digits, because matplotlib returns values such as 0.30000000000000004
    return [float(f"{value:.10g}") for value in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return ticks of a logarithmic axis: 1, 2 and 5 times powers of ten, or only some of the powers.

    Powers of ten are left out if the range is so wide that there would be too many ticks.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits, every in (((1, 2, 5), 1), ((1,), 1), ((1,), 2), ((1,), 5)):
        ticks = [digit * 10.0**power for power in powers[::every] for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 9:
            break
    return ticks
