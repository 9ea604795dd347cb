"""Hopper's tile kernels, one at a time, against fp64.

They run on a Hopper GPU, or without a GPU in the emulator of csrc/tests. The emulator runs the threads of a cluster in
random order, and asynchronous work either at once or as late as its waits allow. losses/test_accuracy.py and
backends/test_kernels.py run the same tiles under their launchers.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastclip
from fastclip._backends import cuda
from support import emulated

pytest.importorskip("triton")
from fastclip.triton_kernels.launch import BwdSide, FwdSide
from fastclip.triton_kernels.tile import CONSTANTS, GAIN, OFFSET2, REPAIR, SCALE

from support.kinds import DEVICE, GPU

pytestmark = [pytest.mark.usefixtures("hopper"), *([pytest.mark.gpu] if GPU else [])]


@pytest.fixture
def hopper(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make the GPU, or the CPU with the emulator, the default device of a test's tensors."""
    if GPU:
        reason = fastclip.backends()["cuda"]
        if reason != "available" or (reason := cuda.refuses(torch.empty(1, dtype=torch.float16, device="cuda"), True)):
            pytest.skip(f"cuda: {reason}")
    else:
        request.getfixturevalue("emulated_cuda")
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


LOG2E = math.log2(math.e)
NAN = float("nan")

# (M, N, D, offset, scale, columns of a tile). The cases cover every mask, the wrap-around of stages and turns, and a
# tail.
CASES = [
    (128, 192, 64, 0, 10.0, 192),  # one tile
    (1, 1, 8, 0, 10.0, 192),  # one positive and no negative
    (1, 7, 8, 3, 10.0, 64),
    (300, 500, 72, 17, 20.0, 192),  # ragged on every axis, an odd number of tile rows
    (641, 391, 200, -250, 50.0, 192),
    (513, 577, 512, 0, 100.0, 192),  # more blocks of k than stages
    (260, 1200, 40, 700, -14.0, 192),  # a negative scale
    (256, 384, 136, 100000, 0.0, 192),  # no positive in range, scale 0
    (385, 200, 328, 64, 14.3, 64),
    (129, 200, 64, 191, 14.3, 192),  # the diagonal touches one corner of a tile; in the next case, the other
    (129, 200, 64, -127, 14.3, 192),
    (700, 65, 64, -3, 14.3, 64),
]
LABELLED = [
    (300, 500, 72, 17, 20.0, 128),
    (129, 129, 64, 0, 100.0, 128),
    (130, 70, 200, -64, -14.0, 64),
    (1, 3, 8, 1, 5.0, 64),
    (515, 260, 72, 0, 14.3, 128),
]
DTYPES = [torch.bfloat16, torch.float16]


