"""One process, or one of torchrun's: the device, the process group, and the model on all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastclip import _env
from fastclip.distributed import before_group
from fastclip.models.dual_encoder import DualEncoder
from fastclip.owner import owned
from fastclip.training.meeting import meeting

__all__ = [
    "World",
    "fsdp_blocks",
    "joined",
    "mean_over_ranks",
    "one_for_all",
    "owned_together",
    "reduce_unsharded",
    "reshard",
    "wrap",
]

_c10d: Any = dist
_meshes: list[Any] = []  # of `wrap`
_LOST = ("gloo/", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe")


class World(NamedTuple):
    """This process among all of a run."""

    rank: int
    ranks: int
    device: torch.device
    group: Any  # process group, or None alone


@contextmanager
def joined(device: str = "auto", *, timeout: timedelta = timedelta(minutes=10)) -> Iterator[World]:
    """The processes that torchrun started (NCCL on GPUs, gloo on CPUs), or this one alone.

    A group that exists already is used and left as it is.

    Args:
        device: "cpu"; "cuda"; "auto", a GPU for each process of this machine where there are enough.
        timeout: of the rendezvous and of every collective; a process that is lost ends the others after it.

    Raises:
        ValueError: "cuda" without a GPU for each process.
        ConnectionError: another process is lost or has not answered; whatever was collective inside failed for it.
    """
    launched = _env.launched()
    local_rank, local_ranks = (launched.local_rank, launched.local_ranks) if launched else (0, 1)
    gpus = torch.cuda.device_count()
    if device == "cuda" and gpus < local_ranks:
        raise ValueError(f"--device cuda needs a GPU for each of {local_ranks} processes, torch sees {gpus}")
    if dist.is_initialized() and launched is None:  # the caller has chosen
        nccl = device != "cpu" and dist.get_backend() == "nccl"
        where = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    elif device == "cpu" or gpus < local_ranks:
        where = torch.device("cpu")
    else:
        where = torch.device("cuda", local_rank)
        torch.cuda.set_device(where)
    begun = launched is not None and not dist.is_initialized()
    try:
        if begun and launched is not None:
            before_group()
            store = _env.agent_store()
            found: dict[str, Any] = {"rank": launched.rank, "world_size": launched.ranks}
            if store is not None:
                found["store"] = meeting(store, launched.rank, launched.ranks, timeout)
            dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=timeout, **found)
        group = _c10d.group.WORLD if dist.is_initialized() else None
        yield World(*((dist.get_rank(), dist.get_world_size()) if group else (0, 1)), where, group)
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        seconds = timeout.total_seconds()
        raise ConnectionError(
            f"another process of this run is lost, or did not answer for {seconds:g} s (--timeout): {_words(error)}"
        ) from error
    finally:
        if begun and dist.is_initialized():
            dist.destroy_process_group()
            while _meshes:  # DTensor's caches keep them, and they the group with its threads
                getattr(_meshes.pop(), "_pg_registry", {}).clear()
        _meshes.clear()  # those of a caller's group end with it


def _is_lost(error: RuntimeError) -> bool:
    """What NCCL and the rendezvous raise has a class; gloo's errors are told by their words alone."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST)


@contextmanager
def one_for_all(world: World) -> Iterator[None]:
    """What fails inside on one rank is raised on every one, which would wait for it otherwise."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if world.group is not None:
        told: list[Any] = [None] * world.ranks
        kind = OSError if isinstance(error, OSError) else ValueError if isinstance(error, ValueError) else RuntimeError
        mine = None if error is None else (kind.__name__, f"{error} (on rank {world.rank})")
        dist.all_gather_object(told, mine, group=world.group)
        if error is None and any(told):
            name, message = next(one for one in told if one)
            raise {"OSError": OSError, "ValueError": ValueError}.get(name, RuntimeError)(message)
    if error is not None:
        raise error


@contextmanager
def owned_together(folder: str | Path, world: World, *, force: bool = False) -> Iterator[None]:
    """Rank 0 owns `folder` (`fastclip.owner.owned`) inside; what keeps it from that is raised on every rank."""
    with ExitStack() as stack:
        with one_for_all(world):
            if world.rank == 0:
                stack.enter_context(owned(folder, force=force))
        yield


def _words(error: RuntimeError) -> str:
    """Of gloo's message what happened, without where in its sources and what to do about it."""
    line = str(error).strip().splitlines()[0]
    return re.sub(r"^\[[^\]]*\.\w+:\d+\] ", "", line).partition(". This is typically")[0]


def wrap(model: DualEncoder, world: World, parallel: str) -> nn.Module:
    """What to call in place of `model`: the same on every rank with gradients averaged over them.

    ddp: DistributedDataParallel around it. fsdp: its blocks, and what is left of it, are sharded in place (FSDP2);
    scale and bias of the logits, numbers, stay whole, and `reduce_unsharded` averages their gradients.
    """
    if world.group is None:
        return model
    if parallel == "ddp":
        ids = [world.device] if world.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.ranks,))
    _meshes.append(mesh)
    numbers = {p for p in model.parameters() if p.dim() == 0}
    for block in fsdp_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=numbers)
    for name in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, name)
    return model


def reshard(model: nn.Module) -> None:
    """Let go of what FSDP2 keeps gathered after a pass without a backward: the next one gathers it anew."""
    from torch.distributed.fsdp import FSDPModule  # slow to load

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reduce_unsharded(model: nn.Module, world: World) -> None:
    """Average over the ranks the gradients that `wrap`'s FSDP leaves alone."""
    for p in model.parameters():
        if p.dim() == 0 and p.grad is not None:
            p.grad.copy_(mean_over_ranks(p.grad, world))


def mean_over_ranks(value: Tensor, world: World) -> Tensor:
    """The same on every rank, summed in fp64."""
    if world.group is None:
        return value
    total = value.detach().double()
    dist.all_reduce(total, group=world.group)
    return (total / world.ranks).to(value.dtype)


def fsdp_blocks(model: DualEncoder) -> Iterator[nn.Module]:
    """What FSDP gathers one after the other: members of the towers' outermost lists that are trained."""

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if isinstance(child, nn.ModuleList | nn.Sequential) and len(child) > 1:
                yield from (member for member in child if any(p.requires_grad for p in member.parameters()))
            else:
                yield from walk(child)

    for tower in (model.visual, model.text):
        yield from walk(tower)
