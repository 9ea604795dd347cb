"""Which picture a sample has, and whether it is still the same."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import pytest

from support import needs

needs("models")
from fastclip.data.identity import picture_places, picture_states
from fastclip.data.mixture import Mixture
from fastclip.data.spec import open_source
from fastclip.data.subset import Subset
from support.faulty import picture, write_folder, write_tar


def test_state_changes_where_the_picture_does(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", 3)
    source = open_source(str(folder))
    before = list(picture_states(source))
    assert list(picture_states(open_source(f"{tmp_path}/a/../a"))) == before
    (folder / "001.png").write_bytes(picture(9))
    times = os.stat(folder / "002.png")
    (folder / "002.png").write_bytes(b"x" + picture(2)[1:])
    os.utime(folder / "002.png", ns=(times.st_atime_ns, times.st_mtime_ns))  # as `cp -p` of a picture of the same size
    after = list(picture_states(source))
    assert [x == y for x, y in zip(before, after)] == [True, False, False]
    (folder / "000.png").unlink()
    assert next(picture_states(source)) != after[0]
    os.rename(folder, tmp_path / "b")
    assert not {*picture_states(open_source(str(tmp_path / "b")))} & {*after}


def test_samples_of_shards_and_parts_have_their_own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("braceexpand")
    members = [(f"{k}.{end}", data) for k in range(3) for end, data in (("png", picture(k)), ("txt", b"x"))]
    write_tar(tmp_path / "0.tar", members)
    write_tar(tmp_path / "1.tar", members)
    shards = open_source(f"{tmp_path}/{{0,1}}.tar")
    places = list(picture_places(shards))
    assert len({*places}) == 6 and {file for file, _ in places} == {f"{tmp_path}/0.tar", f"{tmp_path}/1.tar"}
    assert list(picture_places(Subset(shards, [4, 1]))) == [places[4], places[1]]
    before = list(picture_states(shards))
    write_tar(tmp_path / "1.tar", members[::-1])
    assert [x == y for x, y in zip(before, picture_states(shards))] == [True] * 3 + [False] * 3
    folder = open_source(str(write_folder(tmp_path / "folder", 2)))
    mixed = Mixture("2*x", [folder], [Fraction(2)])
    assert sorted(picture_places(mixed)) == sorted([*picture_places(folder)] * 2)


def test_missing_picture_has_the_place_of_its_name(tmp_path: Path) -> None:
    write_folder(tmp_path, 1)
    (tmp_path / "t.csv").write_text(f"filepath,title\n{tmp_path}/000.png,a\ngone.png,b\n")
    assert list(picture_places(open_source(str(tmp_path / "t.csv")))) == [(f"{tmp_path}/000.png", ""), ("", "gone.png")]
    assert list(picture_places(open_source("digits")))[:1] == [("", open_source("digits").key(0))]
