"""Compiled towers: the same losses, few graphs, and no silent return to eager code."""

from __future__ import annotations

import logging
import os
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
from fastclip.models.towers import text
from fastclip.training import Run, TrainOptions, train
from fastclip.training.from_options import resolve_compile
from fastclip.training.options import read_options
from fastclip.training.ranks import World
from fastclip.training.step import compiled, update
from fastclip.training.step.compiled import Compilation, blocks, eager, obstacle, untraceable
from support.digits_run import digits_run

CPU = World(0, 1, torch.device("cpu"), None)
OPTIONS = TrainOptions(data="digits", model="ViT-tiny", output="x")


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
        whole = run(tmp_path / "b", compile=True, keep_graphs=0, val_data="digits")
    assert_near(whole.losses, plain.losses)
    assert read_options(tmp_path / "b" / "config.yaml").compile is True
    assert read_options(tmp_path / "a" / "config.yaml").compile is None  # may be used on a machine with a GPU
    said = [re.search(r"step (\d+): compiling the towers took \d+ s: (\d+) graphs", r.message) for r in caplog.records]
    first, *_ = [match for match in said if match]
    # Either tower has two graphs, one for its last block and one for all others, with and without gradients
    assert first[1] == "0" and int(first[2]) == 8


@pytest.mark.skipif(sys.platform != "linux", reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compiled_dropout_is_that_of_a_run_without_compilation(
    tmp_path: Path, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ALIGN's text tower has dropout, whose masks gradient caching draws twice. Inductor takes minutes."""
    monkeypatch.setattr(compiled, "_BACKEND", compiler)
    monkeypatch.setattr(update, "_FEW_LENGTHS", 1)  # texts of another width have other masks
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


def printed(program: str, *words: str) -> list[str]:
    """Run a program in a process of its own, and return the lines that it prints.

    A compilation that fails leaves traces in torch, which change the sizes of other tests, and processes that are
    forked after a backward pass in a thread cannot make one.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()


BROKEN = """
import torch
from fastclip.training.step import compiled

def no_compiler(*_):
    raise RuntimeError("no C++ compiler\\nlong advice")

compiled._BACKEND = no_compiler
print(compiled.obstacle(torch.device("cpu")))
"""


def test_without_a_compiler_an_explicit_option_is_an_error() -> None:
    (told,) = printed(BROKEN)
    assert "no C++ compiler" in told and "long advice" not in told
    with pytest.raises(ValueError, match=r"--compile: .*no C\+\+ compiler.*--no-compile trains without it"):
        resolve_compile(replace(OPTIONS, compile=True), CPU, lambda: told, asked=True)


def test_without_a_compiler_the_default_warns_and_trains_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    cuda = CPU._replace(device=torch.device("cuda"))
    assert resolve_compile(OPTIONS, cuda, lambda: "Cannot find a working triton", asked=None).compile is False
    assert [r.levelno for r in caplog.records if "Cannot find a working triton" in r.message] == [logging.WARNING]
    assert resolve_compile(OPTIONS, cuda, lambda: None, asked=None).compile is True
    assert resolve_compile(OPTIONS, CPU, lambda: "unused", asked=None).compile is False


def test_torch_without_deterministic_compilation_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config

    assert obstacle(torch.device("cpu"), deterministic=True) is None
    monkeypatch.setattr(torch._inductor, "config", object())  # as in torch 2.8
    assert "not deterministic" in (obstacle(torch.device("cpu"), deterministic=True) or "")


UNTRACEABLE = """
import logging
import sys
from pathlib import Path
import torch
from fastclip.models import create_model
from fastclip.models.towers import text
from fastclip.training import from_options, train
from fastclip.training.step import compiled
from support.digits_run import digits_run

logging.getLogger(from_options.__name__).addHandler(logging.StreamHandler(sys.stdout))
plain = text._Block.forward

def breaks(self, *args, **named):
    torch._dynamo.graph_break()
    return plain(self, *args, **named)

def breaks_under_autocast(self, *args, **named):
    if torch.is_autocast_enabled("cpu"):
        torch._dynamo.graph_break()
    return plain(self, *args, **named)

def refusal(folder, **changed):
    try:
        train(digits_run(folder, **changed))
    except ValueError as error:
        return error

compiled._BACKEND = "eager"
text._Block.forward = breaks
model = create_model("ViT-tiny")
print(compiled.untraceable(model))
model.text(torch.ones(2, 20, dtype=torch.int64))  # is not compiled any more
folder = Path(sys.argv[1])
print(refusal(folder, compile=True))
print((folder / "config.yaml").exists())
from_options._COMPILED = ("cpu",)  # by default, as on a GPU
print(len(train(digits_run(folder / "default")).losses))
text._Block.forward = breaks_under_autocast
print(compiled.untraceable(model))
print(refusal(folder / "bf16", compile=True, precision="bf16"))
"""


def test_block_that_cannot_be_traced_is_found_before_the_first_step(tmp_path: Path) -> None:
    found, told, config, warned, steps, plain, under_autocast = printed(UNTRACEABLE, str(tmp_path))
    assert "graph_break" in found and config == "False"
    for refused in (told, under_autocast):
        assert re.search(r"^--compile: .*graph_break.*--no-compile trains without it", refused)
    assert re.search("the towers are not compiled: .*graph_break", warned) and steps == "3" and plain == "None"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        ("backend='inductor' raised:\nRuntimeError: no compiler.\nadvice", "RuntimeError: no compiler"),
        ("Branching\n  Explanation: Detected branching.\n  Hint: do not", "Branching: Detected branching"),
        ("", "ValueError"),
    ],
)
def test_cause_of_a_failure_is_named_without_advice(error: str, cause: str) -> None:
    assert compiled._cause(ValueError(error)) == cause
    try:
        raise RuntimeError("Observed exception\n  Explanation: It has no handler.") from ValueError(error)
    except RuntimeError as outer:
        assert compiled._cause(outer) == f"Observed exception: {cause}"


def test_trial_does_not_hide_that_memory_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    model = create_model("ViT-tiny")

    def full(images: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.visual, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        untraceable(model)


def test_trial_leaves_the_model_as_it_was() -> None:
    model = create_model("RN-tiny")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    assert untraceable(model) is None
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(x._compiled_call_impl is None for x in model.modules())


IN_A_THREAD = """
from concurrent.futures import ThreadPoolExecutor
import torch
from fastclip.models import create_model
from fastclip.training.step import compiled

compiled._BACKEND = "eager"
model = create_model("ViT-tiny")
model.set_grad_checkpointing()
compilation = compiled.Compilation(model)
with compilation.of_step(0), ThreadPoolExecutor(1) as thread:
    for width in range(2, 14):
        features = model.text(torch.ones(2, width, dtype=torch.int64))
        thread.submit(features.sum().backward).result()
print(compilation.graphs)
"""


def test_backward_pass_in_another_thread_uses_the_graphs_of_the_forward_pass() -> None:
    """CUDA's backward pass has a thread of its own, to which dynamo's settings do not apply. Checkpointing calls the
    blocks there again, and with more shapes than torch compiles by default, a missing graph would be an error.
    """
    assert printed(IN_A_THREAD) == [str(2 * 12)]


def test_compiled_towers_meet_few_lengths_of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: set[int] = set()
    forward = text.TextTransformer.forward

    def noted(self: text.TextTransformer, ids: torch.Tensor) -> torch.Tensor:
        widths.add(ids.shape[1])
        return forward(self, ids)

    monkeypatch.setattr(text.TextTransformer, "forward", noted)
    run(tmp_path, compile=True, context_length=40)
    assert widths and widths <= {16, 32, 40}


def test_resumed_compiled_run_has_the_same_bits(tmp_path: Path) -> None:
    whole = run(tmp_path / "a", compile=True)
    begun = run(tmp_path / "b", compile=True, stop_after=1)
    torch._dynamo.reset()  # a resumed run is another process
    assert begun.losses + run(tmp_path / "b", compile=True, resume="auto").losses == whole.losses
