"""Exclusive ownership of outputs.

A second command that writes to the same output is refused with a message that names the current owner.

A hidden file, ``.fastclip.lock`` in a folder or ``.NAME.lock`` beside a file, records the owner of the output and is
locked while its process lives. The kernel releases a POSIX lock however the process dies, and forked children do not
inherit it. On some network disks, locks are not visible to other hosts, so the recorded host is checked too.
"""

from __future__ import annotations

import errno
import functools
import inspect
import json
import logging
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

from fastclip.system import env
from fastclip.system.durable import is_special, mend_files

__all__ = ["LOCK", "check_writable", "output_path", "owned", "owned_file", "owning"]

logger = logging.getLogger(__name__)
LOCK = ".fastclip.lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}  # the file system has no locks
_HELD = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}
_TRIES = 100  # attempts to lock a file that others keep replacing
_SETTLES = 0.1  # seconds, after which the last of several simultaneous writers is the owner
_BYTE = 2**30  # the byte that is locked on Windows; other processes can still read the bytes before it
P = ParamSpec("P")
T = TypeVar("T")
_mutex = threading.Lock()
_ours: dict[tuple[int, int, str], tuple[int, int]] = {}  # (device and inode of a folder, name) -> (process, thread)


def output_path(path: str | Path) -> Path:
    """Return the path of an output with ``~`` expanded, which shells do not expand in ``--output=~/run``.

    Raises:
        ValueError: the path is empty, which would mean the working directory, or its user is unknown.
    """
    if not str(path).strip():
        raise ValueError("the path of the output must not be empty")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~NAME of an unknown user
        raise ValueError(f"{path}: {error}") from error


def check_writable(folder: str | Path) -> Path:
    """Return the path of a folder that several commands may write into, after a test write.

    Raises:
        OSError, ValueError: the folder cannot be created or written. The message names it.
    """
    folder = output_path(folder)
    with _made(folder):
        try:
            with tempfile.TemporaryFile(dir=folder) as trial:  # without a name, so it never remains
                trial.write(b"\n" * 4096)
                trial.flush()  # raises unless everything is written
        except OSError as error:
            raise type(error)(f"{folder} cannot be written: {error.strerror}") from error
    return folder


