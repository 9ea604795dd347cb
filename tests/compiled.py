"""Compiles what the Triton launchers launch, for a GPU that is not there, and reads the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastclip.triton_kernels import launch

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Machine(NamedTuple):
    """A kernel's machine code in figures."""

    kernel: str
    variant: str
    registers: int
    stack: int
    local: int
    shared: int
    sass: str

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}\b", self.sass))


class _NoDevice:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _variant(options: dict[str, Any]) -> str:
    flags = [name for name, value in options.items() if value is True]
    return " ".join([*(str(options[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in options), *flags])


def _read(name: str, variant: str, compiled: Any) -> Machine:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(option: str) -> str:
            return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout

        usage, sass = dump("-res-usage"), dump("-sass")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    return Machine(name, variant, registers, stack, local, compiled.metadata.shared, sass)


@contextmanager
def compiling(capability: int) -> Iterator[list[Machine]]:
    """Inside, CPU tensors are taken for those of a GPU of this compute capability (90 for 9.0), and kernels are compiled
    in place of launched; what they came to is in the list."""
    found: dict[tuple[str, str, str], Machine] = {}
    machines: list[Machine] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        key = self.__name__, _variant(options), compiled.hash
        if key not in found:
            found[key] = _read(self.__name__, _variant(options), compiled)
            machines.append(found[key])
        return compiled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(launch, "capability", lambda device: divmod(capability, 10))
        patch.setattr(launch, "fp32_products", lambda: "tf32x3")
        patch.setattr(driver, "_active", _NoDevice(capability))
        yield machines
