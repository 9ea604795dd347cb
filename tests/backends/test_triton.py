"""Properties of the Triton backend alone: two ways to read tiles, repairs and maxima in its own kernels, the
interpreter.

losses/test_accuracy.py and backends/test_kernels.py test what it shares with other backends.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from fastclip.triton_kernels import contrastive_bwd_vectors, contrastive_fwd_reduce, features, launch, planning

import fastclip
from fastclip import triton_kernels
from fastclip._backends import reference
from fastclip._backends import triton as backend
from fastclip._backends.problem import Problem
from fastclip.ops import contrastive_maxima
from fastclip.ops.contrastive import flat
from support.accuracy import check, pairs, poisoned, random_labels
from support.kernels import Launches
from support.kinds import DEVICE, GPU, Kind, uneven

if backend.missing():
    pytest.skip(str(backend.missing()), allow_module_level=True)

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), *([pytest.mark.gpu] if GPU else [])]
DTYPES = [torch.float32, torch.float16]
TRITON_LOSS = Kind("triton", torch.float32).loss


@pytest.fixture(params=["pointers", "descriptors"])
def accesses(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with each way of reading tiles, regardless of the machine's own choice."""
    if GPU and request.param == "descriptors" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this GPU has no tensor memory accelerator")
    monkeypatch.setattr(launch, "uses_descriptors", lambda x: request.param == "descriptors")
    monkeypatch.setattr(planning, "plans", {})
    return request.param


@pytest.mark.pairwise
@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "labels"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_accesses_accurate(accesses: str, dtype: torch.dtype, labels: bool, launches: Launches) -> None:
    M, N = (100, 140) if labels else (140, 140)
    image, text = (poisoned(x, dtype) for x in pairs(M, N, 72))
    y = random_labels(M, N, 40) if labels else None
    check(TRITON_LOSS(labels=y), image, text, 14.3, labels=y)
    tile = next(args for name, args in zip(launches.names, launches.arguments) if name == "contrastive_bwd_kernel")
    assert isinstance(tile[0], launch.Matrix) == (accesses == "pointers")


@pytest.mark.pairwise
@pytest.mark.skipif(GPU, reason="compiled kernels do not see the changed constants")
@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "labels"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repair_forced(
    monkeypatch: pytest.MonkeyPatch, accesses: str, dtype: torch.dtype, labels: bool, launches: Launches
) -> None:
    """The repair is right for ordinary batches too; the guards are set so that every batch needs it."""
    monkeypatch.setattr(contrastive_fwd_reduce, "_SAFE_SUM", torch.inf)
    monkeypatch.setattr(contrastive_bwd_vectors, "_LOWEST", torch.inf)
    M, N = (100, 140) if labels else (140, 140)
    image, text = (poisoned(x, dtype) for x in pairs(M, N, 40))
    y = random_labels(M, N, 40) if labels else None
    check(TRITON_LOSS(labels=y), image, text, 14.3, labels=y)
    assert launches.repaired == [True, True]


@pytest.mark.pairwise
@pytest.mark.parametrize("layout", ["transposed", "expanded", "every other column", "one row", "unaligned"])
@pytest.mark.parametrize("normalize", [True, False])
def test_layouts(layout: str, normalize: bool, accesses: str) -> None:
    image, text = pairs(40, 40, 24)
    if layout == "transposed":
        image = image.T.contiguous().T
    elif layout == "expanded":
        image = image[:1].expand(40, 24)
    elif layout == "every other column":
        image, text = (torch.cat([x, x], 1)[:, ::2] for x in (image, text))
    elif layout == "one row":
        image, text = image[:1], text[:1]
    else:
        image = torch.cat([torch.zeros(1), image.flatten()])[1:].view(40, 24)
    loss = TRITON_LOSS(normalize=normalize)
    slack = 8.0 if layout == "expanded" else 1.0  # equal rows round in the same direction
    check(lambda *x: loss(*x), image, text, 3.0, normalize=normalize, slack=slack)
    x, y = image.to(DEVICE), text.to(DEVICE)
    ours = fastclip.contrastive_loss(x, y, 3.0, normalize=normalize, backend="triton")
    dense = fastclip.contrastive_loss(image, text, 3.0, normalize=normalize, backend="reference")
    torch.testing.assert_close(ours.cpu(), dense, rtol=1e-5, atol=1e-6)


