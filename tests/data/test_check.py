"""`fastclip data`: the report of a check, and packed shards that contain what their source contains."""

from __future__ import annotations

import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import needs
from support.faulty import HTML, picture, write_folder, write_tar

needs("train")

from PIL import Image

from fastclip import cli
from fastclip.data import Source, open_source
from fastclip.data.check import check_source
from fastclip.data.pack import pack_source

BAD = [(HTML, b"x"), (picture(), None), (HTML, b"y"), (picture(), b" ")]


def pictures(folder: Path) -> Source:
    """Write images of every kind (JPEG with EXIF, PNG, WebP, BMP, two captions), some of them faulty."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotates by 90 degrees
    good = [
        (picture(40, "JPEG", exif=exif), b"turned"),
        (picture(50), "zw\u00f6lf".encode()),
        (picture(60, "WEBP"), b"web"),
        (picture(70, "BMP"), b"one\ntwo"),
        (picture(80), b"last"),
    ]
    return open_source(str(write_folder(folder, 0, [*good[:3], *BAD, *good[3:]])))


def usable(source: Source) -> list[tuple[Any, ...]]:
    """Return pixels and captions of every usable sample."""
    found = []
    for index in range(len(source)):
        try:
            record = source[index]
        except ValueError:
            continue
        found.append((record.image.size, np.asarray(record.image.convert("RGB")).tobytes(), record.captions))
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*"))}


# --- check


@pytest.mark.parametrize("workers", [0, 2])
def test_check_counts_everything_once(tmp_path: Path, workers: int) -> None:
    source = pictures(tmp_path)
    found = check_source(source, workers=workers)
    assert (found.samples, found.usable, found.captions) == (9, 5, 6)
    assert found.faults.counts == {"not an image": 2, "no caption": 1, "empty caption": 1}
    assert found.faults.keys["not an image"] == [source.key(3), source.key(5)]
    assert found.bad_share == 4 / 9 and found.seconds > 0
    assert sorted(found.pixels) == [(8, 16), (16, 8), (16, 8)]


def test_check_of_some_samples_is_spread_over_the_data(tmp_path: Path) -> None:
    source = open_source(str(write_folder(tmp_path, 50)))
    seen: list[int] = []
    Image.new("RGB", (300, 200)).save(tmp_path / "030.png")

    def transform(image: Image.Image) -> None:
        seen.append(image.width)
        if image.width > 100:
            raise ZeroDivisionError("by nothing")

    found = check_source(source, max_samples=5, transform=transform)
    assert (found.samples, found.usable, len(seen)) == (5, 4, 5)
    assert found.faults.keys == {"failed transform": [source.key(30)]}
    with pytest.raises(ValueError, match="max_samples at least 1"):
        check_source(source, max_samples=0)


def test_command_check_prints_a_table_and_fails_above_the_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = pictures(tmp_path)
    words = ["data", "check", str(tmp_path), "--workers", "0"]
    assert cli.main(words) == 1
    told = capsys.readouterr().out
    assert "usable            5 (55.56%), with 6 captions" in told
    assert f"- not an image    2, first {source.key(3)}, {source.key(5)}" in told
    assert "samples/s, 0 workers" in told and "smallest 8 x 16, median 16 x 8, largest 16 x 8" in told
    assert cli.main([*words, "--max-bad", "0.5", "--max-samples", "4"]) == 0
    assert "samples           4 of 9" in capsys.readouterr().out
    for share in ("nan", "7", "-1", "inf"):
        assert cli.main([*words, "--max-bad", share]) == 1
        told = capsys.readouterr()
        assert f"--max-bad must be between 0 and 1, got {float(share)}" in told.err and not told.out
    assert cli.main([*words, "--max-bad", "1"]) == 0
    capsys.readouterr()
    twice = write_tar(tmp_path / "t.tar", [("a.png", picture()), ("a.txt", b"x"), ("a.png", picture(1))])
    assert cli.main(["data", "check", str(twice), "--workers", "0"]) == 1
    told = capsys.readouterr().out
    assert "samples             2\n" in told and "- duplicate member  1, first" in told
    assert cli.main(["data", "check", str(tmp_path / "none")]) == 1
    assert f"fastclip data: there is no folder {tmp_path}/none" in capsys.readouterr().err


def test_command_check_prepares_pictures_as_training_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs("models")
    write_folder(tmp_path, 2)
    assert cli.main(["data", "check", str(tmp_path), "--workers", "0", "--model", "ViT-tiny"]) == 0
    assert cli.main(["data", "check", str(tmp_path), "--model", "ViT-tinny"]) == 1
    assert "did you mean 'ViT-tiny'" in capsys.readouterr().err


# --- pack


def other_kind(folder: Path, kind: str) -> Source:
    """Present the files of `pictures` in `folder`/data as another kind of source."""
    files = sorted((folder / "data").iterdir())
    if kind == "table":
        rows = "".join(f"data/{k:03d}.png,caption {k}\n" for k in range(9))
        (folder / "t.csv").write_text("filepath,title\n" + rows)
        return open_source(str(folder / "t.csv"))
    if kind == "hub":
        needs("hf")
        import datasets

        images = [{"bytes": path.read_bytes(), "path": None} for path in files if path.suffix == ".png"]
        texts = [None if k == 4 else f"caption {k}" for k in range(len(images))]
        table = datasets.Dataset.from_dict({"image": images, "text": texts})
        table.cast_column("image", datasets.Image()).save_to_disk(str(folder / "hub"))
        return open_source(f"hf:{folder / 'hub'}")
    path = write_tar(folder / "x.tar", [(path.name, path.read_bytes()) for path in files])
    if kind == "remote":
        needs("train")
        import fsspec

        fsspec.filesystem("memory").pipe("/packed/x.tar", path.read_bytes())
        return open_source("memory://packed/x.tar")
    return open_source(str(path) if kind == "shards" else f"{folder / 'data'}::2*{path}")


@pytest.mark.parametrize("kind", ["folder", "table", "shards", "mixture", "hub", "remote", "digits"])
def test_packed_source_is_read_again_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("FASTCLIP_CACHE", str(tmp_path / "cache"))
    if kind == "digits":
        needs("train")
        source = open_source("digits", held_out=True)
    else:
        source = pictures(tmp_path / "data")
    if kind not in ("folder", "digits"):
        source = other_kind(tmp_path, kind)
        assert check_source(source).usable == len(usable(source)) < len(source)
    packed = pack_source(source, tmp_path / "shards", samples_per_shard=100, workers=1)
    again = open_source(str(tmp_path / "shards"))
    assert usable(again) == usable(source) and len(again) == packed.samples
    assert packed.shards == (4 if kind == "digits" else 1) and packed.kept == 0
    assert packed.samples + packed.faults.total == len(source)
    if kind != "digits":  # digits have no files
        with tarfile.open(tmp_path / "shards" / "00000.tar") as tar:
            assert tar.extractfile("0000000.jpg").read() == (tmp_path / "data" / "000.png").read_bytes()


def test_shards_have_img2datasets_layout(tmp_path: Path) -> None:
    source = pictures(tmp_path / "data")
    pack_source(source, tmp_path / "shards", samples_per_shard=4)
    assert list(files(tmp_path / "shards")) == [
        *("00000.tar", "00000_stats.json", "00001.tar", "00001_stats.json", "00002.tar", "00002_stats.json")
    ]
    with tarfile.open(tmp_path / "shards" / "00000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    suffixes = ("jpg", "png", "webp")
    assert list(members) == [f"00000{k}.{x}" for k, suffix in enumerate(suffixes) for x in (suffix, "json", "txt")]
    for k, suffix in enumerate(suffixes):
        assert members[f"00000{k}.{suffix}"] == (tmp_path / "data" / f"00{k}.png").read_bytes()
    assert json.loads(members["000000.json"]) == {
        "caption": "turned",
        "key": "000000",
        "width": 8,
        "height": 16,
        "original": source.key(0),
    }
    assert members["000001.txt"].decode() == "zw\u00f6lf"
    stats = json.loads((tmp_path / "shards" / "00001_stats.json").read_text())
    assert (stats["count"], stats["successes"]) == (4, 1)
    assert stats["failures"] == {"not an image": 1, "no caption": 1, "empty caption": 1}


def test_pictures_are_resized_when_asked(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", 2)
    Image.new("RGBA", (300, 200), (200, 30, 30, 9)).save(data / "000.png")
    pack_source(open_source(str(data)), tmp_path / "shards", image_size=50, quality=80)
    again = open_source(str(tmp_path / "shards"))
    # images smaller than the requested size stay as they are
    assert [again[k].image.size for k in range(2)] == [(75, 50), (16, 8)]
    assert again[0].image.getpixel((9, 9)) == pytest.approx((200, 30, 30), abs=4)
    assert usable(again)[1] == usable(open_source(str(data)))[1]


@pytest.mark.fault(
    "`fastclip data pack` is interrupted at any point",
    "Re-running the same command resumes; the shards are byte-identical",
)
def test_interrupted_pack_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pictures(tmp_path / "data")
    options = {"samples_per_shard": 2}
    pack_source(source, tmp_path / "whole", **options)
    expected, replace = files(tmp_path / "whole"), os.replace
    steps = 0

    class Killed(BaseException):
        pass

    def interrupted(half: Path, target: Path) -> None:
        nonlocal steps
        if steps == at:
            raise Killed
        steps += 1
        replace(half, target)

    for at in range(9):  # five shards, the third of which is empty and only has stats
        folder, steps = tmp_path / f"{at}", 0
        folder.mkdir()
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "replace", interrupted)
            pack_source(source, folder, **options)
        assert all(expected[name] == data for name, data in files(folder).items() if not name.endswith(".tmp"))
        packed = pack_source(source, folder, **options)
        assert files(folder) == expected and packed.faults.total == 4
        assert packed.kept == sum(steps >= end for end in (2, 4, 5, 7, 9))


def test_pack_touches_no_other_shards(tmp_path: Path) -> None:
    source = pictures(tmp_path / "data")
    pack_source(source, tmp_path / "shards", samples_per_shard=4)
    before = files(tmp_path / "shards")
    with pytest.raises(
        ValueError, match=r"was begun with other options \(samples_per_shard was 4, is now 5\): choose another folder"
    ):
        pack_source(source, tmp_path / "shards", samples_per_shard=5)
    (tmp_path / "other").mkdir()
    write_tar(tmp_path / "other" / "00000.tar", [("a.txt", b"x")])
    with pytest.raises(ValueError, match=r"00000\.tar was not written by this command"):
        pack_source(source, tmp_path / "other")
    assert files(tmp_path / "shards") == before and list(files(tmp_path / "other")) == ["00000.tar"]
    (tmp_path / "shards" / "00000_stats.json").write_text("{}")
    with pytest.raises(ValueError, match=r"00000_stats\.json was not written by this command"):
        pack_source(source, tmp_path / "shards", samples_per_shard=4)


@pytest.mark.fault(
    "The output was created by another version of fastclip",
    "`data pack` writes its shards again if data and options are the same. Other commands refuse the folder "
    "and ask you to choose another folder",
)
def test_pack_knows_shards_of_another_version(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, output = pictures(tmp_path / "data"), tmp_path / "shards"
    pack_source(source, output)
    before, file = files(output), output / "00000_stats.json"
    stats = json.loads(file.read_text())
    changed: list[dict[str, object]] = [{"source": "data"}, {"image_size": 9}]
    for values in changed:
        old = {name: value for name, value in {**stats, **values}.items() if name not in ("max_pixels", "content")}
        file.write_text(json.dumps(old))
        with pytest.raises(
            ValueError, match=r"shards was created by another version of fastclip: choose another folder"
        ):
            pack_source(source, output)
    file.write_text(json.dumps({name: stats[name] for name in stats if name != "quality"}))
    with pytest.raises(ValueError, match=r"shards was created by another version of fastclip: choose another folder"):
        pack_source(source, output)
    file.write_text(json.dumps({name: stats[name] for name in stats if name not in ("max_pixels", "content")}))
    assert (
        pack_source(source, output).kept == 0
        and "00000.tar: the shard is written again, because its samples have changed" in caplog.text
    )
    assert files(output) == before
    file.write_text(json.dumps({name: stats[name] for name in stats if name != "max_pixels"}))
    assert pack_source(source, output).kept == 1


def captioned(folder: Path, kind: str, captions: list[str]) -> Source:
    """Write images data/000.png ... into `folder` with these captions."""
    names = [f"{k:03d}.png" for k in range(len(captions))]
    if kind == "table":
        rows = "".join(f"data/{name},{caption}\n" for name, caption in zip(names, captions, strict=True))
        (folder / "t.csv").write_text("filepath,title\n" + rows)
        return open_source(str(folder / "t.csv"))
    if kind == "karpathy":
        told = zip(names, captions, strict=True)
        images = [{"filename": name, "split": "test", "sentences": [{"raw": text}]} for name, text in told]
        (folder / "s.json").write_text(json.dumps({"images": images}))
        return open_source(f"{folder / 's.json'}:test:{folder / 'data'}")
    for k, caption in enumerate(captions):
        if (path := folder / "data" / f"{k:03d}.txt").read_text() != caption:
            path.write_text(caption)
    return open_source(str(folder / "data") if kind == "folder" else f"2*{folder / 'data'}")


@pytest.mark.fault(
    "`data pack` runs again after samples have changed", "The shards of these samples are named and written again"
)
@pytest.mark.parametrize("kind", ["folder", "table", "karpathy", "mixture"])
def test_pack_again_holds_what_has_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    """A repeated pack writes the shards whose content changed: here a corrected caption and an
    image that was supplied later.
    """
    data = write_folder(tmp_path / "data", 4, [])
    (data / "001.png").write_bytes(HTML)
    times = 2 if kind == "mixture" else 1

    def pack(last: str) -> tuple[int, int, list[str]]:
        caplog.clear()
        source = captioned(tmp_path, kind, ["a", "b", "c", last])
        packed = pack_source(source, tmp_path / "shards", samples_per_shard=2 * times)
        kept = packed.kept, packed.faults.total
        return (*kept, [line.partition(":")[0][-9:] for line in caplog.messages if "written again" in line])

    assert pack("d") == (0, times, []) and pack("d") == (2, times, [])
    anew = pack("new")
    assert anew == (1, times, ["00001.tar"]) if times == 1 else anew[0] < 2 and anew[2]
    assert ("new",) in [told for *_, told in usable(open_source(str(tmp_path / "shards")))]
    (data / "001.png").write_bytes(picture(9))
    anew = pack("new")
    assert anew == (1, 0, ["00000.tar"]) if times == 1 else anew[0] < 2 and anew[1] == 0
    assert len(usable(open_source(str(tmp_path / "shards")))) == 4 * times


def test_pack_from_another_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "AB":
        write_folder(tmp_path / name / "data", 2)
        (tmp_path / name / "p.csv").write_text("filepath,title\ndata/000.png,x\n")
    for spec in ("p.csv", "2*data", "data::p.csv"):
        output = tmp_path / spec.replace("*", "-")
        monkeypatch.chdir(tmp_path / "A")
        pack_source(open_source(spec), output)
        before = files(output)
        assert pack_source(open_source(spec), output).kept == 1
        monkeypatch.chdir(tmp_path / "B")
        with pytest.raises(
            ValueError, match=r"was begun with other options \(source was .*A/.* is now .*B/.*another folder"
        ):
            pack_source(open_source(spec), output)
        assert files(output) == before


def test_packed_json_is_json(tmp_path: Path) -> None:
    """Packed JSON is valid: NaN and infinities in a source's fields, which Python alone reads, become null."""
    data = write_folder(tmp_path / "data", 1)
    (data / "000.json").write_text('{"a": NaN, "b": [1e999, {"c": -Infinity}], "d": 1.5}')
    pack_source(open_source(str(data)), tmp_path / "shards")
    with tarfile.open(tmp_path / "shards" / "00000.tar") as tar:
        text = tar.extractfile(tar.getmembers()[1]).read()
    about = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (about["a"], about["b"], about["d"]) == (None, [None, {"c": None}], 1.5)


