"""Checkpoints survive the process that writes them, and damage is detected."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
import signal
import stat
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from support import needs

needs("models")

from safetensors.torch import load_file, save_file

from fastclip.system.durable import check_manifest, new_folder, write_text
from fastclip.training.run import checkpoints as checkpoint
from fastclip.training.run.background_saver import Saver
from fastclip.training.run.checkpoints import (
    Snapshot,
    check_room,
    find_checkpoint,
    latest_checkpoint,
    mend_checkpoints,
    read_state,
    set_aside_after,
    take_snapshot,
    write_snapshot,
)
from fastclip.training.step.moving_average import MovingAverage
from support.processes import ended, forked, forks

TRIALS = 100
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def snapshot(step: int, value: float | None = None) -> Snapshot:
    """Return a snapshot whose numbers are all `value`, or `step` by default."""
    x = torch.full((64,), float(step if value is None else value))
    return Snapshot(step, {"model": {"x": x}, "optimizer": {"x|exp_avg": -x}}, {"step": step, "param_groups": []})


def loaded(path: Path) -> tuple[int, float]:
    """Return the step and the value of a checkpoint after a check of all its numbers."""
    x, average = load_file(path / "model.safetensors")["x"], load_file(path / "optimizer.safetensors")["x|exp_avg"]
    assert torch.equal(x, -average) and bool((x == x[0]).all())
    return int(read_state(path)["step"]), float(x[0])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@forks
@pytest.mark.fault(
    "kill -9 at any moment of saving", "The checkpoint announced last, or the next one, is intact and loads"
)
def test_kill_leaves_the_last_checkpoint_or_the_next(tmp_path: Path) -> None:
    moments = random.Random(0)
    announced, half_written = 0, 0
    for trial in range(TRIALS):
        reads, writes = os.pipe()

        def save_for_ever(first: int = announced, pipe: int = writes) -> None:
            mend_checkpoints(tmp_path)
            for step in range(first + 1, first + 10**6):
                write_snapshot(tmp_path, snapshot(step), keep=2)
                os.write(pipe, step.to_bytes(4, "little"))

        pid = forked(save_for_ever)
        os.close(writes)
        if trial == 0:
            assert os.read(reads, 4) == (1).to_bytes(4, "little")
            announced = 1
        time.sleep(moments.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        with os.fdopen(reads, "rb") as pipe:
            steps = pipe.read()
        announced = int.from_bytes(steps[-4:], "little") or announced
        half_written += any(name.endswith(".tmp") for name in names(tmp_path))
        found = latest_checkpoint(tmp_path)
        assert found is not None
        step, value = loaded(found)
        assert step in (announced, announced + 1) and value == step, f"trial {trial}: {step} after {announced}"
        announced = step
    assert half_written > 5 and announced > 5  # killed while writing, and between writes


def die_at(operation: int, *, after: bool) -> None:
    """End the process at its n-th file operation, before or after the operation; a file being written is left half
    written.
    """
    count = 0

    def watch(module: object, name: str) -> None:
        does = getattr(module, name)

        def watched(*args: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count == operation and not after:
                if name == "save_file":
                    does(*args)
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)  # type: ignore[arg-type, call-overload]
                os._exit(9)
            result = None if name == "fsync" else does(*args, **options)  # the death of a process loses no written data
            if count == operation:
                os._exit(9)
            return result

        setattr(module, name, watched)

    watch(checkpoint, "save_file")
    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
        watch(os, name)


@forks
@pytest.mark.fault(
    "The process dies after any single file operation of saving", "An intact checkpoint is left, the old or the new one"
)
@pytest.mark.parametrize("again", [False, True], ids=["new", "again"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_death_at_every_file_operation_leaves_a_whole_checkpoint(tmp_path: Path, again: bool, after: bool) -> None:
    for operation in range(1, 200):
        folder = tmp_path / str(operation)
        for step in (1, 2, 3)[: 3 if again else 2]:
            write_snapshot(folder, snapshot(step))

        def write(folder: Path = folder, operation: int = operation) -> None:
            die_at(operation, after=after)
            write_snapshot(folder, snapshot(3, 33), keep=2)

        status = ended(forked(write))
        mend_checkpoints(folder)
        found = latest_checkpoint(folder)
        assert found is not None
        assert loaded(found) in ([(3, 3), (3, 33)] if again else [(2, 2), (3, 33)])
        assert not any(name.startswith(".") for name in names(folder))
        for path in folder.iterdir():
            check_manifest(path)  # no checkpoint has its final name while it is half written or half removed
        if status == 0:
            assert operation > 15 and loaded(found) == (3, 33) and names(folder) == ["step-00000002", "step-00000003"]
            return
        assert status == 9
    raise AssertionError("the child never got to its end")


@pytest.mark.fault(
    "A checkpoint has a flipped byte, a missing file or a truncated file",
    "The file is named, and the checkpoint before it is used",
)
@pytest.mark.parametrize("file", [*FILES, "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_damage_is_found_and_the_one_before_is_used(
    tmp_path: Path, file: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = tmp_path / "checkpoints"
    for step in (1, 2):
        write_snapshot(checkpoints, snapshot(step))
    assert find_checkpoint("auto", tmp_path) == checkpoints / "step-00000002" and not caplog.text
    damaged = checkpoints / "step-00000002" / file
    whole = damaged.read_bytes()
    if how == "missing":
        damaged.unlink()
    elif how == "cut":
        damaged.write_bytes(whole[:-3])
    else:
        place = len(whole) // 2
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert find_checkpoint("auto", tmp_path) == checkpoints / "step-00000001"
    assert find_checkpoint(str(tmp_path), tmp_path / "other") == checkpoints / "step-00000001"
    named = damaged if file != "manifest.json" or how == "cut" else damaged.parent  # for example a digit of a checksum
    assert str(named) in caplog.text and "step-00000001" in caplog.text
    with pytest.raises(ValueError, match=file if named == damaged else "step-00000002"):
        find_checkpoint(str(damaged.parent), tmp_path)
    shutil.rmtree(checkpoints / "step-00000001")
    with pytest.raises(ValueError, match=r"all checkpoints in .* are damaged: .*step-00000002"):
        find_checkpoint("auto", tmp_path)


@pytest.mark.fault("A checkpoint contains a pickle", "It is refused, and no code in it runs")
def test_no_pickle_runs_when_a_checkpoint_is_read(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> object:
            return os.mkdir, (str(tmp_path / "harm"),)

    write_snapshot(tmp_path, snapshot(1))
    path = tmp_path / "step-00000001"
    (path / "model.safetensors").write_bytes(pickle.dumps(Harm()))
    (path / "manifest.json").unlink()
    checkpoint.write_manifest(path)  # the digests are right
    assert latest_checkpoint(tmp_path) == path
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        checkpoint.load_checkpoint(path, torch.nn.Linear(2, 2), torch.optim.AdamW([torch.zeros(2, requires_grad=True)]))
    assert not (tmp_path / "harm").exists()


@pytest.mark.fault(
    "Old checkpoints fill the disk", "The `--keep` newest are kept, and none is removed before the new one is complete"
)
def test_old_checkpoints_go_after_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3, 4):
        write_snapshot(tmp_path, snapshot(step))
    write_snapshot(tmp_path, snapshot(5), keep=3)
    assert names(tmp_path) == [f"step-0000000{k}" for k in (3, 4, 5)]

    def fails(*args: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(checkpoint, "save_file", fails)
    with pytest.raises(OSError, match=r"step-00000006 was not written: .*\. step-00000005 is intact"):
        write_snapshot(tmp_path, snapshot(6), keep=1)
    assert names(tmp_path) == [f"step-0000000{k}" for k in (3, 4, 5)]


def test_checkpoints_of_a_later_step_are_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Checkpoints of later steps are set aside, because `--resume auto` would use them and pruning would count them."""
    for step in (2, 4, 6):
        write_snapshot(tmp_path, snapshot(step))
    set_aside_after(tmp_path, 4)
    assert names(tmp_path) == ["aside-step-00000006", "step-00000002", "step-00000004"]
    assert "step-00000006" in caplog.text
    write_snapshot(tmp_path, snapshot(5), keep=1)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000005"
    assert names(tmp_path) == ["aside-step-00000006", "step-00000005"]


