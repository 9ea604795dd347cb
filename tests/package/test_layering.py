"""Imports go one way; the docstrings of the packages describe the layers."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support import ROOT

PACKAGE = ROOT / "fastclip"

# A folder, or a file beside the folders, imports only from those after it in this list.
LAYERS = (
    *("cli", "report", "curation", "training", "search", "evaluation", "embedding", "models", "data"),
    *("doctor", "bench", "parity", "integrations"),
    *("losses", "distributed", "ops", "_backends", "triton_kernels"),
    *("_cpu", "_cuda", "system", "_version"),
)
# Modules that the losses load, at `import fastclip` or at first use. They need torch and the standard library only.
CORE = {"__init__", *LAYERS[LAYERS.index("losses") :]}
ALLOWED = {
    "triton_kernels": {"torch", "triton"},  # imported by the Triton backend alone, when it is used
    "system/durable.py": {"torch", "safetensors"},  # for writing tensors, which no loss does
    "system/progress.py": {"tqdm"},
    "system/reading.py": {"torch", "safetensors", "yaml"},
}
# The extra of pyproject.toml that installs what a file or folder imports. All others need torch alone.
BROUGHT_BY = {
    **dict.fromkeys(("models", "integrations", "doctor.py", "system/durable.py"), "models"),
    **dict.fromkeys(("data", "embedding", "evaluation", "report", "training"), "train"),
    **dict.fromkeys(("system/progress.py", "system/reading.py"), "train"),
    **dict.fromkeys(("cli", "curation", "search", "data/picture.py"), "search"),
    "data/sources/hub.py": "hf",
}
DISTRIBUTIONS = {"PIL": "pillow", "open_clip": "open-clip-torch", "sklearn": "scikit-learn", "yaml": "pyyaml"}
UNDECLARED = {"triton": "comes with torch, where there is one", "wandb": "--wandb says how to install it"}
NOT_IMPORTED = {"aiohttp": "fsspec reads https:// with it", "tensorboard": "torch.utils.tensorboard writes with it"}


def rank(part: str) -> int:
    assert part in LAYERS, f"fastclip/{part} is in no layer: add it to this test"
    return LAYERS.index(part)


def imports(source: str) -> Iterator[str]:
    """Yield all dotted names that the source imports: `from fastclip._backends import cpu` gives
    fastclip._backends.cpu.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in (_called(node), getattr(node.func, "attr", "")):
            if ast.unparse(node.args[0]) != "modules[name]":  # lazy.py imports by its tables, which are read below
                assert isinstance(node.args[0], ast.Constant)
                yield node.args[0].value
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_LAZY":
            yield from ast.literal_eval(node.value).values()


def _called(node: ast.Call) -> str:
    return getattr(node.func, "id", "")


def faults(name: str, source: str) -> list[str]:
    """Return the faults of a module; `name` is its path within fastclip/."""
    part = name.partition("/")[0].removesuffix(".py")
    wrong, allowed = [], ALLOWED.get(part, {"torch"})
    for imported in imports(source):
        top, *rest = imported.split(".")
        if top == "fastclip" and rest and part != "__init__":
            if rank(rest[0]) < rank(part):
                wrong.append(f"{part} imports {imported}, which is above it")
        elif part in CORE and top not in {"fastclip", *sys.stdlib_module_names, *ALLOWED.get(name, allowed)}:
            wrong.append(f"{name} imports {imported}: import fastclip needs torch only")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and _called(node) == "print" and part != "cli":
            wrong.append(f"{name} prints: a library logs")
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and name != "system/env.py":
            wrong.append(f"{name} reads the environment: system/env.py does")
    return wrong


def name_of(path: Path) -> str:
    """Return the path within the package: triton_kernels/ is installed as fastclip/triton_kernels."""
    return path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).as_posix()


SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "triton_kernels").glob("*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_keeps_to_its_layer(path: Path) -> None:
    assert faults(name_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("ops", "from fastclip.losses.contrastive import contrastive_loss", "ops imports fastclip.losses.contrastive"),
        ("_backends", "import fastclip.ops", "_backends imports fastclip.ops"),
        ("models", "def f():\n    from fastclip import training", "models imports fastclip.training"),
        ("models", "_LAZY = {'train': 'fastclip.training.run.loop'}", "models imports fastclip.training.run.loop"),
        ("losses/labels.py", "import timm", "needs torch only"),
        ("losses/labels.py", "from importlib import import_module\nimport_module('timm')", "needs torch only"),
        ("system/owner.py", "import tqdm", "needs torch only"),
        ("evaluation/retrieval.py", "from fastclip.training import options", "evaluation imports fastclip.training"),
        ("_backends", "import triton", "needs torch only"),
        ("triton_kernels", "from fastclip._backends import cpu", "triton_kernels imports fastclip._backends"),
        ("training", "print(1)", "prints"),
        ("data", "import os\nos.environ['X']", "reads the environment"),
    ],
)
def test_every_fault_is_found(name: str, source: str, message: str) -> None:
    assert any(message in fault for fault in faults(name, source))


def declared(extra: str = "") -> set[str]:
    """Return the distributions that pyproject.toml requires, or those of an extra and of the extras that it names."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: set[str] = set()
    for one in map(Requirement, project["optional-dependencies"][extra] if extra else project["dependencies"]):
        ours = one.name == project["name"]
        found |= set().union(*map(declared, one.extras)) if ours else {canonicalize_name(one.name)}
    return found


def distributions(path: Path) -> set[str]:
    """Return pip's names of the third-party packages that a module imports."""
    tops = {name.partition(".")[0] for name in imports(path.read_text())} - {"fastclip", *sys.stdlib_module_names}
    return {canonicalize_name(DISTRIBUTIONS.get(top, top)) for top in tops} - {*UNDECLARED}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_module_imports_is_declared(path: Path) -> None:
    name = name_of(path)
    extra = BROUGHT_BY.get(name) or BROUGHT_BY.get(name.partition("/")[0])
    assert distributions(path) <= declared() | (declared(extra) if extra else set())


def test_what_is_declared_is_imported() -> None:
    imported = set().union(*map(distributions, SOURCES))
    assert declared() == {"torch"} and declared("all") - imported == {*NOT_IMPORTED} - imported
    assert all((PACKAGE / name).exists() for name in BROUGHT_BY)


def test_no_tool_of_ours_is_installed_for_a_user() -> None:
    assert not declared("all") & {"pytest", "mypy", "ruff", "clang-format", "playwright", "mkdocs", "hypothesis"}
    users = ("models", "train", "hf", "remote", "search")
    assert declared("all") == set().union(*map(declared, users)) and declared("dev") > declared("all")


INCLUDE = re.compile(r'#include\s*[<"](torch|ATen|c10|pybind11|Python\.h|numpy)')


def test_native_code_is_free_of_frameworks() -> None:
    assert INCLUDE.search("#include <torch/extension.h>") and INCLUDE.search("#include <Python.h>")
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert len(sources) > 8
    for path in sources:
        allowed = {"pybind11"} if path.parent.name == "bindings" else set()
        found = set(INCLUDE.findall(path.read_text()))
        assert found <= allowed, f"{path.relative_to(ROOT)} includes {found}"


def test_groups_end_with_their_threads() -> None:
    """Whatever creates a process group first calls `before_group`, so that no thread of gloo is left at the exit."""
    made = 0
    for folder in ("fastclip", "benchmarks", "tests", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for function in ast.walk(ast.parse(path.read_text())):
                if not isinstance(function, ast.FunctionDef):
                    continue
                calls = [x for x in ast.walk(function) if isinstance(x, ast.Call)]
                first = {ast.unparse(x.func): x.lineno for x in sorted(calls, key=lambda x: -x.lineno)}
                if line := first.get("dist.init_process_group"):
                    made += 1
                    assert first.get("before_group", line) < line, f"{path.relative_to(ROOT)}:{line}"
    assert made >= 5
