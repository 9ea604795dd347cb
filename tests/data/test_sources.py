"""Every kind of data by its SPEC: reading files that the tests create, and the errors for faulty ones."""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from support import needs

needs("train")

from PIL import Image

from fastclip.data import Source, open_source
from fastclip.data.faults import BadSample
from fastclip.data.sources.digits import CLASS_NAMES, TEMPLATES
from fastclip.data.spec import absolute_spec


def picture(shade: int, suffix: str = ".png", *, exif: Image.Exif | None = None) -> bytes:
    """Return an image 16 pixels wide and 8 high, of one grey except for a white top left corner."""
    image = Image.new("RGB", (16, 8), (shade, shade, shade))
    image.putpixel((0, 0), (255, 255, 255))
    file = io.BytesIO()
    image.save(file, "JPEG" if suffix.startswith(".j") else suffix[1:].upper(), **({"exif": exif} if exif else {}))
    return file.getvalue()


def shade(source: Source, index: int) -> int:
    image = source[index].image
    assert image.size == (16, 8)
    return image.convert("RGB").getpixel((15, 7))[0]


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, count: int, size: int) -> None:
    """Write shards in which image `j` of shard `i` has the shade 10 i + j and the caption "i j",
    alternately in .txt and .json.
    """
    for i in range(count):
        members = {}
        for j in range(size):
            members[f"{i:02d}{j:02d}.png"] = picture(10 * i + j)
            text = f"{i} {j}"
            kind = ".json" if j % 2 else ".txt"
            members[f"{i:02d}{j:02d}{kind}"] = (json.dumps({"caption": text}) if j % 2 else text).encode()
        write_tar(folder / f"{i:05d}.tar", members)


def captions(source: Source) -> list[tuple[str, ...]]:
    return [source.captions(index) for index in range(len(source))]


# --- digits


def test_digits_split_is_fixed_stratified_and_disjoint() -> None:
    train, held_out = open_source("digits"), open_source("digits", held_out=True)
    assert len(train) == 1437 and len(held_out) == 360
    counts = [np.bincount([source[k].label for k in range(len(source))]) for source in (train, held_out)]
    share = counts[1] / (counts[0] + counts[1])
    assert len(share) == 10 and np.abs(share - 0.2).max() < 0.005
    seen = {train[k].image.tobytes() for k in range(len(train))}
    assert not any(held_out[k].image.tobytes() in seen for k in range(len(held_out)))
    assert [held_out[k].label for k in range(12)] == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]


def test_digits_are_pictures_of_sklearns_with_their_captions() -> None:
    from sklearn.datasets import load_digits

    pixels = load_digits().images / 16 * 255
    for held_out in (False, True):
        source = open_source("digits", held_out=held_out)
        assert (source.class_names, source.templates, source.spec) == (CLASS_NAMES, TEMPLATES, "digits")
        for index in (0, 7, len(source) - 1):
            record = source[index]
            assert record.image.mode == "RGB" and record.image.size == (32, 32)
            found, original = np.asarray(record.image, np.float64), pixels[int(record.key[-4:])]
            assert (found[..., 0] == found[..., 1]).all() and (found[..., 0] == found[..., 2]).all()
            # the image is enlarged, so the mean of a block is near its pixel's level
            blocks = found[..., 0].reshape(8, 4, 8, 4).mean((1, 3))
            assert np.corrcoef(blocks.flatten(), original.flatten())[0, 1] > 0.95
            name = CLASS_NAMES[record.label]
            assert record.captions == source.captions(index) == tuple(t.format(name) for t in TEMPLATES)


def test_digits_keys_are_numbers_of_sklearn() -> None:
    from sklearn.datasets import load_digits as theirs

    targets = theirs(return_X_y=True)[1]
    numbers = []
    for held_out in (False, True):
        source = open_source("digits", held_out=held_out)
        for index in range(len(source)):
            folder, number = source[index].key.split("/")
            assert folder == "digits" and len(number) == 4
            assert source[index].label == targets[int(number)]
            numbers.append(int(number))
    assert sorted(numbers) == list(range(1797))


# --- tables


