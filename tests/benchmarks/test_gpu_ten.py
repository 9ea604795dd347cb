"""`make gpu-ten`: its dry run, which CI calls, its rows, its time and its end. No test here needs a GPU."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from support import ROOT, needs
from support.processes import wait_for
from support.rows import rows_of

needs("train")


from benchmarks import gpu_ten, report
from benchmarks.gpu import correct as gpu_correct
from benchmarks.gpu import device as gpu
from benchmarks.gpu import steps as gpu_steps
from benchmarks.gpu.checklist import Checklist
from benchmarks.gpu.pretended import Pretended
from benchmarks.gpu_ten import PARTS, Part, limit
from benchmarks.losses.providers import OURS
from benchmarks.plot import GPU_COLUMNS
from fastclip.bench.provenance import about_gpu

COMMAND = [sys.executable, "-m", "benchmarks.gpu_ten", "--dry-run", "--rows"]


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of one dry run of every part."""
    folder = tmp_path_factory.mktemp("dry")
    words = [*COMMAND, str(folder), "--variant", "portable=FASTCLIP_CPU_ISA:portable"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout


def test_every_part_runs_without_a_gpu(dry: tuple[Path, str]) -> None:
    """Every part runs without a GPU, so that a misspelt name is detected before a GPU is available."""
    folder, printed = dry
    for part in PARTS:
        assert f"{part.name:12s} done" in printed
    rows = rows_of(folder)
    assert {row["part"] for row in rows} == {part.name for part in PARTS}
    assert {row["provider"] for row in rows if row["part"] == "host"} == {
        *("fastclip_cuda", "fastclip_triton", "open_clip", "open_clip_compiled", "autograd", "launch")
    }
    told = {row["status"] for row in rows} - {"", "no test is marked gpu"}
    assert told <= {"not installed", "there is no GPU to count on", "no C++ compiler for torch.compile"}
    ways = {row["case"].split()[0] for row in rows if row["part"] == "correct"} - {"tests"}
    assert ways == {*gpu_correct.WAYS, "graph"}
    megabytes = {row["case"].split()[-2] for row in rows if row["part"] == "workspace"}
    assert megabytes == {"128", "256", "512", "1024", "2048"}
    assert {row["provider"] for row in rows if row["part"] == "variants"} == {"this", "portable"}
    for mode in ("eager", "compiled"):
        of_step = [row for row in rows if row["part"] == "training" and row["case"].endswith(mode)]
        found = {row["measure"]: float(row["value"]) for row in of_step}
        assert len(of_step) == len(found) and {row["unit"] for row in of_step} == {"ms"}  # the shares derive from these
        assert 2 * found["step"] == pytest.approx(sum(found.values()), abs=0.1)
        assert min(found[name] for name in ("products", "optimiser", "loss", "accuracy")) > 0


def test_dry_rows_are_no_results(dry: tuple[Path, str]) -> None:
    """Both files of a dry run have a GPU's columns, and every row states that no GPU was present."""
    folder, _ = dry
    steps = rows_of(folder, "cuda.csv")
    assert {row["gpu"] for row in (*steps, *rows_of(folder))} == {"dry run"}
    with (ROOT / "benchmarks" / "results" / "cuda.csv").open(newline="") as file:
        assert list(steps[0]) == next(csv.reader(file))
    assert {row["loss"] for row in steps} == {"softmax", "sigmoid"}
    assert all(row["median_ms"] for row in steps if row["provider"] in OURS["cuda"])


def test_a_dry_run_says_what_a_gpu_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    about = Pretended().about()
    assert list(about) == list(about_gpu()) and set(GPU_COLUMNS) <= set(about)


def test_what_is_done_is_not_run_again(dry: tuple[Path, str]) -> None:
    folder, _ = dry
    before = len(rows_of(folder))
    done = subprocess.run([*COMMAND, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and len(rows_of(folder)) == before
    assert "variants     skipped" in done.stdout and done.stdout.count(" done\n") == len(PARTS) - 1


def test_report_of_these_rows(dry: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = dry
    assert "## Ten minutes with a GPU" not in report.text(tmp_path)  # for a folder in which it never ran
    assert "| host | softmax 256x512 | launch | step |" in report.text(folder)


def test_a_killed_run_keeps_its_rows(tmp_path: Path) -> None:
    words = [*COMMAND, str(tmp_path), "--only", "correct"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "gpu_ten.csv").exists(), 100)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    rows = rows_of(tmp_path)
    assert rows and rows[0]["case"] == "tests" and not (tmp_path / "done" / "correct").exists()


# ---- the order, the end and the time of the parts ----


def run_of(codes: dict[str, int | None], asked: list[str]) -> Any:
    """Return a replacement for the function that runs a part: it records the part's name and returns its exit code."""

    def run(command: list[str], seconds: float) -> int | None:
        asked.append(command[command.index("--part") + 1])
        return codes.get(asked[-1], 0)

    return run


def checked(tmp_path: Path, codes: dict[str, int | None]) -> tuple[int, list[str]]:
    asked: list[str] = []
    checklist = Checklist(tmp_path / "cuda.csv", tmp_path / "done", run=run_of(codes, asked))
    return gpu_ten.check(checklist, list(PARTS), time.monotonic() + 560), asked


def test_a_wrong_value_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked(tmp_path, {"correct": gpu_ten.WRONG}) == (1, ["correct"])
    assert "a value is wrong" in capsys.readouterr().out
    code, asked = checked(tmp_path, {"steps": gpu_ten.WRONG})
    assert code == 1 and asked == ["correct", "host", "counters", "steps"]


def test_a_part_that_fails_or_is_cut_does_not_end_the_run(tmp_path: Path) -> None:
    names = [part.name for part in PARTS]
    assert checked(tmp_path, {"host": 1, "counters": None}) == (1, names)
    assert checked(tmp_path, {"counters": None}) == (3, ["host", "counters"])  # the other parts are done
    assert checked(tmp_path, {"counters": gpu_ten.INCOMPLETE}) == (3, ["counters"])
    assert checked(tmp_path, {}) == (0, ["counters"])


def test_a_part_goes_on_after_a_peer_has_broken_the_gpu(tmp_path: Path) -> None:
    """A part continues in a new process after a peer has broken the GPU, at once or, if no time is left, at the next
    call.
    """
    codes, ran = iter([gpu_ten.PEER_LOST, gpu_ten.PEER_LOST, 0]), []

    def run(command: list[str], seconds: float) -> int:
        ran.append(command[-2:])
        return next(codes)

    part, end = Part("steps", seconds=30), time.monotonic() + 40
    assert gpu_ten.check(Checklist(tmp_path / "cuda.csv", tmp_path, run=run), [part], end) == 0
    assert len(ran) == 3 and ran[0] == ran[1] == ran[2] and ran[0][0] == "--until"  # the same limit

    def slow(command: list[str], seconds: float) -> int:
        time.sleep(seconds - 1)
        return gpu_ten.PEER_LOST

    checklist = Checklist(tmp_path / "cuda.csv", tmp_path / "other", run=slow)
    assert gpu_ten.check(checklist, [part], time.monotonic() + 5) == 3 and not (tmp_path / "other").exists()


def test_a_lost_peer_has_an_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loses(log: Any) -> None:
        raise gpu_steps.PeerLost("memeff broke the GPU")

    monkeypatch.setattr(gpu_steps, "run", loses)
    monkeypatch.setattr(gpu_ten, "end_with_parent", lambda: None)
    arguments = Namespace(dry_run=False, variant=[], rows=tmp_path, until=0.0, markers=tmp_path)
    monkeypatch.setattr(gpu, "Gpu", Pretended)
    assert gpu_ten.run_part("steps", arguments) == gpu_ten.PEER_LOST


class Sleeping(Part):
    def command(self, rows: Path, providers: list[str]) -> list[str]:
        return [sys.executable, "-c", f"import time; time.sleep({60 if self.name == 'slow' else 0})"]


def test_an_overrunning_part_is_cut_and_the_next_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts: list[Part] = [Sleeping("slow", seconds=5), Sleeping("quick", seconds=20)]
    start = time.monotonic()
    assert gpu_ten.check(Checklist(tmp_path / "cuda.csv", tmp_path), parts, start + 25) == 3
    assert time.monotonic() - start < 20
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [["slow", "took"], ["quick", "done"]]


def test_limits_leave_later_parts_their_time() -> None:
    assert sum(part.seconds for part in PARTS) <= gpu_ten.SECONDS < 560
    first, host, *rest = PARTS
    assert limit(first, [host, *rest], gpu_ten.SECONDS) == first.seconds
    assert limit(first, [host, *rest], 30) == 30  # --seconds 30
    assert limit(host, rest, gpu_ten.SECONDS) == 2 * host.seconds  # the first part was done before
    assert limit(PARTS[-1], [], 400) == 400 and limit(PARTS[-1], [], -1) == 0
    left = gpu_ten.SECONDS
    for k, part in enumerate(PARTS):  # even if every part takes its full time
        assert limit(part, list(PARTS[k + 1 :]), left) >= part.seconds
        left -= limit(part, list(PARTS[k + 1 :]), left)
    assert left >= 0


def test_parts_that_are_named_run_again(tmp_path: Path) -> None:
    for name in ("steps", "steps-softmax-48x32", "host"):
        (tmp_path / name).write_text("")
    gpu_ten.forget(tmp_path, ["steps"])
    assert os.listdir(tmp_path) == ["host"]


def test_list_and_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu_ten.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [part.name for part in PARTS]
    for words in (["--only", "hots"], ["--variant", "x"], ["--variant", f"x={tmp_path}"], ["--variant", "this=A:1"]):
        with pytest.raises(SystemExit):
            gpu_ten.main([*words, "--dry-run"])
    with pytest.raises(SystemExit):
        gpu_ten.main(["--dry-run", "--rows", str(ROOT / "benchmarks" / "results")])
    told = capsys.readouterr().err
    assert "no part hots" in told and "a dry run must not write to the folder of results" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_gpu_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_ten.main([])
    assert "torch finds no GPU here" in capsys.readouterr().err
