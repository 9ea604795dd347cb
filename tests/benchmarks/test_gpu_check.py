"""`make gpu-check`: its parts, and resuming after a stop. No test here needs a GPU."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from support import ROOT, needs
from support.processes import ended, forked, forks, start, wait_for

needs("models")


from benchmarks import gpu_check
from benchmarks.gpu import checklist as checklists
from benchmarks.gpu.checklist import TESTS, Checklist, Part, missing, run_limited
from benchmarks.gpu_check import parts
from benchmarks.losses import providers as losses
from benchmarks.losses.peers import PEERS

PART = Part("softmax-both-64x32", "softmax", "both", (64, 32))
COLUMNS = ["loss", "mode", "N", "D", "dtype", "provider", "status"]
RUNNABLE = ["open_clip", "memeff", "fastclip_triton"]


def write(path: Path, statuses: dict[str, str], part: Part = PART) -> None:
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(COLUMNS)
        for name, status in statuses.items():
            writer.writerow([part.loss, part.mode, *part.size, "bfloat16", name, status])


def checklist(tmp_path: Path, run) -> Checklist:
    return Checklist(tmp_path / "rows.csv", tmp_path / "made" / "marker", lambda loss: RUNNABLE, run)


def test_parts_are_the_tests_and_every_case() -> None:
    names = [part.name for part in parts()]
    first = len(TESTS)
    assert (
        names[: first + 1] == [*TESTS, "softmax-both-8192x512"] and len(names) == len(set(names)) == first + 4 * 4 + 1
    )
    cases = {(part.loss, part.mode) for part in parts() if part.loss}
    assert cases == {(loss, mode) for loss, modes in losses.MODES.items() for mode in modes}
    command = ["-m", "pytest", "-q", "--full", "-m", "gpu", "tests/backends/test_cuda.py", "-x"]
    assert parts()[0].command(Path("rows.csv"), [])[1:] == command
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"pytest\.mark\.gpu|@each_(kind|backend)\((?!CPU_KINDS)", path.read_text())
    }
    files = {word for words in TESTS.values() for word in words if word.endswith(".py")}
    assert files == marked - {"tests/benchmarks/test_gpu_check.py"}
    assert checklists.SECONDS < 600


def test_a_part_selects_its_case_alone(tmp_path: Path) -> None:
    needs("bench")
    cases = [part for part in parts([(64, 32)]) if part.loss]
    words = [part.command(tmp_path / "rows.csv", ["open_clip"])[3:] for part in cases]  # without `python -m pytest`
    listing = ["--collect-only", "-p", "no:cacheprovider"]
    with_gpu = "import pytest, torch; torch.cuda.is_available = lambda: True"
    run = f"{with_gpu}; [pytest.main([*words, *{listing}]) for words in {words}]"
    done = subprocess.run([sys.executable, "-c", run], cwd=ROOT, capture_output=True, text=True, timeout=120)
    found = [line for line in done.stdout.splitlines() if "::" in line]
    ids = [f"64x32-bfloat16-{part.loss}-{part.mode}" for part in cases]
    assert found == [f"benchmarks/test_losses.py::test_speed[{name}]" for name in ids], done.stdout + done.stderr


def test_a_case_is_done_when_everyone_has_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    assert missing(PART, path, RUNNABLE) == RUNNABLE
    write(path, {"open_clip": "", "memeff": "not installed"})
    assert missing(PART, path, RUNNABLE) == RUNNABLE  # all of them, because rounds are paired
    write(path, {"fastclip_triton": ""}, Part("", "softmax", "forward", (64, 32)))
    write(path, {"fastclip_triton": ""}, Part("", "softmax", "both", (64, 33)))
    write(path, {"memeff": "check failed: x", "fastclip_triton": "check failed: x"})
    assert missing(PART, path, RUNNABLE) == RUNNABLE  # a failure of fastclip is no result
    write(path, {"fastclip_triton": ""})
    assert missing(PART, path, RUNNABLE) == []
    write(path, {"memeff": "not installed"})
    assert missing(PART, path, ["open_clip", "fastclip_triton"]) == []
    assert missing(PART, path, RUNNABLE) == RUNNABLE  # installed in the meantime
    write(path, {"memeff": "error: x"})
    assert missing(PART, path, RUNNABLE) == []
    assert missing(PART, path, [*RUNNABLE, "fastclip_cuda"]) == [*RUNNABLE, "fastclip_cuda"]


def test_a_peer_that_breaks_the_gpu_is_left_out(tmp_path: Path) -> None:
    asked = []

    def run(command: list[str], seconds: float) -> int:
        asked.append(command[command.index("--providers") + 1])
        broken = "memeff" in asked[-1]
        write(
            tmp_path / "rows.csv", {"memeff": "device lost: x"} if broken else {"open_clip": "", "fastclip_triton": ""}
        )
        return int(broken)

    assert checklist(tmp_path, run).do(PART, 60) == "done"
    assert asked == ["open_clip,memeff,fastclip_triton", "open_clip,fastclip_triton"]
    assert checklist(tmp_path, run).do(PART, 60) == "done" and len(asked) == 2


def test_what_goes_wrong_is_said(tmp_path: Path) -> None:
    def breaks_itself(command: list[str], seconds: float) -> int:
        write(tmp_path / "rows.csv", {"fastclip_triton": "device lost: x"})
        return 1

    assert checklist(tmp_path, breaks_itself).do(PART, 60) == "failed with exit code 1"
    assert checklist(tmp_path, breaks_itself).todo(PART) == RUNNABLE
    assert checklist(tmp_path, lambda command, seconds: None).do(PART, 60) == "took more than 60 s"
    assert checklist(tmp_path, lambda command, seconds: 0).do(PART, 60) == "left no row for " + ", ".join(RUNNABLE)


def test_tests_run_again_when_the_code_has_changed(tmp_path: Path, monkeypatch) -> None:
    codes = iter([1, checklists.NO_TESTS, 0])
    monkeypatch.setattr(checklists, "code_state", lambda: "first")
    found = checklist(tmp_path, lambda command, seconds: next(codes))
    results = [found.do(Part("tests-gpu"), 60) for _ in range(4)]  # the fourth call runs nothing
    assert results == ["failed with exit code 1", "no test is marked gpu", "done", "done"]
    monkeypatch.setattr(checklists, "code_state", lambda: "second")
    assert found.todo(Part("tests-gpu")) == ["tests"]


def test_code_is_all_that_is_not_built(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checklists, "ROOT", tmp_path)
    kernel = tmp_path / "csrc" / "cuda" / "kernel.cu"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("a")
    states = [checklists.code_state()]
    for path in (kernel, kernel.with_name("other.cu")):
        path.write_text("b")
        states.append(checklists.code_state())
    assert len(set(states)) == 3
    (tmp_path / "fastclip").mkdir()
    for other in ("README.md", "fastclip/_cpu.so"):
        (tmp_path / other).write_text("c")
    assert checklists.code_state() == states[-1]


def test_runnable_are_those_that_load() -> None:
    found = checklists.runnable("sigmoid")
    assert "open_clip" in found and set(found) <= set(losses.names("sigmoid", "cuda"))
    assert found == list(losses.load_losses("sigmoid", "cuda", losses.names("sigmoid", "cuda"))[0])


def test_exit_codes(tmp_path: Path, capsys) -> None:
    def run_all(code: int | None, end: float) -> int:
        return gpu_check.check(checklist(tmp_path, lambda command, seconds: code), [Part("tests-gpu"), PART], end)

    later = time.monotonic() + 10_000
    assert run_all(1, later) == 1
    assert "softmax" not in capsys.readouterr().out  # nothing is timed if tests fail
    assert run_all(0, time.monotonic() - 1) == 3
    assert run_all(None, time.monotonic() + 60) == 3  # ended by --minutes, not by the part's own limit
    assert run_all(None, later) == 1
    write(tmp_path / "rows.csv", dict.fromkeys(RUNNABLE, ""))
    assert run_all(checklists.NO_TESTS, later) == 0


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat").read_text()
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # ended in the meantime, or a system without /proc
        return not Path("/proc/self/stat").exists()
    return stat.rpartition(")")[2].split()[0] != "Z"  # a zombie has ended as well


def test_a_part_ends_in_time(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    # Child processes of a part end with it
    inner = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    start = time.monotonic()
    assert run_limited([sys.executable, "-c", outer], 3) is None and time.monotonic() - start < 20
    while alive(int(pid.read_text())):
        assert time.monotonic() - start < 20
        time.sleep(0.05)
    assert run_limited([sys.executable, "-c", "raise SystemExit(7)"], 60) == 7
    assert run_limited([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], 60) == 128 + 9


SLEEPING = """#!{python}
import os, subprocess, sys, time
target = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open({said!r}, "w") as file:
    file.write(f"{{os.getpid()}} {{target.pid}}.")
