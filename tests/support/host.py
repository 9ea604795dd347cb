"""What a training step costs the host, without a GPU: calls, allocations, launches, time.

Triton's own launcher and the CUDA module's binding run, compiled for Hopper, on a driver that does nothing
(fake_cuda.c), with CPU tensors in place of a GPU's: all that Python does is what it does on a GPU. Nothing is computed,
so the values mean nothing. `measure` runs a process of its own, because Triton reads its environment once.
"""

from __future__ import annotations

import cProfile
import ctypes
import functools
import importlib.machinery
import importlib.util
import json
import os
import pstats
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import ROOT, native_build
from support.emulated import Missing
from support.store import sources, stored

N, D = 64, 512
STEPS = 10  # that counts are of
ROUNDS, BEST_OF = 200, 3


def _headers() -> Path:
    """The folder of Triton's cuda.h."""
    spec = importlib.util.find_spec("triton")
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else Path("nowhere")
    if not (folder / "backends/nvidia/bin/ptxas").is_file():
        raise Missing("Triton's compiler for NVIDIA is not installed")
    return folder / "backends/nvidia/include"


def _driver() -> Path:
    """A folder with the driver that does nothing, as libcuda.so.1."""
    headers, compiler = _headers(), shutil.which("gcc")
    if compiler is None:
        raise Missing("gcc is not installed, which Triton builds its launcher with")

    def make(source: Path, place: Path) -> None:
        flags = ("-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-I", headers)
        done = native_build.run(compiler, *flags, source / "tests/support/fake_cuda.c", "-o", place / "libcuda.so.1")
        assert done.returncode == 0, done.stderr

    version = native_build.run(compiler, "--version").stdout
    return stored("fake-cuda", sources("tests/support/fake_cuda.c"), (str(headers), version), make)