@pytest.mark.parametrize(
    ("name", "separator"), [("t.csv", ","), ("t.tsv", "\t"), ("t.csv", ";"), ("t.csv", "|"), ("t.CSV", "\t")]
)
def test_table_separator_is_found_in_the_header(tmp_path: Path, name: str, separator: str) -> None:
    for k in range(2):
        (tmp_path / f"{k}.png").write_bytes(picture(k))
    rows = [["other", "filepath", "title"], ["x", "0.png", "a cat"], ["y", "1.png", "a dog"]]
    table = tmp_path / name
    table.write_text("\n".join(map(separator.join, rows)))
    source = open_source(str(table))
    assert captions(source) == [("a cat",), ("a dog",)]
    assert [shade(source, k) for k in range(2)] == [0, 1]
    assert [source[k].key for k in range(2)] == ["0.png", "1.png"]
    assert (source.class_names, source.templates, source[0].label, source.spec) == ((), (), None, str(table))


@pytest.mark.parametrize(("image", "caption"), [("image", "caption"), ("Path", " TEXT "), ("file_name", "title")])
def test_table_columns_have_other_names(tmp_path: Path, image: str, caption: str) -> None:
    (tmp_path / "a.png").write_bytes(picture(5))
    (tmp_path / "t.csv").write_text(f"{caption},{image}\nA cat,a.png\n")
    source = open_source(str(tmp_path / "t.csv"))
    assert captions(source) == [("A cat",)] and shade(source, 0) == 5


def test_table_prefers_open_clips_columns(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,title,image,filepath\nno,yes,no.png,yes.png\n")
    source = open_source(str(tmp_path / "t.csv"))
    assert captions(source) == [("yes",)]
    with pytest.raises(BadSample, match=re.escape("yes.png: no such file")):
        source[0]


def test_table_fields_are_quoted(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(
        b'\xef\xbb\xbf"filepath","title"\r\n"a, b.png","he said ""hi"", twice"\r\n\r\n'
        b'c.png,"two\nlines"\r\nd.png, \xc3\xa9t\xc3\xa9 \r\n'
    )
    source = open_source(str(tmp_path / "t.csv"))
    assert captions(source) == [('he said "hi", twice',), ("two\nlines",), ("été",)]


@pytest.mark.fault(
    "No row of a table can be used, or the table cannot be parsed",
    "The run does not start. An error names the file and, except for empty captions, the line",
)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name,label\na.png,1\n",
            r"t\.csv: the table needs a column of images .*filepath.* but its columns are name, label",
        ),
        (
            "filepath,label\na.png,1\n",
            r"t\.csv: .* captions \(title, caption, text\).* but its columns are filepath, label\.",
        ),
        ("", r"t\.csv: .* but its columns are none\."),
        ("filepath,title\n", r"t\.csv: the table has a header and no rows"),
        ("filepath,title\na.png,\nb.png, \n", r"t\.csv: all 2 captions are empty"),
        (
            'filepath,title\n,"x\ny"\n,y\n',
            r"none of 2 rows can be used; the first is .*t\.csv, line 2: the path is empty",
        ),
        (
            "filepath,title\n\nb.png\n",
            r"none of 1 rows can be used; .*t\.csv, line 3: 1 fields, but the header has 2",
        ),
        ("filepath,title\na.png,x, y\n", r"t\.csv, line 2: 3 fields, but the header has 2"),
        ('filepath,title\na.png,x\nb.png,"x\nc.png,y\nd.png,z\n', r"t\.csv, line 3: unexpected end of data"),
        (f"filepath,title\na.png,{'x' * 200_000}\n", r"t\.csv, line 2: field larger than field limit"),
    ],
)
def test_table_fault_names_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / "t.csv"))


def test_table_of_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"filepath,title\na.png,\xe9t\xe9\n")
    with pytest.raises(ValueError, match=r"t\.csv, line 2: its caption is not UTF-8"):
        open_source(str(tmp_path / "t.csv"))


def test_table_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        open_source(str(tmp_path / "none.csv"))


# --- folders


