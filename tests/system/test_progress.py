"""Progress of a computation: lines in the log, seconds apart, or a bar on a terminal."""

from __future__ import annotations

import logging
import sys

import pytest

from support import needs

needs("train")
from fastclip.system import progress
from fastclip.system.progress import Progress


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Clock:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "time", clock := Clock())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    return clock


def test_count_has_a_line_with_its_speed_every_five_seconds(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with Progress("pictures of digits", 100, done=20) as bar:
        for clock.now in (104.0, 105.0, 106.0, 109.0, 110.0):
            bar.moved(10)
    assert caplog.messages == [
        "pictures of digits: 40 of 100, 4 images/s",
        "pictures of digits: 70 of 100, 5 images/s",
    ]


def test_numbers_have_a_line_at_once_every_five_seconds_and_at_the_end(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with Progress("training", 4, unit="step") as bar:
        for clock.now in (100.0, 101.0, 106.0, 107.0):
            bar.count()
            bar.show({"loss": clock.now, "lr": 0.5})
        bar.show({"recall": 1.0})  # belongs to the most recent count
    assert caplog.messages == [
        "step 1 of 4: loss 100, lr 0.5",
        "step 3 of 4: loss 106, lr 0.5",
        "step 4 of 4: loss 107, lr 0.5",
        "step 4 of 4: recall 1",
    ]


def test_nothing_is_shown_on_other_ranks(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with Progress("training", 1, unit="step", shown=False) as bar:
        bar.moved()
        bar.show({"loss": 1.0})
    assert not caplog.messages


def test_terminal_has_a_bar_and_no_lines(
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("training", 2, unit="step") as bar:
        bar.count()
        bar.show({"loss": 0.25, "lr": 1.0})
    shown = capsys.readouterr().err
    assert "1/2" in shown and "loss=0.25" in shown and "lr" not in shown and not caplog.messages
