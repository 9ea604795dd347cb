"""CMake for the tests: what is there to build with, and a build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

# cmake, ctest and ninja may be installed beside Python, whose environment need not be activated
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
CAN_BUILD = COMPILER is not None and shutil.which("cmake", path=PATH) is not None
REASON = "cmake or a C++ compiler is not installed"


def run(*command: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PATH": PATH}, timeout=600)


def build(source: Path, folder: Path, **options: object) -> str:
    """Configures and builds `source` in `folder`; everything that was printed."""
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=PATH) else []
    configure = ["cmake", "-S", source, "-B", folder, *generator, *(f"-D{k}={v}" for k, v in options.items())]
    log = ""
    for command in (configure, ["cmake", "--build", folder, "--parallel", "2"]):
        done = run(*command)
        log += done.stdout + done.stderr
        assert done.returncode == 0, log
    return log