@forks
@pytest.mark.fault(
    "The disk is full (simulated by a limit on the size of a file)",
    "The message states the bytes needed, and the old checkpoint is kept",
)
def test_full_disk_says_how_many_bytes_were_needed(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="Windows has no limits of resources")
    write_snapshot(tmp_path, snapshot(1))
    big = Snapshot(2, {"model": {"x": torch.zeros(50_000)}, "optimizer": {}}, {"step": 2})

    def fails() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=r"step-00000002 was not written: .*\(os error 27\)") as caught:
            write_snapshot(tmp_path, big, keep=1)
        message = str(caught.value)
        assert "needs 200," in message and "bytes free" in message.replace(" free", " bytes free")
        assert "a file may have at most 100,000 (ulimit -f). step-00000001 is intact" in message

    assert ended(forked(fails)) == 0
    assert names(tmp_path) == ["step-00000001"] and loaded(tmp_path / "step-00000001") == (1, 1)


@pytest.mark.fault(
    "The disk has too little space", "An error states the bytes needed and the bytes free, and nothing is written"
)
def test_space_is_looked_at_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**6, free=700))
    monkeypatch.setattr(checkpoint, "save_file", lambda *args: pytest.fail("written"))
    with pytest.raises(
        OSError,
        match=r"No space left on device. It needs 1,\d+ bytes, and the disk has 700 bytes free. There is no earlier",
    ):
        write_snapshot(tmp_path, snapshot(1))
    assert names(tmp_path) == []
    monkeypatch.undo()
    # the free space is unknown
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, free=0))
    write_snapshot(tmp_path, snapshot(1))


