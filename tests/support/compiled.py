"""Compile the kernels of the Triton launchers for a GPU that need not be present, and read their machine code."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from fastclip.triton_kernels import gradients, launch, plain, planning
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastclip._backends import triton as triton_backend
from fastclip._backends.problem import Problem, Side, SideGrads
from support import ROOT

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "MUFU.EX2", "LDL", "STL")


class _NoDevice:
    """A driver with the answers that Triton needs in order to compile."""

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
    config = options["CONFIG"]._asdict() if "CONFIG" in options else {}
    sizes = [str(config[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if config]
    return " ".join([*sizes, *(name for name, value in {**options, **config}.items() if value is True)])


def _read(compiled: Any) -> dict[str, int]:
    """Return figures of a kernel's machine code, and its instructions if it multiplies matrices."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(option: str) -> str:
            return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout

        usage = dump("-res-usage")
        # the disassembler takes half a second to start, as long as compiling a kernel
        sass = dump("-sass") if "tt.dot" in compiled.asm["ttir"] else None
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    counts = {name: len(re.findall(rf"\b{re.escape(name)}\b", sass)) for name in INSTRUCTIONS} if sass else {}
    return {**dict(zip(("registers", "stack", "local"), map(int, found.groups()))), **counts}


@contextmanager
def compiling(capability: int) -> Iterator[list[dict[str, Any]]]:
    """Treat CPU tensors as tensors on a GPU of this compute capability (90 for 9.0), and compile kernels instead of
    launching them. The list that is yielded receives their figures.
    """
    seen: set[str] = set()
    machines: list[dict[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            first = args[0]
            while isinstance(first, tuple):
                first = first[0]
            dtype = str(getattr(first, "base", first).dtype)[6:]
            about = {"kernel": self.__name__, "variant": _variant(options), "dtype": dtype}
            sizes = {"warps": compiled.metadata.num_warps, "shared": compiled.metadata.shared}
            machines.append({**about, **sizes, **_read(compiled)})
        return None  # nothing to launch at the next call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(launch, "capability", lambda device: divmod(capability, 10))
        patch.setattr(launch, "fp32_products", lambda: "tf32x3")
        patch.setattr(gradients, "addmm", lambda *args, **options: None)  # the product is not a kernel of fastclip
        patch.setattr(planning, "plans", {})
        patch.setattr(driver, "_active", _NoDevice(capability))
        yield machines


def problem(D: int, dtype: torch.dtype, labels: bool, exclude_self: bool, normalize: bool) -> Problem:
    M, N = 256, 384
    y = (torch.zeros(M, dtype=torch.int32), torch.zeros(N, dtype=torch.int32)) if labels else None
    image, text = torch.zeros(M, D, dtype=dtype), torch.zeros(N, D, dtype=dtype)
    return Problem(image, text, torch.tensor(1.0), y, 0, exclude_self, normalize)


def launch_bwd(p: Problem) -> None:
    rows, cols = (torch.zeros(len(x), dtype=torch.float64) for x in (p.image, p.text))
    stats = Side(rows, rows, rows, rows.float()), Side(cols, cols, cols, cols.float())
    triton_backend.contrastive_bwd(p, stats, (SideGrads(rows, rows, rows), SideGrads(cols, cols, cols)), [True] * 3)


def launch_plain(p: Problem) -> None:
    image, text = p.image, p.text[: len(p.image)]
    loss, saved = triton_backend.plain_fwd(image, text, p.scale, 0.5, p.normalize)
    triton_backend.plain_bwd(image, text, p.scale, saved, 0.5, p.normalize, loss, (True, True, True))


def launch_sigmoid(p: Problem) -> None:
    bias = torch.tensor(0.0)
    loss, *kept = triton_backend.sigmoid_fwd(p, bias, 1, [True] * 4, torch.float32)
    triton_backend.sigmoid_bwd((p.image, p.text, p.scale, bias), kept, loss)
    triton_backend.sigmoid_fwd(p, bias, 1, [False] * 4, torch.float64)


def launch_distill(p: Problem) -> None:
    stats, of_teachers = triton_backend.distill_fwd(p, [p])
    grads = [SideGrads(side.neg, side.pos, side.neg) for side in stats]
    d_cosine = of_teachers[0].cosine, of_teachers[1].cosine
    triton_backend.distill_bwd(p, [p], stats, of_teachers, (grads[0], grads[1]), d_cosine, [True] * 3)


def launch_statistics(p: Problem) -> None:
    triton_backend.contrastive_fwd(p)
    triton_backend.contrastive_fwd(p, maxima=True)
    launch_bwd(p)


def launch_everything(*choices: Any) -> None:
    """Call each operation on such a problem; inside `compiling`, this compiles every kernel that it would launch."""
    p = problem(*choices)
    launch_statistics(p)
    if p.labels is None:
        launch_plain(p)
        launch_sigmoid(p)
        launch_distill(p)


def launched(chip: int) -> list[dict[str, Any]]:
    """Return the figures of all kernels that the operations launch on this chip."""
    with compiling(chip) as machines:
        for dtype in (torch.bfloat16, torch.float32):
            launch_everything(512, dtype, False, False, True)
        launch_everything(512, torch.float32, True, False, True)
        launch_everything(512, torch.bfloat16, True, True, True)
        if chip >= 90:  # below 9.0 the launch above compiles the same code, with the exclusion of the diagonal
            launch_everything(512, torch.bfloat16, True, False, True)
        for dtype, labels in itertools.product((torch.bfloat16, torch.float32), (False, True)):
            p = problem(512, dtype, labels, False, True)
            limited = p._replace(limits=(torch.zeros(len(p.image)), torch.zeros(len(p.text))))
            launch_statistics(limited)
            launch_sigmoid(limited)
            if labels:
                launch_sigmoid(p)
                launch_sigmoid(limited._replace(exclude_self=True))
        with pytest.MonkeyPatch.context() as patch:  # as on AMD
            patch.setattr(plain, "_TICKET", False)
            launch_plain(problem(512, torch.bfloat16, False, False, True))
        # a tail of D; before Hopper, tiles of float16 have the registers and instructions of bfloat16
        launch_everything(59, torch.float16 if chip >= 90 else torch.bfloat16, False, False, False)
    return machines


def spilling() -> list[dict[str, Any]]:
    """Compile a configuration that spills: the registers of four warps for a tile of 128 x 128 and all its
    gradients.
    """
    with compiling(90) as machines, pytest.MonkeyPatch.context() as patch:
        patch.setitem(launch.CONFIGS, ("contrastive_bwd", "hopper", "fp16", False), launch.Config(128, 128, 64, 4, 3))
        launch_bwd(problem(512, torch.bfloat16, False, False, True))
    return machines


if __name__ == "__main__":
    assert Path(launch.__file__).resolve().is_relative_to(ROOT), "another checkout's kernels"
    json.dump(spilling() if sys.argv[1] == "spilling" else launched(int(sys.argv[1])), sys.stdout)
