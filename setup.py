"""Builds the native modules with CMake; everything else is in pyproject.toml.

The package works without them, slower. FASTCLIP_BUILD_CPU: unset tries, and where it fails leaves the reason for
`fastclip.backends()` to tell; 1 fails the installation; 0 does not try.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
REPORT = "_build_report.txt"  # in the installed package: why there is no native module


class BuildError(Exception):
    pass


def wanted() -> str:
    choice = os.environ.get("FASTCLIP_BUILD_CPU", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"FASTCLIP_BUILD_CPU must be 0, 1 or unset, got {choice!r}")
    return choice


class CMakeBuild(build_ext):
    """Runs CMake once an extension; a failure is a report, not an error, unless the build was asked for."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # an editable installation is imported from the source folder
        package = ROOT / "fastclip" if getattr(self, "editable_mode", False) else target.parent
        (package / REPORT).unlink(missing_ok=True)
        try:
            if wanted() == "0":
                raise BuildError("FASTCLIP_BUILD_CPU=0 was set when the package was built")
            self.run_cmake(target.parent)
        except BuildError as error:
            if wanted() == "1":
                raise
            logging.getLogger(__name__).warning("fastclip: the native CPU module was not built: %s", error)
            (package / REPORT).write_text(f"{error}\n")
            for stale in package.glob(f"{target.name.split('.')[0]}.*"):
                stale.unlink()

    def run_cmake(self, output: Path) -> None:
        if shutil.which("cmake") is None:
            raise BuildError("cmake was not found")
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        import pybind11  # a build requirement: absent when setup.py is only asked for metadata

        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        self.call("cmake", "-S", ROOT, "-B", build, *generator, *(f"-D{k}={v}" for k, v in options.items()))
        self.call("cmake", "--build", build, "--config", options["CMAKE_BUILD_TYPE"])

    def call(self, *command: object) -> None:
        words = [str(word) for word in command]
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.announce(done.stdout, level=2)
        if done.returncode:
            errors = [line.strip() for line in done.stdout.splitlines() if "error" in line.lower()]
            compiler = next((line for line in errors if "CMAKE_CXX_COMPILER" in line), None)
            why = "no C++ compiler was found" if compiler else " ".join(errors[:3]) or "see pip install -v"
            raise BuildError(f"`{words[0]} {words[1]}` failed ({why})")


# triton_kernels is installed inside the package: triton-lang ships a package of the bare name
setup(
    packages=[*find_packages(include=["fastclip*"]), "fastclip.triton_kernels"],
    package_dir={"fastclip.triton_kernels": "triton_kernels"},
    ext_modules=[Extension("fastclip._cpu", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
