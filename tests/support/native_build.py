"""Builds for the tests: available tools, CMake, and the Hopper kernels."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.version import Version

from support.store import sources, stored

# cmake, ctest and ninja may be installed beside Python, whose environment need not be activated
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
CAN_BUILD = COMPILER is not None and shutil.which("cmake", path=PATH) is not None
REASON = "cmake or a C++ compiler is not installed"
# in the order of setup.py
_NVCC = (os.environ.get("CUDACXX"), f"{os.environ.get('CUDA_HOME', '/nonexistent')}/bin/nvcc", "nvcc")
NVCC = next((path for name in _NVCC if name and (path := shutil.which(name))), None)
FLAGS = ("CC", "CXX", "CPPFLAGS", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDAFLAGS", "CUDAHOSTCXX")
FLAGS += ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PATH": PATH}, timeout=600)


NOT_BUILT = "the sources were not built:"


def build(source: Path, folder: Path, *, warnings: bool = True, **options: object) -> str:
    """Configure and build `source` in `folder`, and return all output.

    With `warnings=False` a warning is an error. Raises an AssertionError that begins with `NOT_BUILT`.
    """
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=PATH) else []
    configure = ["cmake", "-S", source, "-B", folder, *generator, *(f"-D{k}={v}" for k, v in options.items())]
    log = ""
    for command in (configure, ["cmake", "--build", folder, "--parallel", "2"]):
        done = run(*command)
        log += done.stdout + done.stderr
        assert done.returncode == 0, f"{NOT_BUILT}\n{log}"
    assert warnings or "warning:" not in log, f"{NOT_BUILT}\n{log}"
    return log


@functools.cache
def toolchain(*more: str) -> tuple[str, ...]:
    """Return what builds depend on besides sources: versions of the compiler, CMake and `more`, and flags of the
    environment.
    """
    commands = [word for word in (COMPILER, "cmake", *more) if word and shutil.which(word, path=PATH)]
    return *(run(word, "--version").stdout for word in commands), *(f"{k}={os.environ.get(k, '')}" for k in FLAGS)


@functools.cache
def can_run_setup() -> bool:
    """Return True if the Python packages for building the package are installed."""
    try:
        return Version(version("setuptools")) >= Version("77") and Version(version("pybind11")) >= Version("2.13")
    except PackageNotFoundError:
        return False


def cuda_module() -> Path:
    """Build the CUDA module as setup.py does, and return a folder with the results.

    They are `lib/fastclip`, which goes into a wheel, `objects`, `log.txt` with ptxas' report, and CMake's
    `commands.json`, in which SOURCE replaces the folder of the sources.
    """
    files = sources("setup.py", "CMakeLists.txt", "csrc/fastclip.h", "csrc/cuda", "csrc/bindings")

    def make(source: Path, place: Path) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            flags = f"{os.environ.get('CUDAFLAGS', '')} -Xptxas -v"
            environment = {"PATH": PATH, "FASTCLIP_BUILD_CPU": "0", "FASTCLIP_BUILD_CUDA": "1", "CUDAFLAGS": flags}
            command = [sys.executable, "setup.py", "build_ext", "--build-lib", place / "lib", "--build-temp", temporary]
            environment = os.environ | environment | {"CMAKE_EXPORT_COMPILE_COMMANDS": "ON"}
            done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            (place / "log.txt").write_text(done.stdout)
            (place / "objects").mkdir()
            for path in Path(temporary).rglob("*.cu.o"):
                shutil.copy(path, place / "objects")
            (commands,) = Path(temporary).rglob("compile_commands.json")
            (place / "commands.json").write_text(commands.read_text().replace(str(source.resolve()), "SOURCE"))

    return stored("cuda", files, (NVCC, toolchain(NVCC or ""), version("pybind11")), make)
