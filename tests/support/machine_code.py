"""The machine code of compiled kernels (sm_90), and the cost of its common path as far as it can be read."""

from __future__ import annotations

import itertools
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from support.compiled import CUOBJDUMP

_LINE = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/")
_CONTROL = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
_TARGET = re.compile(r"\b(?:BRA|BSSY)\b.*?\b0x([0-9a-f]+)")
_END = frozenset({"BRA", "EXIT", "RET", "CALL", "BRX", "JMP"})


class Instruction(NamedTuple):
    """Instruction of a kernel; `stall` is the least number of clocks before the scheduler issues the warp's
    next one.
    """

    address: int
    text: str
    stall: int

    @property
    def words(self) -> list[str]:
        """Return the opcode and its modifiers."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0].split(".")


class Cost(NamedTuple):
    """Cost of a path for one warp: instructions, sum of their stalls, loads from shared memory."""

    instructions: int
    stalls: int
    loads: int


def functions(path: Path) -> Iterator[tuple[str, list[Instruction]]]:
    """Yield the mangled name and the code of every kernel in an object file or cubin."""
    dump = subprocess.run([CUOBJDUMP, "-sass", path], capture_output=True, text=True, check=True).stdout
    for part in dump.split("Function : ")[1:]:
        lines = part.splitlines()
        code = []
        for line, following in itertools.pairwise(lines):
            if (found := _LINE.match(line)) and (control := _CONTROL.match(following)):
                code.append(Instruction(int(found[1], 16), found[2], int(control[1], 16) >> 41 & 15))
        yield lines[0].strip(), code


def counts(code: list[Instruction]) -> Counter[str]:
    """Count each opcode, alone and with its first modifier."""
    found: Counter[str] = Counter()
    for instruction in code:
        words = instruction.words
        found[words[0]] += 1
        found[".".join(words[:2])] += len(words) > 1
    return found


def epilogues(code: list[Instruction], exponentials: int) -> list[Cost]:
    """List the epilogues of a kernel: runs of basic blocks that contain `exponentials`
    exponentials, from the first one on.
    """
    targets = {int(found[1], 16) for x in code if (found := _TARGET.search(x.text))}
    blocks: list[list[Instruction]] = [[]]
    for instruction in code:
        if blocks[-1] and (instruction.address in targets or blocks[-1][-1].words[0] in _END):
            blocks.append([])
        blocks[-1].append(instruction)
    out, run, seen = [], list[Instruction](), 0
    for block in blocks:
        here = sum(x.words[:2] == ["MUFU", "EX2"] for x in block)
        if not run and not here:
            continue
        run, seen = run + block, seen + here
        if seen >= exponentials:
            out.append(Cost(len(run), sum(x.stall for x in run), sum(x.words[0] == "LDS" for x in run)))
            run, seen = [], 0
    return out
