"""Correctness of what is timed afterwards: tests of the kernels, then values and gradients of every path through
fastclip's backends against float64, each computed twice, and a CUDA graph against a plain step.
"""

from __future__ import annotations

import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastclip
from benchmarks.gpu.checklist import NO_TESTS, run_limited
from benchmarks.gpu.log import Log
from benchmarks.losses.peers import Unavailable
from benchmarks.losses.providers import OURS, CheckFailed, ours
from fastclip._backends.problem import Problem
from fastclip.bench.losses import SCALARS, features
from fastclip.ops import contrastive_statistics
from fastclip.parity.truth import truth

# Hopper's tiles alone, then the launchers around them. Tests of Triton are left out, since compiling takes their time
# and the values below run its kernels too.
TESTS = tuple(
    f"tests/backends/test_{name}.py"
    for name in ("cuda", "cuda_plain", "cuda_sigmoid", "plain", "sigmoid_kernels", "kernels")
)
TESTS_SECONDS = 75.0
VALUES_SECONDS = 25.0  # reserved for the checks after the tests
ENOUGH = 2.0  # for one value
SIZES = {False: [(1000, 512), (4096, 512)], True: [(40, 24), (130, 24)]}  # on a GPU; in a dry run
DTYPES = ("bfloat16", "float16")
PROVIDERS = ("fastclip_cuda", "fastclip_triton")  # Triton compiles while the CUDA backend is checked
WAYS = ("plain", "labels", "smoothing", "offset", "sigmoid")
# Relative errors that no rounding reaches but every wrong tile exceeds; the tests check the promised tolerances
GRADIENT, VALUE, SCALAR = {"bfloat16": 1.5e-2, "float16": 4e-3}, 2e-3, 2e-2

Loss = Callable[..., Tensor]


class Way(NamedTuple):
    """A loss of image, text, scale and possibly a bias on one of fastclip's backends; value and gradients
    in float64.
    """

    ours: Loss
    truth: Callable[[list[Tensor]], list[Tensor]]
    scalars: tuple[float, ...]


def run(log: Log) -> None:
    tests(log)
    available = [name for name in PROVIDERS if is_available(log, name)]
    if not available:
        raise RuntimeError("no GPU backend is available: `fastclip doctor` shows the reasons")
    for provider in available:
        values(log, provider)
        graphs(log, provider)


def tests(log: Log) -> None:
    words = ["-q", "-x", "-m", "gpu", "-k", "not triton", "-p", "no:cacheprovider", *TESTS]
    start, seconds = time.monotonic(), max(1.0, min(TESTS_SECONDS, log.left() - VALUES_SECONDS))
    code = run_limited([sys.executable, "-m", "pytest", *words], seconds)
    outcomes = {0: "", None: "cut: the tests before it passed", NO_TESTS: "no test is marked gpu"}
    status = outcomes.get(code, f"failed with exit code {code}")
    log.row("tests", "fastclip_cuda", "time", "s", time.monotonic() - start, status=status)
    if code not in outcomes:
        raise CheckFailed(f"the tests {status}")


