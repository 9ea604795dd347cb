"""Runs that are stopped, killed or abandoned by another process resume with the results of an uninterrupted run."""

from __future__ import annotations

import gc
import importlib
import json
import logging
import multiprocessing.util
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from fastclip.parity.promised import LOSS
from support import needs
from support.processes import Popen, ended, forked, gloo_threads, in_session, start, wait_for

needs("train")
if not hasattr(os, "fork"):
    pytest.skip("the processes that die are forked", allow_module_level=True)

from fastclip.cli import main
from fastclip.models import create_model
from fastclip.system.durable import check_manifest
from fastclip.training import Interrupted, TrainOptions, trainer
from fastclip.training.ranks import joined, meeting, wrap
from fastclip.training.run import loop
from fastclip.training.run.checkpoints import latest_checkpoint, read_state
from fastclip.training.signals import Signals

STEPS = 12
VALUES: dict[str, Any] = {
    "data": "digits",
    "model": "ViT-tiny",
    "context_length": 16,
    "loss": "unicl",
    "batch_size": 24,
    "workers": 0,
    "device": "cpu",  # a forked process must not touch a GPU
    "save_every": 1,
    "keep": 2,
    "max_steps": STEPS,
}
WORDS = [word for name, value in VALUES.items() for word in ("--" + name.replace("_", "-"), str(value))]
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def options(folder: Path, **changed: Any) -> TrainOptions:
    return TrainOptions(**{**VALUES, "output": str(folder), **changed})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> trainer.Run:
    """Run that is never interrupted."""
    return trainer.train(options(tmp_path_factory.mktemp("whole")))


def lines(folder: Path) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl without the values that depend on the clock."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("samples_per_second", "data_wait", "mfu")} for line in found]


def assert_same(folder: Path, whole: trainer.Run) -> None:
    """Check metrics and weights for equality, bit for bit."""
    assert lines(folder) == lines(whole.folder)
    ours, theirs = (create_model(pretrained=path / "model").state_dict() for path in (folder, whole.folder))
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


def assert_near(folder: Path, whole: trainer.Run) -> None:
    """Check that losses agree to rounding, as those of two ranks do with those of one."""
    losses = [line["loss"] for line in lines(folder)]
    assert len(losses) == len(whole.losses)
    for step, (a, b) in enumerate(zip(losses, whole.losses)):
        assert abs(a - b) <= LOSS * abs(b), f"loss of step {step}: {a} and {b}"


