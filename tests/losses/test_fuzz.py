"""Random shapes, layouts, dtypes, labels and options against the fp64 truth, to reach cases that no list names.

HYPOTHESIS_PROFILE=long draws many more examples; a failure prints the example that caused it.
"""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import fastclip
from fastclip._backends.cpu import native
from support.accuracy import COLLAPSED, check, pairs, poisoned

hypothesis.settings.register_profile("default", max_examples=150, deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=5000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "inside NaN": poisoned,
    "transposed": lambda x: x.T.contiguous().T,
    "every second row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "every second column": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "one row, expanded": lambda x: x[:1].expand(x.shape),
    "one column, expanded": lambda x: x[:, :1].expand(x.shape),
}
# Small sizes, and sizes around the edges of tiles (64 x 512) and vectors (8, 16).
rows = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 129]), st.integers(500, 530))
widths = st.one_of(st.integers(1, 20), st.sampled_from([31, 33, 64]))
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
layouts = st.sampled_from(sorted(LAYOUTS))
megabytes = st.sampled_from(["64", "0.3", "0.01"])
# below 1e-30 a float32 gradient is subnormal
scales = st.floats(-100, 100, width=32).map(lambda s: s if abs(s) > 1e-30 else 0.0)
isas = st.sampled_from(["auto", "auto", "avx2", "portable"])


@pytest.fixture(autouse=True)
def restore():
    before, threads = os.environ.get("FASTCLIP_WORKSPACE_MB"), torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    native.module.select_isa("auto")
    os.environ.pop("FASTCLIP_WORKSPACE_MB", None)
    if before is not None:
        os.environ["FASTCLIP_WORKSPACE_MB"] = before


def set_machine(draw: st.DrawFn) -> None:
    os.environ["FASTCLIP_WORKSPACE_MB"] = draw(megabytes, label="workspace")
    torch.set_num_threads(draw(st.sampled_from([1, 1, 1, 2]), label="threads"))
    try:
        native.module.select_isa(draw(isas, label="isa"))
    except ValueError:
        native.module.select_isa("auto")


def features(draw: st.DrawFn, M: int, N: int, normalize: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Draw features, about half of them aligned. Features that are not normalised have norms that differ by a factor of
    100, and logits of at most 50.
    """
    image, text = pairs(
        M,
        N,
        draw(widths, label="D"),
        aligned=draw(st.sampled_from([0.0, 0.5, 1.0]), label="aligned"),
        noise=draw(st.sampled_from([0.05, 0.3, 2.0]), label="noise"),
        seed=draw(st.integers(0, 99), label="seed"),
    )
    dtype = draw(dtypes, label="dtype")
    if not normalize:
        bound = (50 / max(abs(scale), 1)) ** 0.5
        image, text = (
            bound * torch.logspace(-2, 0, len(x))[:, None] * torch.nn.functional.normalize(x, dim=1)
            for x in (image, text)
        )
    return tuple(LAYOUTS[draw(layouts, label="layout")](x.to(dtype)) for x in (image, text))


def slack(*features: Tensor) -> float:
    return COLLAPSED if any(x.stride(0) == 0 for x in features) else 1.0


def as_given(image: Tensor, text: Tensor, loss):
    """Give the loss the layout that was drawn, because `check` makes contiguous leaves."""

    def strided(x: Tensor, like: Tensor) -> Tensor:
        if 0 in like.stride():
            return x  # the gradient of an expanded leaf would be summed over its rows
        held = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        return held.fill_(torch.nan).copy_(x) if not x.requires_grad else _Restride.apply(x, held)

    return lambda i, t, *scalars: loss(strided(i, image), strided(t, text), *scalars)


class _Restride(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, held: Tensor) -> Tensor:
        return held.copy_(x)

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, None]:
        return d, None


@hypothesis.given(st.data())
def test_contrastive_loss_accurate_on_anything(data: st.DataObject) -> None:
    draw = data.draw
    set_machine(draw)
    M, kind = draw(rows, label="M"), draw(st.sampled_from(["pairs", "labels", "labels", "self"]), label="kind")
    N = draw(rows, label="N") if kind == "labels" else M
    scale = draw(scales, label="scale")
    normalize = draw(st.booleans(), label="normalize")
    options = {
        "normalize": normalize,
        "image_weight": draw(st.sampled_from([0.5, 0.75, 0.0, 1.0]), label="image_weight"),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0]), label="smoothing"),
    }
    image, text = features(draw, M, N, normalize, scale)
    given = dict(options)
    if kind != "pairs":
        classes = draw(st.sampled_from([1, 3, 50, 2**62]), label="classes")
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99), label="label seed"))
        y = tuple(torch.randint(-classes, classes, (size,), generator=generator) for size in (M, N))
        y = tuple(torch.where(of < 0, of - 1, of) for of in y)  # -1 is avoided because it means no label and is refused
        y = (y[0], y[0]) if kind == "self" else y
        own = torch.eye(M, N, dtype=torch.bool) & (kind == "self")
        hypothesis.assume(((y[0][:, None] == y[1]) & ~own).any())
        options |= {"labels": y, "exclude_self": kind == "self"}
        given |= {"image_labels": y[0], "text_labels": y[1], "exclude_self": kind == "self"}
    loss = as_given(image, text, lambda *x: fastclip.contrastive_loss(*x, backend="cpu", **given))
    check(loss, image, text, scale, base_line=False, slack=slack(image, text), **options)


@hypothesis.given(st.data())
def test_sigmoid_loss_accurate_on_anything(data: st.DataObject) -> None:
    draw = data.draw
    set_machine(draw)
    N = draw(rows, label="N")
    scale, bias = (
        draw(scales, label="scale"),
        draw(st.floats(-50, 50, width=32), label="bias"),
    )
    normalize = draw(st.booleans(), label="normalize")
    image, text = features(draw, N, N, normalize, scale)
    loss = as_given(image, text, lambda *x: fastclip.sigmoid_loss(*x, backend="cpu", normalize=normalize))
    check(loss, image, text, scale, bias=bias, base_line=False, slack=slack(image, text), normalize=normalize)