time.sleep(600)
"""
COUNTERS = """
import time
from pathlib import Path
from benchmarks.gpu import counters as gpu_counters
from benchmarks.gpu.log import Log
from benchmarks.gpu.pretended import Pretended
gpu = Pretended()
gpu.pretended = False
gpu_counters.run(Log("counters", Path({folder!r}), gpu, time.monotonic() + 600, Path({folder!r})))
"""


def numbers(path: Path) -> list[int]:
    """Return the process ids in a file that ends with a full stop."""
    wait_for(lambda: path.is_file() and path.read_text().endswith("."))
    return [int(word) for word in path.read_text()[:-1].split()]


def test_ncu_and_its_target_end_with_their_part(tmp_path: Path) -> None:
    """ncu and its target end if their part is killed as `run_limited` does it, by its process group, which does not
    contain them. The target must not watch its own parent, because ncu may give it another one.
    """
    ncu, said = tmp_path / "ncu", tmp_path / "said"
    ncu.write_text(SLEEPING.format(python=sys.executable, said=str(said)))
    ncu.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    words = [sys.executable, "-c", COUNTERS.format(folder=str(tmp_path))]
    part = start(words, cwd=ROOT, env={**os.environ, "PATH": path})
    started = numbers(said)
    try:
        assert all(alive(pid) for pid in started)
        os.killpg(part.pid, signal.SIGKILL)
        part.wait()
        wait_for(lambda: not any(alive(pid) for pid in started), 20)
    finally:
        end(started)


def end(started: list[int]) -> None:
    """Kill the processes that a test started and that are still alive."""
    for pid in started:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@forks
def test_a_check_that_is_ended_ends_its_part(tmp_path: Path, monkeypatch) -> None:
    pid = tmp_path / "pid"
    work = f"import os, time; open({str(pid)!r}, 'w').write(f'{{os.getpid()}}.'); time.sleep(600)"
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--markers", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "parts", lambda sizes: [Part("tests-gpu")])
    monkeypatch.setattr(Part, "command", lambda *_: [sys.executable, "-c", work])
    child = forked(gpu_check.main)
    wait_for(lambda: pid.is_file() and pid.read_text().endswith("."))
    os.kill(child, signal.SIGTERM)
    assert ended(child, 20) == 143
    wait_for(lambda: not alive(int(pid.read_text()[:-1])), 20)


def test_list_says_what_is_left(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write(path, dict.fromkeys(losses.names("sigmoid", "cuda"), ""), Part("", "sigmoid", "both", (64, 32)))
    options = ["--list", "--sizes", "64x32", "--rows", str(path), "--markers", str(tmp_path / "markers")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", *options], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert [line.split() for line in done.stdout.splitlines()] == [
        *([name, "left"] for name in TESTS),
        ["softmax-both-64x32", "left"],
        ["sigmoid-both-64x32", "done"],
        ["training", "left"],
        ["softmax-forward-64x32", "left"],
        ["softmax-backward-64x32", "left"],
    ]


def test_the_extra_is_the_peers() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    extra = text.split("bench-gpu = [")[1].split("]\n")[0]
    packages = {line.strip(' ",').split(">=")[0] for line in extra.splitlines()} - {"", "fastclip-kernels[bench]"}
    assert packages == {peer.package for peer in PEERS.values() if peer.gpu_only}
    assert text.count("bench-gpu") == 1  # no other extra contains it
    assert "gpu: needs a GPU" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_gpu_is_told_so() -> None:
    for words in (["pytest", "benchmarks", "--device", "cuda", "-p", "no:cacheprovider"], ["benchmarks.gpu_check"]):
        done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode in (2, 4) and "torch finds no GPU here" in done.stderr
        assert "Traceback" not in done.stderr
