"""One owner for each output: a second command that writes to the same place is refused, and told who has it.

A hidden file, ``.fastclip.lock`` in a folder or ``.NAME.lock`` beside a file, says who owns the output, and is locked
while its process lives: the kernel releases a POSIX lock however the process dies, and a forked child inherits none.
Locks of some network disks do not reach other hosts, so the host that the file names counts as well.
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
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}  # of a file system
_HELD = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}
_TRIES = 100  # times that the file is replaced while it is being locked
_SETTLES = 0.1  # seconds, after which the last of several that wrote at once stands
_BYTE = 2**30  # that is locked on Windows: whoever has not locked it can read those before it
P = ParamSpec("P")
T = TypeVar("T")
_mutex = threading.Lock()
_ours: dict[tuple[int, int, str], tuple[int, int]] = {}  # device and inode of a folder, name: process and thread


def output_path(path: str | Path) -> Path:
    """Return the path of an output, with ``~`` as the home folder, which shells leave alone in ``--output=~/run``.

    Raises:
        ValueError: the path is empty, which would mean the working directory.
    """
    if not str(path).strip():
        raise ValueError("the output must have a name, got an empty one")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~NAME of nobody
        raise ValueError(f"{path}: {error}") from error


def check_writable(folder: str | Path) -> Path:
    """Return the path of a folder that several commands may write into, after a trial.

    Raises:
        OSError, ValueError: as `owned`; the folder is named.
    """
    folder = output_path(folder)
    with _made(folder):
        try:
            with tempfile.TemporaryFile(dir=folder) as trial:  # without a name: nothing stays of it
                trial.write(b"\n" * 4096)
                trial.flush()  # which writes all, or raises
        except OSError as error:
            raise type(error)(f"{folder} cannot be written: {error.strerror}") from error
    return folder


@contextmanager
def owned(folder: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Make `folder` and own it: no other call, in this process or another, owns it at the same time.

    A call inside the block, of the same thread, shares the ownership. What dead processes left half written in the
    folder is removed. A folder that is still empty at the end, and was made here, is removed.

    Args:
        force: take the folder over from a process of another host, which may have ended without a word.

    Raises:
        BlockingIOError: another process or thread owns the folder; the message says which, where and since when.
        OSError, ValueError: nothing can be written into the folder, which is named.
    """
    folder = output_path(folder)
    with _made(folder), _locked(folder, LOCK, str(folder), force) as is_new:
        if is_new:
            mend_files(folder, owned=True)
        yield folder