def steps_made(folder: Path) -> int:
    """Return the number of lines in metrics.jsonl, one per step since log_every is 1."""
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def start_ranks(folder: Path, work: Callable[[int], object]) -> list[int]:
    """Start two ranks as torchrun would."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        forked(lambda rank=rank: work(rank), folder / f"said {rank}", RANK=str(rank), **meeting)  # type: ignore[misc]
        for rank in range(2)
    ]


@pytest.mark.fault("kill -9 of a run, repeatedly", "`--resume auto` ends with the metrics of a run that never stopped")
def test_run_killed_again_and_again_is_the_run_that_never_stopped(tmp_path: Path, whole: trainer.Run) -> None:
    moments = random.Random(0)
    folder, kills = tmp_path / "run", 0
    for _ in range(STEPS):
        before = steps_made(folder)
        pid = forked(lambda: trainer.train(options(folder, resume="auto")), tmp_path / "said")
        wait_for(lambda before=before: steps_made(folder) not in (before, 0))  # type: ignore[misc]
        time.sleep(moments.uniform(0, 0.2))
        os.kill(pid, signal.SIGKILL)
        if ended(pid) == 0:
            break
        kills += 1
        path = latest_checkpoint(folder / "checkpoints")
        if path is not None:
            # one checkpoint is being written, and one step was logged since
            assert read_state(path)["step"] >= steps_made(folder) - 2
    if not (folder / "model").exists():
        trainer.train(options(folder, resume="auto"))
    assert kills >= 1
    assert_same(folder, whole)


@pytest.mark.fault(
    "One byte of a run's newest checkpoint is flipped",
    "The run resumes from the checkpoint before it, with the same result",
)
def test_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    tmp_path: Path, whole: trainer.Run, caplog: pytest.LogCaptureFixture
) -> None:
    trainer.train(options(tmp_path, stop_after=6))
    file = tmp_path / "checkpoints" / "step-00000006" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)
    rest = trainer.train(options(tmp_path, resume="auto"))
    assert len(rest.losses) == STEPS - 5 and f"{file} is damaged" in caplog.text
    assert_same(tmp_path, whole)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["aside-step-00000006", f"step-{STEPS - 1:08d}", f"step-{STEPS:08d}"]


@pytest.mark.fault("The run dies between its last checkpoint and model/", "`--resume auto` writes model/")
def test_run_that_died_before_its_model_writes_it(tmp_path: Path, whole: trainer.Run) -> None:
    run = trainer.train(options(tmp_path))
    (run.folder / "model").rename(run.folder / ".model.0a1b2c3d.tmp")
    again = trainer.train(options(tmp_path, resume="auto"))
    assert again.steps == STEPS and again.losses == []
    assert_same(tmp_path, whole)
    assert not (run.folder / ".model.0a1b2c3d.tmp").exists()
    with pytest.raises(ValueError, match="nothing is left"):
        trainer.train(options(tmp_path, resume="auto"))


@pytest.mark.parametrize("async_save", [True, False])
def test_saving_in_the_background_changes_no_number(tmp_path: Path, whole: trainer.Run, async_save: bool) -> None:
    changed = {"save_every": 5, "ema": 0.9, "async_save": async_save, "keep": None, "max_steps": STEPS}
    run = trainer.train(options(tmp_path, **changed))
    assert run.losses == whole.losses
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ["step-00000005", "step-00000010", f"step-{STEPS:08d}"]
    for name in saved:
        check_manifest(tmp_path / "checkpoints" / name)


@pytest.mark.parametrize("async_save", [True, False])
def test_run_whose_checkpoint_fails_ends_with_its_error(
    tmp_path: Path, async_save: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(loop, "write_snapshot", fails)
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.train(options(tmp_path, async_save=async_save, save_every=3, max_steps=200))
    assert steps_made(tmp_path) == 4


@pytest.mark.fault("The disk is full during a run", "Exit status 1, a line with the bytes; older checkpoints are kept")
def test_run_on_a_full_disk_says_so_in_a_line(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    trainer.train(options(tmp_path / "run", stop_after=2))

    def fails() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
        sys.stderr = (tmp_path / "stderr").open("w", buffering=1)
        raise SystemExit(main(["train", *WORDS, "--output", str(tmp_path / "run"), "--resume", "auto"]))

    assert ended(forked(fails, tmp_path / "said")) == 1
    said = (tmp_path / "stderr").read_text()
    last = said.splitlines()[-1]
    assert last.startswith("fastclip train: the checkpoint ") and "bytes, and the disk has" in last, said
    assert "step-00000002 is intact" in last and "Traceback" not in said
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000001", "step-00000002"]
    check_manifest(checkpoints / "step-00000002")


SCRIPT = """
import os, sys
name = " ".join(os.environ.get(name, "0") for name in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
open(f"{sys.argv[1]}/pid {name}", "w").write(str(os.getpid()))
from fastclip.cli import main
sys.exit(main(["train", *sys.argv[2:]]))
"""


def command(tmp_path: Path, *words: str, launch: tuple[str, ...] = ()) -> Popen:
    (tmp_path / "command.py").write_text(SCRIPT)
    kept = {k: v for k, v in os.environ.items() if k not in (*LAUNCHED, "TRITON_INTERPRET", "FASTCLIP_BACKEND")}
    program = [sys.executable, *launch, tmp_path / "command.py", tmp_path, *WORDS, *words]
    return start(program, env={**kept, "OMP_NUM_THREADS": "1"})


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.fault(
    "SIGTERM or Ctrl-C",
    "A checkpoint is written after the current step, the exit status is 143 or 130, and no process is left",
)
@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.full), pytest.param(signal.SIGINT, id="SIGINT")],
)
def test_signal_ends_a_command_with_a_checkpoint(tmp_path: Path, whole: trainer.Run, number: signal.Signals) -> None:
    long = ["--save-every", "1000", "--workers", "1", "--output", str(tmp_path / "run")]
    process = command(tmp_path, *long)
    wait_for(lambda: steps_made(tmp_path / "run") > 0 or process.poll() is not None)
    os.killpg(process.pid, number)
    os.killpg(process.pid, number)  # a launcher also forwards the signals that its process group receives
    out, said = process.communicate(timeout=120)
    assert process.returncode == 128 + number, said
    made = steps_made(tmp_path / "run")
    assert f"stopped by a signal after step {made}, with a checkpoint" in said and "Traceback" not in said, said
    assert not out
    path = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert path is not None and read_state(path)["step"] == made < STEPS
    wait_for(lambda: not in_session(process.pid), 20)
    trainer.train(options(tmp_path / "run", resume="auto"))
    assert_same(tmp_path / "run", whole)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.fault(
    "SIGTERM to a run in a script's background, where Ctrl-C is ignored",
    "Ctrl-C stays ignored. SIGTERM writes a checkpoint and gives exit status 143, and no process is left",
)
def test_signal_ends_a_run_in_the_background(tmp_path: Path) -> None:
    """A signal ends a run in the background. The run is forked, which saves the time of imports."""
    folder = tmp_path / "run"
    words = ["--save-every", "1000000", "--max-steps", "1000000", "--workers", "1", "--output", str(folder)]

    def run() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stderr = (tmp_path / "stderr").open("w", buffering=1)
        raise SystemExit(main(["train", *WORDS, *words]))

    multiprocessing.util.get_temp_dir()  # a fork would not remove this folder if it created it
    pid = forked(run, tmp_path / "said")
    wait_for(lambda: steps_made(folder) > 0)
    os.killpg(pid, signal.SIGINT)
    made = steps_made(folder)
    wait_for(lambda: steps_made(folder) > made + 3)
    os.killpg(pid, signal.SIGTERM)
    said = (tmp_path / "stderr").read_text
    assert ended(pid, 60) == 143, said()
    assert "Traceback" not in said(), said()
    path = latest_checkpoint(folder / "checkpoints")
    assert path is not None and read_state(path)["step"] == steps_made(folder)
    wait_for(lambda: not in_session(pid), 20)


def test_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    def watches() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        signals = Signals()
        with signals.watched():
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
                assert signal.getsignal(number) is signal.SIG_IGN
        assert not signals.status

    assert ended(forked(watches, tmp_path / "said")) == 0


def test_interrupted_run_raises_and_restores_the_handlers(
    tmp_path: Path, whole: trainer.Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Validation that is due runs before an interrupted run ends, so that the metrics equal those of a whole run."""
    caplog.set_level(logging.INFO)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    step = trainer.Stepper.step

    def interrupted(self: Any, *args: Any, **named: Any) -> Any:
        if named["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **named)

    monkeypatch.setattr(trainer.Stepper, "step", interrupted)
    changed = {"save_every": None, "val_data": "digits", "val_every": 4}
    with pytest.raises(Interrupted) as caught:
        trainer.train(options(tmp_path, **changed))
    assert (caught.value.code, caught.value.steps) == (143, 4)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 4]
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.undo()
    rest = trainer.train(options(tmp_path, resume="auto", **changed))
    assert [line["loss"] for line in lines(tmp_path) if "loss" in line] == whole.losses and len(
        rest.losses
    ) == STEPS - 4


@pytest.mark.fault("A second SIGTERM or Ctrl-C", "The signal ends the process immediately")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_second_signal_ends_the_process_at_once(tmp_path: Path, number: signal.Signals) -> None:
    def waits() -> None:
        signals = Signals()
        with signals.watched():
            (tmp_path / "ready").touch()
            wait_for(lambda: signals.status != 0)
            (tmp_path / f"got {signals.status}").touch()
            time.sleep(100)

    pid = forked(waits, tmp_path / "said")
    wait_for((tmp_path / "ready").exists)
    os.kill(pid, number)
    wait_for((tmp_path / f"got {128 + number}").exists)
    os.kill(pid, number)  # a signal within a second of the first counts as the same one
    time.sleep(1.2)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, number)
    assert ended(pid) == -number


