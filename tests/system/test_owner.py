"""An output has one owner, and a dead owner is ignored."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastclip.system import env, owner
from fastclip.system.durable import new_file
from fastclip.system.owner import LOCK, check_writable, output_path, owned, owned_file
from support.processes import ended, forked, forks, wait_for

if sys.platform == "win32":
    pytest.skip("processes are forked and locks are those of POSIX", allow_module_level=True)

import fcntl


def holder(folder: Path, *, file: bool = False) -> int:
    """Start a process that owns `folder` until it is killed, and return its pid."""

    def hold() -> None:
        with owned_file(folder) if file else owned(folder):
            (folder.parent / "holds").touch()
            time.sleep(300)

    pid = forked(hold)
    wait_for((folder.parent / "holds").exists)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL


def leave(folder: Path, **fields: Any) -> Path:
    """Write a lock file as another process would leave it."""
    folder.mkdir(exist_ok=True)
    about = {"host": owner.socket.gethostname(), "pid": 2**22 + 1, "since": "2026-01-01", "command": "fastclip train"}
    (folder / LOCK).write_text(json.dumps({**about, "start": "", "word": "", **fields}))
    return folder


@forks
@pytest.mark.fault(
    "Two commands use the same `--output` at the same time",
    "The second is refused, with process, host and start time of the first",
)
@pytest.mark.parametrize("file", [False, True], ids=["folder", "file"])
def test_second_owner_is_refused_and_a_killed_one_is_passed_over(tmp_path: Path, file: bool) -> None:
    place = tmp_path / "out"
    pid = holder(place, file=file)
    for force in (False, True):  # a living owner keeps the folder
        with (
            pytest.raises(BlockingIOError, match=rf"out is in use by process {pid} on \S+ .*since 2\d\d\d-\d\d-\d\d"),
            owned_file(place, force=force) if file else owned(place, force=force),
        ):
            pass
    kill(pid)
    with owned_file(place) if file else owned(place) as found:
        assert found == place
    assert not list(tmp_path.rglob("*.lock"))


@forks
def test_folder_of_an_output_may_be_shared_by_several_files(tmp_path: Path) -> None:
    pid = holder(tmp_path / "a.json", file=True)
    with owned_file(tmp_path / "b.json"), owned(tmp_path):
        pass
    kill(pid)


@forks
def test_child_that_outlives_its_parent_owns_nothing(tmp_path: Path) -> None:
    """A child that outlives its parent owns nothing. Data workers live for some seconds after a
    killed parent, with its open files.
    """
    place, reads = tmp_path / "out", os.pipe()

    def hold() -> None:
        with owned(place):
            if os.fork() == 0:
                os.read(reads[0], 1)
                os._exit(0)
            (tmp_path / "holds").touch()
            time.sleep(300)

    pid = forked(hold)
    wait_for((tmp_path / "holds").exists)
    kill(pid)
    with owned(place):
        os.write(reads[1], b"x")


@forks
def test_child_forked_inside_neither_owns_nor_gives_back(tmp_path: Path) -> None:
    def child() -> None:
        with pytest.raises(BlockingIOError), owned(tmp_path):
            pass

    with owned(tmp_path):
        assert ended(forked(child)) == 0
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()
    parent, status = os.getpid(), 0
    try:
        with owned(tmp_path):
            if pid := os.fork():
                status = os.waitpid(pid, 0)[1]
                assert (tmp_path / LOCK).exists()
            else:
                raise SystemExit
    finally:  # the child leaves the block as well
        if os.getpid() != parent:
            os._exit(0 if (tmp_path / LOCK).exists() else 1)
    assert status == 0 and not (tmp_path / LOCK).exists()


def test_another_thread_is_refused_and_a_call_inside_shares(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    said: list[str] = []

    def second() -> None:
        try:
            with owned(tmp_path / "link"):
                said.append("both own it")
        except BlockingIOError as error:
            said.append(str(error))

    with owned(tmp_path):
        with owned(tmp_path / "link"):
            pass
        assert (tmp_path / LOCK).exists()  # the inner block releases nothing
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert "in use by another thread" in said[0]
    with owned(tmp_path):
        pass


@pytest.mark.fault("A lock file names a process on another host", "The output is refused until `--force` takes it over")
def test_owner_on_another_host_is_told_and_taken_from_by_force(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    leave(tmp_path, host="node-7", pid=12)
    with (
        pytest.raises(BlockingIOError, match=r"by process 12 on node-7 \(fastclip train\) since .*--force"),
        owned(tmp_path),
    ):
        pass
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == 12
    with owned(tmp_path, force=True):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert "node-7" in caplog.text and not list(tmp_path.iterdir())


@pytest.mark.fault(
    "torchrun or Slurm restarts a killed run on another host", "The lock of an earlier start of the same job is ignored"
)
@pytest.mark.parametrize(
    "before, now, passes",
    [
        ("slurm 7/0", {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
        ("slurm 7/0", {"SLURM_JOB_ID": "7"}, False),  # two steps of one job
        ("slurm 7/0", {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, False),
        ("torchrun a/", {"TORCHELASTIC_RUN_ID": "a", "SLURM_JOB_ID": "7"}, True),
        ("torchrun none/", {"TORCHELASTIC_RUN_ID": "none"}, False),
        ("", {}, False),
    ],
)
def test_earlier_start_of_a_job_on_another_host_is_passed_over(
    tmp_path: Path, before: str, now: dict[str, str], passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in now.items():
        monkeypatch.setenv(name, value)
    leave(tmp_path, host="node-7", job=before)
    if passes:
        with owned(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["job"] == env.job()
    else:
        with pytest.raises(BlockingIOError, match="node-7"), owned(tmp_path):
            pass


def test_owner_that_was_taken_from_leaves_the_lock_of_its_successor(tmp_path: Path) -> None:
    with owned(tmp_path):
        (tmp_path / LOCK).unlink()
        leave(tmp_path, host="node-7")
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "node-7"


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 5000, b"{}", b"null", b'{"host": [], "pid": {}}'])
def test_lock_file_of_any_content_is_no_owner(tmp_path: Path, data: bytes) -> None:
    (tmp_path / LOCK).write_bytes(data)
    with owned(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@forks
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_the_process_and_its_begin_count(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", none)
    monkeypatch.setattr(owner, "_SETTLES", 0)
    place = tmp_path / "out"
    pid = holder(place)
    with pytest.raises(BlockingIOError, match=f"process {pid} "), owned(place):
        pass
    owner_of_before = json.loads((place / LOCK).read_text())
    kill(pid)
    with owned(place):
        pass
    if owner_of_before["start"]:  # the pid belongs to another process now
        leave(place, pid=os.getpid(), start="another boot 1")
        with owned(place):
            pass
        leave(place, pid=os.getpid(), start=owner._start(os.getpid()))
        with pytest.raises(BlockingIOError), owned(place):
            pass


def test_lock_file_that_is_replaced_while_it_is_locked_is_locked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock file is opened again if its owner ends and removes it between opening and locking."""
    locks, handles = fcntl.lockf, list[int]()

    def removed(handle: int, how: int) -> None:
        if not handles:
            (tmp_path / LOCK).unlink()
        handles.append(handle)
        locks(handle, how)

    monkeypatch.setattr(fcntl, "lockf", removed)
    with owned(tmp_path):
        assert len(handles) == 2 and (tmp_path / LOCK).exists()