def test_folder_has_every_picture_with_its_captions(tmp_path: Path) -> None:
    files = {
        "b/2.JPG": picture(80, ".jpg"),
        "b/2.txt": b"a cat\n\n  two cats  \r\n",
        "a.b.png": picture(1),
        "a.b.txt": "\ufeffété\n".encode(),
        "b/10.webp": picture(60, ".webp"),
        "b/10.json": json.dumps({"caption": "ten", "url": "x"}).encode(),
        "c/3.png": picture(3),
        "c/3.json": json.dumps({"caption": ["three", "3"]}).encode(),
        "c/4.png": picture(4),
        "c/4.json": b"{}",  # the .txt takes precedence
        "c/4.txt": b"four",
        "c/notes.md": b"",
        "c/._4.png": b"of macOS",
        ".cache/5.png": picture(5),
    }
    for name, data in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    source = open_source(str(tmp_path))
    keys = [source[k].key for k in range(len(source))]
    assert keys == [str(tmp_path / name) for name in ("a.b.png", "b/10.webp", "b/2.JPG", "c/3.png", "c/4.png")]
    assert captions(source) == [("été",), ("ten",), ("a cat", "two cats"), ("three", "3"), ("four",)]
    assert [source[k].captions for k in range(len(source))] == captions(source)
    assert [shade(source, k) for k in range(len(source))] == pytest.approx([1, 60, 80, 3, 4], abs=8)  # JPEG is lossy


@pytest.mark.fault("A folder has no captions at all", "An error counts its images and names the first one")
def test_folder_without_captions_counts_and_names_the_first(tmp_path: Path) -> None:
    for k in range(5):
        (tmp_path / f"{k}.png").write_bytes(picture(k))
    with pytest.raises(
        ValueError, match=r"none of 5 images has a caption; the first is .*0\.png: 0\.txt or 0\.json must"
    ):
        open_source(str(tmp_path))


@pytest.mark.fault(
    "A caption file is empty or damaged", "The sample is replaced and counted by cause; the message names its image"
)
@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b" \n\n", "a.png: its caption is empty"),
        ("a.txt", b"\xff\xfe", "a.png: its caption is not UTF-8"),
        ("a.json", b"{", "a.png: its caption file is not JSON"),
        ("a.json", b'{"caption": null}', "a.png: it has no caption"),
        ("a.json", b'["a cat"]', "a.png: its caption file must hold an object of names and values, got list"),
        ("a.json", b'{"text": "x", "url": ""}', 'a.png: its caption file has no "caption" (it has text, url)'),
        ("a.json", b'{"caption": 3}', 'a.png: "caption" in its JSON file must be a string or a list of strings, got 3'),
    ],
)
def test_folder_caption_fault_names_the_picture(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / name).write_bytes(data)
    source = open_source(str(tmp_path))
    with pytest.raises(ValueError, match=re.escape(message)):
        source[0]


def test_folder_of_neither_pictures_nor_shards_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}: the folder holds no images"):
        open_source(str(tmp_path))


# --- shards


@pytest.mark.parametrize(
    "spec", ["s/{00000..00002}.tar", "s/*.tar", "s", "s/{00000,0000[12]}.tar", "s/{00000..00002..1}.tar"]
)
def test_shards_are_read_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    write_shards(tmp_path / "s", 3, 4)
    monkeypatch.chdir(tmp_path)
    source = open_source(spec)
    assert len(source) == 12 and source.spec == spec and source.class_names == ()
    for index in (11, 0, 5, 4, 3, 8):  # random access
        i, j = divmod(index, 4)
        record = source[index]
        assert record.key == f"s/{i:05d}.tar: {i:02d}{j:02d}"
        assert record.captions == source.captions(index) == (f"{i} {j}",)
        assert shade(source, index) == 10 * i + j


