"""The sigmoid loss of pairs on the CUDA backend: the whole loss against fp64, and its kernels alone.

It runs on a Hopper GPU, or without one in the emulator of csrc/tests, which runs the blocks of a grid and their threads
in random order. losses/test_sigmoid_accuracy.py tests normalised features, backends/test_cuda.py the tiles alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastclip._backends import cuda, reference
from fastclip._backends.problem import Problem
from fastclip.system import env

pytest.importorskip("triton")

from support.accuracy import check, pairs, poisoned
from support.kinds import DEVICE, GPU, Kind, kept

pytestmark = [
    pytest.mark.usefixtures("served_by_cuda", "poisoned_memory"),
    *([pytest.mark.gpu] if GPU else []),
]
DTYPES = [torch.bfloat16, torch.float16]
EVERY = (True, True, True, True)
SCALE, GAIN = 0, 4  # indices of the constants


def scalars(scale: float, bias: float) -> list[Tensor]:
    return [torch.tensor(x, device=DEVICE) for x in (scale, bias)]


def forward(
    image: Tensor,
    text: Tensor,
    scale: float = 10.0,
    bias: float = -10.0,
    *,
    normalize: bool = True,
    divisor: int | None = None,
    needs: Any = EVERY,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Return the loss and the gradients that `needs` selects."""
    s, b = scalars(scale, bias)
    problem = Problem(image, text, s, None, 0, False, normalize)
    found = cuda.sigmoid_fwd(problem, b, divisor or len(image), list(needs), dtype)
    assert [x is not None for x in found[1:]] == list(needs)
    assert found[0] is not None and found[0].dtype == dtype
    for x, d in zip((image, text), found[1:]):
        assert d is None or (d.dtype == reference.saved_dtype(x) and d.is_contiguous() and d.shape == x.shape)
    return [x for x in found if x is not None]


def loss(dtype: torch.dtype, **options: Any) -> Callable[..., Tensor]:
    return Kind("cuda", dtype).loss(**options)


def features(dtype: torch.dtype, *shape: int, **options: Any) -> list[Tensor]:
    return [poisoned(x, dtype) for x in pairs(*shape, **options)]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    assert len(a) == len(b)
    return all(torch.equal(x.view(kinds[x.element_size()]), y.view(kinds[y.element_size()])) for x, y in zip(a, b))


# ---- against fp64 ----


@pytest.mark.pairwise
@pytest.mark.parametrize("bias", [-10.0, -30.0, 3.0])
@pytest.mark.parametrize("norm", [200.0, 1.0, 1 / 64])
@pytest.mark.parametrize("N", [2, 150, 260])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features_as_they_are(dtype: torch.dtype, N: int, norm: float, bias: float) -> None:
    """Features that are not normalised give accurate results. Logits are up to 10; the lowest bias gives weights of
    1e-9 and less, which need the gain to fit into fp16.
    """
    image, text = (poisoned(norm * x / x.norm(dim=1, keepdim=True), dtype) for x in pairs(N, N, 24))
    check(loss(dtype, normalize=False), image, text, 10 / norm**2, bias=bias, normalize=False)


