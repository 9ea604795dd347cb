"""The cost of a training step to the host, without a GPU: calls, allocations, launches, time.

Triton's own launcher and the CUDA module's binding run, compiled for Hopper, on a driver that does nothing
(fake_cuda.c), with CPU tensors in place of a GPU's. Python executes exactly what it executes with a GPU. Nothing is
computed, so the values mean nothing. `measure` starts a process, because Triton reads its environment only once.
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
STEPS = 10  # averaged by the counts
ROUNDS, BEST_OF = 200, 3


def _headers() -> Path:
    """Return the folder of Triton's cuda.h."""
    spec = importlib.util.find_spec("triton")
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else Path("nowhere")
    if not (folder / "backends/nvidia/bin/ptxas").is_file():
        raise Missing("Triton's compiler for NVIDIA is not installed")
    return folder / "backends/nvidia/include"


def _driver() -> Path:
    """Return a folder with the driver that does nothing, as libcuda.so.1."""
    headers = _headers()
    if shutil.which("gcc") is None:
        raise Missing("gcc is not installed, which Triton builds its launcher with")

    def make(source: Path, place: Path) -> None:
        _compile(source, place / "libcuda.so.1", "-shared", "-Wl,-soname,libcuda.so.1")

    version = native_build.run("gcc", "--version").stdout
    return stored("fake-cuda", sources("tests/support/fake_cuda.c"), (str(headers), version), make)


def _compile(source: Path, target: Path, *flags: str) -> None:
    file = source / "tests/support/fake_cuda.c"
    done = native_build.run("gcc", "-O1", "-fPIC", *flags, "-I", _headers(), file, "-o", target)
    assert done.returncode == 0, done.stderr


def _module() -> Path:
    """Build the CUDA module with a runtime that does nothing; its kernels stay PTX and are never assembled."""
    if native_build.NVCC is None:
        raise Missing("nvcc is not installed")
    import pybind11

    def make(source: Path, place: Path) -> None:
        includes = (pybind11.get_include(), sysconfig.get_path("include"), source / "csrc")
        names = ("COMPILER", "ARCHS")
        _compile(source, place / "runtime.o", "-c", "-DFAKE_RUNTIME")
        done = native_build.run(
            *(native_build.NVCC, "-std=c++17", "-O2", "-gencode", "arch=compute_90a,code=compute_90a", "-shared"),
            *("-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "none"),
            *(word for folder in includes for word in ("-I", folder)),
            *(f'-DFASTCLIP_CUDA_{name}="none"' for name in names),
            *sorted((source / "csrc").glob("bindings/cuda_module.cpp")),
            *sorted(path for path in (source / "csrc/cuda").iterdir() if path.suffix in (".cu", ".cpp")),
            # a copy of the runtime that does nothing takes precedence over torch's, which is loaded by then
            *(place / "runtime.o", "-Xlinker", "-Bsymbolic", "-o", place / "_cuda.so"),
        )
        assert done.returncode == 0, done.stdout + done.stderr

    files = sources("csrc/fastclip.h", "csrc/cuda", "csrc/bindings", "tests/support/fake_cuda.c")
    return stored("fake-cuda-module", files, native_build.toolchain(native_build.NVCC), make) / "_cuda.so"


@functools.cache
def measure(what: str, backend: str, *, normalize: bool, capability: int = 90, loss: str = "contrastive") -> Any:
    """Measure one step in a new process; raise Missing if a build requirement is not installed.

    Args:
        what: "counts", by name, or "times", as a multiple of the yardstick's time, or "arguments" of launches, see
            `arguments`, or "public arguments", the same without knowledge of the inside of Triton's launcher.
        loss: "contrastive" or "sigmoid".
    """
    driver = _driver()
    module = str(_module()) if backend == "cuda" else ""
    about = {"what": what, "backend": backend, "normalize": normalize, "capability": capability, "loss": loss}
    about["module"] = module
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
    return json.loads(done.stdout.splitlines()[-1])


class Host:
    """A process whose launches go to the driver that does nothing."""

    def __init__(self, capability: int = 90, module: str = "") -> None:
        path = Path(os.environ["TRITON_LIBCUDA_PATH"]) / "libcuda.so.1"
        self.counters = [ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)]
        self.products = 0
        if module:
            self._load_module(module)
        self._replace_driver(capability)
        self._replace_device(capability)

    def _replace_driver(self, capability: int) -> None:
        import torch
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
        from triton.runtime import driver

        class Driver(CudaDriver):  # type: ignore[misc]
            def __init__(self) -> None:
                self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
                # built-in functions, like torch's functions for a real device and stream
                self.get_current_device = functools.partial(int, 0)
                self.get_current_stream = functools.partial(int.__mul__, 0)

            def get_current_target(self) -> GPUTarget:
                return GPUTarget("cuda", capability, 32)

            def get_active_torch_device(self) -> torch.device:
                return torch.device("cpu")

        driver._active = Driver()

    def _replace_device(self, capability: int) -> None:
        """Treat CPU tensors as those of a GPU."""
        import torch
        from fastclip.triton_kernels import launch

        from fastclip._backends import cuda, triton

        for backend in (cuda, triton):
            backend.refuses = lambda image, named: None
            backend.missing = lambda: None
        launch.capability = functools.cache(lambda device: divmod(capability, 10))
        real, one, out = torch.mm, torch.ones(1, 1), torch.ones(1, 1)

        def product(*args: Any, **options: Any) -> Any:
            """Compute a small product in place of any other, because CPUs cannot multiply bfloat16 into float32."""
            self.products += 1
            return real(one, one, out=out)

        torch.mm = torch.addmm = product

    def _load_module(self, path: str) -> None:
        """Load this module in place of an installed one."""
        loader = importlib.machinery.ExtensionFileLoader("fastclip._cuda", path)
        spec = importlib.util.spec_from_file_location("fastclip._cuda", path, loader=loader)
        assert spec is not None
        sys.modules["fastclip._cuda"] = importlib.util.module_from_spec(spec)
        loader.exec_module(sys.modules["fastclip._cuda"])
        self.counters.append(ctypes.CDLL(path))

    def counter(self, name: str) -> int:
        return sum(ctypes.c_long.in_dll(library, f"fake_cuda_{name}").value for library in self.counters)

    def counts(self, step: Callable[[], None]) -> dict[str, float]:
        return {**self._launched(step), **_called(step), "allocations": _allocated(step)}

    def _launched(self, step: Callable[[], None]) -> dict[str, float]:
        launches, maps, products = self.counter("launches"), self.counter("maps"), self.products
        step()
        products = self.products - products
        launches = self.counter("launches") - launches + products
        return {"launches": launches, "products": products, "maps": self.counter("maps") - maps}


