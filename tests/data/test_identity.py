"""The image that a sample has, and whether it is unchanged."""

from __future__ import annotations

import os
import shutil
from fractions import Fraction
from pathlib import Path

import pytest

from support import needs

needs("models")
from fastclip.data.identity import picture_places, picture_states
from fastclip.data.source import sample_stamp
from fastclip.data.sources.mixture import Mixture
from fastclip.data.sources.subset import Subset
from fastclip.data.spec import open_source
from support.faulty import picture, write_folder, write_tar


def test_state_changes_where_the_picture_does(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", 3)
    source = open_source(str(folder))
    before = list(picture_states(source))
    assert list(picture_states(open_source(f"{tmp_path}/a/../a"))) == before
    (folder / "001.png").write_bytes(picture(9))
    os.utime(folder / "002.png", (1, 1))
    after = list(picture_states(source))
    assert [x == y for x, y in zip(before, after)] == [True, False, False]
    (folder / "000.png").unlink()
    assert next(picture_states(source)) != after[0]
    os.rename(folder, tmp_path / "b")
    assert not {*picture_states(open_source(str(tmp_path / "b")))} & {*after}


def test_state_is_that_of_the_contents_only(tmp_path: Path) -> None:
    """The state of a sample depends on its contents alone. Other permissions, and copies that preserve
    times (rsync -a), do not change it.
    """
    folder = write_folder(tmp_path / "a", 2)
    source = open_source(str(folder))
    before = list(picture_states(source)), [sample_stamp(source, k) for k in range(2)]
    os.chmod(folder / "000.png", 0o600)
    shutil.copy2(folder / "001.png", folder / "copy")
    os.replace(folder / "copy", folder / "001.png")
    assert (list(picture_states(source)), [sample_stamp(source, k) for k in range(2)]) == before


def test_spelling_of_the_spec_is_no_part_of_a_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("braceexpand")
    write_tar(tmp_path / "0.tar", [("0.png", picture(0)), ("0.txt", b"x")])
    (tmp_path / "t.csv").write_text("filepath,title\n,no path\ngone.png,b\nx.png,c\n")
    (tmp_path / "x.png").write_bytes(picture(0))
    monkeypatch.chdir(tmp_path)
    for here in ("0.tar", "t.csv"):
        states = [list(picture_states(open_source(spec))) for spec in (here, f"./{here}", str(tmp_path / here))]
        assert states[0] == states[1] == states[2] and len(set(states[0])) == len(states[0])


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
