"""Each command names an output that it cannot write in one line, before any work."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastclip import cli
from fastclip.cli.outputs import check_apart, check_folder
from fastclip.system.durable import new_file, new_folder, set_aside, write_text
from support import needs
from support.processes import ended, forked, forks

# The commands fail before they notice that the data or the checkpoint does not exist.
FOLDERS = {
    "train": ["train", "--data", "gone", "--model", "gone", "--output"],
    "finetune": ["finetune", "--checkpoint", "gone", "--data", "digits", "--output"],
    "pack": ["data", "pack", "gone", "--output"],
    "embed": ["embed", "gone", "--checkpoint", "gone", "--output"],
    "filter": ["filter", "--data", "gone", "--checkpoint", "gone", "--output"],
    "convert": ["convert", "gone", "--to", "fastclip"],
}
EVAL = ["--checkpoint", "gone", "--data", "gone"]
FILES = {
    "zeroshot": ["eval", "zeroshot", *EVAL, "--output"],
    "zeroshot --details": ["eval", "zeroshot", *EVAL, "--details"],
    "retrieval": ["eval", "retrieval", *EVAL, "--details"],
    "compose": ["eval", "compose", *EVAL, "--queries", "gone", "--sheet"],
    "probe": ["eval", "probe", *EVAL, "--test-data", "gone", "--output"],
    "robustness": [
        "eval",
        "robustness",
        "--checkpoint",
        "gone",
        "--imagenet",
        "gone",
        "--imagenet-v2",
        "gone",
        "--plot",
    ],
    "report": ["report", "gone", "--output"],
    "search": ["search", "dog", "gone", "--checkpoint", "gone", "--sheet"],
    "doctor": ["doctor", "--json"],
    "bench": ["bench", "--output"],
}


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error message of a command."""
    capsys.readouterr()
    assert cli.main(words) == 1
    out, said = capsys.readouterr()
    lines = [line for line in said.splitlines() if "threads sleep" not in line]
    assert not out and len(lines) == 1, out + said
    return lines[0]


