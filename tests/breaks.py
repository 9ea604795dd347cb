"""Break the promises of tests/broken, one at a time in a copy of the repository, and check that a test fails each time.

    python tests/breaks.py                            every break of every promise
    python tests/breaks.py memory fork                promises whose text contains one of the words
    python tests/breaks.py --file fastclip/losses/stats.py  breaks of a file, or those that a test file must notice
    python tests/breaks.py --since HEAD~3             breaks of the files that changed since a revision
    python tests/breaks.py --list ...                 print them, with the command that runs their tests
    python tests/breaks.py --write                    write docs/promises.md from the table

Words, --file and --since add to each other. The copy is made from a checkout whose package is installed for
development (`make test` does so).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from broken import QUESTIONS, Break, Promise, promises
from support import ROOT, native_build

DOCUMENT = ROOT / "docs" / "promises.md"
_NOT_COPIED = (".git", ".venv", "build", "runs", "__pycache__", "*.egg-info", ".*_cache")


_INTRODUCTION = """\
# Promises

This page lists what fastclip guarantees. Each promise names a test that fails if the promise is broken: every promise
was broken on purpose to check this. The changes that break a promise, and its other tests, are in `tests/broken`;
[CONTRIBUTING](../CONTRIBUTING.md#promises) explains how to repeat this.

A batch has M images and N texts with D features each, and W is the number of processes. Errors are relative. "The same
tolerances" are 1e-5 for a loss, 3e-5 for gradients of float32 features (1e-4 if they are computed on the tensor cores
of a GPU), and one rounding for gradients of 16-bit features. "Dense PyTorch" and "the dense formula" are plain PyTorch
formulas that store the M x N matrix. "The loss without labels" is the contrastive loss of
matching pairs, as in `contrastive_loss(image, text, logit_scale)`.
"""


def document() -> str:
    """Return the text of docs/promises.md."""
    lines = [_INTRODUCTION]
    for question in QUESTIONS:
        lines += [f"## {question}", "", "| promise | test |", "|---|---|"]
        for promise in promises():
            if promise.question == question:
                path = f"tests/{promise.tests[0].split('::')[0]}"
                lines.append(f"| {promise.text} | [{Path(path).stem.removeprefix('test_')}](../{path}) |")
        lines.append("")
    return "\n".join(lines)


def pytest_command(promise: Promise) -> list[str]:
    return ["python", "-m", "pytest", "-q", *(f"tests/{name}" for name in promise.tests)]


def changed_since(revision: str, root: Path = ROOT) -> set[str]:
    """Return the files whose content differs from the revision's, including files that git does not track yet.

    A file that was moved without a change is left out.
    """

    def git(*arguments: str) -> list[str]:
        return subprocess.check_output(["git", *arguments], cwd=root, text=True).split("\0")[:-1]

    fields = git("diff", "--name-status", "-M", "-z", revision)
    changed = set(git("ls-files", "--others", "--exclude-standard", "-z"))
    while fields:
        status = fields.pop(0)
        names = [fields.pop(0) for _ in range(2 if status[0] in "RC" else 1)]  # a move has its old and its new name
        if status not in ("R100", "C100"):  # 100 per cent equal content
            changed.add(names[-1])
    return changed


def chosen(words: list[str], files: Iterable[str]) -> list[tuple[Promise, Break]]:
    """Return the breaks whose text contains one of the words, breaks of the files, and breaks
    that the files' tests must notice.
    """
    files = set(files)
    found = []
    for promise in promises():
        tested = any("tests/" + name.split("::")[0] in files for name in promise.tests)
        for one in promise.breaks:
            if tested or one.file in files or any(word in promise.text + one.what for word in words):
                found.append((promise, one))
    return found


def built(one: Break, promise: Promise) -> str | None:
    """Return which native module must be built again to notice the break: "CPU", "CUDA" or None.

    The tests that emulate a GPU compile the CUDA sources themselves.
    """
    if not one.file.startswith("csrc/") and one.file != "CMakeLists.txt":
        return None
    if not one.file.startswith("csrc/cuda"):
        return "CPU"
    return "CUDA" if any(name.endswith("::test_module_without_a_driver") for name in promise.tests) else None


def build(copy: Path, folder: Path, kind: str) -> str | None:
    """Build the native module for the CPU or for CUDA into the copy's package, and return the compiler's errors, if
    any.
    """
    pybind11 = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True).strip()
    options = {"pybind11_DIR": pybind11, "Python_EXECUTABLE": sys.executable}
    options |= {f"FASTCLIP_BUILD_{other}": "ON" if other == kind else "OFF" for other in ("CPU", "CUDA")}
    try:
        native_build.build(copy, folder, **options)
    except AssertionError as error:
        return str(error)[-1600:]
    for module in folder.glob(f"_{kind.lower()}.*"):
        shutil.copy(module, copy / "fastclip")
    return None


def make_copy(copy: Path, stores: Path) -> None:
    """Copy the repository, and renew the times of its files, because the files of the last break must be compiled
    again.

    The builds of its tests are stored in `stores`, for breaks that do not change them (`support/store.py`).
    """
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*_NOT_COPIED), copy_function=shutil.copy)
    # the copy's own kernels must precede those of an editable installation
    (copy / "fastclip" / "triton_kernels").symlink_to(copy / "triton_kernels")
    # without inductor's cache, which identifies our operators by name and not by their code
    stores.mkdir(exist_ok=True)
    (copy / "build").mkdir()
    (copy / "build" / "stored").symlink_to(stores)


def try_break(promise: Promise, one: Break, folder: Path) -> tuple[str, str]:
    """Return "caught", "MISSED", "SKIPPED" or "FAILED", with an explanation."""
    copy = folder / "copy"
    make_copy(copy, folder / "stored")
    path = copy / one.file
    path.write_text(path.read_text().replace(one.old, one.new))
    kind = built(one, promise)
    if kind == "CUDA" and shutil.which("nvcc", path=native_build.PATH) is None:
        return "SKIPPED", "nvcc was not found"
    if kind is not None and (error := build(copy, folder / kind, kind)):
        return "FAILED", f"not built: {error}"
    command = [sys.executable, *pytest_command(promise)[1:], "-x", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines() or [""]
    failed = [line.split()[1] for line in lines if line.startswith(("FAILED ", "ERROR tests/"))]
    if native_build.NOT_BUILT in done.stdout:  # by a fixture: an unused variable breaks no promise
        return "FAILED", done.stdout[-1600:]
    if failed:
        return "caught", f"by {failed[0]}"
    if done.returncode < 0:
        return "caught", "by a crash"
    if done.returncode > 0:
        return "FAILED", f"no test ran: {(done.stdout + done.stderr)[-800:]}"
    return ("MISSED" if " passed" in lines[-1] else "SKIPPED"), lines[-1]


def break_all(breaks: list[tuple[Promise, Break]], jobs: int) -> Counter[str]:
    """Try the breaks, `jobs` at a time, each in its own copy, and print and count their results."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:

        def work(number: int) -> None:
            promise, one = breaks[number]
            folder = Path(name) / str(threading.get_ident())
            folder.mkdir(exist_ok=True)
            begun = time.monotonic()
            result, words = try_break(promise, one, folder)
            counts[result] += 1
            seconds = time.monotonic() - begun
            print(f"{number + 1}/{len(breaks)} {one.file}: {one.what}: {result} {words} ({seconds:.0f} s)", flush=True)

        list(pool.map(work, range(len(breaks))))  # the first error ends it
    return counts


