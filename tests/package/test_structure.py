"""Rules of structure: no cycle of imports, and no file or folder too large to survey."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from support import ROOT

LINES, FUNCTION_LINES, MODULES = 400, 60, 14
SOURCES = sorted(
    path for folder in ("fastclip", "triton_kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)


def module_name(path: Path) -> str:
    """Return the dotted name of a file: fastclip/ops/__init__.py is fastclip.ops,
    triton_kernels/tile.py is named as installed.
    """
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "triton_kernels":
        parts = ("fastclip", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(source: str) -> Iterator[str]:
    """Yield the dotted names of all imports of a module, at its top and inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Map each module to the modules in `sources` (name: text) that it imports; a package is its __init__."""
    graph: dict[str, set[str]] = {}
    for name, text in sources.items():
        graph[name] = set()
        for target in imported_names(text):
            while target and target not in sources:
                target = target.rpartition(".")[0]
            if target not in ("", "fastclip", name):  # `import fastclip` loads nothing, because its names are lazy
                graph[name].add(target)
    return graph


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return a cycle of the graph as a list of nodes, or [] if there is none."""
    done: set[str] = set()

    def visit(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            if back := visit(target, [*way, node]):
                return back
        done.add(node)
        return []

    return next((way for node in sorted(graph) if (way := visit(node, []))), [])


def long_functions(source: str) -> list[str]:
    """List functions of more than 60 lines without their docstrings. Kernels are exempt, but not their launchers."""
    long = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(x) for x in node.decorator_list):
            assert node.end_lineno is not None
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            if (size := node.end_lineno - node.lineno + 1 - docstring) > FUNCTION_LINES:
                long.append(f"{node.name} has {size} lines")
    return long


def siblings(graph: Mapping[str, set[str]]) -> dict[str, dict[str, set[str]]]:
    """Return for each folder (a.b) the graph of its files and subfolders. An import is an edge between the siblings
    that contain the two modules. A folder's __init__, whose names are lazy, has no edges.
    """
    folders: dict[str, dict[str, set[str]]] = {}
    for source, targets in graph.items():
        for target in targets:
            a, b = source.split("."), target.split(".")
            depth = next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
            if depth < min(len(a), len(b)):
                folders.setdefault(".".join(a[:depth]), {}).setdefault(a[depth], set()).add(b[depth])
    return folders


GRAPH = imports({module_name(path): path.read_text() for path in SOURCES})


def test_no_circle_of_files() -> None:
    assert circle(GRAPH) == []


def test_no_circle_of_folders() -> None:
    packages = {module_name(path) for path in SOURCES if path.name == "__init__.py"}
    modules = {name: targets for name, targets in GRAPH.items() if name not in packages}
    folders = siblings(modules)
    assert {"fastclip", "fastclip.data", "fastclip.training"} <= folders.keys()
    assert {folder: way for folder, graph in folders.items() if (way := circle(graph))} == {}


def test_no_folder_is_a_maze() -> None:
    """Folders have few modules, except two in which modules are found by name: one per command and one per kernel."""
    sizes = Counter(path.parent.relative_to(ROOT).as_posix() for path in SOURCES if path.name != "__init__.py")
    assert {folder for folder, size in sizes.items() if size > MODULES} <= {"fastclip/cli", "triton_kernels"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_is_read_at_once(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LINES
    assert long_functions(text) == []


def test_rules_find_faults() -> None:
    circular = {"a": "import b", "b": "def f():\n    from c import x", "c": "import a.d", "a.e": "import c"}
    assert circle(imports(circular)) == ["a", "b", "c", "a"]
    assert circle(imports({**circular, "c": ""})) == []
    assert siblings({"a.b.c": {"a.d.e"}, "a.d.f": {"a.b.g", "a.d.e"}}) == {
        "a": {"b": {"d"}, "d": {"b"}},
        "a.d": {"f": {"e"}},
    }
    body = "\n".join(["    x = 1"] * FUNCTION_LINES)
    assert long_functions(f"def f():\n{body}") == ["f has 61 lines"]
    assert long_functions(f'def f():\n    """One.\n\n    Two.\n    """\n{body[: -len("    x = 1")]}') == []
    assert long_functions(f"@triton.jit\ndef f():\n{body}") == []
