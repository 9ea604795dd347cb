"""The index of a shard, and reports on shards that change during a run."""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from support import needs

needs("train")

from PIL import Image

from fastclip.data import BadSample, open_source
from fastclip.data.shards import index as shard_index
from fastclip.data.shards import tar_index


def picture(shade: int, suffix: str = "png") -> bytes:
    file = io.BytesIO()
    Image.new("L", (16, 8), shade).save(file, suffix)
    return file.getvalue()


def write_shard(
    path: Path,
    count: int = 3,
    *,
    first: int = 0,
    prefix: str = "",
    tar_format: int = tarfile.GNU_FORMAT,
    mtime: float = 0,
) -> Path:
    """Write a shard whose image k has the shade k and the caption "caption k"."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for k in range(first, first + count):
            for suffix, data in (("png", picture(k)), ("json", b"{}"), ("txt", f"caption {k}".encode())):
                info = tarfile.TarInfo(f"{prefix}{k:04d}.{suffix}")
                info.size, info.mtime = len(data), mtime
                tar.addfile(info, io.BytesIO(data))
    return path


def shades(path: Path) -> list[int]:
    source = open_source(str(path))
    found = [source[k] for k in range(len(source))]
    assert [record.captions for record in found] == [(f"caption {record.image.getpixel((3, 3))}",) for record in found]
    return [record.image.getpixel((3, 3)) for record in found]


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """List of the shards that were scanned, with the test's own cache folder."""
    monkeypatch.setenv("FASTCLIP_CACHE", str(tmp_path / "cache"))
    gone_through: list[str] = []
    scan = shard_index.tar_members

    def counted(file: io.FileIO) -> tar_index.Members:
        gone_through.append(Path(str(file.name)).name)
        return scan(file)

    monkeypatch.setattr(shard_index, "tar_members", counted)
    return gone_through


def test_index_is_made_once(tmp_path: Path, scans: list[str]) -> None:
    path = write_shard(tmp_path / "x.tar")
    write_shard(tmp_path / "y.tar", 2, first=3)
    for _ in range(3):
        assert shades(tmp_path / "{x,y}.tar") == [0, 1, 2, 3, 4]
        assert sorted(scans) == ["x.tar", "y.tar"]
    assert sorted(os.listdir(tmp_path)) == ["x.tar", "x.tar.fastclip-index", "y.tar", "y.tar.fastclip-index"]
    index = tmp_path / "x.tar.fastclip-index"
    # other users may read it if they may read the shard
    assert index.stat().st_mode & 0o777 == path.stat().st_mode & 0o777
    assert [open_source(str(tmp_path / "{y,x}.tar"))[k].key[-4:] for k in (1, 2)] == ["0004", "0000"]


def test_index_is_made_anew_for_another_file(tmp_path: Path, scans: list[str]) -> None:
    path = write_shard(tmp_path / "x.tar")
    assert shades(path) == [0, 1, 2]
    write_shard(path, first=5)
    assert shades(path) == [5, 6, 7] and len(scans) == 2
    before = path.stat()
    write_shard(path, 2, first=5)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the size differs
    assert path.stat().st_size == before.st_size or shades(path) == [5, 6]
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # the time differs
    count = len(scans)
    assert shades(path) == [5, 6] and len(scans) == count + 1


@pytest.mark.fault("The index of a shard is damaged", "It is built again")
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[:20],
        lambda data: data + b"x",
        lambda data: b"x" * len(data),
        lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:],
        lambda data: data[:-1] + b"\xff",
        lambda data: b"fcindex0" + data[8:],  # another version
    ],
    ids=["empty", "cut", "cut head", "longer", "garbage", "row", "key", "version"],
)
def test_index_that_is_damaged_is_made_anew(tmp_path: Path, scans: list[str], damage: Callable[[bytes], bytes]) -> None:
    path = write_shard(tmp_path / "x.tar")
    assert shades(path) == [0, 1, 2]
    index = tmp_path / "x.tar.fastclip-index"
    whole = index.read_bytes()
    index.write_bytes(damage(whole))
    assert shades(path) == [0, 1, 2] and len(scans) == 2
    assert index.read_bytes() == whole