def way(name: str, backend: str | None, N: int, normalize: bool, device: str) -> Way:
    options: dict[str, Any] = {"normalize": normalize, "backend": backend}
    if name == "offset":
        expected = functools.partial(offset_truth, normalize=normalize)
        return Way(functools.partial(offset_loss, **options), expected, SCALARS["softmax"])
    expected = functools.partial(dense_truth, normalize=normalize)
    if name == "sigmoid":
        return Way(functools.partial(fastclip.sigmoid_loss, **options), expected, SCALARS["sigmoid"])
    if name == "labels":
        labels = torch.arange(N, device=device) * 7 % (N // 3)
        expected = functools.partial(expected, labels=(labels, labels))
        options |= {"image_labels": labels, "text_labels": labels}
    if name == "smoothing":
        expected = functools.partial(expected, label_smoothing=0.1)
        options["label_smoothing"] = 0.1
    return Way(functools.partial(fastclip.contrastive_loss, **options), expected, SCALARS["softmax"])


def dense_truth(leaves: list[Tensor], **options: Any) -> list[Tensor]:
    image, text, *scalars = leaves
    scale, *bias = (x.item() for x in scalars)
    result = truth(image, text, scale, bias=bias[0] if bias else None, **options)
    return [result.loss, *result.gradients]


def offset_loss(image: Tensor, text: Tensor, scale: Tensor, *, normalize: bool, backend: str | None) -> Tensor:
    """Compute the loss of the second quarter of the images against all texts, like a rank with its shard:
    image i belongs to text i + N / 4.
    """
    size = len(image) // 4
    problem = Problem(image[size : 2 * size], text, scale, offset=size, normalize=normalize)
    rows, cols = contrastive_statistics(problem, backend)
    return ((rows.neg - rows.pos).mean() + cols.neg.mean()).float()


def offset_truth(leaves: list[Tensor], *, normalize: bool) -> list[Tensor]:
    """Return value and gradients of `offset_loss` in float64."""

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        size = len(image) // 4
        image, text = (F.normalize(x, dim=1) if normalize else x for x in (image[size : 2 * size], text))
        z = scale * image @ text.T
        negatives = z.masked_fill(torch.ones_like(z, dtype=torch.bool).triu(size).tril(size), -torch.inf)
        return (negatives.logsumexp(1) - z.diagonal(size)).mean() + negatives.logsumexp(0).mean()

    return value_and_gradients(loss, [x.detach().double().requires_grad_() for x in leaves])


def leaves_of(N: int, D: int, dtype: str, normalize: bool, scalars: tuple[float, ...], device: str) -> list[Tensor]:
    """Return leaves; features that are to be normalised have norms other than 1."""
    pair = (x.detach() * (3.0 if normalize else 1.0) for x in features(N, D, dtype, device))
    numbers = (torch.tensor(value, device=device) for value in scalars)
    return [x.requires_grad_() for x in (*pair, *numbers)]


def value_and_gradients(loss: Loss, leaves: list[Tensor]) -> list[Tensor]:
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def combinations(sizes: list[tuple[int, int]]) -> Iterator[tuple[str, int, int, str, bool]]:
    """Yield way, N, D, dtype, and whether features are normalised."""
    for size in sizes:
        for dtype, normalize, name in itertools.product(DTYPES, (True, False), WAYS):
            yield name, *size, dtype, normalize


def values(log: Log, provider: str) -> None:
    """Compare value and gradients of every way with float64, and check that a second call gives the
    same bits. Raises CheckFailed.
    """
    every, left_out = list(combinations(SIZES[log.gpu.pretended])), 0
    for name, N, D, dtype, normalize in every:
        if log.left() < ENOUGH:
            left_out += 1
            continue
        case = f"{name} {N}x{D} {dtype}" + (" normalised" if normalize else "")
        error = check(f"{provider}, {case}", OURS["cuda"][provider], name, N, D, dtype, normalize, log.gpu.device)
        log.row(case, provider, "largest error of a gradient", "relative", error, digits=8)
    if left_out:
        log.no_time("values", provider, f"{left_out} of {len(every)}")


def is_available(log: Log, provider: str) -> bool:
    try:
        ours(OURS["cuda"][provider], "softmax")
    except Unavailable as reason:
        log.status("values", provider, str(reason))
        return False
    return True


def check(case: str, backend: str | None, name: str, N: int, D: int, dtype: str, normalize: bool, device: str) -> float:
    """Return the larger relative error of d_image and d_text. Raises CheckFailed if any result is wrong."""
    one = way(name, backend, N, normalize, device)
    leaves = leaves_of(N, D, dtype, normalize, one.scalars, device)
    first, again = (value_and_gradients(one.ours, leaves) for _ in range(2))
    if not all(torch.equal(a, b) for a, b in zip(first, again)):
        raise CheckFailed(f"{case}: a second call gives different bits")
    expected = one.truth(leaves)
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(first, expected)]
    limits = [VALUE, GRADIENT[dtype], GRADIENT[dtype], *[SCALAR] * len(one.scalars)]
    if not all(error <= limit for error, limit in zip(errors, limits, strict=True)):  # NaN fails too
        what = ["loss", "d_image", "d_text", "d_scale", "d_bias"]
        parts = ", ".join(f"{x} {error:.1e}" for x, error in zip(what, errors))
        raise CheckFailed(f"{case}: relative errors {parts}")
    return max(errors[1:3])


def graphs(log: Log, provider: str) -> None:
    """Check that a step in a CUDA graph, replayed on other features, gives the bits of a plain step."""
    (N, D), device = SIZES[log.gpu.pretended][0], log.gpu.device
    for name in ("plain", "sigmoid"):
        case = f"graph {name} {N}x{D}"
        if log.left() < ENOUGH:
            log.no_time(case, provider)
            continue
        one = way(name, OURS["cuda"][provider], N, True, device)
        leaves = leaves_of(N, D, "bfloat16", True, one.scalars, device)
        others = leaves_of(N + 1, D, "bfloat16", True, (), device)  # the seed depends on N

        def change(leaves: list[Tensor] = leaves, others: list[Tensor] = others) -> None:
            with torch.no_grad():
                for x, y in zip(leaves, others):
                    x.copy_(y[: len(x)])

        step = functools.partial(value_and_gradients, one.ours, leaves)
        if not all(torch.equal(a, b) for a, b in zip(log.gpu.replayed(step, change), step(), strict=True)):
            raise CheckFailed(f"{provider}, {case}: a replay gives different bits than a plain step")
        log.row(case, provider, "replay equal to a plain step", "bitwise", 1)
