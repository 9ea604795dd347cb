"""The Hopper kernels as the package builds them, inspected without a GPU: ptxas' report and the machine code."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from support.native_build import CAN_BUILD, NVCC, can_run_setup, cuda_module, run, toolchain
from support.store import sources, stored

pytest.importorskip("triton")  # its wheel contains the disassembler
from support.machine_code import Cost, Instruction, counts, epilogues, functions

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        NVCC is None or not CAN_BUILD or not can_run_setup(),
        reason="nvcc, cmake, a C++ compiler, setuptools>=77 or pybind11 is not installed",
    ),
]
# TILES captures a tile kernel's name, fp16, columns of a tile, and labels or gradients. SMALL captures the other
# kernels of the losses of pairs.
TILES = re.compile(r"\d(Statistics|Weights|Sigmoid|Weigh|Repair)ILb([01])E(?:Li(\d+)ELb([01])E)?E")
SMALL = re.compile(r"\d(norms|copy|reduce|finish|sigmoid_finish|sigmoid_bwd)_kernel(?:ILb([01])E(?:Lb([01])E)?)?")
# (kernel, fp16, columns of a tile, labels or gradients) of every kernel that the C interface can launch
TILE_KERNELS = {
    (name, half, columns, option)
    for name, half, option in [(n, h, o) for n in ("Statistics", "Weights", "Sigmoid") for h in "01" for o in "01"]
    for columns in (64, 128 if (name, option) == ("Statistics", "1") else 192)
}
TILE_KERNELS |= {("Weigh", half, columns, "0") for half in "01" for columns in (64, 192)}
TILE_KERNELS |= {("Repair", half, 64, "") for half in "01"}
SMALL_KERNELS = {(name, half, 0, "") for name in ("copy", "finish", "sigmoid_finish", "sigmoid_bwd") for half in "01"}
SMALL_KERNELS |= {("norms", half, 0, sigmoid) for half in "01" for sigmoid in "01"}
SMALL_KERNELS |= {("reduce", "", 0, "")}
KERNELS = TILE_KERNELS | SMALL_KERNELS
# 65536 / 384 threads, rounded down to the hardware's allocation unit; setmaxnreg moves them at run time
REGISTERS = 168

SMALL_REGISTERS = 64  # with 256 threads per block, this allows four blocks per multiprocessor


Kernel = tuple[str, str, int, str]


class Machine(NamedTuple):
    report: dict[Kernel, str]  # ptxas' report on every kernel
    warnings: list[str]  # spills; serialised products are reported as a "potential performance loss"
    counts: dict[Kernel, Counter[str]]  # instructions by name
    code: dict[Kernel, list[Instruction]]


def _kernel(text: str) -> Kernel | None:
    if (found := TILES.search(text)) is not None:
        return found[1], found[2], int(found[3] or 64), found[4] or ""
    found = SMALL.search(text)
    return None if found is None else (found[1], found[2] or "", 0, found[3] or "")


def _read(log: str, objects: Path) -> Machine:
    report = {}
    for part in log.split("Compiling entry function")[1:]:
        if (kernel := _kernel(part)) is not None:
            report[kernel] = part.split("Compile time")[0]
    code = {
        kernel: instructions
        for path in objects.glob("*.cu.o")
        for name, instructions in functions(path)
        if (kernel := _kernel(name)) is not None
    }
    told = ("warning", "potential performance loss")
    warnings = [line for line in log.splitlines() if any(word in line.lower() for word in told)]
    return Machine(report, warnings, {kernel: counts(x) for kernel, x in code.items()}, code)


@pytest.fixture(scope="module")
def machine() -> Machine:
    built = cuda_module()
    return _read((built / "log.txt").read_text(), built / "objects")


def _faults(machine: Machine) -> list[str]:
    """List spills and local memory, from ptxas' report and from the machine code."""
    told = [
        f"{kernel}: {text}"
        for kernel, text in machine.report.items()
        if "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" not in text
    ]
    return told + [f"{kernel}: local memory" for kernel, count in machine.counts.items() if count["LDL"] + count["STL"]]


def _tiles(machine: Machine) -> list[tuple[Kernel, Counter[str]]]:
    return [(kernel, count) for kernel, count in machine.counts.items() if kernel in TILE_KERNELS]


def test_every_kernel_is_compiled_without_spills(machine: Machine) -> None:
    assert set(machine.report) == set(machine.code) == KERNELS
    assert not _faults(machine)
    for kernel, text in machine.report.items():
        used = re.search(r"Used (\d+) registers", text)
        assert used is not None
        most = REGISTERS if kernel in TILE_KERNELS else SMALL_REGISTERS
        assert int(used[1]) == most if kernel in TILE_KERNELS else int(used[1]) <= most, (kernel, text)


def test_products_are_not_serialised(machine: Machine) -> None:
    """ptxas does not report serialised wgmma products, and the machine code has no wait after each product."""
    assert not machine.warnings
    for kernel, count in _tiles(machine):
        assert (count["WARPGROUP.ARRIVE"], count["WARPGROUP.DEPBAR"]) == (1, 2), kernel


