"""Tables as users have them: the locations of images, the choice of columns, damaged rows."""

from __future__ import annotations

import gzip
import os
import re
import unicodedata
from pathlib import Path

import pytest

from support import needs
from support.faulty import picture, write_folder, write_tar

needs("train")

from fastclip.data import BadSample, open_source


def cause(source: object, index: int) -> str:
    with pytest.raises(BadSample) as caught:
        source[index]
    assert caught.value.fault.key == source.key(index)
    return caught.value.fault.cause


# --- locations of images


@pytest.mark.fault(
    "A path in a table leads to different images from the table's folder and from the working directory",
    "The sample is counted by cause and named",
)
def test_table_paths_are_relative_to_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here, beside = tmp_path / "here", tmp_path / "beside"
    for folder in (here, beside):
        (folder / "p").mkdir(parents=True)
    for path in (here / "p/both.png", beside / "p/both.png"):
        path.write_bytes(picture(len(str(path))))
    (beside / "p/one.png").write_bytes(picture(3))
    for path in (here / "p/copy.png", beside / "p/copy.png", here / "p/here.png"):
        path.write_bytes(picture(4))
    (here / "p/linked.png").symlink_to(beside / "p/one.png")
    (beside / "p/linked.png").symlink_to("one.png")
    names = ["p/both.png", "p/one.png", "p/copy.png", "p/here.png", "p/linked.png", str(here / "p/both.png")]
    (beside / "t.csv").write_text("filepath,title\n" + "".join(f"{name},x\n" for name in names))
    monkeypatch.chdir(here)
    source = open_source("../beside/t.csv")
    assert cause(source, 0) == "ambiguous file"
    with pytest.raises(BadSample, match=r"^p/both\.png: two different images, .*/beside/p/both.png and .*/here/p/b"):
        source[0]
    expected = [picture(3), picture(4), picture(4), picture(3), (here / "p/both.png").read_bytes()]
    assert [source.picture_bytes(k) for k in range(1, 6)] == expected
    (line,) = caplog.messages
    assert line.startswith("../beside/t.csv: images such as p/here.png are not in the table's folder and are read from")
    monkeypatch.chdir(beside)
    assert source.picture_bytes(1) == picture(3)  # the source was opened in another folder
    caplog.clear()
    assert open_source("t.csv").picture_bytes(0) == (beside / "p/both.png").read_bytes() and not caplog.messages


@pytest.mark.parametrize(
    ("told", "there"),
    [
        (unicodedata.normalize("NFC", "é.png"), unicodedata.normalize("NFD", "é.png")),
        (unicodedata.normalize("NFD", "é.png"), unicodedata.normalize("NFC", "é.png")),
        ("a.jpg", "a.JPG"),
        ("a.PNG", "a.png"),
        ("in\\a.png", "in/a.png"),
        ("file://{}/a%20b.png", "a b.png"),
    ],
)
def test_table_name_in_another_form_is_found(tmp_path: Path, told: str, there: str) -> None:
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_bytes(picture(5))
    (tmp_path / "t.csv").write_text(f"filepath,title\n{told.format(tmp_path)},x\n")
    assert open_source(str(tmp_path / "t.csv")).picture_bytes(0) == picture(5)


def test_table_name_that_is_not_utf8_is_found(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xe9.png", "wb") as file:
        file.write(picture(5))
    (tmp_path / "t.csv").write_bytes(b"filepath,title\n\xe9.png,x\nhttps://a.b/c.png,y\n")
    source = open_source(str(tmp_path / "t.csv"))
    assert source[0].captions == ("x",)
    with pytest.raises(BadSample, match=r"^https://a\.b/c\.png: URLs in a table are not fetched"):
        source[1]


# --- columns


def test_table_says_which_of_several_columns_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = str(write_folder(tmp_path, 1) / "t.csv")
    Path(table).write_text("filepath,caption,title,note\n000.png,a,b,c\n")
    caplog.set_level("INFO", "fastclip")
    assert open_source(table).captions(0) == ("b",)
    assert caplog.messages == [
        f"{table}: the column title is used, not caption; to use another, write {table}#caption=caption",
        f"{table}: the columns filepath and title are read; ignored columns: caption, note",
    ]
    caplog.clear()
    source = open_source(f"2*{table}#caption=Caption::{table}#caption=note,image=filepath")
    assert [source[k].captions for k in range(3)] == [("a",)] * 2 + [("c",)] and len(caplog.messages) == 2
    assert source.key(0) == "000.png"


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("caption=x", "there is no column x among filepath, caption"),
        ("image=x", "there is no column x among filepath, caption"),
        ("image=caption,caption=z", "there is no column z among"),
    ],
)
def test_column_that_is_not_there_is_named(tmp_path: Path, named: str, message: str) -> None:
    (tmp_path / "t.csv").write_text("filepath;caption\na.png;a\n")
    with pytest.raises(ValueError, match=rf"t\.csv#{named}: {message}"):
        open_source(f"{tmp_path}/t.csv#{named}")
    with pytest.raises(ValueError, match=r"t\.csv#caption=caption,caption=filepath: caption= is given twice"):
        open_source(f"{tmp_path}/t.csv#caption=caption,caption=filepath")
    with pytest.raises(ValueError, match="#caption= names a column or a field, which these data do not have"):
        open_source("digits#caption=x")
    (tmp_path / "t.csv").write_text("filepath,title,Title\na.png,a,b\n")
    with pytest.raises(ValueError, match=r"t\.csv: 2 columns are called title"):
        open_source(f"{tmp_path}/t.csv")


