"""Comparison of the losses with float64 results (`truth`) on every case, within the promised errors.

Every form, backend and dtype is compared. A form is a way to obtain the other ranks' texts (gather or ring, with or
without ``equal_shards``), or a module (`ClipLoss` of fastclip or of open_clip).
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastclip._backends import backends, pick
from fastclip.losses.contrastive import contrastive_loss
from fastclip.losses.modules import ClipLoss
from fastclip.losses.sigmoid import sigmoid_loss
from fastclip.parity import promised
from fastclip.parity.cases import Case, cases
from fastclip.parity.truth import Truth, truth

__all__ = ["Row", "Settings", "alone", "compare", "open_clip_loss", "table"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FORMS = {"gather": ("gather", False), "ring": ("ring", False)}
_FORMS |= {f"{name}, equal_shards": (name, True) for name in ("gather", "ring")}
_MODULES = ("ClipLoss", "open_clip's ClipLoss")
_ALONE = ("plain", "sigmoid")
_COLUMNS = ("loss", "d_image", "d_text", "d_scale", "d_bias")

_Loss = Callable[..., Any]


class Row(NamedTuple):
    """One comparison.

    `errors` and `budgets` map the names in `_COLUMNS` to relative errors (Frobenius norms over the whole batch) and to
    the promised errors.
    """

    form: str
    backend: str
    dtype: str
    case: str
    errors: dict[str, float]
    budgets: dict[str, float]
    raised: str = ""  # the error, if the loss raised one

    @property
    def ok(self) -> bool:
        return all(error <= self.budgets[name] for name, error in self.errors.items())  # False for NaN


class Settings(NamedTuple):
    """Options of a comparison, as in `fastclip.parity.run`."""

    batch: int
    dim: int
    seed: int
    backend: str | None
    device: str


def compare(settings: Settings, device: torch.device) -> list[Row]:
    """Return the rows of all comparisons in the default process group, on every rank."""
    rows = []
    batches = cases(dist.get_world_size(), settings.batch, settings.dim, settings.seed)
    truths: dict[tuple[str, torch.dtype], Truth] = {}
    for backend, dtype in _served(settings, device):
        for case in batches:
            true = truths.get((case.name, dtype)) or _truth(case, dtype, device)
            truths[case.name, dtype] = true
            for form, whose, loss in _losses(case, backend, dtype, device):
                errors, raised = _errors(case, dtype, device, true, loss)
                budgets = _budgets(case, dtype, device, true, form, backend)
                rows.append(Row(form, whose, str(dtype).removeprefix("torch."), case.name, errors, budgets, raised))
    order = [*_FORMS, *_MODULES]
    return sorted(rows, key=lambda row: order.index(row.form))


def alone(device: torch.device, *, batch: int = 136, dim: int = 64, seed: int = 0) -> list[Row]:
    """Compare both losses in this process, without a process group, on every backend and dtype of the device.

    batch: the default is a little more than a tile of 128 rows.
    """
    rows = []
    batches = [case for case in cases(1, batch, dim, seed) if case.name in _ALONE]
    for backend, dtype in _served(Settings(batch, dim, seed, None, device.type), device):
        for case in batches:
            true = _truth(case, dtype, device)
            errors, raised = _errors(case, dtype, device, true, _function(case, {"backend": backend}))
            budgets = _budgets(case, dtype, device, true, "", backend)
            rows.append(Row("-", backend, str(dtype).removeprefix("torch."), case.name, errors, budgets, raised))
    return rows


def _truth(case: Case, dtype: torch.dtype, device: torch.device) -> Truth:
    """Return loss and gradients of the whole batch, with features rounded to dtype."""
    image, text = (x.to(device, dtype) for x in (case.image, case.text))
    scale, *bias = case.scalars
    options = {"labels": case.labels, **case.options} if not bias else {"bias": bias[0], **case.options}
    return truth(image, text, scale, upstream=_upstream(case, device), **options)


def _upstream(case: Case, device: torch.device) -> Tensor:
    """Return the upstream gradient, which differs from row to row if the loss is a vector."""
    shape = (len(case.image) + len(case.text),) if case.options.get("reduction") == "none" else ()
    return torch.linspace(0.5, 1.5, math.prod(shape), dtype=torch.float64, device=device).view(shape)


def _served(settings: Settings, device: torch.device) -> Iterator[tuple[str, torch.dtype]]:
    """Yield the backends that run here, with each dtype that they support."""
    for name, state in backends().items():
        for dtype in _DTYPES if state == "available" and settings.backend in (None, name) else ():
            try:
                pick(name, torch.empty(1, settings.dim, dtype=dtype, device=device))
            except RuntimeError:
                continue
            yield name, dtype


def _losses(case: Case, backend: str, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, str, _Loss]]:
    """Yield (form, backend, loss), where loss takes this rank's image, text, labels and scalars."""
    for form, (comm, equal_shards) in _FORMS.items():
        if case.equal or not equal_shards:
            options = {"group": dist.group.WORLD, "comm": comm, "equal_shards": equal_shards, "backend": backend}
            yield form, backend, _function(case, options)
    if case.name != "normalize=False" or pick(None, torch.empty(1, 1, dtype=dtype, device=device))[0] != backend:
        return
    modules = [(_MODULES[0], backend, ClipLoss)]
    # open_clip rounds its logits to the dtype of the features, so 16-bit dtypes are not compared
    if dtype.itemsize >= 4 and (peer := open_clip_loss("ClipLoss")) is not None:
        modules.append((_MODULES[1], "-", peer))
    for form, whose, module in modules:
        yield form, whose, _of_module(module(True, True, rank=dist.get_rank(), world_size=dist.get_world_size()))


