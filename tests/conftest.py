"""Where there is no GPU Triton's kernels run in its interpreter and Hopper's in csrc/tests' emulator, on the CPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# One thread a process: matrices as small as the tests' cost several times more on two busy cores than on one, and
# several processes of pytest-xdist share the cores. Tests of threads ask for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

pytest.register_assert_rewrite("support")
from support import ROOT, once, pairwise, processes  # noqa: E402

# inductor's cache does not know for which instruction set its code was made: on another one, wrong numbers or a crash
_COMPILED = ROOT / "build" / "inductor" / f"{torch.__version__}-{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_COMPILED))
# inductor's worker processes cost more in imports than they save: kernels are few, and tests run side by side
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run every case: whole matrices, and cases marked full")


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        items[:], deselected = pairwise.split(items)
        config.hook.pytest_deselected(items=deselected)


@pytest.fixture(scope="session", autouse=True)
def _folders(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> None:
    """Keep what tests leave behind out of the user's home, and apart from what runs beside them."""
    os.environ["FASTCLIP_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    once.begin(tmp_path_factory, beside_others=hasattr(request.config, "workerinput"))


@pytest.fixture(scope="module", autouse=True)
def _no_process_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where a process of pytest-xdist runs a part of a module, its own children are looked for."""
    processes.adopt()
    yield
    if left := processes.left_behind():
        pytest.fail(f"{request.node.name} left processes behind, now killed:\n" + "\n".join(left), pytrace=False)


@pytest.fixture(autouse=True)
def _level_of_the_log() -> Iterator[None]:
    """A command that a test runs in this process sets the level, for the test alone."""
    logger = logging.getLogger("fastclip")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(autouse=True)
def _children_end() -> Iterator[None]:
    yield
    processes.end_children()


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """A test draws the same random numbers whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def embedder() -> Any:
    """ViT-tiny, whose random weights are the same in every module, with its tokenizer."""
    from fastclip.models import create_model
    from fastclip.models.embedder import Embedder
    from fastclip.models.tokenizers.clip import ClipTokenizer

    torch.manual_seed(0)
    return Embedder(create_model("ViT-tiny"), ClipTokenizer(), name="ViT-tiny")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same model."""
    from fastclip.models import create_model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    create_model("ViT-tiny").save_pretrained(folder)
    return folder


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """What torch.empty returns is filled with NaN: an output that is not written is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def emulated_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The CUDA backend serves the CPU."""
    from fastclip._backends import cuda
    from support import emulated, interpreter

    try:
        module = emulated.module()
    except emulated.Missing as missing:
        pytest.skip(str(missing))
    interpreter.mend_bfloat16(monkeypatch)
    monkeypatch.setattr(cuda, "_module", module)
    monkeypatch.setattr(cuda, "_not_loaded", None)
    return module


@pytest.fixture
def served_by_cuda(request: pytest.FixtureRequest) -> None:
    """The CUDA backend by a Hopper GPU, without a GPU by the emulator."""
    import torch

    import fastclip
    from fastclip._backends import cuda

    if not torch.cuda.is_available():
        request.getfixturevalue("emulated_cuda")
    elif (reason := fastclip.backends()["cuda"]) != "available" or (
        reason := cuda.refuses(torch.empty(1, dtype=torch.float16, device="cuda"), True)
    ):
        pytest.skip(f"cuda: {reason}")
    cuda._sizes.cache_clear()


@pytest.fixture
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a test that is parametrised by `kinds.each_kind`."""
    import fastclip
    from fastclip._backends import pick

    kind = request.param
    if kind.backend == "cuda" and kind.device == "cpu":
        request.getfixturevalue("emulated_cuda")
    if (state := fastclip.backends()[kind.backend]) != "available":
        pytest.skip(f"{kind.backend}: {state}")
    if kind.for_gpus and kind.device == "cpu":
        from support import interpreter

        interpreter.replace_language_once()
        interpreter.widen_programs(monkeypatch)
    if kind.device == "cuda":
        try:
            pick(kind.backend, torch.empty(1, 1, dtype=kind.dtype, device="cuda"))
        except RuntimeError as refused:  # another GPU
            pytest.skip(str(refused))
    return kind


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Any:
    from support.kernels import Launches

    return Launches(monkeypatch)