def test_shards_members_group_by_key(tmp_path: Path) -> None:
    folders = {
        "a/1.jpeg": picture(90, ".jpg"),
        "a/1.txt": b"one caption\nof two lines\n",
        "b/1.txt": b"captions may come first",
        "b/1.json": b"not read",
        "b/1.seg.png": b"another kind of member",
        "b/1.PNG": picture(7),
        "._b/1.png": picture(9),
        "b/._1.png": b"of macOS",
        "stats.json": b"{}",
        "a." * 60 + "png": b"",
        "d" * 120 + "/2.png": picture(8),  # a long name takes additional headers
        "d" * 120 + "/2.txt": b"long",
        "._b/1.txt": b"hidden folders count",
    }
    path = write_tar(tmp_path / "x.tar", folders)
    source = open_source(str(path))
    keys = ["a/1", "b/1", "._b/1", "d" * 120 + "/2"]
    assert [source[k].key for k in range(len(source))] == [f"{path}: {key}" for key in keys]
    told = ["one caption\nof two lines", "captions may come first", "hidden folders count", "long"]
    assert captions(source) == [(text,) for text in told]
    assert [shade(source, k) for k in range(4)] == pytest.approx([90, 7, 9, 8], abs=8)


def test_shards_are_used_once(tmp_path: Path) -> None:
    write_shards(tmp_path, 2, 2)
    assert len(open_source(str(tmp_path / "{00000,*}.tar"))) == 4


@pytest.mark.fault("Shards are missing", "An error names them")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("none.tar", "no such shards: none.tar: no file"),
        ("n*.tar", "no such shards: n*.tar: no file"),
        ("{00000..00003}.tar", "{00000..00003}.tar: 2 of 4 names have no file, such as 00002.tar"),
        ("{00000.tar", "Unbalanced braces"),
    ],
)
def test_shards_that_are_missing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str
) -> None:
    write_shards(tmp_path, 2, 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        open_source(spec)


@pytest.mark.fault("A shard has no images or no captions", "An error names the shard")
def test_shards_fault_names_the_shard(tmp_path: Path) -> None:
    def refused(members: dict[str, bytes], message: str) -> None:
        path = write_tar(tmp_path / "bad.tar", members)
        with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
            open_source(str(path))

    refused({}, "the shard holds no images")
    refused({"a.txt": b"x"}, "the shard holds no images")
    refused(
        {"a.txt": b"x", "b.png": b"", "b.seg": b"1", "c.jpg": b""},
        "none of 2 images has a caption; the first is b",
    )


@pytest.mark.fault("A shard is cut off before its first sample ends", "An error names the shard")
def test_shards_that_are_cut_off_or_garbage_are_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.txt": b"a", "a.bmp": b"x" * 100_000})
    whole = path.read_bytes()
    for data in (whole[:50_000], b"", b"<html>" * 1000):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}: not a tar file, or one that is cut off"):
            open_source(str(path))
    path.write_bytes(whole)
    source = open_source(str(path))
    path.write_bytes(whole[:50_000])
    with pytest.raises(ValueError, match=r"x\.tar: a: the shard has changed since it was opened"):
        source[0]


# --- any kind


def faulty_picture(kind: str, data: bytes, folder: Path) -> tuple[Source, str]:
    """Return a source whose second image is `data`, and the key expected for it."""
    if kind == "shards":
        members = {"1.png": picture(0), "1.txt": b"x", "2.png": data, "2.txt": b"x"}
        path = write_tar(folder / "x.tar", members)
        return open_source(str(path)), f"{path}: 2"
    for name, content in (("1.png", picture(0)), ("1.txt", b"x"), ("2.png", data), ("2.txt", b"x")):
        (folder / name).write_bytes(content)
    if kind == "folder":
        return open_source(str(folder)), str(folder / "2.png")
    (folder / "t.csv").write_text("filepath,title\n1.png,x\n2.png,x\n")
    return open_source(str(folder / "t.csv")), "2.png"


@pytest.mark.fault(
    "An image is damaged, or its file contains HTML",
    "The sample is replaced and counted by cause; the message names the file",
)
@pytest.mark.parametrize("kind", ["table", "folder", "shards"])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<html>not found</html>", "its format is not recognised"),
        (b"", "the file is empty"),
        (picture(0)[:50], ""),
        (picture(0, ".jpg")[:-100], "(image file is truncated|Truncated File Read)"),
    ],
    ids=["html", "empty", "cut png", "cut jpeg"],
)
def test_damaged_picture_is_named(tmp_path: Path, kind: str, data: bytes, reason: str) -> None:
    source, key = faulty_picture(kind, data, tmp_path)
    assert shade(source, 0) == 0
    with pytest.raises(ValueError, match=f"^{re.escape(key)}: not a readable image: .*{reason}"):
        source[1]