def print_list(breaks: list[tuple[Promise, Break]]) -> None:
    before = None
    for promise, one in breaks:
        if promise is not before:
            print(f"\n{promise.text}\n  {' '.join(pytest_command(promise))}")
        print(f"  {one.file}: {one.what}")
        before = promise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="promises or breaks that contain one of these (default: all)")
    parser.add_argument("--file", action="append", default=[], help="a file of the package or of the tests")
    parser.add_argument("--since", metavar="REV", help="files that changed since this revision of git")
    parser.add_argument("--list", action="store_true", help="print the breaks instead of trying them")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="how many to try at a time (default: 1)")
    parser.add_argument("--write", action="store_true", help="write docs/promises.md instead")
    arguments = parser.parse_args()
    if arguments.write:
        DOCUMENT.write_text(document())
        return
    files = {Path(os.path.relpath(Path(file).resolve(), ROOT)).as_posix() for file in arguments.file}
    if missing := [file for file in files if not (ROOT / file).is_file()]:
        parser.error(f"no file of the repository: {', '.join(missing)}")
    words = list(arguments.words)
    if arguments.since is not None:
        files |= changed_since(arguments.since)
    elif not words and not files:
        words = [""]  # contained in every text
    breaks = chosen(words, files)
    if arguments.list:
        print_list(breaks)
        return
    counts = break_all(breaks, arguments.jobs)
    print(", ".join(f"{count} {result}" for result, count in counts.items()) or "no break was chosen")
    sys.exit(1 if counts["MISSED"] or counts["FAILED"] else 0)


if __name__ == "__main__":
    main()
