"""The distillation loss under torch's machinery, its module beside open_clip's, and its errors."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import open_clip.loss
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fastclip
from support.accuracy import leaves, pairs

BACKENDS = ["cpu", "reference"]
N = 20


def student(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return leaves(*(x.to(dtype) for x in pairs(N, N, 8)), 5.0)


def teachers(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor], list[float]]:
    (a, b), (c, d) = pairs(N, N, 6, seed=1), pairs(N, N, 11, seed=2)
    return [a.to(dtype), c.to(dtype)], [b.to(dtype), d.to(dtype)], [9.3, 4.1]


TEACHERS = teachers()


def loss(*given: Tensor, **options: Any) -> Tensor:
    return fastclip.distillation_loss(*given, *TEACHERS, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_ops_pass_opcheck(dtype: torch.dtype, backend: str | None) -> None:
    if backend == "cpu" and dtype == torch.float64:
        backend = None  # the automatic choice serves float64 with the reference
    given = student(dtype)
    images, texts, scales = teachers(dtype)
    options = images, texts, torch.tensor(scales, dtype=given[2].dtype), 0, True, backend
    torch.library.opcheck(torch.ops.fastclip.distill_fwd, (*given, *options))
    detached = [x.detach() for x in given]
    stats = torch.ops.fastclip.distill_fwd(*detached, *options)
    grads = [torch.rand_like(stats[k]) for k in (0, 1, 2, 3, 10, 11)]
    for needs in ([True, True, True], [False, True, False]):
        torch.library.opcheck(torch.ops.fastclip.distill_bwd, (*detached, *options, list(stats), grads, needs))


@pytest.mark.parametrize("compiler", [pytest.param("inductor", marks=pytest.mark.full), "aot_eager"])
def test_compiles_whole(compiler: str) -> None:
    def scaled(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return loss(2 * image, text, scale.exp(), image_weight=0.3)

    given = *student()[:2], torch.tensor(1.5, requires_grad=True)
    expected, found = scaled(*given), torch.compile(scaled, fullgraph=True, backend=compiler)(*given)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(torch.autograd.grad(found, given), torch.autograd.grad(expected, given)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_rounds_features_and_not_the_scales(backend: str) -> None:
    image, text, scale = student()
    rounded = [x.detach().bfloat16().requires_grad_() for x in (image, text)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(image, text, scale, backend=backend)
    expected = fastclip.distillation_loss(*rounded, scale, *teachers(torch.bfloat16), backend=backend)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    given = [x.detach().bfloat16().double() for x in (image, text)]
    others = [[x.bfloat16().double() for x in side] for side in TEACHERS[:2]]
    exact = fastclip.distillation_loss(*given, scale.detach().double(), *others, TEACHERS[2])
    assert abs(found.item() / exact.item() - 1) < 1e-5  # scales in bfloat16 would be 1e-3 off
    ours, theirs = torch.autograd.grad(found, image)[0], torch.autograd.grad(expected, rounded[0])[0]
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs.float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needed", [n for k in (1, 2, 3) for n in itertools.combinations(range(3), k)], ids=str)
def test_every_subset_of_gradients(needed: tuple[int, ...], backend: str) -> None:
    given = student()
    whole = torch.autograd.grad(loss(*given, backend=backend), given)
    some = [x.detach().requires_grad_(k in needed) for k, x in enumerate(given)]
    found = torch.autograd.grad(loss(*some, backend=backend), [some[k] for k in needed])
    for k, ours in zip(needed, found):
        assert torch.equal(ours, whole[k])


def test_recorded_and_simulated_calls() -> None:
    given, (images, texts, scales) = student(), teachers()

    def both(image: Tensor, text: Tensor, *of_teachers: Tensor) -> tuple[Tensor, Tensor]:
        value = fastclip.distillation_loss(image, text, 5.0, of_teachers[:2], of_teachers[2:], scales)
        return value, torch.autograd.grad(value, image)[0]

    inputs = (*given[:2], *images, *texts)
    torch.testing.assert_close(make_fx(both)(*inputs)(*inputs), both(*inputs))
    with FakeTensorMode() as mode:
        value, gradient = both(*(mode.from_tensor(x) for x in inputs))
    assert value.shape == () and gradient.shape == (N, 8)
    kept = checkpoint(lambda *x: loss(*x), *given, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(kept, given), torch.autograd.grad(loss(*given), given)):
        assert torch.equal(a, b)


def test_transforms_take_the_reference() -> None:
    image, text, scale = (x.detach() for x in student())
    ours = torch.func.grad(lambda x: loss(x, text, scale))(image)
    x = image.clone().requires_grad_()
    torch.testing.assert_close(ours, torch.autograd.grad(loss(x, text, scale), x)[0])
    with pytest.raises(RuntimeError, match=r"torch\.func transforms and forward-mode derivatives need the reference"):
        torch.func.grad(lambda x: loss(x, text, scale, backend="cpu"))(image)


def test_reference_gradcheck_twice() -> None:
    given = [x[:4].detach().requires_grad_() if x.dim() else x for x in student(torch.float64)]
    images, texts, scales = teachers(torch.float64)
    for options in ({}, {"normalize": False, "image_weight": 0.75}, {"reduction": "none"}):

        def of(*leaves: Tensor, options: dict[str, Any] = options) -> Any:
            few = [x[:4] for x in images], [x[:4] for x in texts], scales
            return fastclip.distillation_loss(*leaves, *few, backend="reference", **options)

        assert torch.autograd.gradcheck(of, given)
        assert torch.autograd.gradgradcheck(of, given)


def test_second_derivatives_of_cpu_raise() -> None:
    given = student()
    (gradient,) = torch.autograd.grad(loss(*given, backend="cpu"), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"backend='cpu' has no second derivatives.*to distillation_loss"):
        gradient.square().sum().backward()


def test_teachers_get_no_gradient_and_any_dtype() -> None:
    given, (images, texts, scales) = student(), teachers()
    learning = [x.requires_grad_() for x in (images[0], texts[0], torch.tensor(scales[0]))]
    value = fastclip.distillation_loss(*given, *learning)
    value.backward()
    assert all(x.grad is None for x in learning)
    for dtype in (torch.float64, torch.bfloat16):
        found = fastclip.distillation_loss(*given, images[0].to(dtype), texts[0].to(dtype), scales[0])
        torch.testing.assert_close(found, value, rtol=1e-5 if dtype == torch.float64 else 1e-2, atol=0)
    exact = [x.detach().double() for x in given]
    assert fastclip.distillation_loss(*exact, *learning).dtype == torch.float64


X, Y = torch.randn(2, 4, 8), torch.randn(2, 4, 5)
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "too few texts of a teacher": (
        (*X, 5.0, Y[0], Y[1][:3], 5.0),
        {},
        ValueError,
        r"as many texts as images: teacher_image_features \(4, 5\) float32 on cpu and teacher_text_features \(3, 5\)",
    ),
    "other images": (
        (*X, 5.0, [Y[0], Y[0][:3]], [Y[1], Y[1][:3]], [5.0, 5.0]),
        {},
        ValueError,
        r"features of the student's images.*: teacher_image_features\[1\] \(3, 5\).* for image_features \(4, 8\)",
    ),
    "one list": (
        (*X, 5.0, [Y[0]], [Y[1]], 5.0),
        {},
        ValueError,
        "one list element for each teacher in all three arguments: .*teacher_logit_scale no list but a float",
    ),
    "scales in a tensor": (
        (*X, 5.0, [Y[0]] * 2, [Y[1]] * 2, torch.ones(2)),
        {},
        ValueError,
        r"teacher_text_features a list of 2, teacher_logit_scale no list but a Tensor \(2,\)",
    ),
    "fewer scales than teachers": (
        (*X, 5.0, [Y[0]] * 2, [Y[1]] * 2, [5.0]),
        {},
        ValueError,
        "teacher_text_features a list of 2, teacher_logit_scale a list of 1",
    ),
    "two scales of one teacher": (
        (*X, 5.0, *Y, torch.ones(2)),
        {},
        ValueError,
        r"teacher_logit_scale must have one element: teacher_logit_scale \(2,\) float32 on cpu",
    ),
    "two scales in an element": (
        (*X, 5.0, [Y[0]] * 2, [Y[1]] * 2, [5.0, torch.ones(2)]),
        {},
        ValueError,
        r"teacher_logit_scale\[1\] must have one element: teacher_logit_scale\[1\] \(2,\) float32 on cpu",
    ),
    "unequal lists": (
        (*X, 5.0, [Y[0]], [Y[1]], [5.0, 6.0]),
        {},
        ValueError,
        "teacher_text_features a list of 1, teacher_logit_scale a list of 2",
    ),
    "no teacher": ((*X, 5.0, [], [], []), {}, ValueError, "teacher_image_features a list of 0"),
    "a scale of a teacher": ((*X, 5.0, *Y, "hot"), {}, TypeError, "teacher_logit_scale must be a number or"),
    "a teacher of integers": ((*X, 5.0, *Y.long(), 5.0), {}, TypeError, "must be floating.*teacher_image_features"),
    "reduction": ((*X, 5.0, *Y, 5.0), {"reduction": "max"}, ValueError, "reduction must be 'mean', 'sum' or 'none'"),
    "image_weight": ((*X, 5.0, *Y, 5.0), {"image_weight": 2}, ValueError, r"image_weight must be in \[0, 1\], got 2"),
    "backend": ((*X.double(), 5.0, *Y, 5.0), {"backend": "cpu"}, RuntimeError, "backend='cpu' cannot serve this call"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_told(name: str) -> None:
    given, options, kind, told = WRONG[name]
    with pytest.raises(kind, match=told):
        fastclip.distillation_loss(*given, **options)


# The module of open_clip


def signature(function: object) -> list[tuple[str, object]]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


def test_module_has_open_clip_signature() -> None:
    ours, theirs = fastclip.DistillClipLoss, open_clip.loss.DistillClipLoss
    assert signature(ours.__init__) == signature(theirs.__init__)
    assert signature(ours.forward) == signature(theirs.forward)
    assert not ours().state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("output_dict", [False, True])
def test_module_equals_open_clip(dtype: torch.dtype, output_dict: bool) -> None:
    image, text, a, b = (
        torch.nn.functional.normalize(x.to(dtype), dim=1) for x in (*pairs(50, 50, 16), *pairs(50, 50, 9))
    )
    results = []
    for module in (fastclip.DistillClipLoss(), open_clip.loss.DistillClipLoss()):
        given = leaves(image, text, 14.3)
        out = module(*given, a, b, 25.0, output_dict=output_dict)
        if output_dict:
            assert list(out) == ["contrastive_loss", "distill_loss"]
        losses = tuple(out.values()) if output_dict else out
        results.append([*losses, *torch.autograd.grad(losses[0] + 3.0 * losses[1], given)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-7)


def test_module_refuses_hooks() -> None:
    class Warm(fastclip.DistillClipLoss):
        def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
            return teacher_logits.sum()

    with pytest.raises(TypeError, match=r"Warm\.dist_loss would not be called: inherit from open_clip\.loss\.Distill"):
        Warm()(*X, 5.0, *Y, 5.0)
