"""The sigmoid loss of every backend and dtype, compared with the fp64 truth and with dense torch; see
test_accuracy.py.
"""

from __future__ import annotations

import pytest
import torch

from fastclip.parity.truth import truth
from support.accuracy import check, leaves, pairs, poisoned
from support.kinds import GPU_KINDS, KINDS, SHAPES, Kind, each_kind, fp16, fp32

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Each is (scale, bias): SigLIP's start, equal logits, solved batches, a negative scale, and logits all beyond the range
# of exp.
SCALARS = [(10.0, -10.0), (0.0, 0.0), (0.0, -3.0), (100.0, -30.0), (100.0, -60.0), (-5.0, 3.0), (1.0, 200.0)]


@pytest.mark.pairwise
@pytest.mark.parametrize(("scale", "bias"), SCALARS)
@pytest.mark.parametrize("regime", SHAPES)
@each_kind(KINDS)
def test_sigmoid_accurate(kind: Kind, regime: str, scale: float, bias: float) -> None:
    image, text = kind.pairs(*kind.shape(regime))
    check(kind.loss(), image, text, scale, bias=bias)


@pytest.mark.parametrize(("bias", "loss"), [(-25.0, 1e-6), (-60.0, 1e-15), (-105.0, 1e-24)])
@each_kind(KINDS)
def test_sigmoid_confident_loss_keeps_digits(kind: Kind, bias: float, loss: float) -> None:
    """A confident loss keeps its digits. log(1 + t) would be 3e-3 off at a loss of 1e-5 per pair, and 0 for these
    losses.
    """
    N = 150 if kind.for_gpus else 300  # both give ragged tiles; with more pairs the roundings of the logits average out
    image, text = kind.pairs(N, N, 256, aligned=1.0, noise=0.05)
    # Dense fp32 rounds logits of this size, so only gate B applies.
    found = check(kind.loss(), image, text, -2 * bias, bias=bias, base_line=False)
    assert loss / 1e3 < float(found.loss) < loss * 1e3, "the case no longer tests what its name says"


@each_kind(GPU_KINDS)  # one rounding of such a logit is 1e-5 of the loss, and the CPU's fp16 is off by 1.5e-5
def test_sigmoid_of_a_solved_batch_keeps_digits(kind: Kind) -> None:
    image, text = kind.pairs(100, 100, 64, aligned=1.0, noise=0.05)
    found = check(kind.loss(), image, text, 200.0, bias=-130.0)
    assert float(found.loss) < 1e-15


@each_kind(fp32(KINDS))
def test_sigmoid_extreme_norms_finite_and_accurate(kind: Kind) -> None:
    image, text = pairs(66, 66, 16)
    factor = torch.ones(66, 1)
    factor[3], factor[7], factor[11] = 1e30, 1e20, 1e-6
    image, text = (poisoned(x) for x in (image * factor, text * factor.flip(0)))
    check(kind.loss(), image, text, 10.0, bias=-10.0)


@pytest.mark.parametrize("factor", [1 / 300, -3.0, 65536.0, 1e-30, 1e25])
@each_kind(KINDS)
def test_sigmoid_upstream_gradient_scales(kind: Kind, factor: float) -> None:
    """The gradients are kept in the graph until their upstream factor is known. The factor is not rounded to the
    features' dtype, and gradients of float16 features neither overflow nor flush to zero before it is applied.
    """
    image, text = kind.pairs(30, 30, 16)
    scale = 2.0**-20 / abs(factor) if kind.dtype == torch.float16 else 1.0  # keeps the gradient in float16's range
    expected = truth(image, text, 10.0, bias=-10.0)
    given = leaves(image, text, 10.0, -10.0)
    loss = kind.loss()(*given) * scale
    loss.backward(torch.tensor(factor))
    if kind.dtype == torch.float16:
        return  # 2^-20 of gradients near 1 is subnormal: it must not raise; the next test has the digits
    for ours, theirs in zip(given, (expected.d_image, expected.d_text, expected.d_scale, expected.d_bias)):
        error = (ours.grad.double() / factor - theirs).norm() / theirs.norm()
        assert error < (3e-6 if kind.dtype == torch.float32 or not ours.dim() else 2**-8)


@each_kind(fp16(KINDS))
def test_sigmoid_float16_gradient_of_a_mean_over_many_keeps_digits(kind: Kind) -> None:
    """Gradients of a mean that are below float16's smallest number keep their digits under a gradient
    scaler's factor.
    """
    image, text = kind.pairs(150, 150, 256, aligned=1.0, noise=0.05)
    expected = truth(image, text, 50.0, bias=-25.0)
    assert expected.d_image.abs().median() < 6e-8
    given = leaves(image, text, 50.0, -25.0)
    (kind.loss()(*given) * 2.0**20).backward()
    error = (given[0].grad.double() / 2.0**20 - expected.d_image).norm() / expected.d_image_sum.norm()
    assert error < 2.0**-11


@pytest.mark.pairwise
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("normalize", [True, False])
@each_kind(KINDS)
def test_sigmoid_nan_and_inf_propagate(kind: Kind, value: float, normalize: bool) -> None:
    image, text = kind.pairs(130, 130, 8)
    image[70, 2] = value
    image.requires_grad_()
    loss = kind.loss(normalize=normalize)(image, text, torch.tensor(10.0), torch.tensor(-10.0))
    assert not loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, image)
    assert not gradient.isfinite().all()
