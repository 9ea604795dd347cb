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
    images: list[int]  # of every rank
    texts: list[int]

    @property
    def ranks(self) -> int:
        return len(self.images)

    @property
    def own_images(self) -> slice:
        """Where this rank's images are among all."""
        return _own(self.images, self.rank)

    @property
    def own_texts(self) -> slice:
        return _own(self.texts, self.rank)


def _own(sizes: list[int], rank: int) -> slice:
    first = sum(sizes[:rank])
    return slice(first, first + sizes[rank])


def check_comm(comm: str) -> None:
    if comm not in ("gather", "ring"):
        raise ValueError(f"comm must be 'gather' or 'ring', got {comm!r}")


def check_group(group: Any) -> Any:
    """The process group, or None. ValueError, TypeError or RuntimeError where it cannot be one.

    A one-dimensional `torch.distributed.device_mesh.DeviceMesh` stands for its group.
    """
    if group is None:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("group= needs torch.distributed: call init_process_group first (torchrun sets it up)")
    if isinstance(group, dist.ProcessGroup):
        return group
    if hasattr(group, "get_group"):
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not a member of group=")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup (torch.distributed.group.WORLD is all ranks), "
            f"got {type(group).__name__}"
        )
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
    rank, ranks = group.rank(), group.size()
    if equal_shards:
        shards = Shards(group.group_name, rank, [image.shape[0]] * ranks, [text.shape[0]] * ranks)
    else:
        # Which tensors have gradients decides which collectives the backward pass has
        inputs = {"image_features": image, "text_features": text, **scalars}
        gradients = {name: torch.is_grad_enabled() and x.requires_grad for name, x in inputs.items()}
        shards = _meet(group, image, text, dict(scalars), {**options, "requires_grad": gradients})
    return shards


def _meet(group: Any, image: Tensor, text: Tensor, scalars: dict[str, Tensor], options: dict[str, Any]) -> Shards:
    assert len(scalars) <= _SCALARS and len(options) <= _OPTIONS
    fields = [0, image.shape[0], text.shape[0], image.shape[1], _DTYPES.index(image.dtype)]
    hashes = [_hash(value) for value in options.values()] + [0] * (_OPTIONS - len(options))
    bits = [x.detach().double().reshape(1).view(torch.int64) for x in scalars.values()]
    row = torch.tensor([*fields, *[0] * _SCALARS, *hashes, *[0] * _MESSAGE])
    row = row.to(image.device)
    if bits:
        row[len(fields) : len(fields) + len(bits)] = torch.cat(bits)
    table = _table(row, group, image)
    _check_refusals(table, group.rank())
    where = {name: len(_FIELDS) + _SCALARS + k for k, name in enumerate(options)}
    where |= {"features' D": 3, "features' dtype": 4}
    where |= {name: len(_FIELDS) + k for k, name in enumerate(scalars)}
    shown = {
        "features' D": str,
        "features' dtype": lambda code: str(_DTYPES[code]).removeprefix("torch."),
        **{name: lambda code: repr(torch.tensor(code).view(torch.float64).item()) for name in scalars},
    }
    for name, k in where.items():
        _check_same(name, [line[k] for line in table], shown.get(name), options.get(name), group.rank())
    images, texts = ([line[k] for line in table] for k in (1, 2))
    if sum(images) == 0 or sum(texts) == 0:
        raise ValueError("features must not be empty: no rank has an image, or no rank has a text")
    return Shards(group.group_name, group.rank(), images, texts)


def _width() -> int:
    return len(_FIELDS) + _SCALARS + _OPTIONS + _MESSAGE


def _hash(value: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "little", signed=True)


torch.library.define(
    "fastclip::table_of_ranks",
    "(Tensor row, Tensor? features, str group) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("fastclip::table_of_ranks", "default")
def _table_of_ranks(row: Tensor, features: Tensor | None, group: str) -> Tensor:
    """Rows (size,) of all ranks (ranks, size), on the CPU. They travel on the kind of device that the group decides,
    not a rank's features, which may be the wrong ones; on their very device where that is of this kind."""
    pg = resolve(group)
    c10d: Any = dist.distributed_c10d
    device = torch.device(c10d._get_object_coll_device(pg))
    if features is not None and features.device.type == device.type:
        device = features.device
    row = row.to(device)
    out = row.new_empty(dist.get_world_size(pg) * len(row))
    all_gather(out, row, group=pg)
    return out.view(-1, len(row)).to("cpu", copy=True)


@torch.library.register_fake("fastclip::table_of_ranks")
def _(row: Tensor, features: Tensor | None, group: str) -> Tensor:
    return row.new_empty(dist.get_world_size(resolve(group)), row.shape[0], device="cpu")


def _table(row: Tensor, group: Any, features: Any) -> list[list[int]]:
    """The rows of all ranks."""
    features = features if isinstance(features, Tensor) else None
    table: list[list[int]] = torch.ops.fastclip.table_of_ranks(row, features, group.group_name).tolist()
    return table


def _check_refusals(table: list[list[int]], rank: int) -> None:
    for k, line in enumerate(table):
        if line[0]:
            text = b"".join(number.to_bytes(8, "little", signed=True) for number in line[-_MESSAGE:]).rstrip(b"\0")
            raise ValueError(f"rank {k} of the group refused its arguments: {text.decode(errors='replace')}")


def _check_same(name: str, values: list[int], show: Any, mine: Any, rank: int) -> None:
    if all(value == values[0] for value in values):
        return
    if show is None:
        others = [k for k, value in enumerate(values) if value != values[rank]]
        told = f"{mine!r} on this rank ({rank}), another value on rank {', '.join(map(str, others))}"
    else:
        told = ", ".join(f"{show(value)} on rank {k}" for k, value in enumerate(values))
    raise ValueError(f"the ranks of the group disagree in {name}: {told}")
