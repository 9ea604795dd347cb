"""Fixtures and options of all tests. Without a GPU, Triton's kernels run in its interpreter and Hopper's in the
emulator of csrc/tests, on the CPU.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# One thread per process: matrices as small as the tests' cost several times more on two busy cores than on one, and the
# processes of pytest-xdist share the cores. Tests of threads request them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

pytest.register_assert_rewrite("support")
from support import ROOT, once, pairwise, processes  # noqa: E402

# inductor's cache ignores the instruction set for which its code was compiled; on another one, the code gives wrong
# numbers or crashes
_COMPILED = ROOT / "build" / "inductor" / f"{torch.__version__}-{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_COMPILED))
# Worker processes of inductor cost more in imports than they save, because kernels are few and tests run side by side
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run every case: whole matrices, and cases marked full")


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        items[:], deselected = pairwise.split(items)
        config.hook.pytest_deselected(items=deselected)


@pytest.fixture(scope="session", autouse=True)
def _folders(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> None:
    """Keep files of the tests out of the user's home, and apart from those of concurrent runs."""
    os.environ["FASTCLIP_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    once.begin(tmp_path_factory, beside_others=hasattr(request.config, "workerinput"))


@pytest.fixture(scope="module", autouse=True)
def _no_process_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail if a module leaves processes behind. A pytest-xdist process checks its own children."""
    processes.adopt()
    yield
    if left := processes.left_behind():
        pytest.fail(f"{request.node.name} left processes behind, now killed:\n" + "\n".join(left), pytrace=False)


@pytest.fixture(autouse=True)
def _level_of_the_log() -> Iterator[None]:
    """Restore the log level, which commands that run in this process set."""
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
    """Seed the random numbers, so that a test draws the same ones whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def embedder() -> Any:
    """ViT-tiny with its tokenizer; its random weights are the same in every module."""
    from fastclip.models import create_model
    from fastclip.models.embedder import Embedder
    from fastclip.models.tokenizers.clip import ClipTokenizer

    torch.manual_seed(0)
    return Embedder(create_model("ViT-tiny"), ClipTokenizer(), name="ViT-tiny")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the model of `embedder`."""
    from fastclip.models import create_model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    create_model("ViT-tiny").save_pretrained(folder)
    return folder


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill the memory of torch.empty with NaN, so that an output that is not written is detected."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def emulated_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the CUDA backend serve the CPU."""
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
    """Let the CUDA backend serve, on a Hopper GPU or, without a GPU, in the emulator."""
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
    """Kind of a test that `kinds.each_kind` parametrises."""
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
