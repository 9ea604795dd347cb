"""One update: optimiser groups, clipping, the moving average, the scale, and conditions that stop training."""

from __future__ import annotations

import copy
import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from support import needs

needs("models")

from fastclip.data.batch import Batch
from fastclip.models import DualEncoder, create_model
from fastclip.training.options import Loss
from fastclip.training.ranks import World
from fastclip.training.step.losses import NamedLoss, named_loss
from fastclip.training.step.moving_average import MovingAverage
from fastclip.training.step.optim import build_optimizer, clip_gradients, gradient_norm, parameter_groups, warmup_cosine
from fastclip.training.step.update import Stepper, seed_step

ALONE = World(0, 1, torch.device("cpu"), None)
B, L, SAMPLES = 12, 8, 20


def tiny(name: str = "ViT-tiny", **options: Any) -> DualEncoder:
    torch.manual_seed(0)
    return create_model(name, context_length=L, **options)


def batch(seed: int = 0, size: int = B) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    ids = torch.randint(1, 400, (size, L), generator=generator)
    labels = torch.randint(0, 5, (size,), generator=generator)
    keys = tuple(f"pictures/{k}.jpg" for k in range(size))
    return Batch(images, ids, labels, keys, samples=torch.randperm(SAMPLES, generator=generator)[:size])


def cut(whole: Batch, size: int) -> list[Batch]:
    pieces = range(0, len(whole.keys), size)
    return [Batch(*(x[k : k + size] for x in whole)) for k in pieces]


def stepper(model: DualEncoder, loss: str = "clip", *, lr: float = 1e-3, **options: Any) -> Stepper:
    choice = {"weight_decay": options.pop("decay", 0.1), "eps": options.pop("eps", 1e-6)}
    optimizer = build_optimizer(options.pop("optimizer", "adamw"), model, lr=lr, **choice)
    return Stepper(model, model, of_name(loss), optimizer, ALONE, **options)


def of_name(loss: str, **options: Any) -> NamedLoss:
    return named_loss(loss, **options, **({"samples": SAMPLES} if loss == "global" else {}))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]), name


def test_warmup_cosine_rises_and_falls() -> None:
    factors = [warmup_cosine(step, warmup_steps=4, steps=12) for step in range(13)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.5) and factors[12] == pytest.approx(0)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert warmup_cosine(0, warmup_steps=0, steps=1) == 1


@pytest.mark.parametrize("name", ["ViT-tiny", "RN-tiny", "align-tiny", "florence-tiny"])
def test_matrices_decay_and_nothing_else(name: str) -> None:
    model = create_model(name)
    groups = parameter_groups(model, 0.25)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decays) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for module in model.modules():
        for kind, p in module.named_parameters(recurse=False):
            matrix = isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding) and kind == "weight"
            vector = kind == "bias" or "norm" in type(module).__name__.lower() or kind in ("logit_scale", "cls_token")
            assert matrix != vector or kind not in ("weight", "bias")
            if matrix or vector:
                assert decays[id(p)] == (0.25 if matrix else 0.0), (type(module).__name__, kind)