def test_shards_are_saved_in_the_background_as_they_were(tmp_path: Path) -> None:
    """FSDP2: checkpoints written in the background have the same bytes as those written at once."""
    importlib.import_module("torch.distributed.fsdp")  # once, before the forks
    for name, at_once in (("background", False), ("at once", True)):
        changed = {"parallel": "fsdp", "keep": None, "ema": 0.9, "max_steps": 3, "async_save": not at_once}
        pids = start_ranks(tmp_path, lambda rank: trainer.train(options(tmp_path / name, **changed)))  # noqa: B023
        assert [ended(pid) for pid in pids] == [0, 0]
    for step in range(1, 4):
        for file in ("model", "optimizer", "ema"):
            one, other = (
                tmp_path / name / "checkpoints" / f"step-{step:08d}" / f"{file}.safetensors"
                for name in ("background", "at once")
            )
            assert one.read_bytes() == other.read_bytes(), f"{file} of step {step}"


@pytest.mark.fault("SIGTERM to one of several ranks", "All end after the same step, with one checkpoint and status 143")
def test_signal_to_one_rank_ends_all_after_the_same_step(tmp_path: Path, whole: trainer.Run) -> None:
    folder = tmp_path / "run"
    pids = start_ranks(tmp_path, lambda rank: trainer.train(options(folder, save_every=1000)))
    wait_for(lambda: steps_made(folder) > 1)
    os.kill(pids[1], signal.SIGTERM)
    assert [ended(pid) for pid in pids] == [143, 143]
    path = latest_checkpoint(folder / "checkpoints")
    assert path is not None and read_state(path)["step"] == steps_made(folder) < STEPS
    trainer.train(options(folder, resume="auto"))  # as a single process
    assert_near(folder, whole)


