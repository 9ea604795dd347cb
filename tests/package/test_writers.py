"""Every file that the package writes appears whole or not at all."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ROOT

PACKAGE = ROOT / "fastclip"
WRITES = {"write_text", "write_bytes", "save_file", "savefig", "imwrite", "to_csv", "to_parquet", "tofile"}
SAVES = {"save", "dump"}  # of torch, images and json, into a file or into memory
# Files with another way of writing, and the reason for it
ALLOWED = {
    "system/durable.py": "is what the others use",
    "training/run/metrics.py": "lines are added; a torn one is cut when the run goes on",
    "bench/harness.py": "rows are added to a table that others keep",
    "parity/processes.py": "a temporary folder, which ends with the command",
}


def writers(source: str) -> Iterator[str]:
    """Yield calls that write a file outside of `with new_file(...)` and `with new_folder(...)`."""
    tree = ast.parse(source)
    memory = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and "BytesIO()" in ast.unparse(node.value)
        for target in ast.walk(node)
        if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store)
    }
    yield from _writers(tree, memory)


def _writers(node: ast.AST, memory: set[str]) -> Iterator[str]:
    if isinstance(node, ast.With) and any(
        isinstance(call, ast.Call) and ast.unparse(call.func) in ("new_file", "new_folder")
        for item in node.items
        for call in ast.walk(item.context_expr)
    ):
        return
    if isinstance(node, ast.Call) and _writes(node, memory):
        yield f"line {node.lineno}: {ast.unparse(node)}"
    for inside in ast.iter_child_nodes(node):
        yield from _writers(inside, memory)


def _writes(call: ast.Call, memory: set[str]) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    method = isinstance(call.func, ast.Attribute)
    if name == "open":
        modes = [*call.args[0 if method else 1 :], *(k.value for k in call.keywords if k.arg == "mode")]
        return any(isinstance(mode, ast.Constant) and set(str(mode.value)) & set("wax+") for mode in modes)
    first = call.args[0].id if call.args and isinstance(call.args[0], ast.Name) else ""
    if name in WRITES:
        return (method or name == "save_file") and first not in memory
    return name in SAVES and method and bool(call.args) and first not in memory


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_written_by_durable(path: Path) -> None:
    found = list(writers(path.read_text(encoding="utf-8")))
    assert bool(found) == (str(path.relative_to(PACKAGE)) in ALLOWED), f"see fastclip/system/durable.py: {found}"


def test_files_that_may_write_are_there() -> None:
    assert all((PACKAGE / name).is_file() for name in ALLOWED)


@pytest.mark.parametrize(
    "source, found",
    [
        ("open(path, 'w')", 1),
        ("open(path, mode='ab')", 1),
        ("path.open('wb')", 1),
        ("path.open(encoding='utf-8')", 0),
        ("path.write_text('x')", 1),
        ("write_text(path, 'x')", 0),
        ("torch.save(x, file)", 1),
        ("with new_file(path) as half:\n    torch.save(x, half)", 0),
        ("with new_folder(path) as half, half.open('w') as out:\n    json.dump(x, out)", 0),
        ("data = io.BytesIO()\npicture.save(data, 'PNG')", 0),
        ("run.save()", 0),
    ],
)
def test_writers_are_found(source: str, found: int) -> None:
    assert len(list(writers(source))) == found