@pytest.mark.fault("EXIF data give an orientation", "The image is turned upright")
@pytest.mark.parametrize("kind", ["table", "folder", "shards"])
def test_picture_is_turned_as_its_exif_says(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotates by 90 degrees clockwise
    source, key = faulty_picture(kind, picture(0, exif=exif), tmp_path)
    record = source[1]
    assert record.key == key and record.image.size == (8, 16)
    assert record.image.convert("L").getpixel((7, 0)) == 255  # the white corner was top left
    assert record.image.getexif().get(0x0112, 1) == 1


@pytest.mark.fault(
    "An image has disappeared since the start",
    "The sample is replaced and counted by cause; the message names the file",
)
def test_picture_that_has_gone_is_named(tmp_path: Path) -> None:
    source, key = faulty_picture("folder", picture(0), tmp_path)
    (tmp_path / "2.png").unlink()
    with pytest.raises(BadSample, match=f"{re.escape(key)}: No such file"):
        source[1]
    (tmp_path / "1.txt").unlink()
    with pytest.raises(BadSample, match=r"1\.png: it has no caption: 1\.txt or 1\.json must be in the same folder"):
        source.captions(0)


@pytest.mark.parametrize("kind", ["digits", "table", "folder", "shards"])
def test_source_goes_to_another_process(tmp_path: Path, kind: str) -> None:
    source = open_source("digits") if kind == "digits" else faulty_picture(kind, picture(3), tmp_path)[0]
    copied = pickle.loads(pickle.dumps(source))
    assert len(copied) == len(source) and copied.spec == source.spec
    assert copied[1].image.tobytes() == source[1].image.tobytes() and copied[1][1:] == source[1][1:]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", "did you mean 'digits'"),
        ("flickr", "'flickr' is not a dataset, and there is no folder with this name"),
        ("data/flickr", "there is no folder data/flickr"),
        ("a.parquet", "'a.parquet' is not a dataset, and there is no folder with this name"),
        ("notes.md", "notes.md is not a file of a supported kind"),
        ("", "'' is not a dataset"),
    ],
)
def test_unknown_spec_lists_what_it_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        open_source(spec)
    assert all(kind in str(error.value) for kind in ("digits", "pairs.csv", "folder", "shards/*.tar"))


@pytest.mark.parametrize(
    ("spellings", "absolute"),
    [
        (["A", "./A", "A/", "x/../A", "{cwd}/A"], "{cwd}/A"),
        (["A::2*d", "./A/::2.0*d/", "{cwd}/A::2*{cwd}/d"], "{cwd}/A::2*{cwd}/d"),
        (["A#caption=text", "./A/#caption=text"], "{cwd}/A#caption=text"),
        (["d.json:train+val:A/", "./d.json:train+val:./A"], "{cwd}/d.json:train+val:{cwd}/A"),
        (["./d.json:test"], "{cwd}/d.json:test"),
        (["hf:A:train", "hf:./A/:train"], "hf:{cwd}/A:train"),
        (["hf:A", "hf:x/../A"], "hf:{cwd}/A"),
        (["hf:name/of:train#image=a"], "hf:name/of:train#image=a"),
        (["pk/*.tar", "./pk//*.tar"], "{cwd}/pk/*.tar"),
        (["s3://x/{{0..9}}.tar", "s3://x/{{0..9}}.tar"], "s3://x/{{0..9}}.tar"),
        (["2*s3://x//./0.tar::digits"], "2*s3://x//./0.tar::digits"),
        (["./digits"], "{cwd}/digits"),
    ],
)
def test_spellings_of_one_place_are_one_absolute_spec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spellings: list[str], absolute: str
) -> None:
    for name in ("A", "d", "x", "digits"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    wanted = absolute.format(cwd=tmp_path)
    for spec in spellings:
        assert absolute_spec(spec.format(cwd=tmp_path)) == wanted
    monkeypatch.chdir("/")
    assert absolute_spec(wanted) == wanted