def test_pack_of_nothing_and_options_out_of_range_are_refused(tmp_path: Path) -> None:
    nothing = open_source(str(write_folder(tmp_path / "data", 0, [(HTML, b"x")] * 2)))
    with pytest.raises(ValueError, match=r"none of 2 samples can be used: 2 not an image \(.*000\.png, .*001\.png\)"):
        pack_source(nothing, tmp_path / "shards")
    assert not list((tmp_path / "shards").glob("*.tar"))
    for name, value in (("samples_per_shard", 0), ("image_size", 0), ("quality", 96), ("workers", -1)):
        with pytest.raises(ValueError, match="must be at least 1, quality from 1 to 95"):
            pack_source(nothing, tmp_path / "x", **{name: value})


def test_command_packs_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = pictures(tmp_path / "data")
    words = ["data", "pack", str(tmp_path / "data"), "--output", str(tmp_path / "s"), "--samples-per-shard", "5"]
    assert cli.main([*words, "--workers", "1"]) == 0
    told = capsys.readouterr().out
    assert f"wrote {tmp_path}/s: 5 samples in 2 shards\nskipped: 2 not an image ({source.key(3)}, " in told
    assert cli.main(words) == 0 and "5 samples in 2 shards, 2 of which already existed" in capsys.readouterr().out
    for name in ("--size", "--image-size"):  # the second is the former name
        assert cli.main([*words, name, "4"]) == 1
        assert "image_size was None, is now 4" in capsys.readouterr().err


