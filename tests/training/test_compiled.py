"""Compiled towers: the same losses, few graphs, and no silent return to eager code."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastclip.parity.promised import LOSS
from support import needs

needs("train")
from fastclip.models import create_model
from fastclip.training import Run, TrainOptions, from_options, train
from fastclip.training.from_options import resolve_compile
from fastclip.training.options import read_options
from fastclip.training.ranks import World
from fastclip.training.step import compiled
from fastclip.training.step.compiled import Compilation, blocks, eager
from support.digits_run import digits_run

CPU = World(0, 1, torch.device("cpu"), None)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace without generating code, which takes a minute per model."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "_BACKEND", "eager")


def run(folder: Path, **changed: Any) -> Run:
    return train(digits_run(folder, **{"micro_batch": 8, **changed}))


def assert_near(ours: list[float], theirs: list[float]) -> None:
    assert len(ours) == len(theirs) and all(abs(a - b) <= LOSS * abs(b) for a, b in zip(ours, theirs)), (ours, theirs)


def test_the_blocks_of_every_kind_of_tower_are_compiled() -> None:
    for name, classes in {
        "ViT-B-32": (["_ClassTokenBlock"] * 12, ["_Block"] * 12),
        "RN50": (["BottleneckBlock"] * 16, ["_Block"] * 12),
        "florence-tiny": (["SwinTransformerBlock"] * 4, ["_Block"] * 2),
        "align-tiny": (["ConvBnAct", *["EdgeResidual"] * 2, *["InvertedResidual"] * 2], ["BertLayer"] * 2),
    }.items():
        model = create_model(name, device="meta")
        assert tuple([type(x).__name__ for x in blocks(tower)] for tower in (model.visual, model.text)) == classes


def test_compiled_run_has_the_same_losses_and_says_what_compiling_took(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = run(tmp_path / "a", val_data="digits")
    with caplog.at_level(logging.INFO):
        whole = run(tmp_path / "b", compile=True, val_data="digits")
    assert_near(whole.losses, plain.losses)
    assert read_options(tmp_path / "b" / "config.yaml").compile is True
    assert read_options(tmp_path / "a" / "config.yaml").compile is None  # may be used on a machine with a GPU
    said = [re.search(r"step (\d+): compiling the towers took \d+ s: (\d+) graphs", r.message) for r in caplog.records]
    first, *_ = [match for match in said if match]
    # Either tower has two graphs, one for its last block and one for all others, with and without gradients, for one
    # size of images and at most three widths of texts
    assert first[1] == "0" and 8 <= int(first[2]) <= 4 + 4 * 3


@pytest.mark.skipif(sys.platform != "linux", reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compiled_dropout_is_that_of_a_run_without_compilation(
    tmp_path: Path, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ALIGN's text tower has dropout, whose masks gradient caching draws twice. Inductor takes minutes."""
    monkeypatch.setattr(compiled, "_BACKEND", compiler)
    plain, fast = (run(tmp_path / str(on), model="align-tiny", context_length=None, compile=on) for on in (False, True))
    assert_near(fast.losses, plain.losses)


def test_more_shapes_than_torch_compiles_by_default_all_get_a_graph() -> None:
    model = create_model("ViT-tiny")
    compilation, block = Compilation(model), blocks(model.text)[0]
    with compilation.of_step(0), torch.no_grad():
        for width in range(2, 14):
            block(torch.ones(2, width, 32))
    assert compilation.graphs == 12
    with eager(), torch.no_grad():
        block(torch.ones(2, 20, 32))
    with compilation.of_step(1):
        pass
    assert compilation.graphs == 12


BROKEN = """
import torch
from fastclip.training.step import compiled

def no_compiler(*_):
    raise RuntimeError("no C++ compiler\\nlong advice")

compiled._BACKEND = no_compiler
print(compiled.obstacle(torch.device("cpu")))
"""


def test_without_a_compiler_an_explicit_option_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # In a process of its own: a compilation that fails leaves traces in torch, which change the sizes of other tests
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, check=True)
    assert "no C++ compiler" in done.stdout and "long advice" not in done.stdout
    monkeypatch.setattr(from_options, "obstacle", lambda device: done.stdout.strip())
    options = TrainOptions(data="digits", model="ViT-tiny", output="x")
    assert resolve_compile(options, CPU).compile is False  # the default on a CPU, which needs no compiler
    with pytest.raises(ValueError, match=r"--compile: .*no C\+\+ compiler.*--no-compile trains without it"):
        resolve_compile(replace(options, compile=True), CPU)


def test_without_a_compiler_the_default_warns_and_trains_eagerly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(from_options, "obstacle", lambda device: "Cannot find a working triton installation")
    options = TrainOptions(data="digits", model="ViT-tiny", output="x")
    assert resolve_compile(options, CPU._replace(device=torch.device("cuda"))).compile is False
    assert [r.levelno for r in caplog.records if "Cannot find a working triton" in r.message] == [logging.WARNING]
    monkeypatch.setattr(from_options, "obstacle", lambda device: None)
    assert resolve_compile(options, CPU._replace(device=torch.device("cuda"))).compile is True


def test_resumed_compiled_run_has_the_same_bits(tmp_path: Path) -> None:
    whole = run(tmp_path / "a", compile=True)
    begun = run(tmp_path / "b", compile=True, stop_after=1)
    torch._dynamo.reset()  # a resumed run is another process
    assert begun.losses + run(tmp_path / "b", compile=True, resume="auto").losses == whole.losses
