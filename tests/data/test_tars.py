"""Tar files of any writer: false sizes, links, several archives in one file, members that belong to no sample."""

from __future__ import annotations

import io
import os
import random
import re
import tarfile
import time
import tracemalloc
from pathlib import Path

import pytest

from support import needs
from support.faulty import picture, write_tar

needs("train")

from fastclip.data import BadSample, open_source
from fastclip.data.shards.tar_index import tar_members

END = bytes(1024)


def header(name: str, size: int | bytes, kind: bytes = b"0", *, link: str = "") -> bytes:
    """Return one header block. A size given as bytes is the raw field; a size below 0 or beyond 8 GiB is stored in base
    256.
    """
    field = size if isinstance(size, bytes) else b"%011o\0" % size if 0 <= size < 8**11 else b""
    field = field or (2**96 + size if size < 0 else size | 2**95).to_bytes(12, "big")
    block = bytearray(512)
    for place, text in ((0, name.encode()), (124, field), (156, kind), (157, link.encode()), (257, b"ustar\x0000")):
        block[place : place + len(text)] = text
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str, data: bytes, kind: bytes = b"0") -> bytes:
    return header(name, len(data), kind) + data + bytes(-len(data) % 512)


def records(**values: str) -> bytes:
    """Return an extended header with these records."""
    lines = b""
    for name, value in values.items():
        line = f" {name}={value}\n".encode()
        length = next(n for n in range(len(line), len(line) + 9) if n == len(line) + len(str(n)))
        lines += str(length).encode() + line
    return member("PaxHeader", lines, b"x")


PAIR = member("a.png", picture(7)) + member("a.txt", b"one")
HOSTILE = {
    "negative": header("b.png", -512),
    "negative by one": header("b.png", -1),
    "most negative": header("b.png", b"\xff" + bytes(11)),
    "beyond the end": header("b.png", 10**9),
    "huge": header("b.png", 2**90),
    "no number": header("b.png", b"zz"),
    "no octal": header("b.png", b"00000000999\0"),
    "negative in words": header("b.png", b"-0000001000\0"),
    "long name, huge": header("b.png", 2**60, b"L") + member("b.png", b"x"),
    "long name, negative": header("b.png", -512, b"L"),
    "long link, huge": header("b.png", 2**33, b"K") + header("b.png", 0, b"1", link="a.png"),
    "records, huge": header("b.png", 2**33, b"x"),
    "records, negative": header("b.png", -1024, b"x"),
    "global, huge": header("b.png", 2**40, b"g"),
    "pax size, negative": records(size="-512") + header("b.png", 0),
    "pax size, no number": records(size="1e3") + header("b.png", 0),
    "pax size, huge": records(size="9" * 4000) + header("b.png", 0),
    "pax size, large": records(size="99999999999") + header("b.png", 0),
    "pax records, no lengths": member("PaxHeader", b"size=4\n", b"x") + header("b.png", 0),
    "pax records, endless": member("PaxHeader", b"0 a=b\n" * 9, b"x") + header("b.png", 0),
    "pax records, beyond": member("PaxHeader", b"99 a=b\n", b"x") + header("b.png", 0),
    "global size": member("PaxHeader", b"14 size=1024\n\n", b"g") + header("b.png", 0),
    "sparse, negative": header("b.png", -512, b"S"),
    "folder, then nothing": header("b/", -512, b"5") + header("c.png", -512),
    "unknown kind, negative": header("b.png", -512, b"Z"),
    "device, negative": header("b.png", -512, b"3") + header("c.png", -512),
    "garbage": b"\x01" * 512,
}