def test_folder_that_was_made_for_nothing_is_removed(tmp_path: Path) -> None:
    with owned(tmp_path / "a" / "b"):
        pass
    assert not list(tmp_path.iterdir())
    with owned(tmp_path / "a" / "b") as folder:
        (folder / "x").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["x"]


def test_halves_of_dead_processes_are_removed_by_the_owner(tmp_path: Path) -> None:
    (tmp_path / ".00000.tar.0a1b2c3d.tmp").touch()
    with owned(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_file_that_another_command_writes_into_an_owned_folder_stays(tmp_path: Path) -> None:
    (tmp_path / ".notes.v2.tmp").touch()
    with owned_file(tmp_path / "eval.json") as file, new_file(file) as half:
        half.write_text("{}")
        with owned(tmp_path):
            assert half.exists()
    assert file.read_text() == "{}" and {path.name for path in tmp_path.iterdir()} == {"eval.json", ".notes.v2.tmp"}


def as_file(tmp_path: Path) -> tuple[Path, str]:
    (tmp_path / "x").touch()
    return tmp_path / "x", "x is a file, not a folder"


def below_a_file(tmp_path: Path) -> tuple[Path, str]:
    return as_file(tmp_path)[0] / "y" / "z", r"y/z cannot be created: \S*x is a file, not a folder"


def dead_link(tmp_path: Path) -> tuple[Path, str]:
    (tmp_path / "x").symlink_to(tmp_path / "gone")
    return tmp_path / "x", "x is a broken link"


def not_writable(tmp_path: Path) -> tuple[Path, str]:
    return Path("/proc/self/out"), "/proc/self/out cannot be created: No such file"


@pytest.mark.fault(
    "`--output` is a file, is inside a file, or is not writable", "An error names the path before any work"
)
@pytest.mark.parametrize("case", [as_file, below_a_file, dead_link, not_writable])
def test_folder_that_cannot_be_made_is_named(tmp_path: Path, case: Callable[[Path], tuple[Path, str]]) -> None:
    place, said = case(tmp_path)
    with pytest.raises(OSError, match=said), owned(place):
        pass


@forks
@pytest.mark.fault("`--output` is on a full disk", "An error names the path before any work")
def test_full_disk_is_named_before_any_work(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="Windows has no limits of resources")

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=r"new cannot be written: (File too large|No space)"), owned(tmp_path / "new"):
            pytest.fail("there was no space")

    assert ended(forked(full)) == 0
    assert not list(tmp_path.iterdir())


def test_empty_path_is_no_working_directory_and_a_tilde_is_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output_path("~/run") == tmp_path / "run" and output_path("a~") == Path("a~")
    for empty in ("", " "):
        with pytest.raises(ValueError, match="must not be empty"):
            output_path(empty)
    with pytest.raises(ValueError, match="~nobody-of-this-name"):
        output_path("~nobody-of-this-name/x")


def test_folder_of_several_commands_is_tried(tmp_path: Path) -> None:
    with owned(tmp_path):
        assert check_writable(tmp_path) == tmp_path
    assert check_writable(tmp_path / "new") and not list(tmp_path.iterdir())
    for case in (as_file, below_a_file):
        place, said = case(tmp_path)
        with pytest.raises(OSError, match=said):
            check_writable(place)


def test_file_that_is_a_folder_is_named_and_a_pipe_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="name a file"), owned_file(tmp_path):
        pass
    os.mkfifo(tmp_path / "pipe")
    with owned_file(tmp_path / "pipe") as file:
        assert file == tmp_path / "pipe" and list(tmp_path.iterdir()) == [file]