# --- damage


@pytest.mark.fault(
    "`data check` meets shards that are empty, garbage or missing",
    "Each is reported in one line, and the others are read",
)
def test_check_reads_the_shards_beside_dead_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pair = [("a.png", picture()), ("a.txt", b"x"), ("a.npy", b"")]
    for k in range(6):
        write_tar(tmp_path / f"{k}.tar", pair)
    Path("1.tar").write_bytes(b"")
    Path("2.tar").write_bytes(HTML * 99)
    with open("4.tar", "r+b") as file:
        file.truncate(1700)
    whole = ["data", "check", "--workers", "0"]
    assert cli.main([*whole, "{0..7}.tar"]) == 1
    told, said = capsys.readouterr()
    lines = told.splitlines()
    assert "samples           4" in lines and "usable            4 (100.00%), with 4 captions" in lines
    assert [line.split(None, 1)[1] for line in lines if line.startswith("damaged")] == [
        *("no such shard: 6.tar", "no such shard: 7.tar", "1.tar: not a tar file, or one that is cut off: empty file"),
        "2.tar: not a tar file, or one that is cut off: a header is missing or has a wrong checksum",
        "4.tar: cut off or damaged after 1 sample, which is used: unexpected end of data",
    ]
    assert "ignored           3 .npy (0.tar: a.npy, 3.tar: a.npy, 5.tar: a.npy)" in lines
    assert "fastclip data: 5 shards or datasets cannot be read completely" in said
    assert cli.main([*whole, "{0,3,5}.tar"]) == 0
    assert "damaged" not in capsys.readouterr().out


