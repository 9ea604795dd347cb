"""Files that other programs wrote, and files that the package writes."""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path

import pytest
import torch

from fastclip.system.durable import mend_files, mend_folders, new_file, new_files, write_json, write_tensors
from fastclip.system.reading import parse_json, read_json, read_lines, read_tensors


@pytest.mark.parametrize(
    "data, said",
    [(b"\xff", "not JSON"), (b"{", "not JSON"), (b"", "not JSON"), (b"[" * 100_000, "not JSON"), (b"[1]", "an object")],
    ids=["not UTF-8", "cut", "empty", "nested", "a list"],
)
def test_json_of_another_kind_is_an_error_that_names_the_file(tmp_path: Path, data: bytes, said: str) -> None:
    file = tmp_path / "answer.json"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"answer.json .*{said}"):
        read_json(file)


def test_json_may_hold_another_kind_where_it_is_asked_for() -> None:
    assert parse_json("[1]", "the answer", list) == [1]
    with pytest.raises(ValueError, match="the answer must hold a list, got int"):
        parse_json("1", "the answer", list)


def test_lines_are_those_of_a_text_in_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes("\ufeffé\r\n\n b\n".encode())
    assert read_lines(file) == ["é", "", " b"]
    file.write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"names\.txt is not UTF-8: .*0xe9"):
        read_lines(file)


def test_tensors_of_another_kind_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    file = tmp_path / "head.safetensors"
    write_tensors(file, {"weight": torch.ones(2)})
    assert read_tensors(file, ["weight"])["weight"].tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"head.safetensors holds no tensor bias; it holds weight"):
        read_tensors(file, ["weight", "bias"])
    whole = file.read_bytes()
    for data in (b"", b"\x00" * 100, whole[:-1], b"\xff" * 8 + whole):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"head.safetensors is not a complete safetensors file"):
            read_tensors(file)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    pytest.importorskip("safetensors")
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1)})
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o666 & ~umask}


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """Two writers of one file do not collide, even with equal pids, as in two containers."""
    file = tmp_path / "part"
    with new_file(file) as first:
        first.write_text("first")
        with new_file(file) as second:
            second.write_text("second")
        assert file.read_text() == "second" and first.read_text() == "first"
    assert file.read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


def test_half_of_a_dead_process_is_removed_after_an_hour_or_by_the_folders_owner(tmp_path: Path) -> None:
    alive, dead = tmp_path / ".part.0a1b2c3d.tmp", tmp_path / ".part.4e5f6a7b.tmp"
    for half in (alive, dead):
        half.touch()
    os.utime(dead, (time.time() - 3700,) * 2)
    mend_files(tmp_path)
    assert alive.exists() and not dead.exists()
    mend_files(tmp_path, owned=True)
    assert not alive.exists()


def test_what_no_process_of_ours_left_stays(tmp_path: Path) -> None:
    """Files and folders of users stay, although their names resemble those of unfinished files."""
    files = [".notes.v2.tmp", ".a.0A1B2C3D.tmp", ".0a1b2c3d.tmp", ".a.0a1b2c3d4.tmp", "a.0a1b2c3d.tmp"]
    folders = [".step-5.old.tmp", ".step-5.v2.tmp", ".files.v2.tmp", ".model.backup.0a1b2c3d.tmp"]
    for name in files:
        (tmp_path / name).touch()
    for name in folders:
        (tmp_path / name).mkdir()
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    (tmp_path / ".step-5.0a1b2c3d.tmp").mkdir()
    mend_files(tmp_path)
    mend_files(tmp_path, owned=True)
    mend_folders(tmp_path, "step-*")
    mend_folders(tmp_path, "model")
    with new_files(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*files, *folders}


def test_error_of_the_disk_names_the_file_and_not_its_half(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, new_file(tmp_path / "gone" / "part"):
        pass
    assert str(caught.value) == f"[Errno 2] No such file or directory: '{tmp_path}/gone/part'"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"directory: '\S+/folder'$"), new_file(tmp_path / "folder"):
        pass
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}'$"), new_files(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match=rf"^{tmp_path}/x was not written$"), new_files(tmp_path) as half:
        raise OSError(f"{half}/x was not written")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