@contextmanager
def owned(folder: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Create `folder` and own it: no other call, in this process or another, can own it at the same time.

    Calls of the same thread inside the block share the ownership. Temporary files that dead processes left in the
    folder are removed. A folder that was created here is removed if it is empty at the end.

    Args:
        force: take the folder over from a process of another host, which may have ended without releasing it.

    Raises:
        BlockingIOError: another process or thread owns the folder. The message names it, its host and its start.
        OSError, ValueError: the folder cannot be created or written. The message names it.
    """
    folder = output_path(folder)
    with _made(folder), _locked(folder, LOCK, str(folder), force) as is_new:
        if is_new:
            mend_files(folder, owned=True)
        yield folder


@contextmanager
def owned_file(file: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Take ownership of one file, as `owned` does of a folder.

    Other processes may write into its folder. Pipes and devices have no owner.
    """
    file = output_path(file)
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder: name a file")
    if is_special(file):
        yield file
        return
    file = Path(os.path.realpath(file))  # the lock is that of a link's target
    with _made(file.parent), _locked(file.parent, f".{file.name}.lock", str(file), force):
        yield file


def owning(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that fills the folder `output`: it owns the folder while it runs, and gets it as a Path."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def owns(*arguments: P.args, **options: P.kwargs) -> T:
        bound = signature.bind(*arguments, **options)
        with owned(bound.arguments["output"]) as bound.arguments["output"]:
            return function(*bound.args, **bound.kwargs)

    return owns


class _Owner(NamedTuple):
    """The owner of an output, as recorded in a lock file."""

    host: str
    pid: int
    since: str
    command: str
    start: str  # start time of the process, "" if unknown: the system reuses process ids
    word: str  # random, identifies this ownership
    job: str = ""  # `fastclip.system.env.job`

    def __str__(self) -> str:
        command = f" ({self.command})" if self.command else ""
        return f"process {self.pid} on {self.host}{command} since {self.since}"


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Create the folder and its parents. At the end, remove those that were created here and are empty."""
    made: list[Path] = []
    try:
        for path in (*reversed(folder.parents), folder):
            if not path.is_dir():
                try:
                    path.mkdir()
                    made.append(path)
                except FileExistsError as error:
                    if not path.is_dir():  # otherwise another process was faster
                        kind = "a broken link" if path.is_symlink() else "a file"
                        raise NotADirectoryError(
                            f"{folder} cannot be created: {path} is {kind}, not a folder"
                        ) from error
                except OSError as error:
                    raise type(error)(f"{folder} cannot be created: {error.strerror}") from error
        yield
    finally:
        for path in reversed(made):
            with suppress(OSError):  # the folder is not empty
                path.rmdir()


@contextmanager
def _locked(folder: Path, name: str, output: str, force: bool) -> Iterator[bool]:
    """Hold the lock file `name` of a folder. Yield False if this thread already holds it, in a surrounding call.

    A process loses its lock when it closes any descriptor of the file, so a file that it has locked is never reopened.

    Args:
        output: name of the output, for messages.
    """
    entry, pid, thread = folder.stat(), os.getpid(), threading.get_ident()
    key = (entry.st_dev, entry.st_ino, name)  # independent of links in the path
    with _mutex:
        holder = _ours.get(key)
        if holder is None or holder[0] != pid:  # no holder, or an entry inherited from the parent by a fork
            holder = None
            _ours[key] = (pid, thread)
    if holder == (pid, thread):
        yield False
        return
    if holder is not None:
        raise BlockingIOError(
            f"{output} is in use by another thread of this process: wait for it, or choose another output"
        )
    lock = folder / name
    try:
        handle, owner = _take(lock, output, force)
        try:
            yield True
        finally:
            if os.getpid() == pid:  # a child that was forked inside the block holds no lock
                _give_back(lock, handle, owner)
    finally:
        with _mutex:
            _ours.pop(key, None)


def _take(lock: Path, output: str, force: bool) -> tuple[int, _Owner]:
    """Return the lock file, open and locked, and the owner written to it."""
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    pid = os.getpid()
    owner = _Owner(socket.gethostname(), pid, since, _command(), _start(pid), secrets.token_hex(8), env.job())
    try:
        for _ in range(_TRIES):
            with ExitStack() as stack:
                handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
                stack.callback(os.close, handle)
                if _try(lock, handle, owner, output, force):
                    stack.pop_all()  # the lock is held as long as the file is open
                    return handle, owner
    except BlockingIOError:
        raise
    except OSError as error:
        raise type(error)(f"{output} cannot be written: {error.strerror}") from error
    raise BlockingIOError(f"other processes keep locking and releasing {output}: choose another output")


def _try(lock: Path, handle: int, owner: _Owner, output: str, force: bool) -> bool:
    """Lock an open file and write its owner. Return False if the name of the lock now leads to another file."""
    locked = _lock(handle)
    if not _is_at(lock, handle):
        return False
    before = _read(handle)
    elsewhere = before is not None and before.host != owner.host
    foreign = before is not None and elsewhere and not _is_earlier(before.job, owner.job)
    # Without locks, the content of the file alone tells if the owner lives
    if locked is False or (locked is None and before is not None and not elsewhere and _alive(before)):
        if not (elsewhere and force):
            raise BlockingIOError(
                f"{output} is in use by {before or 'another process'}: stop it, or choose another output"
            )
        lock.unlink(missing_ok=True)
        return False
    if foreign and not force:
        raise BlockingIOError(
            f"{output} is in use by {before}, which is on another host: if that process has ended, pass --force to "
            "take the output over"
        )
    if before is not None:
        logger.info("%s: taken over from %s, which has ended or was overridden by --force", output, before)
    try:
        _write(handle, owner)
    except OSError:
        lock.unlink(missing_ok=True)
        raise
    if locked is None:  # another process may have written at the same time: the last writer wins
        time.sleep(_SETTLES)
        return _is_at(lock, handle) and _read(handle) == owner
    return True


def _is_earlier(job: str, now: str) -> bool:
    """Return True if `job` is an earlier start of the job `now`. The earlier start has then ended, on whatever host."""
    name, _, start = now.rpartition("/")
    before, _, number = job.rpartition("/")
    return bool(name) and name == before and (not start or (number.isdecimal() and int(number) < int(start)))


def _give_back(lock: Path, handle: int, owner: _Owner) -> None:
    """Remove the lock file and unlock it."""
    with suppress(OSError):  # the folder is gone, or its disk
        is_ours = _is_at(lock, handle) and _read(handle) == owner  # not if another host has taken it over
        if is_ours and os.name != "nt":  # while it is locked, so that no other process can lock the removed file
            lock.unlink()
        os.close(handle)
        if is_ours and os.name == "nt":  # Windows cannot remove an open file
            lock.unlink()


def _lock(handle: int) -> bool | None:
    """Lock an open file. Return False if another process holds the lock, None if the file system has no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, _BYTE, os.SEEK_SET)  # locking starts at the current position
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            # POSIX locks instead of flock, whose locks a forked child would keep if it outlives this process
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _is_at(lock: Path, handle: int) -> bool:
    """Return True if the name of the lock still leads to the open file, which another process may have removed."""
    try:
        return os.path.samestat(os.stat(lock), os.fstat(handle))
    except FileNotFoundError:
        return False


def _read(handle: int) -> _Owner | None:
    """Return the owner that a lock file records, or None if it records none."""
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        values: dict[str, Any] = {"job": "", **json.loads(os.read(handle, 10_000))}  # older files record no job
        fields: dict[str, Any] = {name: str(values[name]) for name in _Owner._fields}
        return _Owner(**{**fields, "pid": int(values["pid"])})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _write(handle: int, owner: _Owner) -> None:
    data = json.dumps(owner._asdict()).encode() + b"\n"
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    if os.write(handle, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with suppress(OSError):  # another user's file; any user who may write into the folder may own it next
        os.chmod(handle, 0o666)
    os.fsync(handle)


def _command() -> str:
    """Return the name of the program, with the subcommand of fastclip."""
    words = [os.path.basename(sys.argv[0])] if sys.argv and sys.argv[0] else []
    return " ".join(words + [word for word in sys.argv[1:2] if not word.startswith("-")])


def _start(pid: int) -> str:
    """Return the start time of a process of this host, for comparison, or "" if it is gone or the time is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"  # field 22: start time
    except (OSError, IndexError):
        return ""


def _alive(owner: _Owner) -> bool:
    """Return True if a process of this host is alive, as judged by its id and, if known, by its start time."""
    if owner.start and _start(os.getpid()):
        return _start(owner.pid) == owner.start
    try:
        os.kill(owner.pid, 0)  # signal 0 is not sent: it only checks that the process exists
    except ProcessLookupError:
        return False
    except OSError:  # a process of another user
        return True
    return True
