"""Every promise, the tests that hold it, and a way to break it, after which one of those tests must fail.

    python tests/breaks.py                 breaks every promise, one at a time, in a copy of the repository
    python tests/breaks.py memory fork     those whose text contains one of the words
    python tests/breaks.py --write         docs/promises.md from this table

The copy is made from a checkout whose package is installed for development (`make test` does so).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from broken import (
    Break,
    Promise,
    data,
    distributed,
    doctor,
    documents,
    features,
    filter,
    gpus,
    integrations,
    losses,
    models,
    plan,
    probe,
    report,
    retrieval,
    search,
    training,
    zeroshot,
)
from support import ROOT
from support.native_build import PATH

DOCUMENT = ROOT / "docs" / "promises.md"


PARTS = (
    losses,
    distributed,
    gpus,
    integrations,
    models,
    data,
    training,
    plan,
    features,
    zeroshot,
    retrieval,
    probe,
    report,
    search,
    filter,
    doctor,
    documents,
)
PROMISES: dict[str, list[Promise]] = {name: found for part in PARTS for name, found in part.PROMISES.items()}


def document() -> str:
    lines = [
        "# Promises",
        "",
        "What fastclip holds to, the tests that fail when it does not, and how each was broken to see them fail.",
        "`python tests/breaks.py` breaks every one again; `--write` makes this file from the table there.",
    ]
    for section, promises in PROMISES.items():
        lines += ["", f"## {section}", "", "| promise | tests | broken by |", "|---|---|---|"]
        for promise in promises:
            tests = "<br>".join(f"`{name}`" for name in promise.tests)
            breaks = "<br>".join(f"{one.what} (`{one.file}`)" for one in promise.breaks)
            lines.append(f"| {promise.text} | {tests} | {breaks} |")
    return "\n".join(lines) + "\n"


def build(copy: Path, folder: Path, kind: str) -> str | None:
    """Rebuild the native module of the copy for the CPU or CUDA; what the compiler said where it fails."""
    pybind11 = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True).strip()
    configure = [
        "cmake",
        "-S",
        copy,
        "-B",
        folder,
        f"-Dpybind11_DIR={pybind11}",
        f"-DPython_EXECUTABLE={sys.executable}",
        *(f"-DFASTCLIP_BUILD_{other}={'ON' if other == kind else 'OFF'}" for other in ("CPU", "CUDA")),
    ]
    for command in (configure, ["cmake", "--build", folder]):
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": PATH})
        if done.returncode:
            return done.stdout[-800:] + done.stderr[-800:]
    for module in folder.glob(f"_{kind.lower()}.*"):
        shutil.copy(module, copy / "fastclip")
    return None


def try_break(one: Break, tests: tuple[str, ...], folder: Path) -> str:
    """ "caught by ..." or what went wrong instead."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "runs", "__pycache__", "*.egg-info", ".*_cache")
    # without the times of the files: what the last break changed must be compiled again
    shutil.copytree(ROOT, copy, ignore=ignored, copy_function=shutil.copy)
    # beside an editable installation the copy's own kernels must be found first
    (copy / "fastclip" / "triton_kernels").symlink_to(copy / "triton_kernels")
    path = copy / one.file
    path.write_text(path.read_text().replace(one.old, one.new))
    kind = "CUDA" if "cuda" in one.file else "CPU"
    emulated = kind == "CUDA" and not any(test.endswith("test_module_without_a_driver") for test in tests)
    if (
        one.file.startswith("csrc/") or one.file == "CMakeLists.txt"
    ) and not emulated:  # those tests build what they run
        if kind == "CUDA" and shutil.which("nvcc", path=PATH) is None:
            print(f"{one.what}: nvcc was not found, {one.file} is not compiled")
        elif error := build(copy, folder / kind, kind):
            return f"NOT BUILT: {error}"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(f"tests/{t}" for t in tests)]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return "MISSED"
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR tests/"))]
    if failed:
        return f"caught by {failed[0]}"
    return "caught by a crash" if done.returncode < 0 else f"NOT RUN: {(done.stdout + done.stderr)[-800:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="promises or breaks that contain one of these (default: all)")
    parser.add_argument("--write", action="store_true", help="write docs/promises.md instead")
    arguments = parser.parse_args()
    if arguments.write:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(document())
        return
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        for promise in (promise for promises in PROMISES.values() for promise in promises):
            for one in promise.breaks:
                if arguments.words and not any(word in promise.text + one.what for word in arguments.words):
                    continue
                result = try_break(one, promise.tests, Path(name))
                missed += not result.startswith("caught")
                print(f"{one.what}: {result}", flush=True)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
