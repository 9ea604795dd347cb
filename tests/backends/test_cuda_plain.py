"""The plain case on the CUDA backend: its kernels alone, judged by their output. test_plain.py tests loss and
gradients.

They run on a Hopper GPU, or without one in the emulator of csrc/tests, which runs the blocks of a grid and
their threads in random order.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastclip._backends import cuda

pytest.importorskip("triton")

from support.accuracy import pairs, poisoned
from support.kinds import DEVICE, GPU, kept, uneven

pytestmark = [
    pytest.mark.usefixtures("served_by_cuda", "poisoned_memory"),
    *([pytest.mark.gpu] if GPU else []),
]
DTYPES = [torch.bfloat16, torch.float16]
EVERY = (True, True, True)
OFFSET2, REPAIR, GAIN = 2, 3, 4  # indices of the constants at the head of `saved`


def features(dtype: torch.dtype, *shape: int, **options: Any) -> list[Tensor]:
    return [poisoned(x, dtype) for x in pairs(*shape, **options)]


def run(image: Tensor, text: Tensor, normalize: bool) -> list[Tensor]:
    """Return the loss and its gradients."""
    scale, upstream = torch.tensor(14.3, device=DEVICE), torch.tensor(1.0, device=DEVICE)
    loss, saved = cuda.plain_fwd(image, text, scale, 0.5, normalize)
    return [loss, *cuda.plain_bwd(image, text, scale, saved, 0.5, normalize, upstream, EVERY)]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    kinds = {2: torch.int16, 4: torch.int32}
    return all(torch.equal(x.view(kinds[x.element_size()]), y.view(kinds[y.element_size()])) for x, y in zip(a, b))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_the_same(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, normalize: bool) -> None:
    """Repeated runs give the same bits, in any schedule and on any number of processors, with and without a repair."""
    given = features(dtype, 300, 300, 40) if normalize else [poisoned(x, dtype) for x in uneven(300, 300)]
    image, text = map(kept, given)
    first = run(image, text, normalize)
    for seed, processors in [(1, 4), (2, 2), (3, 3), (4, 132)]:
        monkeypatch.setenv("FASTCLIP_EMULATE_SEED", str(seed))
        monkeypatch.setattr(cuda, "_processors", lambda device, n=processors: n)
        assert same_bits(first, run(image, text, normalize)), (seed, processors)


@pytest.mark.skipif(GPU, reason="the emulator counts launches")
@pytest.mark.parametrize(
    ("dtype", "normalize", "expected"),
    [
        (torch.bfloat16, True, (4, 2)),  # norms, statistics, reduction, repair; weights, finish
        # the norms kernel also scales rows to norm 1, and does so again in the backward pass
        (torch.float16, True, (4, 3)),
        (torch.bfloat16, False, (4, 2)),
    ],
)
def test_launches(dtype: torch.dtype, normalize: bool, expected: tuple[int, int]) -> None:
    """Number of the kernel launches of a step, apart from two products of the library and autograd's fill."""
    image, text = (x.contiguous() for x in features(dtype, 64, 64, 32))
    scale, upstream = torch.tensor(5.0), torch.tensor(1.0)
    cuda._module.launches()
    _, saved = cuda.plain_fwd(image, text, scale, 0.5, normalize)
    launches = cuda._module.launches()
    cuda.plain_bwd(image, text, scale, saved, 0.5, normalize, upstream, EVERY)
    assert (launches, cuda._module.launches()) == expected


class Saved(NamedTuple):
    """The arrays that the forward pass hands to the backward pass, in the layout of csrc/cuda/loss_plan.h."""

    constants: Tensor
    own_scale: Tensor
    own: Tensor
    inv: list[Tensor]
    factor: list[Tensor]
    weight: list[Tensor]
    lse2: list[Tensor]

    @staticmethod
    def of(saved: Tensor, N: int) -> Saved:
        padded, at = (N + 31) // 32 * 32, 0

        def take(count: int, words: int = 1) -> Tensor:
            nonlocal at
            part = saved[at : at + max(padded * words, 32) if count == N else at + 32]
            at += len(part)
            return (part if words == 1 else part.view(torch.float64))[:count].double().cpu()

        found: dict[str, Any] = {"inv": [], "factor": [], "weight": [], "lse2": []}
        constants, own_scale, own = take(8), take(1, 2), take(N, 2)
        for _ in range(2):
            for name, words in (("inv", 1), ("factor", 1), ("weight", 2), ("lse2", 1)):
                found[name].append(take(N, words))
        assert at == len(saved)
        return Saved(constants, own_scale, own, **found)


@pytest.mark.parametrize("N", [1, 31, 32, 33, 1000])
def test_saved_is_as_large_as_promised(N: int) -> None:
    assert 4 * cuda.plain_saved(N) == cuda._module.loss_plan(N, 8, 2**20, 4)[0]


