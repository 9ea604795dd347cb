"""The ranks of a call agree before they compute: shards that do not fit together raise on every rank, and none hangs.

One all_gather of a few numbers a call, the only one whose result the host waits for; `equal_shards=True` does without.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastclip.distributed.collectives import all_gather, resolve

__all__ = ["Shards", "check_comm", "check_group", "meet", "reported"]

_FIELDS = ("refused", "images", "texts", "D", "dtype")  # of a rank's row, in front of scalars, options and message
_SCALARS, _OPTIONS = 2, 12
_MESSAGE = 40  # numbers of 8 bytes: what a rank that refused its arguments says
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Shards(NamedTuple):
    """How a batch lies on the ranks of a process group."""

    group: str  # its name
    rank: int
    ranks: int
    images: list[int]  # of every rank
    texts: list[int]
    own_images: slice  # where this rank's are among all
    own_texts: slice


def _shards(group: Any, images: list[int], texts: list[int]) -> Shards:
    rank = group.rank()
    own = [slice(sum(sizes[:rank]), sum(sizes[: rank + 1])) for sizes in (images, texts)]
    return Shards(group.group_name, rank, group.size(), images, texts, own[0], own[1])


def check_comm(comm: str) -> None:
    if comm not in ("gather", "ring"):
        raise ValueError(f"comm must be 'gather' or 'ring', got {comm!r}")


def check_group(group: Any) -> Any:
    """The process group, or None. ValueError, TypeError or RuntimeError where it cannot be one.

    A one-dimensional `torch.distributed.device_mesh.DeviceMesh` stands for its group.
    """
    if group is None:
        return None
    if not dist.is_available():
        raise RuntimeError("group= needs torch.distributed, which this build of torch lacks")
    if not isinstance(group, dist.ProcessGroup) and hasattr(group, "get_group"):
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not a member of group=")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup (torch.distributed.group.WORLD is all ranks), "
            f"got {type(group).__name__}"
        )
    if not dist.is_initialized():
        raise RuntimeError("group= needs torch.distributed: call init_process_group first (torchrun sets it up)")
    return group


@contextmanager
def reported(group: Any, equal_shards: bool, features: Any) -> Iterator[None]:
    """Checks of this rank's arguments: their errors reach the other ranks, which wait for it in `meet`."""
    try:
        yield
    except Exception as error:
        if group is not None and not equal_shards and not torch.compiler.is_compiling():
            row = [0] * _width()
            row[0] = 1
            text = f"{type(error).__name__}: {error}".encode()[: 8 * _MESSAGE].ljust(8 * _MESSAGE, b"\0")
            row[-_MESSAGE:] = [int.from_bytes(text[k : k + 8], "little", signed=True) for k in range(0, len(text), 8)]
            _table(torch.tensor(row), group, features)
        raise


def meet(
    group: Any,
    image: Tensor,
    text: Tensor,
    scalars: Mapping[str, Tensor],
    options: Mapping[str, Any],
    equal_shards: bool,
) -> Shards:
    """How the batch lies on the ranks. ValueError, on every rank, where they do not fit together.

    scalars: tensors (), which must be the same on every rank; options: whatever else must.
    """
    if equal_shards:
        return _shards(group, [image.shape[0]] * group.size(), [text.shape[0]] * group.size())
    # Which tensors have gradients decides which collectives the backward pass has
    inputs = {"image_features": image, "text_features": text, **scalars}
    gradients = {name: torch.is_grad_enabled() and x.requires_grad for name, x in inputs.items()}
    values = [repr(value) for value in (*options.values(), gradients)]
    names = list(scalars), [*options, "requires_grad"]
    sizes = torch.ops.fastclip.agree(image, text, list(scalars.values()), *names, values, group.group_name)
    images, texts = sizes.tolist()
    return _shards(group, images, texts)


