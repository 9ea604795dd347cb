"""The native code on its own: csrc/tests under CTest, plain and under sanitizers."""

from __future__ import annotations

import json
import platform
import re
import shlex
import shutil
from pathlib import Path

import pytest

from support import ROOT
from support.native_build import CAN_BUILD, COMPILER, REASON, build, run, toolchain
from support.store import sources, stored


def has_runtime(sanitize: str, folder: Path) -> bool:
    (folder / "main.cpp").write_text("int main() { return 0; }\n")
    command = [COMPILER, f"-fsanitize={sanitize}", folder / "main.cpp", "-o", folder / "main"]
    return run(*command).returncode == 0 and run(folder / "main").returncode == 0


def groups() -> set[str]:
    return set(re.findall(r'\{"(\w+)", \1\}', (ROOT / "csrc/tests/test_cpu.cpp").read_text()))


def built(sanitize: str, folder: Path) -> Path:
    """Return a folder that CTest can run, with its program."""
    options = {"FASTCLIP_BUILD_PYTHON": "OFF", "FASTCLIP_BUILD_TESTS": "ON", "FASTCLIP_SANITIZE": sanitize}

    def make(source: Path, place: Path) -> None:
        build(source, folder, warnings=False, **options)
        shutil.copy(folder / "test_cpu", place)
        # CTest's list of tests contains the program's absolute path
        text = (folder / "CTestTestfile.cmake").read_text()
        (place / "CTestTestfile.cmake").write_text(text.replace(str(folder), "${CMAKE_CURRENT_LIST_DIR}"))

    files = sources("CMakeLists.txt", "csrc/fastclip.h", "csrc/cpu", "csrc/tests")
    name = "-".join(["native-tests", *filter(None, sanitize.split(","))])
    return stored(name, files, (options, toolchain()), make)


@pytest.mark.skipif(not CAN_BUILD, reason=REASON)
@pytest.mark.parametrize("sanitize", ["", "address,undefined", "thread"], ids=["plain", "address,undefined", "thread"])
def test_native_code(sanitize: str, tmp_path: Path) -> None:
    if sanitize and not has_runtime(sanitize, tmp_path):
        pytest.skip(f"{COMPILER} has no runtime for -fsanitize={sanitize}")
    folder = tmp_path / "tests"  # CTest writes beside the program
    shutil.copytree(built(sanitize, tmp_path / "build"), folder)
    done = run("ctest", "--test-dir", folder, "--output-on-failure", "--no-tests=error")
    assert done.returncode == 0, done.stdout + done.stderr
    passed = set(re.findall(r"(\w+) \.+ +Passed", done.stdout))
    assert passed == groups() and len(passed) >= 10, "a group of test_cpu.cpp is not registered with CTest"


@pytest.mark.skipif(not CAN_BUILD, reason=REASON)
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="resizing needs an x86 processor")
def test_resizing_has_no_fused_multiply_adds(tmp_path: Path) -> None:
    """Fused multiply-adds round differently from Pillow, and a compiler inserts them if a user's CXXFLAGS allow it."""
    options = {"FASTCLIP_BUILD_PYTHON": "OFF", "CMAKE_CXX_FLAGS": "-mavx2 -mfma", "CMAKE_EXPORT_COMPILE_COMMANDS": "ON"}
    done = run("cmake", "-S", ROOT, "-B", tmp_path, *(f"-D{k}={v}" for k, v in options.items()))
    assert done.returncode == 0, done.stdout + done.stderr
    entries = json.loads((tmp_path / "compile_commands.json").read_text())
    commands = {Path(entry["file"]).name: shlex.split(entry["command"]) for entry in entries}
    assert "-mavx2" in commands["resize_avx2.cpp"][commands["resize_avx2.cpp"].index("-O3") :]
    for name in ("resize.cpp", "resize_avx2.cpp"):
        command = [word for word in commands[name] if word != "-c"]
        command[command.index("-o") + 1] = str(tmp_path / "assembly")
        done = run(*command, "-S")
        assert done.returncode == 0, done.stderr
        assert not re.search(r"\bvfn?m(add|sub)", (tmp_path / "assembly").read_text()), name