@pytest.mark.parametrize("workspace", ["0.004", "0.125"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, normalize: bool, workspace: str) -> None:
    """A workspace of a few tiles forces chunks of rows and blocks of columns, with the same result."""
    image, text = features(dtype, 300, 300, 24)
    if not normalize:
        image, text = image / 4, text / 4
    whole = forward(kept(image), kept(text), normalize=normalize, needs=(False,) * 4)
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", workspace)
    check(loss(dtype, normalize=normalize), image, text, 2.0, bias=-4.0, normalize=normalize)
    assert same_bits(whole, forward(kept(image), kept(text), normalize=normalize, needs=(False,) * 4))
    assert cuda._sizes(300, 24, env.workspace_bytes("cuda"), cuda._processors(-1))[-1] < 300


def test_chunks_of_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace that fits a wave of rows gives chunks of whole rows, here with two processors and products two tiles
    wide.
    """
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.125")
    monkeypatch.setattr(cuda, "_processors", lambda device: 2)
    _, _, _, chunks, *_, columns = cuda._sizes(300, 264, env.workspace_bytes("cuda"), 2)
    assert chunks > 1 and columns == 300
    check(loss(torch.bfloat16), *features(torch.bfloat16, 300, 300, 264), 5.0, bias=-4.0)


# ---- calls, bits, upstream ----


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_the_same(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, normalize: bool) -> None:
    """Repeated runs give the same bits, in any schedule and on any number of processors."""
    image, text = (kept(x) for x in features(dtype, 300, 300, 40))
    first = forward(image, text, normalize=normalize, dtype=torch.float64)
    for seed, processors in [(1, 4), (2, 2), (3, 3), (4, 132)]:
        monkeypatch.setenv("FASTCLIP_EMULATE_SEED", str(seed))
        monkeypatch.setattr(cuda, "_processors", lambda device, n=processors: n)
        again = forward(image, text, normalize=normalize, dtype=torch.float64)
        assert same_bits(first, again), (seed, processors)


@pytest.mark.pairwise
@pytest.mark.parametrize("d_loss", [1.0, 0.0, -3.7, 65536.0, 1e-30, 1e38, math.nan, math.inf])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("shapes", [((7, 3), (5, 3)), ((64, 32), (64, 32)), ((129, 17), (1, 17))], ids=str)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_is_the_reference_to_the_bit(
    dtype: torch.dtype, shift: int, shapes: tuple[Any, ...], wide: bool, d_loss: float
) -> None:
    """The backward pass equals the reference bit for bit, for sizes and addresses with and without 16-byte access, and
    for an upstream gradient in fp32 or fp64.
    """
    inputs = [torch.randn(shape).to(DEVICE, dtype) for shape in shapes] + scalars(1.0, 1.0)
    kept = []
    for x in inputs:
        memory = torch.randn(x.numel() + shift, device=DEVICE).to(reference.saved_dtype(x))
        kept.append(memory[shift:].view(x.shape))
    upstream = torch.tensor(d_loss, device=DEVICE, dtype=torch.float64 if wide else torch.float32)
    expected = reference.sigmoid_bwd(inputs, kept, upstream)
    for ours, theirs in zip(cuda.sigmoid_bwd(inputs, kept, upstream), expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_loss_scaler_keeps_gradients_that_fp16_flushes() -> None:
    image, text = (kept(x) for x in features(torch.float16, 150, 150, 256, aligned=1.0, noise=0.05))
    inputs = image, text, *scalars(50.0, -25.0)
    _, *grads = forward(image, text, 50.0, -25.0)
    one, many = (cuda.sigmoid_bwd(inputs, grads, torch.tensor(x, device=DEVICE))[0] for x in (1.0, 65536.0))
    assert (one == 0).float().mean() > 0.4 and (many == 0).float().mean() < 0.1


@pytest.mark.skipif(GPU, reason="the emulator counts launches")
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_launches(dtype: torch.dtype, normalize: bool) -> None:
    """A step launches norms, tiles and finish forward and one kernel backward, apart from two products of
    the library and autograd's fill.
    """
    image, text = (x.contiguous() for x in features(dtype, 64, 64, 32))
    cuda._module.launches()
    _, *grads = forward(image, text, normalize=normalize)
    launches = cuda._module.launches()
    cuda.sigmoid_bwd((image, text, *scalars(10.0, -10.0)), grads, torch.tensor(1.0))
    assert (launches, cuda._module.launches()) == (3, 1)


# ---- the kernels alone, judged by their output ----


class Work(NamedTuple):
    """The arrays before the weights, in the layout of csrc/cuda/loss_plan.h, as views on the device."""

    constants: Tensor
    ticket: Tensor
    own: Tensor
    inv: list[Tensor]
    factor: list[Tensor]
    part: Tensor
    weights: Tensor
    raw: Tensor

    @staticmethod
    def of(memory: Tensor, N: int, width: int) -> Work:
        """Return the views for one chunk of fewer than 1000 rows, which has narrow tiles."""
        at = 0

        def take(count: int, dtype: torch.dtype) -> Tensor:
            nonlocal at
            size = count * dtype.itemsize
            found = memory[at : at + size].view(dtype)
            at += -(-size // 128) * 128
            return found

        constants, ticket, own = take(8, torch.float32), take(1, torch.int32), take(N, torch.float64)
        sides = [take(N, torch.float32) for _ in range(4)]
        blocks = -(-N // 8)
        take(2 * blocks, torch.float32)
        part = take(3 * (-(-N // 128) * -(-N // 64) + blocks), torch.float64).view(3, -1)
        take(3 * 64, torch.float64)
        assert at == cuda._module.loss_plan(N, width, 2**30, 4)[6]
        weights = take(N * (-(-N // 128) * 128), torch.bfloat16)
        raw = take(2 * N * width, torch.float32).view(2, N, width)
        return Work(constants, ticket, own, sides[::2], sides[1::2], part, weights, raw)

    def sums(self, tiles: int) -> tuple[Tensor, Tensor]:
        """Return the sums of the tiles' shares and of the diagonal's shares."""
        return self.part[:, :tiles].sum(1).cpu(), self.part[:, tiles:].sum(1).cpu()


def _begun(
    image: Tensor, text: Tensor, s: Tensor, b: Tensor, normalize: bool, gradients: bool = True
) -> tuple[Work, tuple[Any, ...], list[Tensor]]:
    """Run norms and tiles of one chunk. Return the workspace, the arguments of further calls,
    and the tensors to keep alive.
    """
    N = len(image)
    *alive, problem, sizes = cuda._plain(image, text, s, 0.5, normalize)
    width = alive[2].shape[1]
    size = sizes[6] + 2 * N * sizes[4] + 2 * 4 * N * width + 1024
    memory = torch.full((size,), 0xFF, dtype=torch.uint8, device=DEVICE)
    cuda._module.sigmoid_weights(problem, b.data_ptr(), memory.data_ptr(), 0, 0, gradients)
    return Work.of(memory, N, width), (problem, b.data_ptr(), memory.data_ptr(), 0), [*alive, memory]


@pytest.mark.pairwise
@pytest.mark.parametrize("N", [1, 40, 129, 300])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (3.0, -30.0), (3.0, -200.0), (-5.0, 3.0)])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_and_tiles(
    dtype: torch.dtype, gradients: bool, scale: float, bias: float, normalize: bool, N: int
) -> None:
    """Norms and tiles agree with fp64: the pairs of the diagonal, the gain (which the tiles derive themselves unless
    rows are unit rows), and weights, including those that fp16 would flush to zero without the gain.
    """
    image, text = features(dtype, N, N, 40)
    s, b = scalars(scale, bias)
    work, _, alive = _begun(kept(image), kept(text), s, b, normalize, gradients)
    assert len(alive) == 5 and int(work.ticket) == 0 and float(work.constants[SCALE]) == scale
    sides = image.double(), text.double()
    inv = [1 / x.norm(dim=1) if normalize else torch.ones(N, dtype=torch.float64) for x in sides]
    for side, true in enumerate(inv):
        torch.testing.assert_close(work.inv[side].double().cpu(), true, rtol=1e-6, atol=0)
    rounded = [x.double().cpu() for x in work.inv]
    cosine = rounded[0][:, None] * rounded[1] * (sides[0] @ sides[1].T)
    z = scale * cosine + bias
    own = -torch.sigmoid(-z.diagonal())
    torch.testing.assert_close(work.own.cpu(), own, rtol=1e-12, atol=1e-300)
    tiles = -(-N // 128) * -(-N // 64)
    others, owns = work.sums(tiles)
    true = torch.stack([-torch.nn.functional.logsigmoid(z.diagonal()), own * cosine.diagonal(), own])
    error = (owns - true.sum(1)).abs() / true.abs().sum(1)
    assert (error <= 1e-12).all(), error
    g = torch.sigmoid(z).fill_diagonal_(0)
    softplus = -torch.nn.functional.logsigmoid(-z).fill_diagonal_(0).sum()
    flushed = 1e-30  # the sums of a tile are fp32
    assert abs(float(others[0]) - float(softplus)) <= 1e-5 * float(softplus) + flushed
    if not gradients:
        return
    gain = float(work.constants[GAIN])
    if dtype == torch.bfloat16:
        assert gain == 1
    else:
        norms = [(x.norm(dim=1) * r).max() for x, r in zip(sides, rounded)]
        bound = abs(scale) * float(norms[0] * norms[1]) + bias
        assert math.log2(gain) == 12 - math.floor(min(max(bound, -40), 0) / math.log(2)), bound
    for v, true in ((1, gain * (g * cosine).sum()), (2, g.sum())):
        size = gain * (g * cosine.abs()).sum() if v == 1 else g.sum()
        assert abs(float(others[v] - true)) <= 1e-4 * float(size) + gain * flushed, v
    weights = work.weights.view(dtype).view(N, -1)[:, :N].double().cpu()
    factors = [x.double().cpu() for x in work.factor]
    true = gain * factors[0][:, None] * g * factors[1]
    rounding, smallest = (2.0**-8, gain * flushed) if dtype == torch.bfloat16 else (2.0**-10, 2.0**-24)
    assert ((weights - true).abs() <= rounding * true + smallest).all() and true.max() < 2**15


@pytest.mark.pairwise
@pytest.mark.parametrize("N", [1, 40, 300])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("gain", [1.0, 2.0**20])
@pytest.mark.parametrize("D", [24, 30])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finish(dtype: torch.dtype, wide: bool, D: int, gain: float, normalize: bool, N: int) -> None:
    """The finish is right for arbitrary products, diagonal and shares, with a divisor other than the number
    of pairs.
    """
    image, text = (kept(x) for x in features(dtype, N, N, D))
    s, b = scalars(3.0, -2.0)
    work, arguments, alive = _begun(image, text, s, b, normalize)
    width, tiles, divisor = work.raw[0].shape[1], -(-N // 128) * -(-N // 64), 7.0
    work.constants[GAIN] = gain
    for raw in work.raw:
        raw.copy_(gain * torch.randn(N, width))
        raw[:, D:] = 0
    work.part.copy_(torch.randn(work.part.shape, dtype=torch.float64))
    value = image.new_empty((), dtype=torch.float64 if wide else torch.float32)
    saved = reference.saved_dtype(image)
    out = [image.new_full((N, D), math.nan, dtype=saved) for _ in range(2)]
    both = s.new_full((2,), math.nan)
    addresses = [value.data_ptr(), wide, *(x.data_ptr() for x in (*out, both))]
    cuda._module.sigmoid_finish(*arguments, divisor, *addresses)
    rows = [x[:, :D].double().cpu() for x in alive[2:4]]
    if alive[2].data_ptr() == alive[0].data_ptr():
        rows = [x.double().cpu() for x in (image, text)]
    factor, own = [x.double().cpu() for x in work.factor], gain * work.own.cpu()
    for k, (x, y) in enumerate((rows, rows[::-1])):
        g = work.raw[k][:, :D].double().cpu() + (own * factor[0] * factor[1])[:, None] * y
        if normalize:
            g = g - x * ((x * g).sum(1) / (x * x).sum(1))[:, None]
        true = 3.0 * g / gain / divisor * (work.inv[k].double().cpu() / factor[k])[:, None]
        error = (out[k].double().cpu() - true).abs().max(1).values
        rounding = 2.0**-8 if saved == torch.bfloat16 else 2.0**-20
        assert (error <= rounding * true.abs().max(1).values.clamp_min(0.1)).all()
    others, owns = work.sums(tiles)
    others[1] /= gain
    tolerance = 1e-13 if wide else 1e-6
    found = torch.tensor([float(value), *both.tolist()], dtype=torch.float64)
    for ours, true, close in zip(found, (others + owns) / divisor, (tolerance, 1e-6, 1e-6)):
        assert abs(float(ours - true)) <= close * max(abs(float(true)), 1)
