"""Build the native modules with CMake. Everything else about the package is in pyproject.toml.

The package works without native modules, but slower. FASTCLIP_BUILD_CPU and FASTCLIP_BUILD_CUDA choose: 1 requires the
module, 0 skips it. If unset, a failed build is recorded as the reason that `fastclip.backends()` returns.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
WANTED = {kind: os.environ.get(f"FASTCLIP_BUILD_{kind}", "") for kind in ("CPU", "CUDA")}
for kind, choice in WANTED.items():
    if choice not in ("", "0", "1"):
        raise SystemExit(f"FASTCLIP_BUILD_{kind} must be 0, 1 or unset, got {choice!r}")


class BuildError(Exception): ...


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    names = (os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc")
    nvcc = next((path for name in names if name and (path := shutil.which(name))), None)
    if nvcc is None:
        raise BuildError("nvcc was not found (PATH, CUDACXX, CUDA_HOME)")
    words = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release (\d+)\.(\d+)", words)
    if version is None or (int(version[1]), int(version[2])) < (12, 5):
        raise BuildError(f"nvcc 12.5 or newer is required, {nvcc} is {version[0] if version else 'of unknown release'}")
    return nvcc


class CMakeBuild(build_ext):
    """Run CMake once per extension. A failure goes into a report, and is an error only for a required module."""

    def files(self, folder: Path, ext: Extension) -> tuple[Path, Path]:
        """Return the paths of the module and of the report of its failed build. Exactly one of them exists."""
        module = Path(self.get_ext_filename(ext.name)).name
        return folder / module, folder / f"{module.split('.')[0]}_build_report.txt"

    def deliver(self, ext: Extension, source: Path, target: Path) -> None:
        """Replace the module or report in `target` by renaming: a process that has loaded the old module keeps it."""
        target.mkdir(parents=True, exist_ok=True)
        for built, place in zip(self.files(source, ext), self.files(target, ext)):
            if built.exists():
                temporary = place.with_name(f".{place.name}.{os.getpid()}")
                shutil.copy(built, temporary)
                os.replace(temporary, place)
            else:
                place.unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        kind = ext.name.removeprefix("fastclip._").upper()
        build = Path(self.build_temp).resolve() / kind.lower()  # one folder per module: a failure affects no other
        output = build / "output"
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        try:
            if WANTED[kind] == "0":
                raise BuildError(f"FASTCLIP_BUILD_{kind}=0 was set when the package was built")
            self.run_cmake(kind, build, output)
        except BuildError as error:
            if WANTED[kind] == "1":
                raise
            logging.getLogger(__name__).warning("fastclip: the native %s module was not built: %s", kind, error)
            self.files(output, ext)[1].write_text(f"{error}\n")
        self.deliver(ext, output, Path(self.build_lib, "fastclip"))

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            self.deliver(ext, Path(self.build_lib, "fastclip"), ROOT / "fastclip")

    def run_cmake(self, kind: str, build: Path, output: Path) -> None:
        options = {f"FASTCLIP_BUILD_{other}": "ON" if other == kind else "OFF" for other in WANTED}
        if kind == "CUDA":
            options["CMAKE_CUDA_COMPILER"] = find_nvcc()
        if shutil.which("cmake") is None:
            raise BuildError("cmake was not found")
        import pybind11  # a build requirement, which is absent when only metadata is requested

        options |= {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(output),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        # --fresh, because pip's build environment, which may contain ninja, has another path every time
        self.call("cmake", "-S", ROOT, "-B", build, "--fresh", *generator, *(f"-D{k}={v}" for k, v in options.items()))
        self.call("cmake", "--build", build, "--config", options["CMAKE_BUILD_TYPE"])

    def call(self, *command: object) -> None:
        words = [str(word) for word in command]
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.announce(done.stdout, level=logging.INFO)
        if done.returncode:
            errors = [line.strip() for line in done.stdout.replace(":\n", ": ").splitlines() if "error" in line.lower()]
            compiler = next((line for line in errors if "CMAKE_CXX_COMPILER" in line), None)
            why = "no C++ compiler was found" if compiler else " ".join(errors[:3]) or "see pip install -v"
            raise BuildError(f"`{words[0]} {words[1]}` failed ({why})")


# triton_kernels is installed inside the package, because triton-lang ships a package named triton_kernels
setup(
    packages=[*find_packages(include=["fastclip*"]), "fastclip.triton_kernels"],
    package_dir={"fastclip.triton_kernels": "triton_kernels"},
    ext_modules=[Extension(f"fastclip._{kind}", sources=[], optional=True) for kind in ("cpu", "cuda")],
    cmdclass={"build_ext": CMakeBuild},
)
