"""Agreement of the ranks before they compute: if their shards do not fit together, every rank raises, and none hangs.

Every call makes one all-gather of a few numbers. This is the only collective whose result the host waits for, and it is
skipped with `equal_shards=True`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastclip._backends import DTYPES
from fastclip.distributed.collectives import all_gather, resolve

__all__ = ["Shards", "check_comm", "check_group", "meet", "reported"]

# Parts of the row of 8-byte numbers that a rank sends: five fields (1 if the rank refused its arguments, else 0; the
# number of images; the number of texts; D; a code of the dtype), the scalars, hashes of the options, and the error
# message of a rank that refused its arguments
_WIDTHS = (5, 2, 16, 40)
_MESSAGE_BYTES = 8 * _WIDTHS[-1]


class Shards(NamedTuple):
    """Distribution of a batch over the ranks of a process group."""

    group: str  # name of the group
    rank: int
    ranks: int
    images: list[int]  # number of images on every rank
    texts: list[int]  # number of texts on every rank
    own_images: slice  # position of this rank's images among the images of all ranks
    own_texts: slice


def _shards(group: Any, images: list[int], texts: list[int]) -> Shards:
    rank = group.rank()
    own_images, own_texts = (slice(sum(sizes[:rank]), sum(sizes[: rank + 1])) for sizes in (images, texts))
    return Shards(group.group_name, rank, group.size(), images, texts, own_images, own_texts)


def check_comm(comm: str) -> None:
    if comm not in ("gather", "ring"):
        raise ValueError(f"comm must be 'gather' or 'ring', got {comm!r}")


def check_group(group: Any) -> Any:
    """Return `group` as a process group. None stays None.

    A one-dimensional `torch.distributed.device_mesh.DeviceMesh` is replaced by its group. Raise TypeError for any other
    type, ValueError if this process is not a member, and RuntimeError if torch.distributed is not available or not
    initialised.
    """
    if group is None:
        return None
    if not dist.is_available():
        raise RuntimeError("group= needs torch.distributed: install a build of torch that includes it")
    if not isinstance(group, dist.ProcessGroup) and hasattr(group, "get_group"):
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not a member of group=")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup (torch.distributed.group.WORLD contains all ranks) or a "
            f"one-dimensional DeviceMesh, got {type(group).__name__}"
        )
    if not dist.is_initialized():
        raise RuntimeError("group= needs torch.distributed: call init_process_group first (torchrun sets it up)")
    return group


@contextmanager
def reported(group: Any, equal_shards: bool, features: Any) -> Iterator[None]:
    """Run checks of this rank's arguments. Errors are also sent to the other ranks, which wait in `meet`."""
    try:
        yield
    except Exception as error:
        if group is not None and not equal_shards and not torch.compiler.is_compiling():
            text = f"{type(error).__name__}: {error}".encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
            row = torch.zeros(sum(_WIDTHS), dtype=torch.int64)
            fields, _, _, message = _parts(row)
            fields[0] = 1  # refused
            message.copy_(torch.frombuffer(bytearray(text), dtype=torch.int64))
            _table(row, group, features)
        raise


def meet(
    group: Any,
    image: Tensor,
    text: Tensor,
    scalars: Mapping[str, Tensor],
    options: Mapping[str, Any],
    equal_shards: bool,
) -> Shards:
    """Return the distribution of the batch. Raise ValueError on every rank if shards or options do not fit together.

    scalars: tensors () that must be equal on every rank. options: other values that must be equal.
    """
    if equal_shards:
        return _shards(group, [image.shape[0]] * group.size(), [text.shape[0]] * group.size())
    # The ranks must also agree on which tensors require gradients: that decides the collectives of the backward pass
    inputs = {"image_features": image, "text_features": text, **scalars}
    gradients = {name: torch.is_grad_enabled() and x.requires_grad for name, x in inputs.items()}
    values = [repr(value) for value in (*options.values(), gradients)]
    names = list(scalars), [*options, "requires_grad"]
    sizes = torch.ops.fastclip.agree(image, text, list(scalars.values()), *names, values, group.group_name)
    images, texts = sizes.tolist()
    return _shards(group, images, texts)