@pytest.mark.fault(
    "The headers of a tar file declare impossible sizes",
    "The file is read up to the first such header, and the message names the shard",
)
@pytest.mark.parametrize("kind", HOSTILE)
def test_declared_sizes_are_not_believed(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(PAIR + HOSTILE[kind] + END)
    tracemalloc.start()
    source = open_source(str(path))
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()
    assert source.captions(0) == ("one",) and source[0].image.size == (16, 8)
    assert f"{path}: cut off or damaged after 1 sample, which is used: " in caplog.text
    path.write_bytes(HOSTILE[kind] + END)
    with pytest.raises(ValueError, match=re.escape(f"{path}: not a tar file, or one that is cut off")):
        open_source(str(path))


def test_any_bytes_come_to_an_end() -> None:
    """Reading ends soon for any bytes, and members lie inside the file; single bytes of headers are changed
    at random.
    """
    whole = PAIR + records(path="b.png", size="3") + member("b.png", b"abc") + member("././@LongLink", b"c.png", b"L")
    whole += member("c", b"x") + header("d.png", 0, b"2", link="a.png") + member("e", b"y" * 600, b"S") + END
    headers = [k for k in range(0, len(whole) - len(END), 512) if whole[k + 257 : k + 262] == b"ustar"]
    draw, begin, counts = random.Random(0), time.monotonic(), []
    for _ in range(1500):
        data = bytearray(whole)
        for start in draw.sample(headers, 2):
            data[start + draw.choice((0, 124, 125, 130, 135, 156, 482, draw.randrange(512)))] = draw.randrange(256)
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
        try:
            found = tar_members(io.BytesIO(data))
        except tarfile.TarError:
            continue
        counts.append(len(found.members))
        assert all(0 <= one.header < len(data) and one.size >= 0 for one in found.members)
        assert len(found.members) + len(found.lost) <= len(data) // 512
    assert time.monotonic() - begin < 30 and len(counts) > 500 and {*counts} >= {1, 2, 3, 4, 5}


@pytest.mark.parametrize("between", [b"", END, bytes(10_240), bytes(2**20 + 512)])
def test_tars_put_together_are_read_to_the_end(
    tmp_path: Path, between: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(PAIR + between + member("b.png", picture(9)) + member("b.txt", b"two") + END)
    source = open_source(str(path))
    assert [source.captions(k) for k in range(len(source))] == [("one",), ("two",)] and not caplog.messages
    path.write_bytes(PAIR + END + b"something else" * 99)
    assert len(open_source(str(path))) == 1
    assert (
        f"{path}: cut off or damaged after 1 sample, which is used: no tar header after the end of the archive"
        in caplog.text
    )


def test_links_in_a_shard_are_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = [
        *(header("in/early.png", 0, b"2", link="../a.png"), header("in/early.txt", 0, b"2", link="./late.txt")),
        *(PAIR, member("in/late.txt", b"late")),
        *(header("hard.png", 0, b"1", link="a.png"), header("hard.txt", 99, b"1", link="./a.txt")),
        *(header("chain.png", 0, b"2", link="in/early.png"), header("chain.txt", 0, b"1", link="hard.txt")),
    ]
    path = tmp_path / "x.tar"
    path.write_bytes(b"".join(parts) + END)
    source = open_source(str(path))
    told = {source.key(k).partition(": ")[2]: source[k].captions for k in range(len(source))}
    assert told == {"in/early": ("late",), "a": ("one",), "hard": ("one",), "chain": ("one",)}
    assert {source[k].image.tobytes() for k in range(4)} == {source[1].image.tobytes()}
    assert caplog.messages == [
        f"{path}: ignored members that belong to no sample: 1 .txt without a picture ({path}: in/late.txt)"
    ]


@pytest.mark.fault("A dangling link, a device or a sparse file in a shard", "The sample is counted by cause")
def test_members_without_data_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = [
        *(PAIR, header("b.png", 0, b"2", link="/etc/passwd"), member("b.txt", b"x")),
        *(header("c.png", 0, b"1", link="d.png"), member("c.txt", b"x"), header("d.png", 0, b"1", link="c.png")),
        *(header("e.png", 0, b"3"), member("e.txt", b"x"), member("f.png", b"xyz", b"S"), member("f.txt", b"x")),
        *(member("g.png", picture(1)), header("g.txt", 0, b"2", link="../g.txt")),
    ]
    path = tmp_path / "x.tar"
    path.write_bytes(b"".join(parts) + END)
    source = open_source(str(path))
    causes = {}
    for k in range(1, len(source)):
        with pytest.raises(BadSample) as caught:
            source[k]
        causes[source.key(k)[-1]] = caught.value.fault.cause
    assert causes == dict.fromkeys("bcefg", "lost member")
    assert source.passed.counts == {"link to nothing in the file": 4, "device or pipe": 1, "sparse file": 1}
    assert "4 link to nothing in the file (" in caplog.text


def test_members_of_no_sample_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every member is part of a sample or is counted by its kind, at each opening."""
    names = ["a.png", "a.txt", "a.json", "a.cls", "a.seg.png", "a.npy", "b.v2.jpg", "b.txt", "c.JPE", "c.txt"]
    names += ["d.jfif", "d.json", "._e.png", "README", "stats.json", "a.txt", "a.npy", "f.jpg", "f.png", "f.txt"]
    texts = {".txt": b"x", ".json": b'{"caption": "x"}', ".cls": b"0"}
    data = {kind: picture(3, "JPEG") for kind in (".jpg", ".JPE", ".jfif")} | {".png": picture(4)} | texts
    path = write_tar(tmp_path / "x.tar", [(name, data.get(Path(name).suffix, b"")) for name in names])
    for _ in range(2):  # the index contains the counts too
        caplog.clear()
        source = open_source(str(path))
        found = {}
        for k in range(len(source)):
            try:
                found[source[k].key] = "used"
            except BadSample as bad:
                found[f"{bad.fault.key}, {bad.fault.cause}"] = bad.fault.cause
        used = {f"{path}: {key}": "used" for key in "acdf"}
        assert found == {**used, f"{path}: b, no image": "no image", f"{path}: a, duplicate member": "duplicate member"}
        assert source.passed.counts == {
            **dict.fromkeys(("hidden", "without a suffix", ".json without a picture", "repeated"), 1),
            **dict.fromkeys((".seg.png", ".v2.jpg", ".png"), 1),
            ".npy": 2,
        }
        in_samples = [
            "a.png",
            "a.txt",
            "a.json",
            "a.cls",
            "b.txt",
            "c.JPE",
            "c.txt",
            "d.jfif",
            "d.json",
            "f.jpg",
            "f.txt",
        ]
        assert source.passed.total + len(in_samples) == len(names)
        (line,) = caplog.messages
        assert line.startswith(f"{path}: ignored members") and f"1 .v2.jpg ({path}: b.v2.jpg)" in line


def test_shard_without_a_picture_says_what_it_holds(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("0.image.jpg", b"x"), ("0.caption.txt", b"x"), ("1.image.jpg", b"x")])
    with pytest.raises(
        ValueError, match=r"x\.tar: the shard holds no images; it holds 2 \.image\.jpg \(0\.image\.jpg,"
    ):
        open_source(str(path))


@pytest.mark.parametrize(
    ("magic", "name"), [(b"\x1f\x8b\x08", "gzip"), (b"(\xb5/\xfd", "zstd"), (b"PK\x03\x04", "zip")]
)
def test_compressed_shard_is_called_so(tmp_path: Path, magic: bytes, name: str) -> None:
    (tmp_path / "x.tar").write_bytes(magic + bytes(range(256)) * 9)
    with pytest.raises(ValueError, match=rf"x\.tar: not a tar file, .*: it is compressed by {name}"):
        open_source(str(tmp_path / "x.tar"))


def test_text_that_is_empty_gives_way(tmp_path: Path) -> None:
    members = [("a.png", picture(0)), ("a.txt", b" "), ("a.json", b'{"caption": ["x", null, "y"]}')]
    members += [("b.png", picture(0)), ("b.txt", b""), ("b.json", b'{"text": "z", "url": ""}')]
    source = open_source(str(write_tar(tmp_path / "x.tar", members)))
    assert source.captions(0) == source[0].captions == ("x", "y")
    with pytest.raises(BadSample, match="its caption is empty"):
        source[1]


def test_index_of_other_headers_is_made_anew(tmp_path: Path) -> None:
    """An index is rebuilt if the headers of the shard differ at the same size and time, as after a copy that preserves
    times or two writes within one tick of the clock.
    """
    path = write_tar(tmp_path / "x.tar", [("a.png", picture(0)), ("a.txt", b"one")])
    assert open_source(str(path)).key(0) == f"{path}: a"
    before = path.stat()
    write_tar(path, [("b.png", picture(0)), ("b.txt", b"two")])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    source = open_source(str(path))
    assert source.key(0) == f"{path}: b" and source[0].captions == ("two",)