def _function(case: Case, sharded: dict[str, Any]) -> _Loss:
    def loss(image: Tensor, text: Tensor, labels: tuple[Tensor, ...], *scalars: Tensor) -> Any:
        named: dict[str, Any] = {**case.options, **sharded}
        if len(scalars) == 2:
            return sigmoid_loss(image, text, scalars[0], scalars[1], **named)
        named |= zip(("image_labels", "text_labels"), labels)
        return contrastive_loss(image, text, scalars[0], **named)

    return loss


def _of_module(module: Any) -> _Loss:
    def loss(image: Tensor, text: Tensor, labels: tuple[Tensor, ...], *scalars: Tensor) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch warns about old names of collectives
            return module(image, text, *scalars)

    return loss


def open_clip_loss(name: str) -> Any:
    """Return a class of open_clip.loss, or None. Only its file is loaded: the package would import all its models."""
    package = importlib.util.find_spec("open_clip")
    for folder in (package and package.submodule_search_locations) or ():
        spec = importlib.util.spec_from_file_location("open_clip_loss", Path(folder) / "loss.py")
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return getattr(module, name)
    return None


def _errors(
    case: Case, dtype: torch.dtype, device: torch.device, true: Truth, loss: _Loss
) -> tuple[dict[str, float], str]:
    """Return the relative errors of loss and gradients over all ranks, and an error message.

    If a rank raised, the errors are NaN and the message is that of its exception.

    Rank r of W returns L_r, and the loss is the mean of L_r over the ranks. A rank's gradient of its features is
    that of the sum of all L_r, so it is W times the true gradient. A rank's gradient of a scalar is averaged over the
    ranks, as DDP does, and the mean is the true gradient. With reduction="none", a rank returns the losses of its rows,
    and nothing is multiplied by W.
    """
    (rank, _), raised = _place(), ""
    shards = [slice(sum(sizes[:rank]), sum(sizes[: rank + 1])) for sizes in (case.images, case.texts)]
    try:
        shares = _shares(case, shards, dtype, device, true, loss)
    except Exception as error:  # if all ranks raise, the row fails; if one does, the others time out
        shares = torch.full((1 + len(true.gradients),), torch.nan, dtype=torch.float64, device=device)
        raised = f"{type(error).__name__}: {error}".splitlines()[0]
    if dist.is_initialized():
        dist.all_reduce(shares)
    errors = [shares[0].sqrt() if true.loss.dim() else (shares[0] - true.loss).abs(), *shares[1:3].sqrt()]
    errors += [(total - t).abs() for total, t in zip(shares[3:], true.gradients[2:])]
    return {k: float(x / t.norm()) for k, x, t in zip(_COLUMNS, errors, (true.loss, *true.gradients))}, raised


