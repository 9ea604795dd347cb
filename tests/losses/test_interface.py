"""First contact with the losses: unsuitable arguments, choice of backend, environment variables, ClipLoss."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import open_clip.loss
import pytest
import torch
from torch import Tensor

import fastclip
from fastclip._backends import cpu
from fastclip._backends.cpu import blocks, contrastive
from support.accuracy import pairs

IMAGE, TEXT = torch.randn(4, 8), torch.randn(4, 8)
GONE = torch.distributed.ProcessGroup(0, 1)  # a process group after `destroy_process_group`
NAMES_BOTH = r"image_features \({}\) {} on cpu and text_features \({}\) {} on {}"


def both(image: str, text: str, image_dtype: str = "float32", text_dtype: str = "float32", device: str = "cpu") -> str:
    return NAMES_BOTH.format(image, image_dtype, text, text_dtype, device)


def nested(x: Tensor) -> Tensor:
    return torch.nested.as_nested_tensor(list(x), layout=torch.jagged)


GROUP_ERRORS = {
    "group": (IMAGE, TEXT, {"group": 3}, TypeError, r"group must be a torch\.distributed\.ProcessGroup .*, got int"),
    "group that is gone": (
        IMAGE,
        TEXT,
        {"group": GONE},
        RuntimeError,
        "torch.distributed: call init_process_group first",
    ),
}
ERRORS = {
    "vector": (IMAGE[0], TEXT, {}, ValueError, both("8,", "4, 8")),
    "three axes": (IMAGE, TEXT[None], {}, ValueError, both("4, 8", "1, 4, 8")),
    "D": (IMAGE, TEXT[:, :7], {}, ValueError, both("4, 8", "4, 7")),
    "N": (IMAGE, TEXT[:3], {}, ValueError, "as many texts as images: " + both("4, 8", "3, 8")),
    "empty batch": (IMAGE[:0], TEXT[:0], {}, ValueError, "empty: " + both("0, 8", "0, 8")),
    "no features": (IMAGE[:, :0], TEXT[:, :0], {}, ValueError, "empty"),
    "dtypes": (IMAGE, TEXT.double(), {}, TypeError, both("4, 8", "4, 8", "float32", "float64")),
    "integers": (IMAGE.long(), TEXT, {}, TypeError, both("4, 8", "4, 8", "int64")),
    "complex": (IMAGE, TEXT.to(torch.complex64), {}, TypeError, both("4, 8", "4, 8", text_dtype="complex64")),
    "float8": (IMAGE.to(torch.float8_e4m3fn), TEXT.to(torch.float8_e4m3fn), {}, TypeError, "float16 or float64"),
    "sparse": (IMAGE.to_sparse(), TEXT, {}, TypeError, r"dense tensor, got a sparse_coo one: pass .*\.to_dense\(\)"),
    "nested": (IMAGE, nested(TEXT), {}, TypeError, r"text_features must be a dense tensor, got a nested one"),
    "devices": (IMAGE, TEXT.to("meta"), {}, ValueError, both("4, 8", "4, 8", device="meta")),
    "numpy": (IMAGE.numpy(), TEXT, {}, TypeError, r"image_features must be a torch\.Tensor, got ndarray"),
    "several scales": (IMAGE, TEXT, {"logit_scale": torch.ones(2)}, ValueError, r"one element: logit_scale \(2,\)"),
    "complex scale": (IMAGE, TEXT, {"logit_scale": torch.tensor(1j)}, TypeError, "real"),
    "scale of text": (IMAGE, TEXT, {"logit_scale": "14"}, TypeError, "logit_scale must be a number or a torch.Tensor"),
    "no scale": (IMAGE, TEXT, {"logit_scale": None}, TypeError, "logit_scale must be a number"),
    "true scale": (IMAGE, TEXT, {"logit_scale": True}, TypeError, "logit_scale must be a number.*got bool"),
    "tensor of true": (IMAGE, TEXT, {"logit_scale": torch.tensor(True)}, TypeError, "must be real: .* bool"),
    "several numpy scales": (IMAGE, TEXT, {"logit_scale": np.ones(2)}, TypeError, "got ndarray"),
    "complex numpy scale": (IMAGE, TEXT, {"logit_scale": np.complex64(2)}, TypeError, "got complex"),
    "weight": (IMAGE, TEXT, {"image_weight": 1.5}, ValueError, r"image_weight must be in \[0, 1\], got 1\.5"),
    "weight NaN": (IMAGE, TEXT, {"image_weight": float("nan")}, ValueError, "image_weight"),
    "weight with gradient": (
        IMAGE,
        TEXT,
        {"image_weight": torch.tensor(0.5, requires_grad=True)},
        TypeError,
        r"image_weight does not receive a gradient: pass image_weight\.item\(\)",
    ),
    "weight of text": (IMAGE, TEXT, {"image_weight": "0.5"}, TypeError, "image_weight must be a number, got str"),
    "smoothing of text": (IMAGE, TEXT, {"label_smoothing": None}, TypeError, "label_smoothing must be a number"),
    "normalize": (IMAGE, TEXT, {"normalize": "no"}, TypeError, "normalize must be True or False, got 'no'"),
    "no normalize": (IMAGE, TEXT, {"normalize": None}, TypeError, "normalize must be True or False, got None"),
    "exclude_self": (IMAGE, TEXT, {"exclude_self": "yes"}, TypeError, "exclude_self must be True or False"),
    "no reduction": (IMAGE, TEXT, {"reduction": None}, ValueError, "'mean', 'sum' or 'none', got None"),
    "list of labels": (
        IMAGE,
        TEXT,
        {"image_labels": [0, 1, 2, 3], "text_labels": torch.arange(4)},
        TypeError,
        r"image_labels must be a torch\.Tensor, got list: convert it with torch\.as_tensor",
    ),
    "bool labels": (
        IMAGE,
        TEXT,
        {"image_labels": torch.ones(4) > 0, "text_labels": torch.arange(4)},
        TypeError,
        r"image_labels must be integers: image_labels \(4,\) bool",
    ),
    "smoothing": (IMAGE, TEXT, {"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\]"),
    "reduction": (IMAGE, TEXT, {"reduction": "median"}, ValueError, "'mean', 'sum' or 'none', got 'median'"),
    "comm": (IMAGE, TEXT, {"comm": "tree"}, ValueError, "'gather' or 'ring', got 'tree'"),
    "backend": (IMAGE, TEXT, {"backend": "tpu"}, ValueError, "'tpu' is unknown; .*'cpu', 'reference'"),
    **GROUP_ERRORS,
    "one label": (IMAGE, TEXT, {"text_labels": torch.arange(4)}, ValueError, "image_labels is missing"),
    "label dtype": (
        IMAGE,
        TEXT,
        {"image_labels": torch.ones(4), "text_labels": torch.arange(4)},
        TypeError,
        r"image_labels must be integers: image_labels \(4,\) float32",
    ),
    "label shape": (
        IMAGE,
        TEXT,
        {"image_labels": torch.arange(4), "text_labels": torch.arange(5)},
        ValueError,
        r"text_labels \(5,\) int64 on cpu for text_features \(4, 8\)",
    ),
    "no positive": (
        IMAGE,
        TEXT,
        {"image_labels": torch.arange(4), "text_labels": torch.arange(4) + 4},
        ValueError,
        "no positive pair",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_misfit_raises_before_any_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image, text, options, error, message = ERRORS[name]
    monkeypatch.setattr(cpu, "contrastive_fwd", lambda *_: pytest.fail("the kernels were called"))
    monkeypatch.setattr(fastclip._backends.reference, "contrastive_fwd", cpu.contrastive_fwd)
    with pytest.raises(error, match=message):
        fastclip.contrastive_loss(image, text, **options)


NUMBERS = [
    14,
    14.0,
    np.float32(14),
    np.float64(14),
    np.int64(14),
    np.array(14.0),
    np.array([14]),
    Fraction(14),
    Decimal(14),
]


@pytest.mark.parametrize(
    "scale",
    [*NUMBERS, torch.tensor(14.0), torch.tensor([14.0]), torch.tensor([[14]]), torch.tensor(14.0).double()],
    ids=repr,
)
def test_scale_of_any_kind_is_taken(scale: Any) -> None:
    torch.testing.assert_close(
        fastclip.contrastive_loss(IMAGE, TEXT, scale), fastclip.contrastive_loss(IMAGE, TEXT, 14.0), rtol=0, atol=0
    )
    if isinstance(scale, Tensor) and scale.is_floating_point():
        scale = scale.clone().requires_grad_()
        fastclip.contrastive_loss(IMAGE, TEXT, scale).backward()
        assert scale.grad.shape == scale.shape and scale.grad.dtype == scale.dtype


def test_explicit_backend_that_cannot_serve_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot serve this call: .* not float64"):
        fastclip.contrastive_loss(IMAGE.double(), TEXT.double(), backend="cpu")
    assert fastclip.contrastive_loss(IMAGE.double(), TEXT.double()).dtype == torch.float64
    monkeypatch.setenv("FASTCLIP_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="not float64"):
        fastclip.contrastive_loss(IMAGE.double(), TEXT.double())
    monkeypatch.setenv("FASTCLIP_BACKEND", "tpu")
    with pytest.raises(ValueError, match="'tpu' is unknown"):
        fastclip.contrastive_loss(IMAGE, TEXT)


def test_environment_chooses_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    real = fastclip._backends.reference.contrastive_fwd
    monkeypatch.setattr(fastclip._backends.reference, "contrastive_fwd", lambda *a: served.append(1) or real(*a))
    fastclip.contrastive_loss(IMAGE, TEXT)
    assert not served
    monkeypatch.setenv("FASTCLIP_BACKEND", "reference")
    fastclip.contrastive_loss(IMAGE, TEXT)
    assert served


@pytest.mark.parametrize("value", ["many", "0", "-1", "nan"])
def test_workspace_that_is_no_size_raises(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", value)
    with pytest.raises(ValueError, match="FASTCLIP_WORKSPACE_MB must be a number"):
        fastclip.contrastive_loss(IMAGE, TEXT)


def python(code: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.fault("A native module is missing", "`backends()` gives the reason, and the import succeeds")
def test_missing_native_module_is_a_reason() -> None:
    code = (
        "import sys; sys.modules['fastclip._cpu'] = None; import fastclip, torch; x = torch.eye(4); "
        "print(fastclip.backends()); print(round(fastclip.contrastive_loss(x, x, 1.0).item(), 4)); "
    )
    backends, loss = python(code).splitlines()
    assert "'cpu': 'the native module fastclip._cpu does not load" in backends
    assert "'reference': 'available'" in backends
    assert loss == "0.7437"  # log(e + 3) - 1


def test_environment_chooses_instruction_set() -> None:
    code = "import fastclip; from fastclip._backends.cpu import native; "
    code += " print(fastclip.backends()['cpu'], native.module.isa())"
    assert python(code, FASTCLIP_CPU_ISA="portable") == "available portable"
    assert python(code, FASTCLIP_CPU_ISA="mmx").startswith("FASTCLIP_CPU_ISA='mmx' is not supported by this processor")


def test_import_needs_torch_only() -> None:
    code = "import torch, sys; before = set(sys.modules); import fastclip; print(*sorted(set(sys.modules) - before))"
    new = {name.split(".")[0] for name in python(code).split()}
    assert new - set(sys.stdlib_module_names) - {"fastclip", "torch"} == set()


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="loaded libraries are read from Linux's /proc")
def test_no_second_openmp_runtime_is_loaded() -> None:
    code = (
        "import re, torch; x = torch.randn(300, 8)\n"
        "loaded = lambda: set(re.findall(r'/\\S*(?:gomp|iomp|omp)\\S*[.]so\\S*', open('/proc/self/maps').read()))\n"
        "torch.mm(x, x.T); before = loaded(); import fastclip; fastclip.contrastive_loss(x, x)\n"
        "print(fastclip.backends()['cpu'], *sorted(loaded() - before))"
    )
    assert python(code) == "available"


def test_native_module_names_no_openmp_runtime() -> None:
    """The native module links to none of libgomp, libomp and libiomp5. If torch's runtime has the system's name, the
    loader takes one for the other, and a link shows only in the file itself.
    """
    module = pytest.importorskip("fastclip._cpu")
    assert not re.findall(rb"lib[gi]?omp5?(?:-\w+)?[.](?:so|dylib)", Path(module.__file__ or "").read_bytes())


def test_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    assert fastclip.__version__ == version("fastclip-kernels")


def signature(function: object) -> list[tuple[str, object]]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


def test_clip_loss_has_open_clip_signature() -> None:
    assert signature(fastclip.ClipLoss.__init__) == signature(open_clip.loss.ClipLoss.__init__)
    assert signature(fastclip.ClipLoss.forward) == signature(open_clip.loss.ClipLoss.forward)


@pytest.mark.parametrize("bias", [None, 2.0])
@pytest.mark.parametrize("output_dict", [False, True])
def test_clip_loss_equals_open_clip(bias: float | None, output_dict: bool) -> None:
    results = []
    for module in (fastclip.ClipLoss(), open_clip.loss.ClipLoss(cache_labels=True)):
        image, text = (torch.nn.functional.normalize(x, dim=1).requires_grad_() for x in pairs(50, 50, 16))
        scale = torch.tensor(14.3, requires_grad=True)
        logit_bias = None if bias is None else torch.tensor(bias, requires_grad=True)
        out = module(image, text, scale, logit_bias=logit_bias, output_dict=output_dict)
        loss = out["contrastive_loss"] if output_dict else out
        loss.backward()
        results.append((loss.detach(), image.grad, text.grad, scale.grad))
        if logit_bias is not None:
            assert logit_bias.grad.abs() < 1e-6
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_modules_over_processes_need_them() -> None:
    for module, scalars in (
        (fastclip.ClipLoss(local_loss=True, gather_with_grad=True, rank=0, world_size=4), (10.0,)),
        (fastclip.SigLipLoss(rank=0, world_size=4), (10.0, -10.0)),
    ):
        with pytest.raises(RuntimeError, match=r"world_size=4 needs torch\.distributed: call init_process_group"):
            module(IMAGE, TEXT, *scalars)
    with pytest.raises(ValueError, match="Horovod is not supported"):
        fastclip.ClipLoss(use_horovod=True)


def test_modules_have_no_state() -> None:
    assert not fastclip.ClipLoss().state_dict() and not fastclip.SigLipLoss().state_dict()


def test_siglip_loss_has_open_clip_signature() -> None:
    ours = signature(fastclip.SigLipLoss.__init__)
    theirs = signature(open_clip.loss.SigLipLoss.__init__)
    assert ours == theirs or ours == [*theirs, ("chunk_size", None)]
    assert signature(fastclip.SigLipLoss.forward) == signature(open_clip.loss.SigLipLoss.forward)


def test_siglip_loss_takes_every_way_to_the_same_loss() -> None:
    expected = fastclip.SigLipLoss()(IMAGE, TEXT, 10.0, -10.0)
    for options in ({"dist_impl": name} for name in ("bidir", "shift", "reduce", "gather")):
        assert torch.equal(fastclip.SigLipLoss(**options)(IMAGE, TEXT, 10.0, -10.0), expected)
    assert torch.equal(fastclip.SigLipLoss(chunk_size=2)(IMAGE, TEXT, 10.0, -10.0), expected)
    with pytest.raises(ValueError, match="dist_impl must be one of 'bidir', 'shift', 'reduce', 'gather', got 'ring'"):
        fastclip.SigLipLoss(dist_impl="ring")
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        fastclip.SigLipLoss(chunk_size=0)


SIGMOID_ERRORS = {
    "N": (IMAGE, TEXT[:3], {}, ValueError, "as many texts as images: " + both("4, 8", "3, 8")),
    "dtypes": (IMAGE, TEXT.double(), {}, TypeError, both("4, 8", "4, 8", "float32", "float64")),
    "several biases": (IMAGE, TEXT, {"logit_bias": torch.ones(2)}, ValueError, r"one element: logit_bias \(2,\)"),
    "bias of text": (IMAGE, TEXT, {"logit_bias": "-10"}, TypeError, "logit_bias must be a number"),
    "several scales": (IMAGE, TEXT, {"logit_scale": torch.ones(2)}, ValueError, r"one element: logit_scale \(2,\)"),
    "reduction": (IMAGE, TEXT, {"reduction": "none"}, ValueError, "'mean' or 'sum', got 'none'"),
    "backend": (IMAGE, TEXT, {"backend": "tpu"}, ValueError, "'tpu' is unknown; .*'cpu', 'reference'"),
    "no bias": (IMAGE, TEXT, {"logit_bias": None}, TypeError, "logit_bias must be a number or a torch.Tensor"),
    "one label": (IMAGE, TEXT, {"text_labels": torch.arange(4)}, ValueError, "image_labels is missing"),
    "exclude_self": (IMAGE, TEXT, {"exclude_self": True}, ValueError, "exclude_self needs labels"),
    "ignore_label": (IMAGE, TEXT, {"ignore_label": 0}, ValueError, "ignore_label needs image_labels and text_labels"),
    "all ignored": (
        IMAGE,
        TEXT,
        {"image_labels": torch.zeros(4).int(), "text_labels": torch.arange(4), "ignore_label": 0},
        ValueError,
        "no pair remains: every image label is ignore_label=0",
    ),
    "margin": (IMAGE, TEXT, {"negative_margin": float("nan")}, ValueError, "negative_margin must be finite or None"),
    **GROUP_ERRORS,
    "cpu float64": (IMAGE.double(), TEXT.double(), {"backend": "cpu"}, RuntimeError, "cannot serve .* not float64"),
}


@pytest.mark.parametrize("name", SIGMOID_ERRORS)
def test_sigmoid_misfit_raises_before_any_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image, text, options, error, message = SIGMOID_ERRORS[name]
    monkeypatch.setattr(cpu, "sigmoid_fwd", lambda *_: pytest.fail("the kernels were called"))
    with pytest.raises(error, match=message):
        fastclip.sigmoid_loss(image, text, **{"logit_scale": 10.0, "logit_bias": -10.0, **options})


@pytest.mark.fault("`torch.set_default_dtype` is changed", "The results are the same")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_default_dtype_changes_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def results() -> list[Tensor]:
        found: list[Tensor] = []
        for backend in ("cpu", "reference"):
            for features in (torch.float32, torch.bfloat16):
                image, text = (x.to(features).requires_grad_() for x in (IMAGE.detach(), TEXT.detach()))
                loss = fastclip.contrastive_loss(image, text, label_smoothing=0.1, backend=backend)
                loss = loss + fastclip.sigmoid_loss(image, text, 10.0, -10.0, backend=backend)
                found += [loss.detach(), *torch.autograd.grad(loss, (image, text))]
                found += fastclip.contrastive_stats(image, text, backend=backend)
        return found

    expected = results()
    monkeypatch.setattr(blocks, "workspace", blocks._Workspace())
    monkeypatch.setattr(contrastive, "workspace", blocks.workspace)
    torch.set_default_dtype(dtype)
    try:
        found = results()
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


@pytest.mark.parametrize("number", [np.float32(0.25), np.array(0.25), Fraction(1, 4), torch.tensor(0.25)], ids=repr)
def test_options_are_numbers_of_any_kind(number: Any) -> None:
    options = {"image_weight": number, "label_smoothing": number, "normalize": np.bool_(True)}
    plain = {"image_weight": 0.25, "label_smoothing": 0.25}
    for reduction in ("mean", "sum"):
        ours, theirs = (fastclip.contrastive_loss(IMAGE, TEXT, **o, reduction=reduction) for o in (options, plain))
        assert torch.equal(ours, theirs)
    assert torch.equal(
        fastclip.sigmoid_loss(IMAGE, TEXT, 8 * number, number), fastclip.sigmoid_loss(IMAGE, TEXT, 2.0, 0.25)
    )


@pytest.mark.parametrize("name", ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32"])
def test_labels_of_any_integer_dtype(name: str) -> None:
    y = torch.tensor([1, 0, 1, 3])
    narrow = y.to(getattr(torch, name))
    for options in ({}, {"exclude_self": True}):
        ours = fastclip.contrastive_loss(IMAGE, TEXT, image_labels=narrow, text_labels=y, **options)
        assert torch.equal(ours, fastclip.contrastive_loss(IMAGE, TEXT, image_labels=y, text_labels=y, **options))
