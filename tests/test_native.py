"""The native code on its own: csrc/tests under CTest, plain and under sanitizers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# cmake, ctest and ninja may be installed beside Python, whose environment need not be activated
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PATH": PATH}, timeout=600)


def has_runtime(sanitize: str, folder: Path) -> bool:
    (folder / "main.cpp").write_text("int main() { return 0; }\n")
    command = [COMPILER, f"-fsanitize={sanitize}", folder / "main.cpp", "-o", folder / "main"]
    return run(*command).returncode == 0 and run(folder / "main").returncode == 0


def groups() -> set[str]:
    return set(re.findall(r'\{"(\w+)", \1\}', (ROOT / "csrc/tests/test_cpu.cpp").read_text()))


@pytest.mark.skipif(
    shutil.which("cmake", path=PATH) is None or COMPILER is None, reason="cmake or a C++ compiler is not installed"
)
@pytest.mark.parametrize("sanitize", ["", "address,undefined", "thread"], ids=["plain", "address,undefined", "thread"])
def test_native_code(sanitize: str, tmp_path: Path) -> None:
    if sanitize and not has_runtime(sanitize, tmp_path):
        pytest.skip(f"{COMPILER} has no runtime for -fsanitize={sanitize}")
    build = tmp_path / "build"
    options = ["-DFASTCLIP_BUILD_PYTHON=OFF", "-DFASTCLIP_BUILD_TESTS=ON", f"-DFASTCLIP_SANITIZE={sanitize}"]
    options += ["-G", "Ninja"] if shutil.which("ninja", path=PATH) else []
    for command in (["cmake", "-S", ROOT, "-B", build, *options], ["cmake", "--build", build]):
        done = run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning:" not in done.stdout, done.stdout
    done = run("ctest", "--test-dir", build, "--output-on-failure", "--no-tests=error")
    assert done.returncode == 0, done.stdout + done.stderr
    passed = set(re.findall(r"(\w+) \.+ +Passed", done.stdout))
    assert passed == groups() and len(passed) >= 10, "a group of test_cpu.cpp is not registered with CTest"