class Case(NamedTuple):
    """A problem whose arrays lie inside frames of NaN, and its fp64 truth."""

    x: Tensor
    y: Tensor
    row_factor: Tensor
    col_factor: Tensor
    constants: Tensor
    cosine: Tensor
    z: Tensor
    own: Tensor
    tile: Any
    offset: int

    @staticmethod
    def of(M: int, N: int, D: int, offset: int, scale: float, tile_n: int, dtype: torch.dtype) -> Case:
        generator = torch.Generator(DEVICE).manual_seed(M + N + D)
        sides = []
        for size in (M, N):
            frame = torch.full((size, -(-D // 8) * 8 + 16), NAN, dtype=dtype)
            frame[:, :D] = torch.randn(size, D, generator=generator)
            sides.append(frame[:, :D])
        x, y = sides
        r, c = (1 / side.float().norm(dim=1) for side in sides)
        cosine = (x.double() @ y.double().T) * r.double()[:, None] * c.double()
        constants = torch.full((CONSTANTS,), NAN)
        bound = abs(scale)
        constants[SCALE.value], constants[REPAIR.value] = scale, 0.0
        constants[OFFSET2.value] = (0.0 if bound <= 70 else bound - 70) * LOG2E
        constants[GAIN.value] = 1024.0
        own = torch.arange(M)[:, None] + offset == torch.arange(N)
        tile = cuda._Tiles(x.device).new_config(128, tile_n, 64, 12, 1)
        return Case(x, y, r, c, constants, cosine, scale * cosine, own, tile, offset)

    @property
    def exponential(self) -> Tensor:
        return torch.exp2(self.z * LOG2E - float(self.constants[OFFSET2.value]))

    def parts(self, planes: int) -> tuple[Tensor, Tensor]:
        M, N = self.z.shape
        return (
            torch.full((planes, -(-N // self.tile.BLOCK_N), M), NAN),
            torch.full((planes, -(-M // self.tile.BLOCK_M), N), NAN),
        )

    def by_tiles(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the row sums of every tile column and the column sums of every tile row."""
        rows = torch.stack([part.sum(1) for part in values.split(self.tile.BLOCK_N, 1)])
        return rows, torch.stack([part.sum(0) for part in values.split(self.tile.BLOCK_M, 0)])


def labels_of(M: int, N: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(M)
    return tuple(torch.randint(-3, 12, (size,), generator=generator, dtype=torch.int32) for size in (M, N))


def tiles(processors: int = 4) -> Any:
    found = cuda._Tiles(torch.device(DEVICE))
    found.processors = processors
    return found


def assert_close(ours: Tensor, true: Tensor, magnitude: Tensor, tolerance: float = 2e-5) -> None:
    error = (ours.double() - true).abs() / magnitude.clamp_min(1e-300)
    assert (error <= tolerance).all(), f"worst {error.max():.1e} at {error.argmax()}"


@pytest.fixture(params=[1, 2], ids=lambda seed: f"schedule{seed}")
def schedule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCLIP_EMULATE_SEED", str(request.param))


@pytest.mark.pairwise
@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(dtype: torch.dtype, case: tuple[Any, ...]) -> None:
    p = Case.of(*case, dtype)
    row, col = p.parts(1)
    tiles().contrastive_fwd(
        p.tile,
        p.x,
        p.y,
        FwdSide(p.row_factor, None, row),
        FwdSide(p.col_factor, None, col),
        p.constants,
        p.offset,
        False,
    )
    for ours, true in zip((row[0], col[0]), p.by_tiles(p.exponential.masked_fill(p.own, 0))):
        assert_close(ours, true, true)


@pytest.mark.pairwise
@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("case", LABELLED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_with_labels(dtype: torch.dtype, case: tuple[Any, ...], exclude_self: bool) -> None:
    p = Case.of(*case, dtype)
    y = labels_of(*p.z.shape)
    sides = [FwdSide(*side) for side in zip((p.row_factor, p.col_factor), y, p.parts(3))]
    tiles().contrastive_fwd(p.tile, p.x, p.y, *sides, p.constants, p.offset, exclude_self)
    left_out = p.own & exclude_self
    same = (y[0][:, None] == y[1]) & ~left_out
    negative = ~same & ~left_out
    for k, values in enumerate(
        (p.exponential.where(negative, 0), p.exponential.where(same, 0), (p.z * LOG2E).where(same, 0))
    ):
        for side, true, size in zip(sides, p.by_tiles(values), p.by_tiles(values.abs())):
            assert_close(side.part[k], true, size + (1e-6 if k == 2 else 0))


def test_exponentials_that_flush_are_no_empty_set() -> None:
    p = Case.of(20, 20, 8, 0, 100.0, 64, torch.bfloat16)
    p.constants[OFFSET2.value] = 1000.0
    y = labels_of(20, 20)
    sides = [FwdSide(*side) for side in zip((p.row_factor, p.col_factor), y, p.parts(3))]
    tiles().contrastive_fwd(p.tile, p.x, p.y, *sides, p.constants, 0, False)
    same = y[0][:, None] == y[1]
    for side, axis in zip(sides, (1, 0)):
        assert torch.equal(side.part[0, 0] > 0, (~same).any(axis)) and torch.equal(side.part[1, 0] > 0, same.any(axis))


def framed(M: int, N: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return room for weights (M, N) inside a frame of NaN, and the part of the frame that must stay NaN. The part
    begins at a multiple of 16 bytes, because the TMA writes 16 bytes at a time.
    """
    width = -(-N // 8) * 8
    frame = torch.full((M, width + 8), NAN, dtype=dtype)
    return frame[:, :N], frame[:, width:]


def weights_of(p: Case, sides: list[BwdSide], exclude_self: bool, processors: int = 4) -> tuple[Tensor, Tensor]:
    M, N = p.z.shape
    weights, beyond = framed(M, N, p.x.dtype)
    part = torch.full((-(-M // p.tile.BLOCK_M) * -(-N // p.tile.BLOCK_N) + 1,), NAN)
    tiles(processors).contrastive_bwd(p.tile, p.x, p.y, *sides, p.constants, p.offset, exclude_self, weights, part)
    assert beyond.isnan().all() and part[-1].isnan(), "written outside"
    return weights, part[:-1]


def assert_weights(p: Case, ours: Tensor, part: Tensor, g: Tensor) -> None:
    """Check that weights are G r c rounded once to the dtype, and that the partial sums of
    d_scale come from unrounded values.
    """
    r, c = p.row_factor.double()[:, None], p.col_factor.double()
    true = g * r * c
    smallest = torch.finfo(p.x.dtype).smallest_normal
    assert_close(ours, true, true.abs() + smallest, torch.finfo(p.x.dtype).eps / 2 + 3e-5)
    blocks = [
        (tile.sum(), tile.abs().sum())
        for rows in (g * p.cosine).split(p.tile.BLOCK_M, 0)
        for tile in rows.split(p.tile.BLOCK_N, 1)
    ]
    sums, sizes = (torch.stack(x) for x in zip(*blocks))
    assert_close(part, sums, sizes)


@pytest.mark.pairwise
@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights(dtype: torch.dtype, case: tuple[Any, ...]) -> None:
    p = Case.of(*case, dtype)
    M, N = p.z.shape
    neg = [(torch.rand(size) / p.exponential.max()).float() for size in (M, N)]  # keeps the weights in fp16's range
    ours, part = weights_of(p, [BwdSide(p.row_factor, neg[0]), BwdSide(p.col_factor, neg[1])], False)
    g = p.exponential.masked_fill(p.own, 0) * (neg[0].double()[:, None] + neg[1].double())
    assert_weights(p, ours, part, g)


@pytest.mark.pairwise
@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("case", [(*case[:5], {128: 192}.get(case[5], 64)) for case in LABELLED], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_with_labels(dtype: torch.dtype, case: tuple[Any, ...], exclude_self: bool) -> None:
    p = Case.of(*case, dtype)
    M, N = p.z.shape
    y = labels_of(M, N)
    largest = p.exponential.max()
    vectors = [[(torch.rand(size) * most).float() for most in (1 / largest, 1 / largest, 1.0)] for size in (M, N)]
    sides = [
        BwdSide(factor, neg, label, pos, own)
        for factor, label, (neg, pos, own) in zip((p.row_factor, p.col_factor), y, vectors)
    ]
    ours, part = weights_of(p, sides, exclude_self)
    neg, pos, own = (a.double()[:, None] + b.double() for a, b in zip(*vectors))
    g = torch.where(y[0][:, None] == y[1], p.exponential * pos + own, p.exponential * neg)
    assert_weights(p, ours, part, g.masked_fill(p.own & exclude_self, 0))


def test_infinite_exponential_of_a_positive_is_masked() -> None:
    """The positive's exponential may overflow: it is left out of the sums, and its weight is 0."""
    p = Case.of(8, 8, 8, 0, 500.0, 64, torch.bfloat16)
    p.y.copy_(p.x)
    p.x[1:].zero_()
    p.constants[OFFSET2.value] = 0.0
    row, col = p.parts(1)
    sides = [FwdSide(f, None, part) for f, part in ((p.row_factor, row), (torch.ones(8), col))]
    tiles().contrastive_fwd(p.tile, p.x, p.y * torch.eye(8, 1, dtype=p.y.dtype), *sides, p.constants, 0, False)
    assert row[0, 0].tolist() == [7.0] * 8 and col[0, 0].tolist() == [7.0] * 8


def test_repaired_weights_are_left_alone() -> None:
    """The kernel returns at once if the device has requested a repair, because the repair writes the block."""
    p = Case.of(300, 200, 64, 0, 10.0, 192, torch.bfloat16)
    p.constants[REPAIR.value] = 1.0
    ones = [torch.ones(size) for size in p.z.shape]
    ours, part = weights_of(p, [BwdSide(p.row_factor, ones[0]), BwdSide(p.col_factor, ones[1])], False)
    assert ours.isnan().all() and part.isnan().all()


def sigmoid_of(p: Case, gradients: bool) -> tuple[Tensor, Tensor]:
    """Return the weights and the tiles' sums, with a bias of -4."""
    M, N = p.z.shape
    weights, beyond = framed(M, N, p.x.dtype)
    count = -(-M // p.tile.BLOCK_M) * -(-N // p.tile.BLOCK_N)
    part = torch.full((3, count + 2), NAN, dtype=torch.float64)
    bias, stored = torch.tensor(-4.0), weights if gradients else None
    tiles().sigmoid_fwd(p.tile, p.x, p.y, p.row_factor, p.col_factor, p.constants, p.offset, bias, stored, part[:, 1:])
    assert part[:, 0].isnan().all() and part[:, -1].isnan().all() and beyond.isnan().all()
    return weights, part[:, 1:-1]


def assert_sigmoid(p: Case, gradients: bool) -> None:
    weights, part = sigmoid_of(p, gradients)
    z = p.z - 4.0
    loss = torch.nn.functional.softplus(z).masked_fill(p.own, 0)
    assert_close(part[0].sum(), loss.sum(), loss.sum() + 1e-30)
    if gradients:
        sigmoid = z.sigmoid().masked_fill(p.own, 0)
        assert_close(part[2].sum(), sigmoid.sum(), sigmoid.sum() + 1e-30)
        assert_weights(p, weights, part[1], 1024.0 * sigmoid)
    else:
        assert part[1:].isnan().all() and weights.isnan().all()


@pytest.mark.pairwise
@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigmoid(dtype: torch.dtype, case: tuple[Any, ...], gradients: bool) -> None:
    assert_sigmoid(Case.of(*case, dtype), gradients)


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigmoid_of_products_beyond_fp32(dtype: torch.dtype, gradients: bool) -> None:
    """The warp of a row whose products overflow fp32 starts again logit by logit, in a tile
    without a mask. Other warps do not.
    """
    p = Case.of(256, 192, 40, 100000, 14.3, 192, dtype)
    factor = torch.ones(256)
    factor[20] = 10.0
    p = p._replace(row_factor=p.row_factor * factor, cosine=p.cosine * factor[:, None], z=p.z * factor[:, None])
    assert torch.exp(p.z[20, :16] - 4.0).add(1).prod() > 2.0**100 and p.z.abs().max() < 80
    assert_sigmoid(p, gradients)
    weights, _ = sigmoid_of(p, True)
    p.row_factor[20] = NAN
    spoiled, part = sigmoid_of(p, True)
    assert spoiled[20].isnan().all() and part[:, 0].isnan().all() and part[:, 1].isfinite().all()
    others = torch.arange(256) != 20
    assert torch.equal(spoiled[others], weights[others])


@pytest.mark.parametrize("processors", [2, 3, 132])
def test_any_number_of_processors(processors: int) -> None:
    """The bits do not depend on the number of clusters among which the tiles are distributed."""
    p = Case.of(700, 600, 136, 5, 14.3, 192, torch.bfloat16)
    ones = [torch.rand(size) for size in p.z.shape]
    sides = [BwdSide(p.row_factor, ones[0]), BwdSide(p.col_factor, ones[1])]
    expected, found = weights_of(p, sides, False), weights_of(p, sides, False, processors)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


def test_narrow_tiles_where_wide_ones_leave_processors_idle() -> None:
    found = tiles(processors=132)
    for M, N, width in [(512, 512, 64), (1024, 1024, 64), (4096, 4096, 192), (128, 65536, 192)]:
        assert width == found.config("contrastive_bwd", M, N, True).BLOCK_N, (M, N)
    assert found.config("contrastive_fwd", 4096, 4096, True).BLOCK_N == 128
    assert found.config("contrastive_fwd", 4096, 4096, False).BLOCK_N == 192


def test_c_interface_refuses_bad_arguments() -> None:
    done = subprocess.run([emulated.build("test_cuda")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "0 failures\n", done.stdout + done.stderr


def test_refusals_become_messages(emulated_cuda: Any) -> None:
    p = Case.of(8, 8, 8, 0, 1.0, 64, torch.bfloat16)
    with pytest.raises(ValueError, match="the native code refused its arguments"):
        tiles(processors=1).contrastive_fwd(
            p.tile, p.x, p.y, *(FwdSide(p.row_factor, None, x) for x in p.parts(1)), p.constants, 0, False
        )
