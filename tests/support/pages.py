"""The documentation as tests see it: pages, their blocks of code, commands and links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from support import ROOT

PAGES = sorted(path for pattern in ("*.md", "docs/*.md", "benchmarks/*.md") for path in ROOT.glob(pattern))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->\n\Z")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_OPERATOR = re.compile(r"[|&;<>()]+")


class Block(NamedTuple):
    language: str
    code: str
    line: int  # of its first line, counted from 1
    not_run: str | None  # the reason in a `<!-- not run: reason -->` on the line before the block


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        reason = _NOT_RUN.search(text[: fence.start()])
        line = text.count("\n", 0, fence.start(2)) + 1
        found.append(Block(fence[1], fence[2], line, reason[1] if reason else None))
    return [block for block in found if block.language in languages]


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of every command in the `console` blocks, with continuations joined and pipes and comments
    removed.
    """
    for block in blocks(page, "console"):
        for line in block.code.replace("\\\n", " ").splitlines():
            if not line.startswith("$ "):
                continue
            lexer = shlex.shlex(line[2:], posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, "|"]:
                if _OPERATOR.fullmatch(word):
                    yield words
                    words = []
                elif words or not re.match(r"[A-Z_]+=", word):  # an assignment of a variable before the command
                    words.append(word)


def links(page: Path) -> list[str]:
    """Return the links of a page, except to other sites."""
    text = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", page.read_text(encoding="utf-8")))
    return [target for target in _LINK.findall(text) if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub creates for the headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    words = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in words}