@pytest.mark.fault(
    "The disk is too small for a checkpoint of the run",
    "Before the first step, an error states the bytes needed and the bytes free",
)
def test_room_for_a_checkpoint_is_looked_at_before_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(3, 2)  # 32 bytes
    model.bias.requires_grad_(False)
    free = 24 * 3 + 8
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**6, free=free))
    check_room(tmp_path / "checkpoints", model)
    with pytest.raises(OSError, match=r"a checkpoint needs at least 112 bytes, but 80 bytes are free"):
        check_room(tmp_path / "checkpoints", model, ema=True)
    (tmp_path / "checkpoints").touch()
    with pytest.raises(NotADirectoryError, match="checkpoints is a file"):
        check_room(tmp_path / "checkpoints", model)


@pytest.mark.fault(
    "An error occurs while config.yaml, metrics.jsonl or model/ is written", "The previous content is kept"
)
def test_text_and_folder_are_replaced_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "text", "old")
    with new_folder(tmp_path / "folder") as half:
        (half / "file").write_text("old")
    with pytest.raises(OSError, match="mine"), new_folder(tmp_path / "folder") as half:
        (half / "file").write_text("new")
        raise OSError("mine")

    def fails(*args: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="full"):
        write_text(tmp_path / "text", "new")
    with pytest.raises(OSError, match="full"), new_folder(tmp_path / "folder") as half:
        (half / "file").write_text("new")
    monkeypatch.undo()
    assert (tmp_path / "text").read_text() == (tmp_path / "folder" / "file").read_text() == "old"
    assert names(tmp_path) == ["folder", "text"]
    with new_folder(tmp_path / "folder") as half:
        (half / "file").write_text("new")
    assert (tmp_path / "folder" / "file").read_text() == "new" and names(tmp_path) == ["folder", "text"]


def test_training_goes_on_beside_a_snapshot_and_does_not_change_it(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    ema = MovingAverage(model, 0.9)

    def train() -> None:
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        ema.update()

    train()
    taken = [take_snapshot(model, optimizer, step=1, about={}, ema=ema) for _ in range(2)]
    assert taken[0] is not None and taken[1] is not None
    kept = json.dumps(taken[0].state)
    save_file({f"{a}/{b}": x for a, values in taken[0].tensors.items() for b, x in values.items()}, tmp_path / "before")
    train()
    before = load_file(tmp_path / "before")
    assert len(before) > 15 and json.dumps(taken[1].state) == kept
    for file, values in taken[1].tensors.items():
        for name, x in values.items():
            assert torch.equal(x, before[f"{file}/{name}"]), f"{file}: {name}"


@pytest.mark.fault("Saving in the background fails", "The run ends at its next step with the error")
@pytest.mark.parametrize("background", [False, True])
def test_saver_writes_one_at_a_time_and_keeps_no_error_to_itself(background: bool) -> None:
    written: list[int] = []

    def write(number: int) -> None:
        assert len(written) == number
        time.sleep(0.01)
        written.append(number)

    def fails() -> None:
        raise OSError("disk")

    with Saver(background=background) as saver:
        for number in range(3):
            saver.start(write, number)
        saver.wait()
        assert written == [0, 1, 2] and not saver.failed
        saver.start(fails)
        while not saver.failed:
            time.sleep(0.001)
        with pytest.raises(OSError, match="disk"):
            saver.start(write, 3)
        assert not saver.failed  # reported only once
    with pytest.raises(OSError, match="disk"), Saver(background=background) as saver:
        saver.start(fails)
    with pytest.raises(OSError, match="disk") as caught, Saver(background=background) as saver:
        saver.start(fails)
        raise FloatingPointError("loss")
    assert isinstance(caught.value.__cause__, FloatingPointError)


def test_folder_that_cannot_be_flushed_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that cannot be flushed is no error, since some network file systems refuse it. A file that
    cannot be flushed is an error.
    """
    flush, answer = os.fsync, errno.EINVAL

    def refuses_folders(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(answer, os.strerror(answer))
        flush(handle)

    monkeypatch.setattr(os, "fsync", refuses_folders)
    write_text(tmp_path / "text", "x")
    answer = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_text(tmp_path / "text", "y")
