"""The digits examples, run as a user runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT, needs

needs("train")

EXAMPLES = ROOT / "examples"


def run_example(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    # A single thread is hardly slower for models this small, and many times faster than two on cores that others use.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / name), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


def test_demo_reaches_95_percent_and_draws(tmp_path: Path) -> None:
    # a third of the default, to save time
    result = run_example("train_digits.py", "--steps", "140", "--output", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    top1 = re.search(r"zero-shot top-1 on 360 held-out digits: ([\d.]+) %", result.stdout)
    assert top1 and float(top1[1]) >= 95
    assert "loss computed by backend" in result.stdout and "step 140 of 140" in result.stderr
    picture = (tmp_path / "digits.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_demo_fails_when_it_did_not_learn(tmp_path: Path) -> None:
    result = run_example("train_digits.py", "--steps", "2", "--output", str(tmp_path))
    assert result.returncode != 0
    assert "below the required 95 %" in result.stderr and "Traceback" not in result.stderr


def test_one_import_swapped_gives_open_clip_losses() -> None:
    result = run_example("open_clip_one_import.py")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if re.match(r"\s*\d+ ", line)]
    losses = [(float(theirs), float(ours)) for _, theirs, ours, _ in rows]
    assert len(losses) == 20 and losses[-1][0] < 0.1 * losses[0][0]
    assert all(ours == pytest.approx(theirs, rel=1e-5) for theirs, ours in losses)
