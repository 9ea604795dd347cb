"""Shards behind URLs: a file system in memory, and a local web server that the tests start."""

from __future__ import annotations

import io
import multiprocessing
import re
import tarfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from support import needs

needs("train")

import fsspec
from PIL import Image

from fastclip.data import open_source
from fastclip.system import env


def shard(*shades: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for k in shades:
            file = io.BytesIO()
            Image.new("L", (4, 4), k).save(file, "png")
            for suffix, data in (("png", file.getvalue()), ("txt", f"caption {k}".encode())):
                info = tarfile.TarInfo(f"{k:03d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def shades(spec: str) -> list[int]:
    source = open_source(spec)
    assert source.spec == spec
    return [source[k].image.getpixel((0, 0)) for k in range(len(source))]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def memory(cache: Path) -> Iterator[dict[str, bytes]]:
    """Put shards 0 and 1 at memory://s."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pipe({"/s/0.tar": shard(1, 2), "/s/1.tar": shard(3)})
    yield system
    system.store.clear()


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List of the URLs that were copied."""
    from fastclip.data.shards import remote

    found: list[str] = []
    copy = remote._copy

    def counted(system: object, path: str, *rest: object) -> None:
        found.append(path)
        copy(system, path, *rest)

    monkeypatch.setattr(remote, "_copy", counted)
    return found


@pytest.mark.parametrize("spec", ["memory://s/{0,1}.tar", "memory://s/{0..1}.tar", "memory://s/*.tar"])
def test_remote_shards_are_copied_once(memory: object, copies: list[str], spec: str) -> None:
    for _ in range(2):
        assert shades(spec) == [1, 2, 3]
    assert sorted(copies) == ["/s/0.tar", "/s/1.tar"]


def test_remote_shard_is_called_by_its_url(memory: object) -> None:
    source = open_source("memory://s/0.tar::2*memory://s/1.tar")
    assert len(source) == 4 and source[0].key == "memory://s/0.tar: 001" and source[3].key == "memory://s/1.tar: 003"


def test_remote_shard_that_has_changed_is_copied_anew(memory: fsspec.AbstractFileSystem, copies: list[str]) -> None:
    assert shades("memory://s/1.tar") == [3]
    memory.pipe("/s/1.tar", shard(*range(50)))
    assert shades("memory://s/1.tar") == list(range(50)) and len(copies) == 2


@pytest.mark.parametrize("name", ["ETag", "Last-Modified", "mtime"])
def test_remote_shard_of_the_same_size_that_has_changed_is_copied_anew(
    memory: fsspec.AbstractFileSystem, cache: Path, copies: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    told, info = {name: "1"}, type(memory).info
    monkeypatch.setattr(type(memory), "info", lambda self, path: {**info(self, path), **told})
    for _ in range(2):
        assert shades("memory://s/1.tar") == [3] and len(copies) == 1
    memory.pipe("/s/1.tar", shard(4))
    told[name] = "2"
    for _ in range(2):
        assert shades("memory://s/1.tar") == [4] and len(copies) == 2
    version = next(cache.rglob("*.version"))
    version.unlink()  # as if killed before writing it
    assert shades("memory://s/1.tar") == [4] and len(copies) == 3 and version.exists()
    told.clear()  # a server that reports no version
    assert shades("memory://s/1.tar") == [4] and len(copies) == 4
    assert shades("memory://s/1.tar") == [4] and len(copies) == 4
    assert not list(cache.rglob("*.tmp")) and not list(cache.rglob("*.part"))


@pytest.mark.fault(
    "The server of a remote shard does not answer",
    "The local copy is used, with a warning. Without a copy, an error names the URL",
)
def test_remote_copy_is_used_when_nobody_answers(
    memory: fsspec.AbstractFileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    assert shades("memory://s/1.tar") == [3]
    memory.rm("/s/1.tar")
    assert shades("memory://s/1.tar") == [3]
    assert "memory://s/1.tar cannot be reached (" in caplog.text and "): the existing copy" in caplog.text
    with pytest.raises(OSError, match=r"^memory://s/2\.tar: cannot be copied: FileNotFoundError"):
        open_source("memory://s/2.tar")


@pytest.mark.fault("A remote shard arrives incomplete", "An error names the URL, and nothing of the shard is kept")
def test_remote_copy_of_another_size_is_not_kept(
    memory: fsspec.AbstractFileSystem, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(self: object, path: str, local: str) -> None:
        Path(local).write_bytes(shard(3)[:2048])

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "get_file", cut)
        with pytest.raises(OSError, match=r"memory://s/1\.tar: cannot be copied: Short: 2048 of 10240 bytes were"):
            open_source("memory://s/1.tar")
    assert [path.suffix for path in cache.rglob("*") if path.is_file()] in ([], [".lock"])
    assert shades("memory://s/1.tar") == [3]


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("pipe:aws s3 cp s3://b/0.tar -", ValueError, "pipe:aws s3 cp s3://b/0.tar -: commands are not run"),
        ("https://x.org/*.tar", ValueError, "https://x.org/*.tar: a web server does not list its files"),
        ("https://x.org/{0..1.tar", ValueError, "https://x.org/{0..1.tar: "),
        ("https://x.org/{0..9999999}.tar", ValueError, "{0..9999999}.tar: the braces stand for more than 1,000,000"),
        (
            "https://x.org/pairs.csv",
            ValueError,
            "https://x.org/pairs.csv: only tar shards, whose names end in .tar, can",
        ),
        ("memory://none/*.tar", ValueError, "no such shards: memory://none/*.tar"),
        ("nosuch://x/0.tar", ValueError, "nosuch://x/0.tar: Protocol not known"),
    ],
)
def test_remote_fault_is_named(memory: object, spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        open_source(spec)


def test_remote_pattern_finds_no_hidden_names_and_folders(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe("/s/._1.tar", b"macOS")
    memory.pipe("/s/x.tar/1.png", b"of a folder")
    assert shades("memory://s/*.tar") == [1, 2, 3]
    with pytest.raises(ValueError, match=r"/s/\._1\.tar: not a tar file"):
        open_source("memory://s/.*.tar")


def test_file_urls_are_not_copied(tmp_path: Path, cache: Path) -> None:
    for k in range(2):
        (tmp_path / f"{k}.tar").write_bytes(shard(k))
    for pattern in ("{0..1}", "*"):
        assert shades(f"file://{tmp_path}/{pattern}.tar") == [0, 1]
    assert not (cache / "shards").exists()


def test_cache_folder_is_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTCLIP_CACHE", raising=False)
    assert env.cache_folder() == Path.home() / ".cache" / "fastclip"
    monkeypatch.setenv("FASTCLIP_CACHE", "~/elsewhere")
    assert env.cache_folder() == Path.home() / "elsewhere"


class _Server(SimpleHTTPRequestHandler):
    asked: list[str]

    def log_message(self, *args: object) -> None:
        self.asked.append(f"{self.command} {self.path}")


def test_shards_of_a_web_server(tmp_path: Path, cache: Path) -> None:
    needs("remote")
    folder = tmp_path / "served"
    folder.mkdir()
    for k in range(2):
        (folder / f"{k}.tar").write_bytes(shard(k))
    asked: list[str] = []
    handler = partial(type("Server", (_Server,), {"asked": asked}), directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        assert shades(f"{url}/{{0..1}}.tar") == shades(f"{url}/{{0..1}}.tar") == [0, 1]
        read = [line for line in asked if line.startswith("GET")]
        assert sorted({line.split()[1] for line in read}) == ["/0.tar", "/1.tar"]
        with pytest.raises(OSError, match=rf"^{re.escape(url)}/2\.tar: cannot be copied: ClientResponseError: 404"):
            open_source(f"{url}/2.tar")
    finally:
        server.shutdown()
        server.server_close()
    assert shades(f"{url}/{{0..1}}.tar") == [0, 1]  # the server is gone
    with pytest.raises(
        OSError, match=rf"^{re.escape(url)}/2\.tar: cannot be copied: ClientConnectorError: Cannot conn"
    ):
        open_source(f"{url}/2.tar")


def test_remote_shard_is_copied_by_one_of_several_processes(memory: object, tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    start, answers = fork.Barrier(3), fork.Queue()

    def rank() -> None:
        from fastclip.data.shards import remote

        copy, copied = remote._copy, []

        def slowly(*rest: object) -> None:
            copied.append(1)
            time.sleep(1)  # gives the other processes time to arrive
            copy(*rest)

        remote._copy = slowly
        start.wait(60)
        answers.put((shades("memory://s/{0,1}.tar"), len(copied)))

    ranks = [fork.Process(target=rank) for _ in range(3)]
    for process in ranks:
        process.start()
    found = [answers.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join(60)
    assert [seen for seen, _ in found] == [[1, 2, 3]] * 3
    assert sum(copied for _, copied in found) == 2