def test_index_is_in_the_cache_folder_where_none_can_lie_beside_the_shard(tmp_path: Path, scans: list[str]) -> None:
    path = write_shard(tmp_path / "x.tar")
    (tmp_path / "x.tar.fastclip-index").mkdir()  # acts as a read-only folder, even for the superuser
    for _ in range(2):
        assert shades(path) == [0, 1, 2]
        assert scans == ["x.tar"]
    assert len(list((tmp_path / "cache" / "index").iterdir())) == 1
    assert sorted(os.listdir(tmp_path)) == ["cache", "x.tar", "x.tar.fastclip-index"]  # no partial file is left


def test_damage_of_a_shard_is_told_each_time(
    tmp_path: Path, scans: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Damage of a shard is reported at each opening, including damage recorded in the index: faults of single samples,
    and the point at which a shard was cut off.
    """
    path = write_shard(tmp_path / "x.tar", 4)
    with tarfile.open(path, "a") as tar:
        for name in ("0001.txt", "9999.png"):
            tar.addfile(tarfile.TarInfo(name))
    with tarfile.open(path) as tar:
        end = tar.getmember("0003.txt").offset_data
    path.write_bytes(path.read_bytes()[: end + 3])
    for _ in range(2):
        caplog.clear()
        source = open_source(str(path))
        assert caplog.messages == [
            f"{path}: cut off or damaged after 3 samples, which are used: unexpected end of data"
        ]
        assert [source.captions(k) for k in range(3)] == [(f"caption {k}",) for k in range(3)] and len(source) == 4
        with pytest.raises(BadSample, match=f"^{re.escape(str(path))}: 0003: the shard ends before the sample does$"):
            source[3]
    write_shard(path, 2)
    with tarfile.open(path, "a") as tar:
        for name in ("0001.txt", "9999.png"):
            tar.addfile(tarfile.TarInfo(name))
    for _ in range(2):
        source = open_source(str(path))
        for row, cause in ((2, "no caption"), (3, "duplicate member")):
            with pytest.raises(BadSample) as caught:
                source.captions(row)
            assert caught.value.fault.cause == cause
    assert scans == ["x.tar"] * 2


def test_index_is_not_needed_on_disk(tmp_path: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_shard(tmp_path / "x.tar")
    (tmp_path / "x.tar.fastclip-index").mkdir()
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("FASTCLIP_CACHE", str(tmp_path / "file"))
    assert shades(path) == shades(path) == [0, 1, 2] and len(scans) == 2


def test_index_has_its_name_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_shard(tmp_path / "x.tar")
    replaced = []

    moved = os.replace

    def replace(half: Path, file: Path) -> None:
        assert half != file and not file.exists()
        with path.open("rb") as shard:
            found = shard_index._load(half, shard_index.stamp_of(path.stat()), shard)
        assert found is not None and len(found.rows) == 3
        replaced.append(half.name)
        moved(half, file)

    monkeypatch.setattr(os, "replace", replace)
    for _ in range(2):
        assert shades(path) == [0, 1, 2]
        (tmp_path / "x.tar.fastclip-index").unlink()
    assert len(set(replaced)) == 2  # every process writes its own file


def test_index_made_by_several_processes_at_once_is_whole(tmp_path: Path) -> None:
    for k in range(12):
        write_shard(tmp_path / f"{k:02d}.tar", 4, first=4 * k)
    fork = multiprocessing.get_context("fork")
    start, answers = fork.Barrier(4), fork.Queue()

    def rank() -> None:
        start.wait(60)
        answers.put(shades(tmp_path / "{00..11}.tar"))

    ranks = [fork.Process(target=rank) for _ in range(4)]
    for process in ranks:
        process.start()
    assert [answers.get(timeout=60) for _ in ranks] == [list(range(48))] * 4
    for process in ranks:
        process.join(60)
    expected = sorted(f"{k:02d}.tar{end}" for k in range(12) for end in ("", ".fastclip-index"))
    assert sorted(os.listdir(tmp_path)) == expected


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "a/b/", "f" * 120 + "/", "long" * 24 + "/" + "l" * 90, "été/", "☃"])
@pytest.mark.parametrize("mtime", [0, 1.5])
def test_members_are_those_of_tarfile(tmp_path: Path, tar_format: int, prefix: str, mtime: float) -> None:
    path = write_shard(tmp_path / "x.tar", prefix=prefix, tar_format=tar_format, mtime=mtime)
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data - 512, member.size) for member in tar]
    with path.open("rb", buffering=0) as file:
        assert tar_index.tar_members(file) == (expected, "", ())
    assert shades(path) == [0, 1, 2]
    assert open_source(str(path))[1].key == f"{path}: {prefix}0001"


def overwritten(path: Path) -> None:
    """Overwrite a shard with other samples of the same sizes and time, so that only the headers differ."""
    before = path.stat()
    write_shard(path, first=4)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


@pytest.mark.fault(
    "Hidden files, including macOS's `._` files, and folders whose names end in `.tar`", "They are not read as shards"
)
def test_hidden_files_and_folders_are_no_shards(tmp_path: Path) -> None:
    for k in range(2):
        write_shard(tmp_path / "s" / f"{k}.tar", 2, first=2 * k)
    (tmp_path / "s" / "._0.tar").write_bytes(b"macOS")
    (tmp_path / "s" / "x.tar").mkdir()
    for spec in ("s", "s/*.tar", "**/*.tar", "{s,s}/?.tar"):
        assert shades(tmp_path / spec) == [0, 1, 2, 3], spec
    assert shades(tmp_path / "s" / f"{{0,1{',0' * 200}}}.tar") == [0, 1, 2, 3]  # longer than a file name may be
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "._0.tar").write_bytes(b"macOS")
    with pytest.raises(ValueError, match="the folder holds no images"):
        open_source(str(tmp_path / "f"))
    with pytest.raises(ValueError, match=r"no such shards: .*x\*\.tar: no file"):
        open_source(str(tmp_path / "s" / "x*.tar"))
    (tmp_path / "s" / "y.tar").symlink_to("nothing")
    for spec in ("s", "s/*.tar"):
        with pytest.raises(FileNotFoundError, match=r"y\.tar"):
            open_source(str(tmp_path / spec))


@pytest.mark.fault(
    "The braces of a pattern expand to more than a million shards",
    "An error names the pattern before it is expanded",
)
@pytest.mark.parametrize(
    "pattern",
    ["{00000..99999999999}", "{-9..99999999999..3}", "{0..9999}{0..9999}", "{9999999..0}", "{0.." + "9" * 5000 + "}"],
)
def test_braces_of_too_many_names_are_refused(pattern: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^{re.escape(pattern)}\.tar: the braces stand for more than 1,000,000 names"
    ):
        open_source(f"{pattern}.tar")


@pytest.mark.fault("A shard changes during the run", "The run ends with an error that names the shard")
@pytest.mark.parametrize(
    "change",
    [
        overwritten,
        lambda path: os.truncate(path, 1000),
        lambda path: os.utime(path, (0, 0)),
        lambda path: write_shard(path, 100),
    ],
    ids=["overwritten", "cut", "touched", "longer"],
)
def test_shard_that_changes_under_a_run_is_named(tmp_path: Path, change: Callable[[Path], object]) -> None:
    path = write_shard(tmp_path / "x.tar")
    source = open_source(str(path))
    assert source[1].captions == ("caption 1",)
    change(path)
    message = f"^{re.escape(str(path))}: 0001: the shard has changed since it was opened: "
    message += "run again when nothing writes to it$"
    with pytest.raises(ValueError, match=message):
        source[1]
    with pytest.raises(ValueError, match=message):
        source.captions(1)


@pytest.mark.fault("A shard has disappeared since the start", "The run ends with an error that names the shard")
def test_shard_that_has_gone_is_named(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.tar")
    source = open_source(str(path))
    path.unlink()
    with pytest.raises(OSError, match=r"x\.tar: 0002: No such file"):
        source[2]
    with pytest.raises(IndexError):
        source[3]


def test_picture_and_its_mask_are_one_sample(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for k in range(2):
            for suffix, data in (("jpg", picture(k, "jpeg")), ("png", picture(200)), ("txt", b"a caption")):
                info = tarfile.TarInfo(f"{k}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    source = open_source(str(tmp_path / "x.tar"))
    assert [source[k].image.getpixel((3, 3)) for k in range(len(source))] == [0, 1]  # the first member of a key counts


def test_reads_of_a_few_bytes_are_put_together() -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(size, 7) if size is not None and size > 0 else size)

    data = bytes(range(200))
    assert tar_index.read_exactly(Slow(data), 150) == data[:150]
    assert tar_index.read_exactly(Slow(data), 300) == data
    assert tar_index.read_exactly(Slow(data), 0) == b""
