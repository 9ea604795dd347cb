"""The kernels of the Triton launchers, compiled for GPUs that need not be present: machine code without spills.

Every configuration that the launchers can choose is compiled for sm_80 (pointers) and sm_90 (tensor descriptors,
wgmma).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from support import ROOT
from support.store import sources, stored

triton = pytest.importorskip("triton")
COMPILED = ROOT / "tests/support/compiled.py"
TILES = {"contrastive_fwd_kernel", "contrastive_bwd_kernel", "sigmoid_fwd_kernel"}
PLAIN = {f"plain_{name}_kernel" for name in ("norms", "reduce", "loss", "finish")} | {"copy_sides_kernel"}
SIGMOID = {f"sigmoid_{name}_kernel" for name in ("norms", "finish", "bwd")}
DISTILL = {"distill_fwd_kernel", "distill_bwd_kernel"}
HALF = {90: {"sigmoid_bound_kernel"}, 80: set()}  # float16 alone has it, which is compiled for Hopper
# Bytes of shared memory that a program may use: on an H100, and on the smallest chip from 8.0 on (8.6, 8.9, 12.0)
SHARED = {90: 227 * 1024, 80: 99 * 1024}
# Two of these programs must fit on a Hopper multiprocessor, so that one loads while the other is in its epilogue
TWO_AT_ONCE = {"contrastive_fwd_kernel", "contrastive_bwd_kernel"}


def _compile(*what: str) -> list[list[dict[str, Any]]]:
    """Compile each of `what` in its own process, side by side, and return the kernels' reports. The kernels of this
    process may be those of the interpreter.
    """
    # this checkout's package takes precedence over an installed one
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    running = [
        subprocess.Popen([sys.executable, COMPILED, word], stdout=subprocess.PIPE, text=True, env=environment)
        for word in what
    ]
    outputs = [process.communicate()[0] for process in running]
    assert all(process.returncode == 0 for process in running)
    return [json.loads(text) for text in outputs]


def _report(name: str, *what: str) -> dict[str, list[dict[str, Any]]]:
    """Return the reports of `_compile`, compiled once per state of the sources."""

    def make(source: Path, place: Path) -> None:
        for word, machines in zip(what, _compile(*what)):
            (place / f"{word}.json").write_text(json.dumps(machines))

    backend = [
        f"fastclip/{name}.py" for name in ("system/env", "_backends/problem", "_backends/reference", "_backends/triton")
    ]
    files = sources("triton_kernels", *backend, "tests/support/compiled.py")
    place = stored(name, files, (triton.__version__, torch.__version__), make)
    return {word: json.loads((place / f"{word}.json").read_text()) for word in what}


@pytest.fixture(scope="module")
def machines() -> dict[int, list[dict[str, Any]]]:
    return {int(chip): found for chip, found in _report("triton", *map(str, SHARED)).items()}


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("chip", SHARED)
def test_no_kernel_spills(machines: dict[int, list[dict[str, Any]]], chip: int) -> None:
    found = machines[chip]
    assert {m["kernel"] for m in found} >= TILES | PLAIN | SIGMOID | DISTILL | HALF[chip]
    told = [
        f"{m['kernel']} {m['variant']}: {m}" for m in found if m["stack"] or m["local"] or m.get("LDL") or m.get("STL")
    ]
    assert not told, "\n".join(told)
    assert all(m["shared"] <= SHARED[chip] for m in found)


def test_every_configuration_is_compiled(machines: dict[int, list[dict[str, Any]]]) -> None:
    from fastclip.triton_kernels.launch import CONFIGS

    for (kernel, chip, dtype, labels), config in CONFIGS.items():
        variants = [
            m["variant"].split()
            for m in machines[90 if chip == "hopper" else 80]
            if m["kernel"] == f"{kernel.removesuffix('_repair')}_kernel"
            and (m["dtype"] == "float32") == (dtype == "fp32")
        ]
        block, exact = [str(size) for size in config[:3]], kernel.endswith("_repair")
        assert any(v[:3] == block and ("LABELS" in v) == labels and ("EXACT" in v) == exact for v in variants), (
            kernel,
            chip,
            dtype,
            labels,
        )


@pytest.mark.parametrize("chip", SHARED)
def test_tiles_with_limits_are_equal(machines: dict[int, list[dict[str, Any]]], chip: int) -> None:
    """Forward, backward and repairs with limits add the terms of a dot product in the same order, because they have the
    same tile: a pair near its limit is left out by all of them or by none.
    """
    for dtype in ("bfloat16", "float32"):
        tiles: dict[tuple[str, bool, bool], set[Any]] = {}
        for m in machines[chip]:
            flags = m["variant"].split()
            if m["kernel"] in TILES - {"sigmoid_fwd_kernel"} and m["dtype"] == dtype and "LIMITS" in flags:
                kind = m["kernel"], "EXACT" in flags, "LABELS" in flags
                tiles.setdefault(kind, set()).add((*flags[:3], m["warps"]))
        assert len(tiles) == 8  # forward, backward, their repairs, each without and with labels
        assert len(set.union(*tiles.values())) == 1, tiles


def test_tensor_cores(machines: dict[int, list[dict[str, Any]]]) -> None:
    """Tiles use wgmma and the TMA on Hopper, and mma on Ampere."""
    for m in machines[90]:
        if m["kernel"] in TILES:
            assert m["HGMMA"] > 0 and m["HMMA"] == 0 and m["UTMALDG"] > 0, m
            assert "DESCRIPTOR" in m["variant"].split()
    for m in machines[80]:
        if m["kernel"] in TILES:
            assert m["HMMA"] > 0 and "DESCRIPTOR" not in m["variant"].split(), m


def test_one_exponential_a_logit(machines: dict[int, list[dict[str, Any]]]) -> None:
    for m in (m for found in machines.values() for m in found):
        if m["kernel"] in TILES:
            rows, columns, *flags = m["variant"].split()
            logits = int(rows) * int(columns) // (32 * m["warps"])  # logits per thread
            exact = 2 * (2 if "LABELS" in flags and "fwd" in m["kernel"] else 1)
            assert m["MUFU.EX2"] == logits * (exact if "EXACT" in flags else 1), m


def test_two_programs_a_multiprocessor(machines: dict[int, list[dict[str, Any]]]) -> None:
    """Two programs fit on a multiprocessor: one's products run during the other's epilogue, or the tensor cores would
    wait.
    """
    for m in machines[90]:
        if m["kernel"] in TWO_AT_ONCE and m["dtype"] == "bfloat16" and m["warps"] == 4 and "EXACT" not in m["variant"]:
            assert 2 * (m["shared"] + 1024) <= 228 * 1024
            assert 2 * m["warps"] * 32 * -(-m["registers"] // 8) * 8 <= 65536, m


def test_a_spill_is_found() -> None:
    """The check detects a kernel that spills."""
    tiles = [m for m in _report("triton-spilling", "spilling")["spilling"] if m["kernel"] == "contrastive_bwd_kernel"]
    (m,) = (m for m in tiles if "EXACT" not in m["variant"].split())
    assert m["stack"] > 0 and m["LDL"] > 0 and m["STL"] > 0