def test_instructions_as_planned(machine: Machine) -> None:
    """Products are wgmma on operands that the TMA loads into shared memory, results are stored by the TMA, and
    registers move to the consumer warps.
    """
    for kernel, count in _tiles(machine):
        assert count["HGMMA"] == 8 and count["HMMA"] == 0, kernel  # four steps of 16 features, two halves of the rows
        assert count["UTMALDG"] == 2 and count["USETMAXREG"] == 2, kernel
        stores = kernel[0] in ("Weights", "Weigh") or (kernel[0] == "Sigmoid" and kernel[3] == "1")
        assert (count["UTMASTG"] > 0) == (count["STSM"] > 0) == stores, kernel


def test_one_exponential_a_logit(machine: Machine) -> None:
    """A logit takes one exponential in the plain path and one in the masked path, and a thread has as many logits as
    the tile has columns. The repair has a single path with two; the weights' masked path has a third.
    """
    for kernel, count in _tiles(machine):
        assert count["MUFU.EX2"] == {"Weigh": 4}.get(kernel[0], 2) * kernel[2], kernel


# Costs of one warp on the path of a tile without a mask, as compiled by nvcc 13.0. The products of a tile take 12 D
# clocks, 6,144 at D = 512 (docs/kernels.md).
COSTS = {
    ("Statistics", 192, "0"): Cost(1233, 2375, 52),
    ("Statistics", 128, "1"): Cost(2414, 2502, 72),
    ("Weights", 192, "0"): Cost(1979, 3832, 108),
    ("Weights", 192, "1"): Cost(2884, 4987, 264),
    ("Weigh", 192, "0"): Cost(1949, 3636, 108),
    ("Sigmoid", 192, "0"): Cost(1128, 1861, 28),
    ("Sigmoid", 192, "1"): Cost(2633, 5820, 56),
    ("Repair", 64, ""): Cost(1169, 1684, 32),
}


def test_tiles_cost_no_more_than_they_did(machine: Machine) -> None:
    """The epilogue of a tile does not become more expensive: instructions, clocks of stalls, and loads from shared
    memory, which compete with those of the products.
    """
    release = re.search(r"release (\d+\.\d+)", run(NVCC, "--version").stdout)
    if release is None or release[1] != "13.0":
        pytest.skip("another nvcc makes other code")
    assert set(COSTS) == {(name, columns, option) for name, _, columns, option in TILE_KERNELS if columns != 64} | {
        ("Repair", 64, "")
    }
    for (name, half, columns, option), code in machine.code.items():
        if known := COSTS.get((name, columns, option)):
            cost = min(epilogues(code, columns))
            assert all(now <= 1.02 * then for now, then in zip(cost, known)), (name, half, option, cost)


def test_small_kernels_call_no_subroutines(machine: Machine) -> None:
    """Small kernels call no subroutine. A division in fp64 is a subroutine, and a tile kernel spills around it."""
    for kernel, count in machine.counts.items():
        if kernel[0] in ("Repair", "reduce"):
            assert count["CALL"] == 0, kernel


FAULTS = {
    "csrc/fastclip.h": ("FASTCLIP_CUDA_TILE_N_LABELS = 128", "FASTCLIP_CUDA_TILE_N_LABELS = 192"),
    "csrc/cuda/tile.cuh": ("      wgmma_commit();\n", "      wgmma_commit();\n      acc[0][0] *= 2.f;\n"),
}


def _compile_changed(file: str) -> Machine:
    """Compile one source file with CMake's exact command, after a change to one of the files that it includes."""
    old, new = FAULTS[file]
    commands = json.loads((cuda_module() / "commands.json").read_text())
    (command,) = (one["command"] for one in commands if one["file"].endswith("contrastive_fwd.cu"))
    files = sources("csrc/fastclip.h", "csrc/cuda")

    def make(source: Path, place: Path) -> None:
        text = (source / file).read_text()
        assert text.count(old) == 1
        (source / file).write_text(text.replace(old, new))
        words = shlex.split(command.replace("SOURCE", str(source)))
        words[words.index("-o") + 1] = str(place / "changed.cu.o")
        done = run(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        (place / "log.txt").write_text(done.stdout + done.stderr)

    place = stored(f"cuda-changed-{Path(file).stem}", files, (command, toolchain(NVCC), FAULTS[file]), make)
    return _read((place / "log.txt").read_text(), place)


def test_what_is_looked_for_is_found() -> None:
    """The checks above detect real faults: wide tiles with labels, which spill, and accumulators
    that are used between products.
    """
    machine = _compile_changed("csrc/fastclip.h")
    assert any("Statistics" in fault for fault in _faults(machine)) and machine.warnings
    machine = _compile_changed("csrc/cuda/tile.cuh")
    assert any("serialized" in line for line in machine.warnings)
    assert any(count["WARPGROUP.DEPBAR"] > 2 for count in machine.counts.values())