@pytest.mark.parametrize("N", [1, 40, 129])
@pytest.mark.parametrize("normalize", [True, False])
def test_saved_is_written_whole(N: int, normalize: bool) -> None:
    """The forward pass writes all of `saved`. Torch compares the outputs of an op, and unwritten memory
    would differ.
    """
    image, text = (kept(x) for x in features(torch.bfloat16, N, N, 24))
    saved = cuda.plain_fwd(image, text, torch.tensor(9.0, device=DEVICE), 0.5, normalize)[1]
    assert saved.isfinite().all()


def close(ours: Tensor, true: Tensor, tolerance: float, what: str) -> None:
    error = (ours - true).abs() / true.abs().clamp_min(1e-300)
    assert (error <= tolerance).all(), f"{what}: worst {error.max():.1e} at {error.argmax()}"


@pytest.mark.pairwise
@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("N", [40, 129, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_the_forward_hands_on(dtype: torch.dtype, N: int, repair: bool) -> None:
    """Norms, reduction and repair hand the backward pass vectors that agree with fp64."""
    image, text = (poisoned(x, dtype) for x in (uneven(N, N) if repair else pairs(N, N, 40)))
    scale, w = torch.tensor(3.0), 0.75
    found = cuda.plain_fwd(kept(image), kept(text), scale.to(DEVICE), w, not repair)[1]
    saved = Saved.of(found, N)
    sides = image.double(), text.double()
    inv = [torch.ones(N, dtype=torch.float64) if repair else 1 / x.norm(dim=1) for x in sides]
    cosine = inv[0][:, None] * inv[1] * (sides[0] @ sides[1].T)
    z = 3.0 * cosine
    neg = z.masked_fill(torch.eye(N, dtype=torch.bool), -math.inf)
    bound = 3.0 if not repair else 3.0 * float(sides[0].norm(dim=1).max() * sides[1].norm(dim=1).max())
    offset2 = max(bound - 70, 0) / math.log(2)
    assert abs(float(saved.constants[OFFSET2]) - offset2) <= 1e-5 * offset2
    assert (saved.constants[REPAIR] != 0) == repair
    largest, own = 0.0, torch.zeros(N, dtype=torch.float64)
    for side, share in enumerate((w, 1 - w)):
        lse = neg.logsumexp(1 - side)
        d = share * torch.sigmoid(lse - z.diagonal()) / N
        own, largest = own - d, max(largest, float(d.max()))
        close(saved.inv[side], inv[side], 1e-6, "inv")
        power = 2.0 ** inv[side].log2().floor() if dtype == torch.float16 and not repair else torch.ones(N)
        assert torch.equal(saved.factor[side] * power, saved.inv[side])
        tolerance = 1e-4 if repair else 1e-5
        if repair:
            close(saved.lse2[side], lse / math.log(2), 1e-6, "lse2")
            lost = saved.lse2[side] - lse / math.log(2)
            shown = d > 1e-30
            close(saved.weight[side][shown], (d * lost.exp2())[shown], tolerance, "weight")
        else:
            close(saved.weight[side], d * torch.exp(offset2 * math.log(2) - lse), tolerance, "weight")
    close(saved.own[own < -1e-30], own[own < -1e-30], 1e-4 if repair else 1e-5, "own")
    close(saved.own_scale, (own * cosine.diagonal()).sum()[None], 1e-4, "own_scale")
    assert float(saved.constants[GAIN]) == 2.0 ** (10 - math.floor(math.log2(largest)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repair_keeps_what_rounding_takes(dtype: torch.dtype) -> None:
    """The repair keeps the digits that rounding of log-sum-exps in the thousands would lose. The
    products of these features are exact.
    """
    N = 130
    image, text = (torch.randint(-8, 9, (N, 8)) * 2.0 ** (torch.arange(N) % 6)[:, None] for _ in range(2))
    scale = torch.tensor(0.057)
    found = cuda.plain_fwd(image.to(DEVICE, dtype), text.to(DEVICE, dtype), scale.to(DEVICE), 0.5, False)[1]
    saved = Saved.of(found, N)
    z = scale.double() * (image.double() @ text.double().T)
    neg = z.masked_fill(torch.eye(N, dtype=torch.bool), -math.inf)
    assert saved.constants[REPAIR] != 0 and z.abs().max() > 1000
    for side in range(2):
        lse = neg.logsumexp(1 - side)
        d = 0.5 * torch.sigmoid(lse - z.diagonal()) / N
        shown = d > 1e-30
        true = d * (saved.lse2[side] - lse / math.log(2)).exp2()
        close(saved.weight[side][shown], true[shown], 5e-6, "weight")


@pytest.mark.pairwise
@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("N", [40, 129, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights(dtype: torch.dtype, N: int, repair: bool) -> None:
    """Weights are G r c times the gain, rounded once to the dtype. They are 0 on the diagonal,
    and nothing is written outside.
    """
    image, text = (kept(poisoned(x, dtype)) for x in (uneven(N, N) if repair else pairs(N, N, 40)))
    scale = torch.tensor(3.0, device=DEVICE)
    _, found = cuda.plain_fwd(image, text, scale, 0.5, not repair)
    saved = Saved.of(found, N)
    *_operands, problem, sizes = _problem(image, text, scale, not repair)
    rows, _, stride, extra = sizes[2:6]
    weights = image.new_full((rows + extra, stride), math.nan)
    cuda._module.loss_weights(problem, found.data_ptr(), weights.data_ptr(), 0, 0)
    x, y = (side.double().cpu() for side in (image, text))
    z = 3.0 * saved.inv[0][:, None] * saved.inv[1] * (x @ y.T)
    neg = z.masked_fill(torch.eye(N, dtype=torch.bool), -math.inf)
    p = [0.5 * torch.sigmoid(neg.logsumexp(k) - z.diagonal()) / N for k in (1, 0)]
    g = p[0][:, None] * neg.softmax(1) + p[1] * neg.softmax(0)
    true = float(saved.constants[GAIN]) * g * saved.factor[0][:, None] * saved.factor[1]
    ours = weights[:N, :N].double().cpu()
    assert (ours.diagonal() == 0).all()
    smallest = max(torch.finfo(dtype).smallest_normal, 1e-30)
    logit_error = 2e-3 if repair else 1e-4  # the logits are thousands, in fp32
    assert ((ours - true).abs() <= (torch.finfo(dtype).eps / 2 + logit_error) * true + smallest).all()
    assert weights[:N, -(-N // 8) * 8 :].isnan().all(), "written outside"


def _problem(image: Tensor, text: Tensor, scale: Tensor, normalize: bool) -> tuple[Any, ...]:
    return cuda._plain(image, text, scale, 0.5, normalize)


def test_finish() -> None:
    """The finish is right for arbitrary sums of products: projection, scale, upstream gradient and the sum
    of d_scale.
    """
    N, D = 140, 40
    image, text = (kept(x) for x in features(torch.bfloat16, N, N, D))
    scale, upstream = torch.tensor(3.0, device=DEVICE), torch.tensor(0.5, device=DEVICE)
    _, found = cuda.plain_fwd(image, text, scale, 0.5, True)
    saved = Saved.of(found, N)
    *_operands, problem, sizes = _problem(image, text, scale, True)
    rows, _, stride, extra = sizes[2:6]
    weights = image.new_full((rows + extra, stride), math.nan)
    cuda._module.loss_weights(problem, found.data_ptr(), weights.data_ptr(), 0, 0)
    raw = [torch.randn(N, D, device=DEVICE) for _ in range(2)]
    out = [image.new_full((N, D), math.nan) for _ in range(2)]
    d_scale = scale.new_empty(())
    addresses = [x.data_ptr() for x in (upstream, *raw, *out, d_scale)]
    cuda._module.loss_finish(problem, found.data_ptr(), weights.data_ptr(), 0, *addresses)
    gain = float(saved.constants[GAIN])
    x, y = (side.double().cpu() for side in (image, text))
    own = gain * saved.own * saved.factor[0] * saved.factor[1]
    for a, b, sums, ours, k in ((x, y, raw[0], out[0], 0), (y, x, raw[1], out[1], 1)):
        g = sums.double().cpu() + own[:, None] * b
        g = g - a * ((a * g).sum(1) / (a * a).sum(1))[:, None]
        true = 0.5 * 3.0 * g / gain * (saved.inv[k] / saved.factor[k])[:, None]
        error = (ours.double().cpu() - true).abs().max(1).values
        assert (error <= 2.0**-8 * true.abs().max(1).values).all()
    part = weights.flatten()[rows * stride :].view(torch.float32)[32:]
    tiles = -(-N // 128) * -(-N // 64)
    true = 0.5 * (part[:tiles].double().sum().cpu() / gain + saved.own_scale[0])
    assert abs(float(d_scale) - float(true)) <= 1e-6 * abs(float(true))


@pytest.mark.parametrize("spoil", [{"N": 0}, {"D": 0}, {"workspace": -1}, {"processors": 1}], ids=str)
def test_plan_refuses(spoil: dict[str, int]) -> None:
    given = {"N": 5, "D": 8, "workspace": 2**20, "processors": 4, **spoil}
    with pytest.raises(ValueError, match="refused its arguments"):
        cuda._module.loss_plan(*given.values())