# An op, so that no compiler looks into it
torch.library.define(
    "fastclip::agree",
    "(Tensor image, Tensor text, Tensor[] scalars, str[] scalar_names, str[] names, str[] values, str group) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("fastclip::agree", "default")
def _agree(
    image: Tensor,
    text: Tensor,
    scalars: list[Tensor],
    scalar_names: list[str],
    names: list[str],
    values: list[str],
    group: str,
) -> Tensor:
    """Images and texts of every rank (2, ranks), on the CPU. values: the options `names`, as text."""
    assert len(scalars) <= _SCALARS and len(names) <= _OPTIONS
    fields = [0, image.shape[0], text.shape[0], image.shape[1], _DTYPES.index(image.dtype)]
    hashes = [_hash(value) for value in values] + [0] * (_OPTIONS - len(values))
    row = torch.tensor([*fields, *[0] * _SCALARS, *hashes, *[0] * _MESSAGE]).to(image.device)
    if scalars:
        bits = [x.double().reshape(1).view(torch.int64) for x in scalars]
        row[len(fields) : len(fields) + len(bits)] = torch.cat(bits)
    pg = resolve(group)
    table, rank = _table(row, pg, image), dist.get_rank(pg)
    _check_refusals(table)
    for k, name in enumerate(names):
        _check_same(name, [line[len(_FIELDS) + _SCALARS + k] for line in table], None, values[k], rank)
    shown = {
        "D": ("features' D", str),
        "dtype": ("features' dtype", lambda code: str(_DTYPES[code]).removeprefix("torch.")),
    }
    for field, (name, show) in shown.items():
        _check_same(name, [line[_FIELDS.index(field)] for line in table], show, None, rank)
    for k, name in enumerate(scalar_names):
        _check_same(name, [line[len(_FIELDS) + k] for line in table], _as_number, None, rank)
    sizes = [[line[_FIELDS.index(side)] for line in table] for side in ("images", "texts")]
    if not all(map(sum, sizes)):
        raise ValueError("features must not be empty: no rank has an image, or no rank has a text")
    return torch.tensor(sizes)


@torch.library.register_fake("fastclip::agree")
def _(*args: Any) -> Tensor:
    return torch.empty(2, dist.get_world_size(resolve(args[-1])), dtype=torch.int64)


def _as_number(bits: int) -> str:
    return repr(torch.tensor(bits).view(torch.float64).item())


def _width() -> int:
    return len(_FIELDS) + _SCALARS + _OPTIONS + _MESSAGE


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def _table(row: Tensor, pg: Any, features: Any) -> list[list[int]]:
    """Rows (size,) of all ranks. They travel on the kind of device that the group decides, not a rank's features, which
    may be the wrong ones; on their very device where that is of this kind."""
    c10d: Any = dist.distributed_c10d
    device = torch.device(c10d._get_object_coll_device(pg))
    if isinstance(features, Tensor) and features.device.type == device.type:
        device = features.device
    row = row.to(device)
    out = row.new_empty(dist.get_world_size(pg) * len(row))
    all_gather(out, row, group=pg)
    table: list[list[int]] = out.view(-1, len(row)).tolist()
    return table


def _check_refusals(table: list[list[int]]) -> None:
    for k, line in enumerate(table):
        if line[0]:
            text = b"".join(number.to_bytes(8, "little", signed=True) for number in line[-_MESSAGE:]).rstrip(b"\0")
            raise ValueError(f"rank {k} of the group refused its arguments: {text.decode(errors='replace')}")


def _check_same(name: str, values: list[int], show: Any, mine: Any, rank: int) -> None:
    if all(value == values[0] for value in values):
        return
    if show is None:
        others = [k for k, value in enumerate(values) if value != values[rank]]
        told = f"{mine} on this rank ({rank}), another value on rank {', '.join(map(str, others))}"
    else:
        told = ", ".join(f"{show(value)} on rank {k}" for k, value in enumerate(values))
    raise ValueError(f"the ranks of the group disagree in {name}: {told}")
