"""The examples as a user runs them; test_digits_example.py has the digits."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT, needs

needs("train")

EXAMPLES = ROOT / "examples"


def run(command: list[str], folder: Path, **environment: str) -> str:
    """Run a command and return its output."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    inherited = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=inherited | environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_readme_lists_every_example() -> None:
    listed = re.findall(r"^\| \[(.+?)\]\((.+?)\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert {name for name, _ in listed} == {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")}
    assert all(name == target for name, target in listed)


def test_trainer_gives_the_same_losses(tmp_path: Path) -> None:
    needs("accelerate")
    said = run([sys.executable, str(EXAMPLES / "huggingface_trainer.py"), "--steps", "10"], tmp_path)
    rows = [line.split() for line in said.splitlines() if re.match(r"\s*\d+ ", line)]
    assert [int(step) for step, *_ in rows] == [*range(1, 11)]
    assert all(float(ours) == pytest.approx(float(theirs), rel=1e-4) for _, theirs, ours, _ in rows)


def test_simclr_learns(tmp_path: Path) -> None:
    said = run([sys.executable, str(EXAMPLES / "simclr_digits.py"), "--steps", "60"], tmp_path)
    before, after = (float(x) for x in re.findall(r"(?:random encoder|after SimCLR) +([\d.]+) %", said))
    assert after > before + 2 and after > 80


def test_launch_script_trains_on_two_processes(tmp_path: Path) -> None:
    if shutil.which("bash") is None or not Path(sys.executable).with_name("fastclip").exists():
        pytest.skip("bash, or the script `fastclip` of an installed package, is not there")
    said = run(["bash", str(EXAMPLES / "multi_gpu.sh")], tmp_path)
    (folder,) = (tmp_path / "runs" / "multi-gpu").iterdir()
    assert f"{folder.relative_to(tmp_path)}: 20 steps" in said and "zero_shot_top1" in said
    assert (folder / "model").is_dir()


def test_global_loss_trains(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "global_loss.py"), "--data", "digits", "--seeds", "1", "--epochs", "10"]
    said = run(command, tmp_path)
    recalls = [float(x) for x in re.findall(r"batch +[\d,]+ +([\d.]+) %", said)]
    assert len(recalls) == 4 and min(recalls[:3]) > 5  # chance is 0.3