@contextmanager
def owned_file(file: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Own one file, as `owned` a folder; others may write into its folder. A pipe or a device has no owner."""
    file = output_path(file)
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder: name a file")
    if is_special(file):
        yield file
        return
    file = Path(os.path.realpath(file))  # a link stays one
    with _made(file.parent), _locked(file.parent, f".{file.name}.lock", str(file), force):
        yield file


def owning(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that fills the folder `output`: it owns the folder meanwhile, and gets it as a Path."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def owns(*arguments: P.args, **options: P.kwargs) -> T:
        bound = signature.bind(*arguments, **options)
        with owned(bound.arguments["output"]) as bound.arguments["output"]:
            return function(*bound.args, **bound.kwargs)

    return owns


class _Owner(NamedTuple):
    """The owner of an output, as a lock file names it."""

    host: str
    pid: int
    since: str
    command: str
    start: str  # of the process, where the system says: a process's number is used again
    word: str  # drawn for this ownership
    job: str = ""  # `fastclip.system.env.job`

    def __str__(self) -> str:
        command = f" ({self.command})" if self.command else ""
        return f"process {self.pid} on {self.host}{command} since {self.since}"


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make the folder, and remove what was made where it is still empty at the end."""
    made: list[Path] = []
    try:
        for path in (*reversed(folder.parents), folder):
            if not path.is_dir():
                try:
                    path.mkdir()
                    made.append(path)
                except FileExistsError as error:
                    if not path.is_dir():  # else another process was faster
                        kind = "a link to nothing" if path.is_symlink() else "a file"
                        raise NotADirectoryError(f"{folder} cannot be made: {path} is {kind}, not a folder") from error
                except OSError as error:
                    raise type(error)(f"{folder} cannot be made: {error.strerror}") from error
        yield
    finally:
        for path in reversed(made):
            with suppress(OSError):  # it is not empty
                path.rmdir()


@contextmanager
def _locked(folder: Path, name: str, output: str, force: bool) -> Iterator[bool]:
    """Own the file `name` of a folder; False where this thread owns it already, in a call around this one.

    A process loses its lock when it closes any descriptor of the file, so nothing here opens one that it holds.

    Args:
        output: what is owned, for messages.
    """
    entry, pid, thread = folder.stat(), os.getpid(), threading.get_ident()
    key = (entry.st_dev, entry.st_ino, name)  # whatever links lead there
    with _mutex:
        holder = _ours.get(key)
        if holder is None or holder[0] != pid:  # nobody's, or the parent's of before a fork
            holder = None
            _ours[key] = (pid, thread)
    if holder == (pid, thread):
        yield False
        return
    if holder is not None:
        raise BlockingIOError(
            f"{output} is in use by another thread of this process: wait for it, or take another place"
        )
    lock = folder / name
    try:
        handle, owner = _take(lock, output, force)
        try:
            yield True
        finally:
            if os.getpid() == pid:  # a child that was forked inside has nothing to give back
                _give_back(lock, handle, owner)
    finally:
        with _mutex:
            _ours.pop(key, None)


def _take(lock: Path, output: str, force: bool) -> tuple[int, _Owner]:
    """Return the lock file, open and locked, and what it says now."""
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
    raise BlockingIOError(f"{output} is taken and given back again and again by other processes: take another place")


def _try(lock: Path, handle: int, owner: _Owner, output: str, force: bool) -> bool:
    """Lock an open file and write its owner; False where the file under the lock's name is another one now."""
    locked = _lock(handle)
    if not _is_at(lock, handle):
        return False
    before = _read(handle)
    elsewhere = before is not None and before.host != owner.host
    foreign = before is not None and elsewhere and not _is_earlier(before.job, owner.job)
    # Where nothing can be locked the file alone says who lives
    if locked is False or (locked is None and before is not None and not elsewhere and _alive(before)):
        if not (elsewhere and force):
            raise BlockingIOError(f"{output} is in use by {before or 'another process'}: end it, or take another place")
        lock.unlink(missing_ok=True)
        return False
    if foreign and not force:
        raise BlockingIOError(f"{output} is in use by {before}, another host: if that has ended, --force takes it over")
    if before is not None:
        logger.info("%s: passed over %s, which has ended, or is taken over from", output, before)
    try:
        _write(handle, owner)
    except OSError:
        lock.unlink(missing_ok=True)
        raise
    if locked is None:  # another process may have written at the same time: the last one stands
        time.sleep(_SETTLES)
        return _is_at(lock, handle) and _read(handle) == owner
    return True


def _is_earlier(job: str, now: str) -> bool:
    """Return True if `job` is an earlier start of the job `now`: it has ended, on whatever host."""
    name, _, start = now.rpartition("/")
    before, _, number = job.rpartition("/")
    return bool(name) and name == before and (not start or (number.isdecimal() and int(number) < int(start)))


def _give_back(lock: Path, handle: int, owner: _Owner) -> None:
    """Remove the lock file and unlock it."""
    with suppress(OSError):  # the folder is gone, or its disk
        is_ours = _is_at(lock, handle) and _read(handle) == owner  # not where another host has taken it over
        if is_ours and os.name != "nt":  # while it is locked: nobody can own the file that is removed
            lock.unlink()
        os.close(handle)
        if is_ours and os.name == "nt":  # where no open file can be removed
            lock.unlink()


def _lock(handle: int) -> bool | None:
    """Lock an open file. Return False where another process holds the lock, None where the file system has no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, _BYTE, os.SEEK_SET)  # it locks from where the file stands
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            # POSIX locks, and not those of flock: a forked child that outlives this process would keep these
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _is_at(lock: Path, handle: int) -> bool:
    """Return True if the lock's name still leads to the open file, which another process may have removed."""
    try:
        return os.path.samestat(os.stat(lock), os.fstat(handle))
    except FileNotFoundError:
        return False


def _read(handle: int) -> _Owner | None:
    """Return what a lock file says; None where nothing of ours is in it."""
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        values: dict[str, Any] = {"job": "", **json.loads(os.read(handle, 10_000))}  # older files tell no job
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
    with suppress(OSError):  # of another user's file: who may write into the folder may own it next
        os.chmod(handle, 0o666)
    os.fsync(handle)


def _command() -> str:
    """Return the name of the program, and of fastclip the command."""
    words = [os.path.basename(sys.argv[0])] if sys.argv and sys.argv[0] else []
    return " ".join(words + [word for word in sys.argv[1:2] if not word.startswith("-")])


def _start(pid: int) -> str:
    """Return when a process of this host began, for comparison; empty if it is gone, or the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"  # field 22
    except (OSError, IndexError):
        return ""


def _alive(owner: _Owner) -> bool:
    """Return True if a process of this host is alive, as far as its number and its begin tell."""
    if owner.start and _start(os.getpid()):
        return _start(owner.pid) == owner.start
    try:
        os.kill(owner.pid, 0)  # no signal: it asks whether the process is there
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
