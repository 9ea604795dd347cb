"""The GPU backends on a GPU: sizes of several waves, memory, streams, the sanitizer, NCCL. Run with `pytest -m gpu`.

Tests that the interpreter can run too are in losses/test_accuracy.py and
backends/test_kernels.py, which also run on a GPU.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import fastclip
from fastclip._backends import pick
from fastclip.distributed import before_group
from fastclip.parity.promised import LOSS, TENSOR_CORES
from support.accuracy import check, poisoned
from support.kinds import GPU_KINDS, Kind, each_kind, uneven

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
BF16_KINDS = [Kind(backend, torch.bfloat16) for backend in ("triton", "cuda")]


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("D", [256, 512, 640, 768, 1024, 1376])
@each_kind(GPU_KINDS)
def test_loss_and_gradients_accurate(kind: Kind, D: int, scale: float) -> None:
    """Both gates pass at a size of several waves that no tile divides."""
    image, text = kind.pairs(1500, 1500, D)
    check(kind.loss(), image, text, scale)


@pytest.mark.parametrize("options", [{}, {"exclude_self": True}, {"label_smoothing": 0.1}], ids=str)
@each_kind(GPU_KINDS)
def test_labels_accurate(kind: Kind, options: dict[str, Any]) -> None:
    image, text = kind.pairs(700, 700, 512)
    y = torch.randint(0, 200, (700,)), torch.randint(0, 200, (700,))
    check(kind.loss(labels=y, **options), image, text, 14.3, labels=y, **options)


@each_kind(GPU_KINDS)
def test_sigmoid_accurate(kind: Kind) -> None:
    image, text = kind.pairs(1500, 1500, 512)
    check(kind.loss(), image, text, 10.0, bias=-10.0)


@each_kind(GPU_KINDS)
def test_repair_accurate(kind: Kind) -> None:
    image, text = (poisoned(x, kind.dtype) for x in uneven(1500, 1500, 256, largest=1.2))
    check(kind.loss(normalize=False), image, text, 3.0, normalize=False)


def features(N: int, D: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    image = F.normalize(torch.randn(N, D, device="cuda", generator=generator), dim=1)
    noise = F.normalize(torch.randn(N, D, device="cuda", generator=generator), dim=1)
    return [x.to(dtype).requires_grad_() for x in (image, F.normalize(image + 2 * noise, dim=1))]


def truth_by_rows(image: Tensor, text: Tensor, scale: float, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss, and d_image of the sampled rows, in fp64, computed in blocks of logits. The log-sum-exps of a
    million rows are computed in fp32, because fp64 would take minutes.
    """
    u, v = (F.normalize(x.detach().double(), dim=1) for x in (image, text))
    N = len(u)
    block = max(2**27 // N, 1)
    lses = [[], []]
    for a, b, out in ((u, v, lses[0]), (v, u, lses[1])):
        if N >= 2**20:
            a, b = a.float(), b.float()
        for rows in a.split(block):
            out.append((scale * rows @ b.T).logsumexp(1).double())
    row, col = (torch.cat(x) for x in lses)
    own = scale * (u * v).sum(1)
    loss = 0.5 * ((row - own).mean() + (col - own).mean())
    z = scale * u[sample] @ v.T
    g = 0.5 / N * ((z - row[sample, None]).exp() + (z - col).exp())
    g[torch.arange(len(sample), device=z.device), sample] -= 1.0 / N
    d = scale * g @ v
    norm = image.detach().double()[sample].norm(dim=1, keepdim=True)
    return loss, (d - u[sample] * (u[sample] * d).sum(1, keepdim=True)) / norm


def check_sampled(kind: Kind, N: int, D: int) -> None:
    image, text = features(N, D, kind.dtype)
    loss = fastclip.contrastive_loss(image, text, 20.0, backend=kind.backend)
    loss.backward()
    sample = torch.randint(0, N, (64,), device="cuda")
    true, d_image = truth_by_rows(image, text, 20.0, sample)
    assert abs(float(loss) / float(true) - 1) < LOSS + 20 * D * TENSOR_CORES
    error = (image.grad[sample].double() - d_image).norm() / d_image.norm()
    assert error < (1e-4 if kind.dtype == torch.float32 else 2e-2), f"relative error {error:.1e}"


@pytest.mark.parametrize("N", [8192, 65536])
@each_kind(GPU_KINDS)
def test_large_batches_accurate(kind: Kind, N: int) -> None:
    """Losses that are split into row panels, row chunks and column blocks are accurate."""
    check_sampled(kind, N, 512)


@pytest.mark.parametrize(("N", "D"), [(65536, 768), (1048576, 64)])
@each_kind(BF16_KINDS)
def test_large_batches_of_other_widths_accurate(kind: Kind, N: int, D: int) -> None:
    check_sampled(kind, N, D)


@each_kind(GPU_KINDS)
def test_bitwise_repeatable(kind: Kind) -> None:
    image, text = features(3000, 512, kind.dtype)

    def run() -> list[Tensor]:
        loss = fastclip.contrastive_loss(image, text, 50.0, backend=kind.backend)
        return [loss.detach(), *torch.autograd.grad(loss, (image, text))]

    first = run()
    for _ in range(250):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


@pytest.mark.parametrize("loss", ["contrastive", "sigmoid"])
@each_kind(BF16_KINDS)
def test_no_host_synchronisation_and_graph_capture(kind: Kind, loss: str) -> None:
    """A step waits for no synchronisation, and a captured step replayed on new features gives what a plain
    step gives.
    """
    image, text = features(2000, 256, torch.bfloat16)
    scale, bias = (torch.tensor(x, device="cuda", requires_grad=True) for x in (10.0, -10.0))
    inputs = (image, text, scale) if loss == "contrastive" else (image, text, scale, bias)
    function = getattr(fastclip, f"{loss}_loss")

    def step() -> list[Tensor]:
        value = function(*inputs, backend=kind.backend)
        return [value.detach(), *torch.autograd.grad(value, inputs)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        with torch.no_grad():
            for x, y in zip((image, text), features(2000, 256, torch.bfloat16, seed)):
                x.copy_(y)
        graph.replay()
        for a, b in zip(captured, step()):
            assert torch.equal(a, b)


@pytest.mark.parametrize("N", [16384, 65536])
@each_kind(BF16_KINDS)
def test_peak_memory(kind: Kind, N: int) -> None:
    """Peak memory beyond the features and their gradients is the workspace and O((M + N) D); no N x N
    matrix is stored.
    """
    D = 768
    image, text = features(N, D, torch.bfloat16)
    image.grad, text.grad = torch.zeros_like(image), torch.zeros_like(text)
    fastclip.contrastive_loss(image, text, 20.0, backend=kind.backend).backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fastclip.contrastive_loss(image, text, 20.0, backend=kind.backend).backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 2**30 + 4 * N * D * 4 + 2**26
    if N == 65536:
        assert peak < 1.5 * 2**30


@each_kind(BF16_KINDS)
def test_compiled_and_autocast(kind: Kind) -> None:
    image, text = features(600, 128, torch.float32)

    def loss() -> Tensor:
        return fastclip.contrastive_loss(image, text, 20.0, backend=kind.backend)

    with torch.autocast("cuda", torch.bfloat16):
        under = loss()
        assert torch.equal(torch.compile(loss, fullgraph=True)().detach(), under.detach())
    wide = fastclip.contrastive_loss(image, text, 20.0, backend="triton")
    assert 0 < abs(float(under) - float(wide)) < 1e-2


@pytest.mark.parametrize("options", [{}, {"labels": True}, {"bias": -10.0}], ids=str)
@pytest.mark.parametrize("N", [129, 1500, 8192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_triton_and_cuda_agree(dtype: torch.dtype, N: int, options: dict[str, Any]) -> None:
    """Triton and CUDA agree. Each rounds a gradient once, so gradients differ by at most two
    roundings, and losses by those of fp32.
    """
    try:
        pick("cuda", torch.empty(1, 1, dtype=dtype, device="cuda"))
    except RuntimeError as refused:
        pytest.skip(str(refused))

    def run(backend: str) -> list[Tensor]:
        inputs = features(N, 512, dtype)
        y = torch.arange(N, device="cuda") * 7 % (N // 2)
        if bias := options.get("bias"):
            loss = fastclip.sigmoid_loss(*inputs, 10.0, bias, backend=backend)
        else:
            labels = {"image_labels": y, "text_labels": y} if "labels" in options else {}
            loss = fastclip.contrastive_loss(*inputs, 20.0, backend=backend, **labels)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    (loss, *gradients), (other_loss, *others) = run("triton"), run("cuda")
    assert abs(float(loss) / float(other_loss) - 1) < 2e-5
    for a, b in zip(gradients, others):
        assert (a.double() - b.double()).norm() <= torch.finfo(dtype).eps * a.double().norm()


def test_auto_takes_cuda_on_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0) or fastclip.backends()["cuda"] != "available":
        pytest.skip("this GPU is no Hopper, or the module was not built")
    image, _ = features(300, 64, torch.bfloat16)
    assert pick(None, image)[0] == "cuda" and pick(None, image.float())[0] == "triton"


CASE = """
import torch, fastclip
image, text = (torch.randn(300, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
y = torch.arange(300, device="cuda") % 90
for options in ({}, {"image_labels": y, "text_labels": y}, {"normalize": False}):
    fastclip.contrastive_loss(image, text, 10.0, backend="BACKEND", **options).backward()
fastclip.sigmoid_loss(image, text, 10.0, -10.0, backend="BACKEND").backward()
torch.cuda.synchronize()
"""


@pytest.fixture
def sanitizer() -> Iterator[str]:
    found = shutil.which("compute-sanitizer")
    if found is None:
        pytest.skip("compute-sanitizer is not installed")
    yield found


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@each_kind(BF16_KINDS)
def test_compute_sanitizer(kind: Kind, sanitizer: str, tool: str) -> None:
    program = CASE.replace("BACKEND", kind.backend)
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", program],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[Any]:
    """NCCL group of one rank, which exercises as much of NCCL's collectives as a single GPU can."""
    if not dist.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    before_group()
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"labels": True, "label_smoothing": 0.1}, {"bias": -10.0}], ids=str)
@pytest.mark.parametrize("comm", ["gather", "ring"])
@each_kind(BF16_KINDS)
def test_group_of_one_is_the_loss_without(kind: Kind, nccl: Any, comm: str, options: dict[str, Any]) -> None:
    """The loss over a group of one equals the loss without a group, and with equal_shards=True the
    host does not wait for the device.
    """
    inputs = [*features(1000, 256, torch.bfloat16), torch.tensor(10.0, device="cuda", requires_grad=True)]
    options, function = dict(options), fastclip.contrastive_loss
    if options.pop("labels", False):
        options |= dict.fromkeys(("image_labels", "text_labels"), torch.arange(1000, device="cuda") % 300)
    if "bias" in options:
        inputs.append(torch.tensor(options.pop("bias"), device="cuda"))
        function = fastclip.sigmoid_loss

    def run(**more: Any) -> list[Tensor]:
        loss = function(*inputs, backend=kind.backend, **options, **more)
        return [loss.detach(), *torch.autograd.grad(loss, inputs[:3])]

    one = run()
    for more in ({}, {"equal_shards": True}):
        for ours, true in zip(run(group=nccl, comm=comm, **more), one):
            torch.testing.assert_close(ours, true, rtol=1e-2 if ours.dim() else 1e-6, atol=1e-7)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(group=nccl, comm=comm, equal_shards=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
