"""The fingerprint of data is the same for every spelling of a SPEC, and differs for other samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import needs

needs("models")
from fastclip.data.identity import fingerprint
from fastclip.data.spec import open_source
from support.faulty import picture, write_folder, write_tar


def of(spec: str) -> str:
    return fingerprint(open_source(spec))


def write_data(folder: Path) -> None:
    """Write data of every kind: folders a and b, shards in pk, and a table with a damaged row."""
    for name, size in (("a", 12), ("b", 2)):
        write_folder(folder / name, size)
    (folder / "pk").mkdir()
    for shard in "01":
        write_tar(
            folder / "pk" / f"{shard}.tar", [(f"{shard}.png", picture(1)), (f"{shard}.json", b'{"caption": "x"}')]
        )
    (folder / "t.csv").write_text("filepath,title\na/000.png,x\n,no path\na/001.png,y\n")


@pytest.mark.parametrize(
    ("spec", "others"),
    [
        ("a", ["./a", "a/", "b/../a", "{root}/a", "{root}/a/"]),
        ("pk/*.tar", ["./pk/*.tar", "pk", "pk/{{0,1}}.tar", "pk#caption=caption", "{root}/pk/*.tar"]),
        ("a::2*b", ["./a/::2.0*b", "{root}/a::2*./b", "{root}/a::2*{root}/b"]),
        ("t.csv", ["./t.csv", "t.csv#caption=title,image=filepath", "{root}/t.csv"]),
    ],
)
def test_spelling_and_place_make_no_other_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, others: list[str]
) -> None:
    pytest.importorskip("braceexpand")
    write_data(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    before = of(spec)
    found = {other: of(other.format(root=tmp_path / "here")) for other in others}
    assert found == dict.fromkeys(others, before)
    (tmp_path / "here").rename(tmp_path / "there")
    assert of(others[-1].format(root=tmp_path / "there")) == before


def test_other_samples_have_another_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = [of(spec) for spec in ("a", "b", "a::b", "b::a", "a::2*b", "2*a::b")]
    (tmp_path / "a" / "011.txt").write_text("another caption")
    found.append(of("a"))
    for end in ("png", "txt"):
        (tmp_path / "a" / f"011.{end}").rename(tmp_path / "a" / f"zzz.{end}")
    found.append(of("a"))
    write_folder(tmp_path / "one", 1)
    found.append(of("one"))
    for end in ("png", "txt"):
        (tmp_path / "one" / f"000.{end}").rename(tmp_path / "one" / f"zzz.{end}")
    found.append(of("one"))
    assert len(set(found)) == len(found)
