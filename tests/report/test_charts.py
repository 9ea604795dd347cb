"""Curves of the report show the values that the run wrote."""

from __future__ import annotations

import re

import pytest

from support import needs

needs("train")
import numpy as np

from fastclip.report.charts import BOTTOM, LEFT, RIGHT, TOP, Chart, charts_of, short
from fastclip.report.examples import Confusion
from fastclip.report.run import Series
from fastclip.report.view import _matrix


def series(*values: float, first: int = 1) -> Series:
    return Series(np.arange(first, first + len(values), dtype=float), np.array(values, dtype=float))


def chart(name: str, one: Series) -> Chart:
    (found,) = charts_of({name: one})
    return found


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](\S+?) ([\d.]+)", path)]


def test_points_lie_where_the_ticks_say() -> None:
    found = chart("loss", series(4.0, 1.0, 2.0, 3.0))
    ticks = {float(label): place for place, label in found.y_ticks}
    steps = {float(label): place for place, label in found.x_ticks}
    drawn = points(found.curves[0].line)
    assert [y for _, y in drawn] == pytest.approx([ticks[4], ticks[1], ticks[2], ticks[3]], abs=0.11)
    assert [x for x, _ in drawn][-1] == RIGHT and steps[0] == LEFT
    assert [x for x, _ in drawn] == pytest.approx([LEFT + (RIGHT - LEFT) * k / 4 for k in (1, 2, 3, 4)], abs=0.11)
    assert found.curves[0].points == [(1, 4), (2, 1), (3, 2), (4, 3)]


def test_gap_where_there_is_no_number() -> None:
    found = chart("loss", series(1.0, 2.0, np.nan, np.inf, 3.0, np.nan, 4.0)).curves[0]
    assert [len(points(part)) for part in re.split("(?=M)", found.line)[1:]] == [2, 1, 1]
    assert "nan" not in found.line and len(found.dots) == 4
    assert [step for step, _ in found.points] == [1, 2, 5, 7]


def test_long_curves_keep_their_extremes() -> None:
    values = np.full(100_000, 2.0)
    values[77_777], values[5], values[1000:2000] = 9.0, 0.5, np.nan
    found = chart("loss", series(*values))
    curve = found.curves[0]
    assert len(curve.points) == 396 and len(curve.line) < 10_000, "four stretches have no number"
    heights = [y for _, y in points(curve.band)]
    ticks = {float(label): place for place, label in found.y_ticks}
    assert min(heights) == pytest.approx(np.interp(9, sorted(ticks), [ticks[k] for k in sorted(ticks)]), abs=0.11)
    assert max(heights) == pytest.approx(np.interp(0.5, sorted(ticks), [ticks[k] for k in sorted(ticks)]), abs=0.11)
    assert found.note == "mean and range of neighbouring steps"
    assert chart("loss", series(*values[:400])).curves[0].band == ""


@pytest.mark.parametrize(
    "values", [(3.0,), (1.0, 1.0), (0.0, 0.0), (1e-12, 2e-12), (-5.0, 1e9), (100.0, 99.9995), (1e300, -1e300)]
)
def test_any_values_have_ticks_and_stay_inside(values: tuple[float, ...]) -> None:
    found = chart("loss", series(*values))
    labels = [label for _, label in found.y_ticks]
    assert len({*labels}) == len(labels) >= 2
    assert all(LEFT <= x <= RIGHT and TOP <= y <= BOTTOM for x, y in points(found.curves[0].line))


def test_gradient_norms_of_many_sizes_are_logarithmic() -> None:
    found = chart("grad_norm", series(0.1, 1.0, 10.0, 100.0))
    heights = [y for _, y in points(found.curves[0].line)]
    assert np.diff(heights) == pytest.approx([(TOP - BOTTOM) / 3] * 3, abs=0.11) and found.note == "logarithmic"
    assert chart("grad_norm", series(1.0, 3.0)).note == "" == chart("grad_norm", series(0.0, 100.0)).note


def test_every_metric_has_a_chart_but_those_that_say_nothing() -> None:
    found = charts_of(
        {"lr": series(1.0), "skipped": series(0.0), "epoch": series(0.0), "new": series(1.0), "x": series(np.nan)}
    )
    assert [one.title for one in found] == ["Learning rate", "new"]
    assert charts_of({"skipped": series(0.0, 3.0)})[0].title == "Skipped samples"
    assert charts_of({}) == []


def test_numbers_are_short() -> None:
    assert [short(x) for x in (0.99444, 12_500, 1e-5, 2_000_000, 9999)] == ["0.9944", "12.5k", "1e-05", "2M", "9999"]


@pytest.mark.parametrize(("classes", "rows", "drawn"), [(30, 30, False), (31, 0, True)])
def test_matrix_of_many_classes_is_a_picture(classes: int, rows: int, drawn: bool) -> None:
    names = [str(k) for k in range(classes)]
    found = _matrix(Confusion(np.eye(classes, dtype=np.int64), [(0, 1, 2, 0.5)]), names)
    assert (len(found["rows"]), found["map"] is not None) == (rows, drawn)
    assert found["pairs"] == [("0", "1", 2, 0.5)]
    assert _matrix(Confusion(None, []), names[:5])["rows"] == []