def test_update_decays_matrices_only() -> None:
    model = tiny()
    before = weights(model)
    # AdamW's epsilon makes the update of a gradient clipped to 1e-13 vanish, which leaves the decay by 0.1 * 0.5.
    stepper(model, lr=0.1, decay=0.5, max_grad_norm=1e-13).step([batch()], step=0)
    for name, x in model.named_parameters():
        matrix = x.dim() >= 2 and name != "visual.cls_token"
        assert torch.allclose(x, before[name] * (0.95 if matrix else 1), rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_update_learns(optimizer: str) -> None:
    model = tiny()
    one = stepper(model, optimizer=optimizer, lr=1e-2 if optimizer == "lamb" else 1e-3)
    losses = [one.step([batch()], step=step).loss for step in range(12)]
    assert losses[-1] < 0.7 * losses[0]


def test_lamb_scales_a_matrix_by_its_norm() -> None:
    """LAMB (You et al. 2020, algorithm 2) moves a matrix by the learning rate times the norm of the matrix."""
    model = tiny()
    before = weights(model)
    stepper(model, optimizer="lamb", lr=1e-2).step([batch()], step=0)
    name = "visual.blocks.0.mlp.fc1.weight"
    moved = model.state_dict()[name] - before[name]
    assert float(moved.norm()) == pytest.approx(1e-2 * float(before[name].norm()), rel=1e-3)


def test_unknown_optimiser_and_loss_are_named() -> None:
    with pytest.raises(ValueError, match="'sgd'"):
        build_optimizer("sgd", tiny(), lr=1.0, weight_decay=0.0)
    with pytest.raises(ValueError, match="'info'"):
        named_loss("info")
    with pytest.raises(ValueError, match="no label smoothing"):
        named_loss("siglip", label_smoothing=0.1)
    with pytest.raises(TypeError, match="without a known length"):
        named_loss("global")
    with pytest.raises(ValueError, match="no image_weight"):
        named_loss("siglip", image_weight=0.0)
    with pytest.raises(ValueError, match="global loss has no prefixes"):
        named_loss("global", samples=SAMPLES, prefixes=(8, 16))


def test_gradients_are_clipped_to_the_norm_that_is_told() -> None:
    model = tiny()
    images, ids = batch()[:2]
    sum(x.sum() for x in model(images, ids)).backward()
    unclipped = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    norm = gradient_norm(model.parameters())
    assert norm.item() == pytest.approx(float(unclipped.norm()), rel=1e-5)
    clip_gradients(model.parameters(), 2 * norm.item(), norm)
    assert gradient_norm(model.parameters()).item() == norm.item()
    clip_gradients(model.parameters(), 0.5, norm)
    clipped = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    torch.testing.assert_close(clipped, unclipped * (0.5 / unclipped.norm()), rtol=1e-4, atol=1e-9)
    assert gradient_norm([nn.Parameter(torch.ones(2))]).item() == 0


def test_average_follows_the_weights() -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    average = MovingAverage(model, 0.75)
    expected = 1.0
    for k in range(1, 60):
        with torch.no_grad():
            model.weight.add_(1.0)
        average.update()
        decay = min(0.75, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * (1 + k)
    average.swap()
    torch.testing.assert_close(model.weight.detach(), torch.full((2, 2), expected))
    average.swap()
    assert model.weight.detach().eq(60).all()


@pytest.mark.parametrize("loss", get_args(Loss))
def test_micro_batches_make_the_same_update(loss: str) -> None:
    spec = of_name(loss)

    def updated(size: int) -> tuple[DualEncoder, float, float]:
        model = tiny(init_logit_scale=spec.init_logit_scale, init_logit_bias=spec.init_logit_bias)
        # AdamW's first step is the sign of the gradient, which rounding decides for gradients near 0. A large eps
        # avoids that.
        report = stepper(model, loss, lr=1.0, decay=0.0, eps=1.0).step(cut(batch(), size), step=0)
        return model, report.loss, report.grad_norm

    whole, parts = updated(B), updated(5)
    assert parts[1:] == pytest.approx(whole[1:], rel=1e-5)
    start = tiny(init_logit_scale=spec.init_logit_scale, init_logit_bias=spec.init_logit_bias)
    moved = [[(p - q).detach() for p, q in zip(m.parameters(), start.parameters())] for m in (whole[0], parts[0])]
    for (name, _), a, b in zip(start.named_parameters(), *moved):
        assert float((a - b).norm()) <= 2e-4 * float(a.norm()) + 2e-7, name


def dense(loss: str, model: DualEncoder, whole: Batch, prefix: int | None = None) -> Tensor:
    """Compute the papers' formulas over the matrix of logits of a prefix of the features in fp64."""
    image, text, scale, *bias = copy.deepcopy(model).double()(whole.images.double(), whole.ids)
    image, text = (nn.functional.normalize(x[:, :prefix], dim=1) for x in (image, text))
    z = scale * image @ text.T
    same = whole.labels[:, None] == whole.labels if loss == "unicl" else torch.eye(B, dtype=torch.bool)
    if loss == "siglip":
        signs = 2 * torch.eye(B, dtype=torch.float64) - 1
        return -nn.functional.logsigmoid(signs * (z + bias[0])).sum() / B
    if loss == "global":  # of samples that are seen for the first time, without the factor tau
        negatives = z.masked_fill(same, -torch.inf)
        rows, columns = ((x.logsumexp(1) - z.diagonal()).mean() - math.log(B - 1) for x in (negatives, negatives.T))
        return (rows + columns) / 2
    target = same.double() / same.sum(1, keepdim=True)
    if loss == "align":
        target = 0.9 * target + 0.1 / B
    rows, columns = (-(target * x.log_softmax(1)).sum(1).mean() for x in (z, z.T))
    return {"convirt": 0.75 * rows + 0.25 * columns, "align": rows + columns}.get(loss, (rows + columns) / 2)


@pytest.mark.parametrize("loss", get_args(Loss))
def test_losses_are_those_of_the_papers(loss: str) -> None:
    options = {"label_smoothing": 0.1} if loss == "align" else {}
    spec = of_name(loss, **options)
    model = tiny(init_logit_scale=spec.init_logit_scale, init_logit_bias=spec.init_logit_bias)
    expected = float(dense(loss, model, batch()).detach())
    optimizer = build_optimizer("adamw", model, lr=1e-3, weight_decay=0.1)
    assert Stepper(model, model, spec, optimizer, ALONE).step([batch()], step=0).loss == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize("loss", [name for name in get_args(Loss) if name != "global"])
@pytest.mark.parametrize("size", [B, 5])
def test_prefixes_add_their_losses(loss: str, size: int) -> None:
    """The loss is the sum over prefixes, whole or in micro-batches."""
    spec = named_loss(loss, label_smoothing=0.1 if loss == "align" else 0.0, prefixes=(16, 3, 64))
    model = tiny(init_logit_scale=spec.init_logit_scale, init_logit_bias=spec.init_logit_bias)
    expected = sum(float(dense(loss, model, batch(), d).detach()) for d in (16, 3, 64))
    optimizer = build_optimizer("adamw", model, lr=1e-3, weight_decay=0.1)
    report = Stepper(model, model, spec, optimizer, ALONE).step(cut(batch(), size), step=0)
    assert report.loss == pytest.approx(expected, rel=1e-5)


def test_accuracy_is_that_of_the_batch() -> None:
    model = tiny()
    image, text, _ = model(*batch()[:2])
    similar = image @ text.T
    hits = [float((x.argmax(1) == torch.arange(B)).double().mean()) for x in (similar, similar.T)]
    report = stepper(model).step(cut(batch(), 5), step=0, accuracy=True)
    assert [report.image_top1, report.text_top1] == hits
    assert stepper(model).step([batch()], step=0).image_top1 is None


def test_scale_is_clamped() -> None:
    model = tiny()
    with torch.no_grad():
        model.logit_scale.fill_(6.0)
    stepper(model).step([batch()], step=0)
    assert model.logit_scale.exp().item() == pytest.approx(100)


@pytest.mark.fault("Pixels are not finite", "The run ends before the update and names step and samples")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("size", [B, 5])
def test_pixels_that_are_not_finite_stop_before_the_update(value: float, size: int) -> None:
    model = tiny()
    one = stepper(model, ema=MovingAverage(model, 0.9))
    one.step([batch()], step=0)
    before, average = weights(model), copy.deepcopy(one.ema.averages)
    poisoned = batch(1)
    poisoned.images[7, 0, 3, 3] = value
    message = r"loss of step 1 is nan; training stopped before its update: pixels of pictures/7\.jpg are not finite$"
    with pytest.raises(FloatingPointError, match=message):
        one.step(cut(poisoned, size), step=1)
    assert_same(model, before)
    assert all(torch.equal(a, b) for a, b in zip(average, one.ema.averages))
    assert math.isfinite(one.step([batch()], step=1).loss)  # the poisoned batch leaves no trace


@pytest.mark.fault("Weights or features are not finite", "The run ends before the update and names them")
def test_weights_and_features_that_are_not_finite_are_named() -> None:
    model = tiny()
    with torch.no_grad():
        model.visual.blocks[1].mlp.fc1.bias[3] = math.nan
    with pytest.raises(FloatingPointError, match=r"weights of visual\.blocks\.1\.mlp\.fc1\.bias are not finite$"):
        stepper(model).step([batch()], step=4)

    model, whole = tiny(), batch()
    model.text.register_forward_hook(lambda module, args, out: out.where(args[0][:, :1] != whole.ids[3, 0], math.inf))
    whole.ids[:, 0] = torch.arange(1, B + 1)
    with pytest.raises(FloatingPointError, match=r"step 4 .* text features of pictures/3\.jpg are not finite$"):
        stepper(model).step(cut(whole, 4), step=4)


@pytest.mark.fault("A gradient is not finite", "The run ends before the update and names the weights")
def test_gradient_that_is_not_finite_stops_before_the_update() -> None:
    model = tiny()
    before = weights(model)
    model.text.ln_final.bias.register_hook(lambda d: d * math.nan)
    with pytest.raises(
        FloatingPointError, match=r"gradient of step 2 is nan; .* gradients of .*text\.ln_final\.bias are not finite$"
    ):
        stepper(model, max_grad_norm=1.0).step([batch()], step=2)
    assert_same(model, before)


@pytest.mark.fault("The loss overflows", "The run ends before the update and reports the logit scale")
def test_loss_that_overflows_tells_the_scale() -> None:
    model = tiny()
    model.logit_scale.requires_grad_(False).fill_(200.0)
    with pytest.raises(
        FloatingPointError, match=r"features are finite and the logit scale is inf\. .* pictures/0\.jpg"
    ):
        stepper(model).step([batch()], step=2)


def test_seed_of_a_step_depends_on_everything() -> None:
    def drawn(*place: int) -> int:
        seed_step(*place)
        return int(torch.randint(2**62, ()))

    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({drawn(*place) for place in places}) == 4
    assert drawn(0, 1, 0) == drawn(0, 1, 0)