# An op, so that torch.compile does not trace into it
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
    """Return the numbers of images and texts of every rank, (2, ranks), on the CPU. values: the options as text."""
    row = torch.zeros(sum(_WIDTHS), dtype=torch.int64)
    fields, _, hashes, _ = _parts(row)
    fields.copy_(torch.tensor([0, image.shape[0], text.shape[0], image.shape[1], DTYPES.index(image.dtype)]))
    hashes[: len(values)] = torch.tensor([_hash(value) for value in values])
    row = row.to(image.device)
    _, places, _, _ = _parts(row)
    for place, x in zip(places[: len(scalars)], scalars, strict=True):
        place.copy_(x.double().reshape(()).view(torch.int64))  # on the scalars' device, so the host does not wait
    pg = resolve(group)
    table, rank = _table(row, pg, image), dist.get_rank(pg)
    fields, bits, hashes, messages = _parts(table)
    refused, images, texts, D, dtype = fields.T
    _check_refusals(refused, messages)
    for name, column, value in zip(names, hashes.T.tolist(), values):
        _check_same(name, column, None, value, rank)
    _check_same("features' D", D.tolist(), str, None, rank)
    _check_same("features' dtype", dtype.tolist(), _dtype_name, None, rank)
    for name, column in zip(scalar_names, bits.T.tolist()):
        _check_same(name, column, _as_number, None, rank)
    if not (images.any() and texts.any()):
        raise ValueError("features must not be empty: no rank has an image, or no rank has a text")
    return torch.stack([images, texts])


@torch.library.register_fake("fastclip::agree")
def _(*args: Any) -> Tensor:
    return torch.empty(2, dist.get_world_size(resolve(args[-1])), dtype=torch.int64)


def _as_number(bits: int) -> str:
    return repr(torch.tensor(bits).view(torch.float64).item())


def _dtype_name(code: int) -> str:
    return str(DTYPES[code]).removeprefix("torch.")


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    """Return views of the parts of a row (size,), or of the table (ranks, size) of all ranks."""
    parts: tuple[Tensor, ...] = rows.split(_WIDTHS, dim=-1)
    return parts


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def _table(row: Tensor, pg: Any, features: Any) -> Tensor:
    """Gather the rows (size,) of all ranks into a table (ranks, size), on the CPU.

    The rows are sent from a device of the type that the group requires, because the features of a rank may be on a
    device that the group cannot use. If the type of the features' device is right, the rows are sent from that device.
    """
    c10d: Any = dist.distributed_c10d
    device = torch.device(c10d._get_object_coll_device(pg))
    if isinstance(features, Tensor) and features.device.type == device.type:
        device = features.device
    row = row.to(device)
    out = row.new_empty(dist.get_world_size(pg) * len(row))
    all_gather(out, row, group=pg)
    return out.view(-1, len(row)).cpu()


def _check_refusals(refused: Tensor, messages: Tensor) -> None:
    for rank in refused.nonzero().flatten().tolist():
        text = bytes(messages[rank].contiguous().view(torch.uint8).tolist()).rstrip(b"\0")
        raise ValueError(f"rank {rank} of the group refused its arguments: {text.decode(errors='replace')}")


def _check_same(name: str, values: list[int], show: Callable[[int], str] | None, shown: str | None, rank: int) -> None:
    """Raise ValueError unless all ranks have the same value.

    `show` formats a value. If `show` is None, the values are hashes, and `shown` is the value of this rank as text.
    """
    if all(value == values[0] for value in values):
        return
    if show is None:
        others = [k for k, value in enumerate(values) if value != values[rank]]
        message = f"{shown} on this rank ({rank}), another value on rank {', '.join(map(str, others))}"
    else:
        message = ", ".join(f"{show(value)} on rank {k}" for k, value in enumerate(values))
    raise ValueError(f"the ranks of the group disagree on {name}: {message}")