def _module() -> Path:
    """The CUDA module on a runtime that does nothing: its kernels stay PTX, which nobody assembles."""
    if native_build.NVCC is None:
        raise Missing("nvcc is not installed")
    import pybind11

    def make(source: Path, place: Path) -> None:
        includes = (pybind11.get_include(), sysconfig.get_path("include"), source / "csrc")
        names = ("COMPILER", "ARCHS")
        done = native_build.run(
            *(native_build.NVCC, "-std=c++17", "-O2", "-gencode", "arch=compute_90a,code=compute_90a", "-shared"),
            *("-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "none"),
            *(word for folder in includes for word in ("-I", folder)),
            *(f'-DFASTCLIP_CUDA_{name}="none"' for name in names),
            *sorted((source / "csrc").glob("bindings/cuda_module.cpp")),
            *sorted(path for path in (source / "csrc/cuda").iterdir() if path.suffix in (".cu", ".cpp")),
            *("-o", place / "_cuda.so"),
        )
        assert done.returncode == 0, done.stdout + done.stderr

    files = sources("csrc/fastclip.h", "csrc/cuda", "csrc/bindings")
    return stored("fake-cuda-module", files, native_build.toolchain(native_build.NVCC), make) / "_cuda.so"


@functools.cache
def measure(backend: str, *, normalize: bool, capability: int = 90) -> dict[str, float]:
    """Figures of one step, by name; raises Missing where what it is built with is not installed."""
    driver = _driver()
    module = _module() if backend == "cuda" else None
    about = {"backend": backend, "normalize": normalize, "capability": capability, "module": str(module or "")}
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_LIBCUDA_PATH": str(driver),
        "TRITON_CACHE_DIR": str(ROOT / "build/host-triton"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    command = [sys.executable, __file__, json.dumps(about)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


class Host:
    """A process whose launches go to the driver that does nothing."""

    def __init__(self, capability: int = 90, module: str = "") -> None:
        path = Path(os.environ["TRITON_LIBCUDA_PATH"]) / "libcuda.so.1"
        self.cuda = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.products = 0
        self._replace_driver(capability)
        self._replace_device(capability)
        if module:
            self._replace_module(module)

    def _replace_driver(self, capability: int) -> None:
        import torch
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
        from triton.runtime import driver

        class Driver(CudaDriver):  # type: ignore[misc]
            def __init__(self) -> None:
                self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
                # built-in functions, as torch's are that tell a real device and stream
                self.get_current_device = functools.partial(int, 0)
                self.get_current_stream = functools.partial(int.__mul__, 0)

            def get_current_target(self) -> GPUTarget:
                return GPUTarget("cuda", capability, 32)

            def get_active_torch_device(self) -> torch.device:
                return torch.device("cpu")

        driver._active = Driver()

    def _replace_device(self, capability: int) -> None:
        """CPU tensors are taken for those of a GPU."""
        import torch
        from fastclip.triton_kernels import launch

        from fastclip._backends import triton as backend

        backend.refuses = lambda image, named: None
        backend.missing = lambda: None
        launch.capability = functools.cache(lambda device: divmod(capability, 10))
        real, one, out = torch.mm, torch.ones(1, 1), torch.ones(1, 1)

        def product(*args: Any, **options: Any) -> Any:
            """One, whatever was asked for: CPUs have no product of bfloat16 in float32."""
            self.products += 1
            return real(one, one, out=out)

        torch.mm = torch.addmm = product

    def _replace_module(self, path: str) -> None:
        from fastclip._backends import cuda

        loader = importlib.machinery.ExtensionFileLoader("fastclip._cuda", path)
        spec = importlib.util.spec_from_file_location("fastclip._cuda", path, loader=loader)
        assert spec is not None
        cuda._module = importlib.util.module_from_spec(spec)
        loader.exec_module(cuda._module)
        cuda._not_loaded = None
        cuda.missing = lambda: None
        cuda.refuses = lambda image, named: None

    def counter(self, name: str) -> int:
        return ctypes.c_long.in_dll(self.cuda, f"fake_cuda_{name}").value

    def figures(self, step: Callable[[], None], yardstick: Callable[[], None]) -> dict[str, float]:
        """Counts of a step; the time of one, in times of the yardstick's."""
        for _ in range(5):  # compiles, and fills the caches
            step()
        return {
            **self._launched(step),
            **_called(step),
            "allocations": _allocated(step),
            "times": min(_times(step, yardstick) for _ in range(BEST_OF)),
        }

    def _launched(self, step: Callable[[], None]) -> dict[str, float]:
        launches, maps, products = self.counter("launches"), self.counter("maps"), self.products
        step()
        products = self.products - products
        launches = self.counter("launches") - launches + products
        return {"launches": launches, "products": products, "maps": self.counter("maps") - maps}


def _called(step: Callable[[], None]) -> dict[str, float]:
    """Calls of Python functions and, from Python, of C functions; those of C++ bindings among the latter."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(STEPS):
        step()
    profile.disable()
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    if os.environ.get("FASTCLIP_SHOW_CALLS"):
        for (file, line, name), (calls, *_) in sorted(stats.items(), key=lambda item: -item[1][0]):
            print(f"{calls / STEPS:6.1f} {Path(file).name}:{line} {name}")
    counts = {name: sum(calls for key, (calls, *_) in stats.items() if of(key)) / STEPS for name, of in _KINDS.items()}
    return {**counts, "calls": counts["python"] + counts["c"]}


_KINDS: dict[str, Callable[[tuple[str, int, str]], bool]] = {
    "python": lambda key: key[0] != "~",
    "c": lambda key: key[0] == "~",
    "pybind": lambda key: "PyCapsule" in key[2],
}


def _allocated(step: Callable[[], None]) -> int:
    """Tensors allocated; without the 1 that autograd begins with, which is everybody's."""
    from torch.autograd.profiler import profile

    with profile() as recorded:
        step()
    names = [event.name for event in recorded.function_events]
    # `ones_like` is `empty_like`, which is `empty_strided`
    begun = 2 * names.count("aten::ones_like")
    nested = names.count("aten::empty_like") + names.count("aten::new_empty")  # each is one of the others as well
    return sum(name.startswith(("aten::empty", "aten::new_empty")) for name in names) - nested - (begun - begun // 2)


def _times(step: Callable[[], None], yardstick: Callable[[], None]) -> float:
    """Ratio of the medians of a thread's time, the two taken in turns: other processes disturb both alike."""
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for run, into in zip((step, yardstick), taken):
            start = time.thread_time()
            run()
            into.append(time.thread_time() - start)
    step_time, yardstick_time = (sorted(x)[ROUNDS // 2] for x in taken)
    return step_time / yardstick_time


def _inputs() -> list[Any]:
    import torch

    image, text = (torch.randn(N, D, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    return [image, text, torch.tensor(14.3, requires_grad=True)]


def stepper(loss: Callable[..., Any], inputs: list[Any]) -> Callable[[], None]:
    def step() -> None:
        for x in inputs:
            x.grad = None
        loss(*inputs).backward()

    return step


def main(backend: str, normalize: bool, capability: int, module: str) -> dict[str, float]:
    import torch

    import fastclip

    torch.set_num_threads(1)
    host = Host(capability, module)
    inputs = _inputs()

    def loss(*inputs: Any) -> Any:
        return fastclip.contrastive_loss(*inputs, normalize=normalize, backend=backend)

    return host.figures(stepper(loss, inputs), stepper(lambda s: s * s, inputs[2:]))


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