def test_largest_logits_of_nan_are_nan() -> None:
    image, text = (x.to(DEVICE) for x in pairs(9, 9, 8))
    text[4, 2] = torch.nan
    rows, cols = contrastive_maxima(Problem(image, text, torch.tensor(3.0, device=DEVICE)), "triton")
    assert rows.neg_top is not None and rows.neg_top.isnan().tolist() == [i != 4 for i in range(9)]
    assert cols.neg_top is not None and cols.neg_top.isnan().tolist() == [j == 4 for j in range(9)]


def test_norms_are_bounded_as_the_references() -> None:
    assert features.EPS.value == reference.EPS


def test_strided_labels() -> None:
    image, text = (x.to(DEVICE) for x in pairs(30, 30, 8))
    y = torch.randint(0, 9, (60,), dtype=torch.int32, device=DEVICE)[::2]
    p = Problem(image, text, torch.tensor(3.0, device=DEVICE), (y, y.flip(0)), 0, False, True)
    for a, b in zip(flat(backend.contrastive_fwd(p)), flat(reference.contrastive_fwd(p))):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "labels"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stats_equal_the_reference(dtype: torch.dtype, labels: bool) -> None:
    image, text = (x.to(dtype) for x in pairs(150, 150, 24))
    text[7] = text[9]  # a tie
    y = {}
    if labels:
        y = dict(zip(("image_labels", "text_labels"), random_labels(150, 150, 60)))
    ours = fastclip.contrastive_stats(
        image.to(DEVICE), text.to(DEVICE), 14.3, backend="triton", **{k: v.to(DEVICE) for k, v in y.items()}
    )
    true = fastclip.contrastive_stats(image.double(), text.double(), 14.3, backend="reference", **y)
    for name, a, b in zip(ours._fields, ours, true):
        if a.dtype == torch.bool:
            assert torch.equal(a.cpu(), b), name
        else:
            torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-5)


def test_sigmoid_both_accesses_and_blocks(accesses: str, monkeypatch: pytest.MonkeyPatch, launches: Launches) -> None:
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.04")
    image, text = (poisoned(x, torch.float16) for x in pairs(200, 200, 24))
    check(TRITON_LOSS(), image, text, 10.0, bias=-10.0)
    image, text = (poisoned(x, torch.float32) for x in uneven(200, 200))
    check(TRITON_LOSS(normalize=False), image, text, 0.05, bias=-4.0, normalize=False)
    assert launches.names.count("sigmoid_fwd_kernel") == 8


def test_old_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "TRITON", "3.5.1")
    backend.import_error.cache_clear()
    try:
        assert fastclip.backends()["triton"] == "it needs Triton 3.6 or newer, but 3.5.1 is installed"
        with pytest.raises(RuntimeError, match=r"cannot serve this call: it needs Triton 3\.6 or newer"):
            fastclip.contrastive_loss(torch.eye(4), torch.eye(4), backend="triton")
    finally:
        backend.import_error.cache_clear()


def test_without_a_gpu_there_is_a_reason() -> None:
    code = "import fastclip; print(fastclip.backends()['triton'])"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("torch sees no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU")


@pytest.mark.skipif(GPU, reason="what the interpreter does not serve")
def test_interpreter_serves_by_name_only() -> None:
    image, text = pairs(8, 8, 4)
    assert fastclip.backends()["triton"] == "available"
    assert backend.refuses(image, named=True) is None
    assert "to debug it in Triton's interpreter, pass backend='triton'" in str(backend.refuses(image, named=False))
    with pytest.raises(RuntimeError, match="bfloat16 wrongly"):
        fastclip.contrastive_loss(image.bfloat16(), text.bfloat16(), 5.0, backend="triton")
    with pytest.raises(RuntimeError, match="supports float32, bfloat16 and float16, not float64"):
        fastclip.contrastive_loss(image.double(), text.double(), 5.0, backend="triton")
