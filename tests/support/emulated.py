"""The native CUDA module with kernels that run on a CPU (csrc/tests/emulate_sm90.h), built once per state of the
sources.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from support import native_build
from support.store import sources, stored


class Missing(Exception):
    pass


def cuda_headers() -> Path:
    """Return the folder of cuda.h, from the toolkit or from the wheels that torch installs."""
    nvcc = shutil.which("nvcc")
    folders = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).resolve().parent.parent]
    candidates = [Path(folder) / "include" for folder in folders if folder]
    candidates += Path(sysconfig.get_path("purelib")).glob("nvidia/*/include")
    for folder in candidates:
        if (folder / "cuda.h").is_file() and (folder / "cuda_runtime.h").is_file():
            return folder
    raise Missing("the CUDA headers are not installed")


def build(target: str) -> Path:
    """Build `_cuda` (the module) or `test_cuda` (a program); raise Missing if a build requirement is not installed."""
    if not native_build.CAN_BUILD:
        raise Missing(native_build.REASON)
    import pybind11

    headers = cuda_headers()
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "FASTCLIP_BUILD_CPU": "OFF",
        "FASTCLIP_EMULATE_CUDA": "ON",
        "FASTCLIP_CUDA_HEADERS": headers,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }

    def make(source: Path, place: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            native_build.build(source, Path(folder), warnings=False, **options)
            for path in [*Path(folder).glob("_cuda.*.so"), Path(folder) / "test_cuda"]:
                shutil.move(path, place)

    files = sources("CMakeLists.txt", "csrc/fastclip.h", "csrc/cuda", "csrc/tests", "csrc/bindings")
    cuda = hashlib.sha256((headers / "cuda.h").read_bytes()).hexdigest()
    depends = (options, cuda, pybind11.__version__, native_build.toolchain())
    suffix = "" if target == "test_cuda" else str(sysconfig.get_config_var("EXT_SUFFIX"))
    return stored("emulator", files, depends, make) / (target + suffix)


@functools.cache
def module() -> Any:
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(build("_cuda")))
    spec = importlib.util.spec_from_file_location("_cuda", loader=loader)
    assert spec is not None
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded
