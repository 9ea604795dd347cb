"""Commands that SIGTERM ends, however they were started: with status 143, quickly, and without leaving files."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import needs
from support.processes import Popen, ended, forked, forks, in_session, start, wait_for

if sys.platform != "linux":
    pytest.skip("looks into /proc", allow_module_level=True)

from fastclip.cli import ending, main
from fastclip.cli.ending import Terminated, sigterm_raises

SCRIPT = "import sys; from fastclip.cli import main\nif __name__ == '__main__': sys.exit(main(sys.argv[1:]))\n"


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Folder with a short name for a command's temporary files, because a socket's path has at most 107 characters."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def command(tmp_path: Path, temporary: Path, *words: str | Path, ignored: list[signal.Signals]) -> Popen:
    (tmp_path / "command.py").write_text(SCRIPT)
    environment = os.environ | {"TMPDIR": str(temporary), "FASTCLIP_CACHE": str(tmp_path / "cache")}
    return start([sys.executable, tmp_path / "command.py", *words], env=environment, ignored=ignored)


def assert_ends(process: Popen, temporary: Path) -> None:
    """Signal the process with its whole group, as a scheduler does, and check that it ends."""
    begin = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)  # a launcher also forwards the signals that its group receives
    out, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert said.splitlines()[-1].endswith(": ended by SIGTERM") and "Traceback" not in said and not out, said
    assert time.monotonic() - begin < 15  # includes tidying up and the interpreter's shutdown
    wait_for(lambda: not in_session(process.pid), 20)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("workers", "moment", "ignored"),
    [(2, "starting", []), (2, "reading", []), (0, "reading", [signal.SIGINT])],
    ids=["while workers start", "at a terminal", "in the background of a script"],
)
def test_embed_ends_while_it_reads(
    tmp_path: Path,
    temporary: Path,
    request: pytest.FixtureRequest,
    workers: int,
    moment: str,
    ignored: list[signal.Signals],
) -> None:
    needs("search")
    checkpoint = request.getfixturevalue("checkpoint")
    from support.faulty import write_folder

    data = write_folder(tmp_path / "data", 6)
    for number in range(1500):  # some seconds, in batches of two
        for suffix in ("png", "txt"):
            os.link(data / f"000.{suffix}", data / f"more-{number}.{suffix}")
    words = ["--checkpoint", checkpoint, "--output", tmp_path / "out", "--batch-size", "2", "--workers", str(workers)]
    process = command(tmp_path, temporary, "embed", data, *words, "--device", "cpu", ignored=ignored)

    def reads() -> bool:
        assert process.poll() is None, process.communicate()
        if workers and moment == "reading":
            return bool(list(temporary.glob("pymp-*/*")))  # the socket of a worker that has sent a batch
        return (tmp_path / "out" / "metadata").is_dir() and len(in_session(process.pid)) == 1 + workers

    wait_for(reads)
    for number in ignored:
        os.killpg(process.pid, number)
    assert_ends(process, temporary)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.endswith((".tmp", ".old"))]


def test_parity_ends_with_its_processes(tmp_path: Path, temporary: Path) -> None:
    words = ["--nproc", "2", "--device", "cpu", "--batch", "1000"]
    process = command(tmp_path, temporary, "parity", *words, ignored=[signal.SIGINT])

    def compares() -> bool:
        assert process.poll() is None, process.communicate()
        return len(list(temporary.glob("fastclip-parity-*/store"))) == 1

    wait_for(compares)
    assert len(in_session(process.pid)) >= 3
    assert_ends(process, temporary)


def test_interrupted_parity_ends_its_processes_before_their_folder_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastclip.parity import processes, run

    killed: list[bool] = []

    class Rank:
        def kill(self) -> None:
            killed.append(os.path.isdir(folder))

        def join(self) -> None:
            pass

    class Ranks:
        processes = Rank(), Rank()

        def join(self) -> bool:
            raise KeyboardInterrupt

    def start_processes(work: object, words: tuple[object, ...], **options: object) -> Ranks:
        nonlocal folder
        folder = str(words[2])
        return Ranks()

    folder = ""
    monkeypatch.setattr(processes._mp, "start_processes", start_processes)
    with pytest.raises(KeyboardInterrupt):
        run(device="cpu")
    assert killed == [True, True] and not os.path.exists(folder)


@forks
def test_ranks_of_parity_end_with_a_killed_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastclip.parity import processes
    from fastclip.parity.compare import Settings
    from fastclip.system import parent

    def waits(*args: object) -> None:
        (tmp_path / "rank").touch()
        time.sleep(1000)

    def program() -> None:
        pid = os.getpid()
        if os.fork() == 0:
            processes._spawned(0, 2, Settings(8, 8, 0, None, "cpu"), str(tmp_path), pid)
        time.sleep(1000)

    monkeypatch.setattr(parent, "_PAUSE", 0.1)
    monkeypatch.setattr(processes, "_member", waits)
    pid = forked(program)
    wait_for((tmp_path / "rank").exists, 20)
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL
    wait_for(lambda: not in_session(pid), 5)


def inside(ready: Path) -> None:
    """Run inside `sigterm_raises`: an import that swallows every exception, then a library that waits."""
    with sigterm_raises():
        try:
            ready.touch()
            time.sleep(100)
        except BaseException:
            ready.with_name("swallowed").touch()
        time.sleep(100)


@forks
def test_command_ends_where_the_exception_is_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "_PATIENCE", 1.0)
    pid = forked(lambda: inside(tmp_path / "ready"))
    wait_for((tmp_path / "ready").exists)
    os.kill(pid, signal.SIGTERM)
    assert ended(pid, 20) == 143 and (tmp_path / "swallowed").exists()


@forks
@pytest.mark.parametrize("error", [None, ValueError("its worker was ended by the same signal")])
def test_swallowed_signal_is_what_ended_the_command(error: Exception | None) -> None:
    def works() -> None:
        with pytest.raises(Terminated), sigterm_raises():
            with contextlib.suppress(Terminated):
                os.kill(os.getpid(), signal.SIGTERM)
            if error is not None:
                raise error

    assert ended(forked(works)) == 0


@forks
def test_second_signal_ends_a_command_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "_PATIENCE", 1000.0)
    pid = forked(lambda: inside(tmp_path / "ready"))
    wait_for((tmp_path / "ready").exists)
    os.kill(pid, signal.SIGTERM)
    wait_for((tmp_path / "swallowed").exists)
    os.kill(pid, signal.SIGTERM)  # a signal within a second of the first counts as the same one
    time.sleep(1.2)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGTERM)
    assert ended(pid, 20) == 143


@forks
def test_ignored_signal_and_handlers_of_the_caller_stay() -> None:
    def works() -> None:
        seen: list[int] = []
        for handler in (signal.SIG_IGN, lambda number, frame: seen.append(number)):
            signal.signal(signal.SIGTERM, handler)
            with sigterm_raises():
                os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) is handler
        assert seen == [signal.SIGTERM]
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert main(["models"]) == 0 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        with pytest.raises(Terminated), sigterm_raises():
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher's echo, which arrives while the command ends

    assert ended(forked(works)) == 0