@pytest.mark.parametrize("name", [*FOLDERS, *FILES])
def test_output_that_cannot_be_is_named_before_any_work(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("train")
    words, place, folder = (FOLDERS.get(name) or FILES[name]), tmp_path / "file.png", tmp_path / "folder.png"
    place.write_text("kept")
    folder.mkdir()
    assert f"{place} is a file, not a folder" in refused([*words, str(place / "x" / "y.png")], capsys)
    if name != "train":  # the options of train are never empty
        assert "must not be empty" in refused([*words, ""], capsys)
    wrong, said = (place, "is a file, not a folder") if name in FOLDERS else (folder, "is a folder: name a file")
    assert f"{wrong} {said}" in refused([*words, str(wrong)], capsys)
    assert place.read_text() == "kept" and set(tmp_path.rglob("*")) == {place, folder}


@pytest.mark.parametrize("name", [*FOLDERS, *FILES])
def test_output_of_another_command_is_refused_and_taken_by_force(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("train")
    words, place = [*(FOLDERS.get(name) or FILES[name]), str(tmp_path / "out.png")], tmp_path / "out.png"
    lock = tmp_path / ".out.png.lock"
    if name in FOLDERS:
        place.mkdir()
        lock = place / ".fastclip.lock"
    owner = {"host": "node-7", "pid": 12, "since": "2026-01-01", "command": "fastclip x", "start": "", "word": ""}
    lock.write_text(json.dumps(owner))
    said = refused(words, capsys)
    assert f"{place} is in use by process 12 on node-7 (fastclip x) since 2026-01-01" in said and "--force" in said
    if name not in ("doctor", "bench"):  # these would run
        assert cli.main([*words, "--force"]) == 1 and "gone" in capsys.readouterr().err
        assert not lock.exists()


@pytest.mark.fault("The output is a file or a folder that the command reads", "It is refused before any work")
def test_output_is_not_what_the_command_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, folder = tmp_path / "dataset_coco.json", tmp_path / "pictures"
    table.write_text("{}")
    folder.mkdir()
    given = ["eval", "retrieval", "--checkpoint", "gone", "--data", f"{table}:test", "--output", str(table)]
    assert f"--output {table} is an input of the command" in refused(given, capsys)
    given = ["data", "pack", f"2*{folder}::gone", "--output", f"{folder}/../pictures"]
    assert "is an input of the command" in refused(given, capsys)
    assert table.read_text() == "{}" and not list(folder.iterdir())
    with pytest.raises(ValueError, match="is an input of the command"):
        check_apart(folder, [f"{folder}/{{00..99}}.tar"])
    for spec in (f"{folder}#caption=text", f"gone::2.5*hf:{folder}:train#image=a,caption=b", f"{table}:test:{folder}"):
        with pytest.raises(ValueError, match="is an input of the command"):
            check_apart(folder, [spec])
    (folder / "0.tar").touch()
    with pytest.raises(ValueError, match="is an input of the command"):
        check_apart(folder / "0.tar", [f"{tmp_path}/{{none,pict*}}/*.tar"])
    check_apart(folder, [str(table), "digits", "hf:x"])
    check_apart(tmp_path, [str(table)])  # beside the data is allowed


@pytest.mark.fault(
    "The output is inside a folder whose subfolders are classes",
    "It is refused before any work, because it would become a class",
)
def test_output_is_no_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs("train")
    from PIL import Image

    classes, captioned = tmp_path / "classes", tmp_path / "captioned"
    for name in ("cat", "dog"):
        for folder in (classes, captioned):
            (folder / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / name / "0.png")
        (captioned / name / "0.txt").write_text(name)
    for words in (
        ["data", "pack", str(classes), "--output"],
        ["embed", str(classes), "--checkpoint", "gone", "--output"],
        ["train", "--data", f"2*digits::{classes}", "--model", "ViT-tiny", "--output"],
        ["finetune", "--data", str(classes), "--checkpoint", "gone", "--output"],
    ):
        said = refused([*words, str(classes / "new" / "deep")], capsys)
        assert f"--output {classes}/new/deep is in {classes}, where each folder is a class of the data" in said
        assert sorted(path.name for path in classes.iterdir()) == ["cat", "dog"]
    (tmp_path / "links").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "links" / name).symlink_to(classes / name)
    with pytest.raises(ValueError, match=r"links/new is in .*links, where each folder is a class of the data"):
        check_folder(tmp_path / "links" / "new", [str(tmp_path / "links")])
    check_folder(tmp_path / "new", ["{" + ",".join(["0"] * 200) + "}.tar"])  # too long for a file name
    for name in (".new", "cat/new"):  # hidden, and inside a class
        check_folder(classes / name, [str(classes)])
    check_folder(captioned / "new", [str(captioned)])  # images there are not read, and folders are not classes
    check_folder(tmp_path / "new", [str(classes), "digits"])


@pytest.mark.fault("A file to be written is an image or a caption file of the data", "It is refused before any work")
def test_pictures_of_the_data_are_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs("train")
    from PIL import Image

    from fastclip.data.picture import drawn

    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for name in ("0.png", "deep/1.jpg", "sheet.png"):
        Image.new("RGB", (8, 8)).save(folder / name, exif=drawn() if name == "sheet.png" else Image.Exif())
    (folder / "0.json").write_text("{}")
    (tmp_path / "link.png").symlink_to(folder / "0.png")
    search = ["search", "dog", str(folder), "--checkpoint", "gone", "--sheet"]
    compose = ["eval", "compose", "--checkpoint", "gone", "--queries", "gone", "--data", f"{folder}#caption=x"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for place in (folder / "0.png", folder / "deep" / "1.jpg", tmp_path / "link.png"):
        for words in (search, [*compose, "--sheet"]):
            assert f"--sheet {place} exists and is part of the data" in refused([*words, str(place)], capsys)
    for place in (folder / "0.json", folder / "0.png"):
        assert f"--output {place} exists and is part" in refused([*compose, "--output", str(place)], capsys)
    words = ["search", f"dog + {folder}/0.png", str(folder / "deep"), *search[3:], str(folder / "0.png")]
    assert "is an input of the command" in refused(words, capsys)  # the query
    for place in (folder / "sheet.png", folder / "new.png"):  # an existing and a missing file
        assert "part of the data" not in refused([*search, str(place)], capsys)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_two_outputs_are_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "eval",
        "retrieval",
        *EVAL,
        "--output",
        str(tmp_path / "r"),
        "--details",
        f"{tmp_path}/../{tmp_path.name}/r",
    ]
    assert "--output and --details are both" in refused(words, capsys) and not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="links and pipes")
def test_link_stays_one_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    """A link stays a link, and a pipe is written to. Replacing it would, for a user with root rights, put a
    file in the place of /dev/null.
    """
    (tmp_path / "new").mkdir()
    (tmp_path / "latest.json").symlink_to(tmp_path / "new" / "1.json")
    write_text(tmp_path / "latest.json", "x")
    assert (tmp_path / "latest.json").is_symlink() and (tmp_path / "new" / "1.json").read_text() == "x"
    os.mkfifo(tmp_path / "pipe")
    reads = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "through")
    assert os.read(reads, 100) == b"through" and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    os.close(reads)


@forks
@pytest.mark.fault(
    "The disk becomes full in the middle of a file", "An error names the file, and its previous content is kept"
)
def test_full_disk_in_the_middle_of_a_file_names_it(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="Windows has no limits of resources")
    (tmp_path / "part").write_text("old")

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=r"File too large: '\S*/part'$"), new_file(tmp_path / "part") as half:
            half.write_bytes(b"x" * 2000)

    assert ended(forked(full)) == 0
    assert (tmp_path / "part").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_of_a_new_folder_have_the_mode_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    needs("models")
    from safetensors.torch import save_file

    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "model") as half:
            save_file({"x": torch.ones(1)}, half / "model.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model" / "model.safetensors").stat().st_mode) == 0o666 & ~umask


def test_nothing_that_was_set_aside_is_lost(tmp_path: Path) -> None:
    make: list[Callable[[Path], object]] = [Path.touch, Path.mkdir, Path.touch]
    for one in make:
        one(tmp_path / "model")
        set_aside(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aside-model", "aside-model-2", "aside-model-3"]
