"""The Hopper kernels as the package builds them, without a GPU: ptxas' report and the machine code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from emulated import PATH, ROOT

pytest.importorskip("triton")  # whose wheel holds the disassembler
from compiled import CUOBJDUMP

NVCC = shutil.which("nvcc")
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        NVCC is None or shutil.which("cmake", path=PATH) is None, reason="nvcc or cmake is not installed"
    ),
]
KERNEL = re.compile(r"(Statistics|Weights|Sigmoid)ILb([01])ELi(\d+)ELb([01])E")
# (kernel, fp16, columns of a tile, labels or gradients): every one that the C interface can start
KERNELS = {
    (name, half, columns, option)
    for name, half, option in [(n, h, o) for n in ("Statistics", "Weights", "Sigmoid") for h in "01" for o in "01"]
    for columns in (64, 128 if (name, option) == ("Statistics", "1") else 192)
}
REGISTERS = 168  # 65536 / 384 threads, rounded down to what the hardware deals out; setmaxnreg moves them afterwards


class Machine(NamedTuple):
    report: dict[tuple[str, str, int, str], str]  # ptxas' words on every kernel
    warnings: list[str]
    code: dict[tuple[str, str, int, str], Counter[str]]  # instructions


def _kernel(text: str) -> tuple[str, str, int, str] | None:
    found = KERNEL.search(text)
    return None if found is None else (found[1], found[2], int(found[3]), found[4])


def _compile(source: Path, folder: Path) -> Machine:
    options = ["-DFASTCLIP_BUILD_PYTHON=OFF", "-DFASTCLIP_BUILD_CPU=OFF", "-DFASTCLIP_BUILD_CUDA=ON"]
    options += ["-DCMAKE_CUDA_FLAGS=-Xptxas -v", f"-DCMAKE_CUDA_COMPILER={NVCC}"]
    options += ["-G", "Ninja"] if shutil.which("ninja", path=PATH) else []
    log = ""
    configure = ["cmake", "-S", str(source), "-B", str(folder), *options]
    for command in (configure, ["cmake", "--build", str(folder), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": PATH})
        log = done.stdout + done.stderr
        assert done.returncode == 0, log
    report = {}
    for part in log.split("Compiling entry function")[1:]:
        if (kernel := _kernel(part)) is not None:
            report[kernel] = part.split("Compile time")[0]
    code: dict[tuple[str, str, int, str], Counter[str]] = {}
    for path in folder.rglob("*.cu.o"):
        counts: Counter[str] = Counter()
        done = subprocess.run([CUOBJDUMP, "-sass", path], capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            if "Function :" in line:
                counts = Counter()
                if (kernel := _kernel(line)) is not None:
                    code[kernel] = counts
            elif found := re.match(r"\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", line):
                words = found[1].split(".")
                counts[words[0]] += 1
                counts[".".join(words[:2])] += len(words) > 1
    return Machine(report, [line for line in log.splitlines() if "warning" in line.lower()], code)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return _compile(ROOT, tmp_path_factory.mktemp("cuda"))


def _faults(machine: Machine) -> list[str]:
    """Spills and local memory, by ptxas and by the machine code."""
    told = [
        f"{kernel}: {text}"
        for kernel, text in machine.report.items()
        if "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" not in text
    ]
    return told + [f"{kernel}: local memory" for kernel, count in machine.code.items() if count["LDL"] + count["STL"]]


def test_every_kernel_is_compiled_without_spills(machine: Machine) -> None:
    assert set(machine.report) == set(machine.code) == KERNELS
    assert not _faults(machine)
    for kernel, text in machine.report.items():
        assert f"Used {REGISTERS} registers" in text, (kernel, text)


def test_products_are_not_serialised(machine: Machine) -> None:
    """ptxas warns when it has to wait for every wgmma; then there is a wait a product, too."""
    assert not machine.warnings
    for kernel, count in machine.code.items():
        assert (count["WARPGROUP.ARRIVE"], count["WARPGROUP.DEPBAR"]) == (1, 2), kernel


def test_instructions_as_planned(machine: Machine) -> None:
    """wgmma on operands in shared memory that the TMA brings, stored by the TMA; registers move to the consumers."""
    for kernel, count in machine.code.items():
        assert count["HGMMA"] == 8 and count["HMMA"] == 0, kernel  # four steps of 16 features, two halves
        assert count["UTMALDG"] == 2 and count["USETMAXREG"] == 2, kernel
        stores = kernel[0] == "Weights" or (kernel[0] == "Sigmoid" and kernel[3] == "1")
        assert (count["UTMASTG"] > 0) == (count["STSM"] > 0) == stores, kernel


def test_one_exponential_a_logit(machine: Machine) -> None:
    """In the plain path and in the masked one; a thread has as many logits as the tile has columns."""
    for kernel, count in machine.code.items():
        assert count["MUFU.EX2"] == 2 * kernel[2], kernel


def test_a_spill_is_found(tmp_path: Path) -> None:
    """The reading itself: wide tiles with labels, which spill."""
    for name in ("csrc", "CMakeLists.txt"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    header = tmp_path / "csrc/fastclip.h"
    text = header.read_text()
    assert "FASTCLIP_CUDA_TILE_N_LABELS = 128" in text
    header.write_text(text.replace("FASTCLIP_CUDA_TILE_N_LABELS = 128", "FASTCLIP_CUDA_TILE_N_LABELS = 192"))
    machine = _compile(tmp_path, tmp_path / "build")
    assert any("Statistics" in fault for fault in _faults(machine)) and machine.warnings