def test_field_of_json_is_named_as_a_column_is(tmp_path: Path) -> None:
    text, told = b"no", b'{"caption": "no", "alt": ["yes", "oui"]}'
    members = [("a.png", picture(0)), ("a.txt", text), ("a.json", told), ("b.png", picture(1)), ("b.txt", text)]
    shard = write_tar(tmp_path / "x.tar", [*members, ("c.png", picture(2)), ("c.json", b"{}")])
    (tmp_path / "f").mkdir()
    for name, data in members:
        (tmp_path / "f" / name).write_bytes(data)
    for spec in (str(shard), str(tmp_path / "f")):
        assert open_source(spec).captions(0) == ("no",)
        source = open_source(f"{spec}#caption=alt")
        assert source.captions(0) == source[0].captions == ("yes", "oui")
        assert cause(source, 1) == "no caption"
    with pytest.raises(BadSample, match=r'c: its caption file has no "alt" \(it has nothing\)'):
        open_source(f"{shard}#caption=alt")[2]
    with pytest.raises(ValueError, match="#image= names a column of images, which only tables and hf: have"):
        open_source(f"{shard}#image=png")


# --- damage


@pytest.mark.fault(
    "Some rows of a table are damaged",
    "The log names their lines, and they are replaced and counted as unusable samples. The run continues",
)
def test_rows_that_are_damaged_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path, 1)
    rows = b'\n\nfilepath,title\n000.png,"two\nlines"\n000.png\n,x\n000.png,"a "b" c"\n000.png,\xe9\n'
    rows += b"000.png,x,y\n000.png,z\n"
    (table := tmp_path / "t.csv").write_bytes(rows)
    source = open_source(str(table))
    assert [source[k].captions for k in (0, 6)] == [("two\nlines",), ("z",)] and len(source) == 7
    found = [(cause(source, k), source.key(k)) for k in range(1, 6)]
    lines = [f"{table}, line {line}" for line in (6, 7, 8, 9, 10)]
    assert found == list(zip(["damaged row"] * 3 + ["damaged caption", "damaged row"], lines, strict=True))
    assert f"{table}: 5 of 7 rows cannot be used: 4 damaged row ({', '.join(lines[:3])} ...), 1 dam" in caplog.text


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("sep=;\nfilepath;title\n000.png;a,b\n", "a,b"),
        ("\ufeffsep=\t\r\nfilepath\ttitle\r\n000.png\ta\r\n", "a"),
        ("\n \nfilepath,title\n000.png,a", "a"),
        ("SEP=:\nfilepath:title\n000.png:a", "a"),
    ],
)
def test_lines_above_the_header_are_read(tmp_path: Path, text: str, caption: str) -> None:
    write_folder(tmp_path, 1)
    (tmp_path / "t.csv").write_bytes(text.encode())
    source = open_source(str(tmp_path / "t.csv"))
    assert len(source) == 1 and source[0].captions == (caption,)