def test_check_reads_the_parts_beside_dead_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A check reads the remaining parts of a mixture whose other parts fail: a table with an unclosed quote, a URL
    without a server, a missing folder.
    """
    write_folder(tmp_path / "f", 2)
    (tmp_path / "t.csv").write_text('filepath,title\na.png,"x\n')
    parts = [f"{tmp_path}/t.csv", f"2*{tmp_path}/f", "memory://none/{0,1}.tar", f"{tmp_path}/none"]
    assert cli.main(["data", "check", "::".join(parts), "--workers", "0"]) == 1
    told = capsys.readouterr().out
    assert "samples           4" in told and told.count("damaged  ") == 4
    for line in (
        "t.csv, line 2: unexpected end of data",
        "memory://none/1.tar: cannot be copied",
        "there is no folder",
    ):
        assert line in told
    assert cli.main(["data", "check", "::".join(parts[::3]), "--workers", "0"]) == 1
    assert "t.csv, line 2: unexpected end of data; there is no folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unexpected end of data"):
        open_source("::".join(parts))
    (tmp_path / "x.tar").write_bytes(b"")
    assert cli.main(["data", "check", f"{tmp_path}/x.tar", "--workers", "0"]) == 1
    reason = "not a tar file, or one that is cut off: empty file"
    assert capsys.readouterr().err.endswith(f"fastclip data: {tmp_path}/x.tar: {reason}\n")
    assert cli.main(["data", "check", "memory://none/0.tar", "--workers", "0"]) == 1
    assert re.fullmatch(r"fastclip data: memory://none/0.tar: cannot be copied: [^;\n]*\n", capsys.readouterr().err)


def test_check_goes_on_where_a_shard_goes_away(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"{k}.tar", [("a.png", picture()), ("a.txt", b"x")]) for k in range(3)]
    source = open_source(str(tmp_path / "{0..2}.tar"))
    paths[1].unlink()
    found = check_source(source)
    assert (found.samples, found.usable) == (3, 2) and found.faults.keys == {"unreadable shard": [f"{paths[1]}: a"]}


@pytest.mark.parametrize("action", ["check", "pack"])
def test_largest_picture_is_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], action: str
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    write_folder(tmp_path / "f", 2)
    words = ["data", action, str(tmp_path / "f"), "--workers", "1"]
    words += ["--output", str(tmp_path / "s")] if action == "pack" else []
    assert cli.main(words) == 1
    told = capsys.readouterr()
    assert "image too large" in told.out + told.err
    output = [str(tmp_path / "t") if word == str(tmp_path / "s") else word for word in words]
    assert cli.main([*output, "--max-pixels", "1e6"]) == 0 and Image.MAX_IMAGE_PIXELS == 10**6
    if action == "pack":
        assert cli.main([*words, "--max-pixels", "200"]) == 1
        assert "max_pixels was 100, is now 200" in capsys.readouterr().err
    for wrong in ("0", "x", "nan", "inf"):
        with pytest.raises(SystemExit):
            cli.main([*words, "--max-pixels", wrong])
        assert "must be a positive number of pixels, such as 200e6, got" in capsys.readouterr().err