def _shares(
    case: Case, shards: list[slice], dtype: torch.dtype, device: torch.device, true: Truth, loss: _Loss
) -> Tensor:
    """Return this rank's shares of the loss, of the squared errors of d_image and d_text, and of scalars' gradients.

    With reduction="none" the first is the share of the squared error of the losses.
    """
    image, text = (x[k].to(device, dtype).requires_grad_() for x, k in zip((case.image, case.text), shards))
    wide = torch.promote_types(dtype, torch.float32)
    scalars = [torch.tensor(x, dtype=wide, device=device, requires_grad=True) for x in case.scalars]
    labels = () if case.labels is None else tuple(y[k].to(device) for y, k in zip(case.labels, shards))
    value = loss(image, text, labels, *scalars)
    factor, upstream = _place()[1], _upstream(case, device)
    if isinstance(value, tuple):
        value, factor, upstream = torch.cat(value), 1, _rows_of_rank(upstream, case, shards)
    results = value, *torch.autograd.grad(value, (image, text, *scalars), upstream.to(value.dtype))
    value, *grads = (x.detach().double() / factor for x in results)
    squares = [(d - t[k]).square().sum() for d, t, k in zip(grads, true.gradients, shards)]
    of_loss = (value - _rows_of_rank(true.loss, case, shards)).square().sum() if value.dim() else value
    return torch.stack([of_loss, *squares, *grads[2:]])


def _place() -> tuple[int, int]:
    """Return the rank of this process and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _rows_of_rank(x: Tensor, case: Case, shards: list[slice]) -> Tensor:
    """Return this rank's part of x, which holds values of all images and then of all texts."""
    M = len(case.image)
    return torch.cat([x[:M][shards[0]], x[M:][shards[1]]])


def _budgets(
    case: Case, dtype: torch.dtype, device: torch.device, true: Truth, form: str, backend: str
) -> dict[str, float]:
    """Return the promised relative errors for `_COLUMNS`.

    A budget is the sum of an error relative to the value and an error relative to the sum of the absolute values of the
    terms that add up to the value.
    """
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    on_gpu, smoothed = device.type == "cuda", bool(case.options.get("label_smoothing"))
    scalar = (promised.SCALE_GRADIENT, promised.FP32_SUM)
    if dtype == torch.float64:
        loss, image, text, scalar = promised.FP64, *[(promised.FP64, promised.FP64_SUM)] * 3
    elif dtype == torch.float32:
        tf32 = on_gpu and backend == "triton"
        loss, image, text = (
            promised.LOSS,
            *[(promised.TF32_GRADIENT if tf32 else promised.FP32_GRADIENT, promised.FP32_SUM)] * 2,
        )
    else:  # one rounding, one more for label smoothing, and one more for shares that are summed over ranks
        loss, ranks, ring = promised.LOSS, _place()[1], form.startswith("ring")
        for_images = 1 + smoothed + (ring and ranks > 1)
        for_texts = 1 + smoothed + (ranks > 1)
        image, text = (0.0, for_images * eps / 2), (0.0, for_texts * eps / 2)
        if on_gpu and backend != "reference":
            loss += promised.TENSOR_CORES * case.scalars[0] * case.image.shape[1]
    if smoothed and dtype != torch.float64:
        loss += promised.FP32_SUM * case.scalars[0] / float(true.loss)
    budgets = [loss]
    for (of_value, of_sums), grad, sums in zip((image, text, scalar, scalar), true.gradients, true.sums):
        flushed = tiny * eps * grad.numel() ** 0.5 if grad.dim() else 0.0  # below the range of float16
        budgets.append(of_value + (of_sums * float(sums.norm()) + flushed) / float(grad.norm()))
    return dict(zip(_COLUMNS, budgets))


def table(rows: list[Row]) -> str:
    """Return aligned columns of text, with the promised error beside every error."""
    head = ["form", "backend", "dtype", "case", *(f"{name}/promised" for name in _COLUMNS), ""]
    lines = [head]
    for row in rows:
        cells = [f"{row.errors[k]:.1e}/{row.budgets[k]:.1e}" if k in row.errors else "" for k in _COLUMNS]
        lines.append([*row[:4], *cells, "ok" if row.ok else f"FAIL  {row.raised}"])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