@pytest.mark.fault("One rank cannot write its checkpoint", "Every rank ends with the error, and none hangs")
def test_checkpoint_that_fails_on_one_rank_ends_all(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        def fails(*args: object, **options: object) -> None:
            raise OSError("the disk is gone")

        loop.write_snapshot = fails  # type: ignore[assignment]  # of this process
        trainer.train(options(tmp_path / "run", save_every=3))

    assert [ended(pid) for pid in start_ranks(tmp_path, work)] == [1, 1]
    assert (tmp_path / "said 0").read_text() == "OSError: the disk is gone"
    assert (tmp_path / "said 1").read_text() == "OSError: the disk is gone (on rank 0)"
    assert steps_made(tmp_path / "run") == 4


@pytest.mark.fault("One rank finds no intact checkpoint", "Every rank ends with the error, and none hangs")
def test_damaged_checkpoint_ends_all_ranks(tmp_path: Path) -> None:
    trainer.train(options(tmp_path / "run", stop_after=1))
    (tmp_path / "run" / "checkpoints" / "step-00000001" / "state.json").write_text("{}")
    pids = start_ranks(tmp_path, lambda rank: trainer.train(options(tmp_path / "run", resume="auto")))
    assert [ended(pid) for pid in pids] == [1, 1]
    for rank in range(2):
        said = (tmp_path / f"said {rank}").read_text()
        assert said.startswith("ValueError: ") and "state.json is damaged" in said, said


@pytest.mark.fault(
    "A second torchrun uses the `--output` of a run that is still active",
    "Every rank of the second one ends with the error",
)
def test_output_of_another_run_ends_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    told = {"host": "node-7", "pid": 12, "since": "2026-01-01", "command": "fastclip train", "start": "", "word": ""}
    (tmp_path / "run" / ".fastclip.lock").write_text(json.dumps(told))
    pids = start_ranks(tmp_path, lambda rank: trainer.train(options(tmp_path / "run", data="gone")))
    assert [ended(pid) for pid in pids] == [1, 1]
    for rank in range(2):
        assert "in use by process 12 on node-7" in (tmp_path / f"said {rank}").read_text()


@pytest.mark.fault("kill -9 of one rank, or a rank hangs", "The other ranks end within `--timeout`, with a message")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_lost_rank_ends_the_others(tmp_path: Path, number: signal.Signals) -> None:
    folder, seconds = tmp_path / "run", 4
    pids = start_ranks(tmp_path, lambda rank: trainer.train(options(folder, max_steps=10_000, timeout=seconds)))
    wait_for(lambda: steps_made(folder) > 2)
    os.kill(pids[1], number)
    begin = time.monotonic()
    assert ended(pids[0]) == 1
    assert time.monotonic() - begin < seconds + 20  # allows for a busy machine
    said = (tmp_path / "said 0").read_text()
    assert said.startswith("ConnectionError: another process of this run is lost, or did not answer for 4 s"), said
    assert "\n" not in said
    assert latest_checkpoint(folder / "checkpoints") is not None


def test_ranks_meet_where_no_dead_rank_has_been() -> None:
    """Ranks meet although torchrun's store still contains entries of ranks that died before they had met."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("fastclip/ask/2", "the word of a dead rank")
    patience = timedelta(seconds=20)

    def meet(rank: int) -> bool:
        found = meeting(("127.0.0.1", store.port), rank, 3, patience)
        found.set(f"from {rank}", "")
        found.wait([f"from {other}" for other in range(3)], patience)  # all three have met
        return found.add("start", 1) <= 3  # no earlier rank has met here

    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(meet, (2, 1, 0)))
    with pytest.raises(ConnectionError, match="rank 1, 2 of 3 did not join"):
        meeting(("127.0.0.1", store.port), 0, 3, timedelta(seconds=0.1))


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


@pytest.mark.fault("kill -9 of a rank under torchrun", "torchrun restarts the run, which resumes with the same losses")
def test_torchrun_restarts_a_run_whose_rank_was_killed(tmp_path: Path, whole: trainer.Run) -> None:
    folder = tmp_path / "run"
    words = ["--resume", "auto", "--output", str(folder)]
    process = command(tmp_path, *words, launch=(*TORCHRUN, "--max-restarts", "1"))
    wait_for(lambda: steps_made(folder) > 2 or process.poll() is not None)
    os.kill(int((tmp_path / "pid 1 0").read_text()), signal.SIGKILL)
    out, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert (tmp_path / "pid 1 1").exists() and "resuming from" in said
    assert out.count(f"{STEPS} steps") == 1 and said.count(f"step {STEPS} of {STEPS}") == 1  # only one rank logs
    assert_near(folder, whole)


@pytest.mark.fault("SIGTERM to torchrun", "Its processes write a checkpoint and end")
def test_torchrun_passes_a_signal_on(tmp_path: Path, whole: trainer.Run) -> None:
    folder = tmp_path / "run"
    process = command(tmp_path, "--save-every", "1000", "--output", str(folder), launch=TORCHRUN)
    wait_for(lambda: steps_made(folder) > 0 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode != 0 and "with a checkpoint: --resume auto continues the run" in said, said
    path = latest_checkpoint(folder / "checkpoints")
    assert path is not None and read_state(path)["step"] == steps_made(folder) < STEPS
    trainer.train(options(folder, resume="auto"))
    assert_near(folder, whole)


def hold_a_group(parallel: str) -> None:
    """Hold a group while its users' modules are imported as late as possible, and fill DTensor's caches."""
    for name in [name for name in sys.modules if name.startswith("torch.distributed.nn")]:
        del sys.modules[name]
    with joined("cpu") as world:
        wrapped = wrap(create_model("ViT-tiny"), world, parallel)
        importlib.import_module("torch.distributed.nn")  # open_clip's losses import it
        assert gloo_threads() > 0 and all((2 * p).isfinite().all() for p in wrapped.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_threads_end_with_the_group(tmp_path: Path, parallel: str) -> None:
    """Threads of gloo end with the group. Otherwise they now and then abort a process that ends before them."""
    create_model("ViT-tiny")  # loads libraries once

    def work(rank: int) -> None:
        hold_a_group(parallel)
        gc.collect()
        assert gloo_threads() == 0, f"{gloo_threads()} threads of gloo are left"

    for pid in start_ranks(tmp_path, work):
        assert ended(pid, 60) == 0, [path.read_text() for path in tmp_path.glob("said *")]