def _called(step: Callable[[], None]) -> dict[str, float]:
    """Count calls of Python functions and, from Python, of C functions, including those of C++ bindings."""
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
    "pybind": lambda key: "fastclip._cuda." in key[2],
}


def _allocated(step: Callable[[], None]) -> int:
    """Count the tensors allocated by a step, except for the one with which autograd begins."""
    from torch.autograd.profiler import profile

    with profile() as recorded:
        step()
    events = [event for event in recorded.function_events if event.name.startswith(("aten::empty", "aten::new_empty"))]

    def outer(event: Any) -> bool:
        """Return True if an allocation belongs to no other one and not to autograd."""
        parent = event.cpu_parent
        while parent is not None:
            if parent in events or parent.name == "aten::ones_like":
                return False
            parent = parent.cpu_parent
        return True

    return sum(map(outer, events))


def _times(step: Callable[[], None], yardstick: Callable[[], None]) -> float:
    """Return the ratio of the medians of a thread's time. The two are measured alternately, so that other
    processes disturb both equally.
    """
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for run, into in zip((step, yardstick), taken):
            start = time.thread_time()
            run()
            into.append(time.thread_time() - start)
    step_time, yardstick_time = (sorted(x)[ROUNDS // 2] for x in taken)
    return step_time / yardstick_time


def _inputs(loss: str) -> list[Any]:
    import torch

    image, text = (torch.randn(N, D, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    scalars = [14.3] if loss == "contrastive" else [14.3, -10.0]
    return [image, text, *(torch.tensor(x, requires_grad=True) for x in scalars)]


def stepper(loss: Callable[..., Any], inputs: list[Any]) -> Callable[[], None]:
    def step() -> None:
        for x in inputs:
            x.grad = None
        loss(*inputs).backward()

    return step


def arguments(backend: str, normalize: bool, loss: str) -> list[list[Any]]:
    """Return the arguments of Triton's launcher in a first and in a later step, which use the same memory."""
    import torch
    from triton.runtime import driver

    from fastclip import _backends
    from fastclip._backends.problem import Problem

    memory: list[Any] = []
    told: list[Any] = []

    class Features(torch.Tensor):
        """Features that allocate the memory of the step before again."""

        def new_empty(self, *size: Any, **options: Any) -> Any:
            taken = next(self.taken, None)
            if taken is None:
                taken = self.as_subclass(torch.Tensor).new_empty(*size, **options)
                memory.append(taken)
            return taken

    def plain(x: Any) -> Any:
        if isinstance(x, (tuple, list)):
            return [plain(y) for y in x]
        return x.data_ptr() if isinstance(x, torch.Tensor) else x if isinstance(x, int | float | str) else repr(x)

    utils = driver.active.utils
    utils.launch = lambda *args: told.append(plain([*args[:8], *args[11:]]))  # without hooks and their arguments
    utils.fill_tma_descriptor_tiled = lambda *args: ("map", *plain(args))
    module = _backends._BACKENDS[backend]
    image, text, *scalars = (x.detach() for x in _inputs(loss))
    image, text = (x.as_subclass(Features) for x in (image, text))
    scale, upstream = scalars[0], torch.tensor(1.0)
    for _ in range(2):
        for x in (image, text):
            x.taken = iter([*memory])
        told.append("step")
        if loss == "sigmoid":
            p = Problem(image, text, scale, None, 0, False, normalize)
            _, *kept = module.sigmoid_fwd(p, scalars[1], N, [True] * 4, torch.float32)
            module.sigmoid_bwd((image, text, *scalars), kept, upstream)
        else:
            _, saved = module.plain_fwd(image, text, scale, 0.5, normalize)
            module.plain_bwd(image, text, scale, saved, 0.5, normalize, upstream, (True, True, True))
    later = told.index("step", 1)
    return [told[1:later], told[later + 1 :]]


def main(what: str, backend: str, normalize: bool, capability: int, loss: str, module: str) -> Any:
    host = Host(capability, module)
    import torch

    import fastclip

    torch.set_num_threads(1)
    if what.endswith("arguments"):
        if what.startswith("public"):
            from fastclip.triton_kernels import sequence

            sequence._READ_LAUNCHERS = ()
        return arguments(backend, normalize, loss)
    inputs, function = _inputs(loss), getattr(fastclip, f"{loss}_loss")

    def of(*inputs: Any) -> Any:
        return function(*inputs, normalize=normalize, backend=backend)

    step, yardstick = stepper(of, inputs), stepper(lambda s: s * s, inputs[2:3])
    for _ in range(5):  # compiles, and fills the caches
        step()
    return host.counts(step) if what == "counts" else min(_times(step, yardstick) for _ in range(BEST_OF))


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