@pytest.mark.fault("An unclosed quote in a table swallows the following rows", "An error names the file and the line")
@pytest.mark.parametrize(
    ("header", "opens", "inside", "closes"),
    [
        ("filepath,title", 'b.jpg,"two', "c.jpg,three", 'd.jpg,a 5" nail'),  # a strict reader detects it
        ("filepath,title", 'b.jpg,"two', "", 'd.jpg,"four"'),
        ("filepath\ttitle", 'b.jpg\t"two', "c.jpg\tthree", 'd.jpg\ta 5"'),  # a strict reader does not detect it
        ("filepath\ttitle", 'b.jpg\t"two', "", 'd.PNG\ta 5"'),
        ("filepath;title", 'in/b;"two', "in/c;three", 'in/d;a 5"'),
        ("filepath;title", 'b.raw;"two', "c.raw;three", 'd.raw;a 5"'),
        ("title,filepath", '"two,b.jpg', "three,c.jpg", 'a 5",d.jpg'),
        ("title,filepath", '"two,b.jpg', "", 'a 5",d.jpg'),
        ("filepath,title,note", 'b.jpg,"two,x', "c.jpg,three,x", 'd.jpg,a 5",x'),
        ("filepath,title,note", 'b.jpg,"two,x', "c.jpg,three,x", 'd.jpg,a 5",x,y'),  # the end is damaged too
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_quote_that_swallows_rows_is_an_error(
    tmp_path: Path, header: str, opens: str, inside: str, closes: str, end: str
) -> None:
    lines = [header, opens, *[inside] * 40 * bool(inside), closes]
    (table := tmp_path / "t.csv").write_text(end.join(lines), newline="")
    message = rf"^{re.escape(str(table))}, line 2: .* a field .*extends to line {len(lines)}.*: close the quote"
    with pytest.raises(ValueError, match=message):
        open_source(str(table))


@pytest.mark.parametrize(
    "caption",
    [
        "two\nlines",
        "on a mat, asleep\nby the fire, warm\n",
        "\n\na cat, a dog\r\nboth, of them\n",
        "by and/or with,\nand/or, in it",
        "photo 1\nphoto.jpg, by Jo\nin the year, 1900",  # one of its three lines resembles a row
        "a dog\nIMG_1.jpg, by me",
        "a dog, IMG_1.jpg\nby me",
        "red,blue\ngreen,white\nblack,grey",
        "a dog\nIMG_1.jpg,mine",  # the file is in another folder than the images
        'a "word", in\nquotes, or 5" of it',
    ],
)
@pytest.mark.parametrize("first", ["filepath", "title"])
def test_captions_of_several_lines_are_read(tmp_path: Path, caption: str, first: str) -> None:
    told, rows = caption.replace('"', '""'), ["title,filepath"]
    for k in range(3):
        rows.append(f'in/{k}.jpg,"{told}"' if first == "filepath" else f'"{told}",in/{k}.jpg')
    rows[0] = rows[0] if first == "title" else "filepath,title"
    (tmp_path / "t.csv").write_text("\n".join(rows), newline="")
    source = open_source(str(tmp_path / "t.csv"))
    assert [source.captions(k) for k in range(len(source))] == [(caption.strip(),)] * 3


def test_header_of_several_lines_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path, 1)
    (table := tmp_path / "t.csv").write_text('\n"a\nb",filepath,title\n1,000.png,one\n1,000.png\n')
    caplog.set_level("INFO", "fastclip")
    source = open_source(str(table))
    assert source.captions(0) == ("one",) and source.key(1) == f"{table}, line 5"
    assert f"{table}: the columns filepath and title are read; ignored columns: $'a\\nb'" in caplog.messages
    for header, message in (
        ('filepath,title,"no"te', r"t\.csv, line 1: ',' expected after"),
        ('filepath,title,"note', r"t\.csv, line 1: unexpected end of data; a quote opens .* to line 2"),
        ("a" * 200_000, r"t\.csv: the header of the table cannot be read: field larger than field limit"),
        ('filepath,"title', r"t\.csv: the table needs .*, but its columns are filepath, \$'title\\na\.png,x'\. To use"),
    ):
        table.write_text(f"{header}\na.png,x\n")
        with pytest.raises(ValueError, match=message):
            open_source(str(table))


@pytest.mark.fault("A table is compressed, UTF-16 or a pipe", "An error names it, and nothing waits for it")
def test_table_of_another_kind_is_named(tmp_path: Path) -> None:
    text, table = "filepath,title\na.png,x\n", tmp_path / "t.csv"
    for data, message in (
        (gzip.compress(text.encode()), "the table is compressed by gzip"),
        (text.encode("utf-16"), "the table is not UTF-8, but UTF-16"),
        (text.encode("utf-16-be"), "the table is not UTF-8, but UTF-16"),
        (text.encode() + bytes(9), "the table is not UTF-8"),
    ):
        table.write_bytes(data)
        with pytest.raises(ValueError, match=f"^{re.escape(str(table))}: {message}"):
            open_source(str(table))
    table.unlink()
    os.mkfifo(table)
    with pytest.raises(OSError, match=r"t\.csv is a pipe or a device"):
        open_source(str(table))
