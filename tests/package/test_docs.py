"""The pages: their Python runs, their commands parse, their links resolve, and the site builds."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from support import ROOT, needs
from support.pages import PAGES, anchors, blocks, commands, links, name

needs("search")

import torch
from PIL import Image

import fastclip
from fastclip import cli
from fastclip.training.options import parse_finetune, parse_options

WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
# Names and options of the pages, each with a small replacement
SMALL = {"ViT-B-32": "ViT-tiny", "max_steps=400": 'max_steps=2, batch_size=8, device="cpu", workers=0'}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the files that the pages name."""
    folder = tmp_path_factory.mktemp("reader")
    model = fastclip.create_model("ViT-tiny")
    model.save_pretrained(folder / "runs" / "b32" / "model")
    (folder / "runs" / "b32" / "metrics.jsonl").touch()
    torch.save(model.state_dict(), folder / "open_clip.pt")
    (folder / "photos").mkdir()
    for k in range(3):
        Image.new("RGB", (40, 40), (80 * k, 0, 99)).save(folder / "photos" / f"{k}.png")
    return folder


@pytest.fixture
def reader(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Variables that the pages leave to the user, in the folder with the user's files."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("FASTCLIP_CACHE", str(place / "cache"))
    pair = torch.nn.functional.normalize(torch.randn(2, 64, 32), dim=2)
    yield {
        "__name__": "page",
        "encoder": torch.nn.Linear(12, 8),
        "first_view": torch.randn(4, 12),
        "second_view": torch.randn(4, 12),
        "image": Image.new("RGB", (40, 40)),
        "images": torch.randn(8, 3, 32, 32),
        "ids": fastclip.get_tokenizer("ViT-tiny")(["a photo"] * 8),
        "model": fastclip.create_model("ViT-tiny"),
        "image_features": pair[0],
        "text_features": pair[1],
        "logit_scale": torch.tensor(14.3),
        "pairs": torch.arange(64)[:, None].expand(64, 2),
    }
    # A page that fails halfway would leave other packages patched
    if (integrations := sys.modules.get("fastclip.integrations")) is not None:
        integrations.unpatch()


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_python_of_a_page_runs(page: Path, reader: dict[str, Any]) -> None:
    """The Python blocks of a page run from top to bottom in one namespace."""
    for block in blocks(page, "python"):
        if block.not_run is not None:
            continue
        code = "\n" * (block.line - 1) + block.code  # errors show the line of the page
        for large, small in SMALL.items():
            code = code.replace(large, small)
        exec(compile(code, str(page), "exec"), reader)


def test_few_blocks_are_not_run() -> None:
    left_out = [f"{name(page)}:{b.line}: {b.not_run}" for page in PAGES for b in blocks(page, "python") if b.not_run]
    assert len(left_out) < 5, left_out


def test_what_a_block_prints_is_what_the_page_says(reader: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks(ROOT / "docs" / "mathematics.md", "python"):
        said = [line[2:] for line in block.code.splitlines() if line.startswith("# ")]
        exec(block.code, reader)
        printed = capsys.readouterr().out.splitlines()
        # These differ between machines: the error of a gradient, which is rounding alone, and the sign of a zero
        assert [_settled(line) for line in printed] == [_settled(line) for line in said]


def _settled(line: str) -> str:
    return re.sub(r"(?<=gradient )\S+|-(?=0\.0+e)", "", line)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_of_a_page_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = set(re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    monkeypatch.chdir(tmp_path)
    for words in commands(page):
        line = " ".join(words)
        if words[:1] == ["torchrun"] and "--no-python" in words:
            words = words[words.index("--no-python") + 1 :]
        program, *rest = words or [""]
        if program == "fastclip":
            _parse(rest, line)
        elif program == "make":
            assert {word for word in rest if "=" not in word} <= targets, line
        elif Path(program).name == "pip":
            named = [extra for word in rest for extra in re.findall(r"\[(.+)\]", word) if word.startswith(".")]
            assert {extra for several in named for extra in several.split(",")} <= extras, line
        elif Path(program).name in ("python", "python3") and rest[:1] == ["-m"]:
            assert find_spec(rest[1]) is not None, line
        elif Path(program).name in ("python", "python3") and rest[:1] and rest[0].endswith(".py"):
            assert (ROOT / rest[0]).is_file(), line


def _parse(words: list[str], line: str) -> None:
    """Parse a command as `fastclip` does, which exits at an unknown option."""
    if "--config" in words:
        config = Path(words[words.index("--config") + 1])
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text("{data: digits, model: ViT-tiny, output: runs}")
    try:
        args, unknown = cli._parser().parse_known_args(words)
        if parse := {"train": parse_options, "finetune": parse_finetune}.get(args.command):
            parse(unknown)
            unknown = []
        assert not unknown, f"{line}: {unknown}"
    except (SystemExit, ValueError) as end:
        assert isinstance(end, SystemExit) and not end.code, f"{line}: {end}"


def test_commands_are_found() -> None:
    """The parser of the pages finds their commands, so that the tests above check something."""
    found = [words for page in PAGES for words in commands(page) if words]
    assert sum(words[0] == "fastclip" for words in found) > 20
    assert ["fastclip", "plan"] in [words[:2] for words in found]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)} links to {target}"
        assert ROOT in (file, *file.parents), f"{name(page)} links out of the repository: {target}"
        if anchor:
            assert anchor in anchors(file), f"{name(page)} links to {target}; headings are {sorted(anchors(file))}"


def test_every_page_is_in_the_map() -> None:
    mapped = {target.partition("#")[0] for target in links(ROOT / "docs" / "index.md")}
    assert {page.name for page in PAGES if page.parent.name == "docs"} <= mapped | {"index.md"}


def test_site_builds(tmp_path: Path) -> None:
    """The site builds with --strict, for which a page missing from mkdocs.yml or a broken link or anchor is
    an error.
    """
    needs("docs")
    # --quiet would hide the warnings that --strict counts
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in PAGES:
        path = page.relative_to(ROOT).with_suffix("")
        folder = path.parent if path.name in ("README", "index") else path
        html = (tmp_path / "site" / folder / "index.html").read_text(encoding="utf-8")
        tables = re.findall(r"^\|[ :|]*-[ :|-]+\|$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert html.count("<table>") == len(tables), f"{name(page)}: a table is not one on the site"
