"""The processes of a run: device, process group, exchanges between ranks, and the model wrapped for DDP or FSDP."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastclip.distributed import before_group
from fastclip.models.dual_encoder import DualEncoder
from fastclip.system import env
from fastclip.system.owner import owned

__all__ = [
    "World",
    "fsdp_blocks",
    "is_sharded",
    "joined",
    "mean_over_ranks",
    "meeting",
    "of_all_ranks",
    "one_for_all",
    "owned_together",
    "reduce_unsharded",
    "reshard",
    "shards",
    "wrap",
]

T = TypeVar("T")
_c10d: Any = dist
_PAUSE = 0.02  # seconds between two reads of the store
_meshes: list[Any] = []  # device meshes that `wrap` created, released by `joined`
# Fragments of gloo's messages when a peer is gone. These errors have no class by which they could be recognised
_LOST = ("gloo/", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe")


class World(NamedTuple):
    """This process's rank, device and process group in a run."""

    rank: int
    ranks: int  # world size
    device: torch.device
    group: Any  # process group, or None for a single process


@contextmanager
def joined(device: str = "auto", *, timeout: timedelta = timedelta(minutes=10)) -> Iterator[World]:
    """Join the process group of the processes that torchrun started (NCCL on GPUs, gloo on CPUs).

    A process that torchrun did not start runs alone. A process group that already exists is used and left as it is.

    Args:
        device: "cpu", "cuda" or "auto": one GPU per process if this machine has enough, else the CPU.
        timeout: limit of the rendezvous and of every collective. If a process is lost, the others end after this time.

    Raises:
        ValueError: `device` is "cuda" and there is no GPU for each process.
        ConnectionError: a collective inside the context failed because another process is lost or did not answer.
    """
    launched = env.launched()
    local_rank, local_ranks = (launched.local_rank, launched.local_ranks) if launched else (0, 1)
    gpus = torch.cuda.device_count()
    if device == "cuda" and gpus < local_ranks:
        raise ValueError(
            f"--device cuda needs a GPU for each of {local_ranks} processes, but torch sees {gpus}: start fewer "
            "processes, or use --device cpu"
        )
    if dist.is_initialized() and launched is None:  # the caller's group decides
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
            store = env.agent_store()
            place: dict[str, Any] = {"rank": launched.rank, "world_size": launched.ranks}
            if store is not None:
                place["store"] = meeting(store, launched.rank, launched.ranks, timeout)
            dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=timeout, **place)
        group = _c10d.group.WORLD if dist.is_initialized() else None
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if group else (0, 1)
        yield World(rank, ranks, where, group)
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
            while _meshes:  # DTensor's caches keep the meshes, which keep the group and its threads alive
                getattr(_meshes.pop(), "_pg_registry", {}).clear()
        _meshes.clear()  # meshes of a caller's group end with that group


def meeting(address: tuple[str, int], rank: int, ranks: int, timeout: timedelta) -> Any:
    """Return the store of torchrun's agent, under a prefix that no earlier start of the run has used.

    torchrun keeps one store across restarts, and it still holds the addresses of dead processes (torch 2.14;
    github.com/pytorch/pytorch/issues/135712). The number of restarts cannot serve as a prefix, because it differs
    between machines. Therefore rank 0 draws a random name, and every other rank asks for it under a random key of its
    own, which no dead rank 0 can have answered.

    Args:
        address: host and port of the agent's store.

    Raises:
        ConnectionError: not all ranks have arrived within `timeout`.
    """
    store = _c10d.TCPStore(*address, is_master=False, timeout=timeout)
    name = _lead(store, ranks, timeout) if rank == 0 else _follow(store, rank)
    return _c10d.PrefixStore(f"fastclip/{name}", store)


def _lead(store: Any, ranks: int, timeout: timedelta) -> str:
    name, end = secrets.token_hex(8), time.monotonic() + timeout.total_seconds()
    absent = list(range(1, ranks))
    while absent := [rank for rank in absent if not store.check([f"fastclip/{name}/here/{rank}"])]:
        for rank in absent:  # a dead process may have left this key; its successor then sets another
            if store.check([f"fastclip/ask/{rank}"]):
                store.set(f"fastclip/answer/{store.get(f'fastclip/ask/{rank}').decode()}", name)
        if time.monotonic() > end:
            raise ConnectionError(f"rank {', '.join(map(str, absent))} of {ranks} did not join within the timeout")
        time.sleep(_PAUSE)
    return name


def _follow(store: Any, rank: int) -> str:
    word = secrets.token_hex(8)
    store.set(f"fastclip/ask/{rank}", word)
    name = str(store.get(f"fastclip/answer/{word}").decode())  # blocks until rank 0 has answered
    store.set(f"fastclip/{name}/here/{rank}", "")
    return name


def _is_lost(error: RuntimeError) -> bool:
    """Return True if `error` means that another process is lost.

    Errors of NCCL and of the rendezvous are recognised by their class, errors of gloo only by their message.
    """
    return isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST)


@contextmanager
def one_for_all(world: World) -> Iterator[None]:
    """Raise an error of one rank on every rank: the others would otherwise wait for that rank in a collective."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    kind = next((kind for kind in (OSError, ValueError) if isinstance(error, kind)), RuntimeError)
    failures = of_all_ranks(None if error is None else (kind, f"{error} (on rank {world.rank})"), world)
    if error is not None:
        raise error
    for failure in failures:
        if failure is not None:
            raise failure[0](failure[1])


def of_all_ranks(value: T, world: World) -> list[T]:
    """Return the `value` of each rank, in the order of the ranks. The values are pickled for the exchange."""
    if world.group is None:
        return [value]
    values: list[Any] = [None] * world.ranks
    dist.all_gather_object(values, value, group=world.group)
    return values


@contextmanager
def owned_together(folder: str | Path, world: World, *, force: bool = False) -> Iterator[None]:
    """Let rank 0 own `folder` inside the context (`system.owner.owned`). A failure to do so is raised on every rank."""
    with ExitStack() as stack:
        with one_for_all(world):
            if world.rank == 0:
                stack.enter_context(owned(folder, force=force))
        yield


def _words(error: RuntimeError) -> str:
    """Return the cause in gloo's message, without its source location and its advice."""
    line = str(error).strip().splitlines()[0]
    return re.sub(r"^\[[^\]]*\.\w+:\d+\] ", "", line).partition(". This is typically")[0]


def wrap(model: DualEncoder, world: World, parallel: str) -> nn.Module:
    """Return the module to call in place of `model`, so that gradients are averaged over the ranks.

    "ddp" wraps the model in DistributedDataParallel. "fsdp" shards the blocks and the remaining parameters in place
    (FSDP2). FSDP2 cannot shard the scale and the bias of the logits, which are scalar tensors, so they stay whole, and
    `reduce_unsharded` averages their gradients.
    """
    if world.group is None:
        return model
    if not shards(parallel, world):
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


def shards(parallel: str, world: World) -> bool:
    """Return True if `wrap` shards the parameters of a model among the processes."""
    return parallel == "fsdp" and world.group is not None


def is_sharded(wrapped: nn.Module, world: World) -> bool:
    """Return True if `wrap`, whose result is `wrapped`, has sharded the parameters."""
    return world.group is not None and not isinstance(wrapped, nn.parallel.DistributedDataParallel)


def reshard(model: nn.Module) -> None:
    """Free the parameters that FSDP2 keeps gathered after a forward pass without a backward pass.

    The next forward pass gathers them again, with the values they have then.
    """
    from torch.distributed.fsdp import FSDPModule  # slow to load

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reduce_unsharded(model: nn.Module, world: World) -> None:
    """Average the gradients of the parameters that `wrap` leaves unsharded under FSDP over the ranks."""
    for p in model.parameters():
        if p.dim() == 0 and p.grad is not None:
            p.grad.copy_(mean_over_ranks(p.grad, world))


def mean_over_ranks(value: Tensor, world: World) -> Tensor:
    """Return the mean of `value` over the ranks, summed in fp64. All ranks get the same result."""
    if world.group is None:
        return value
    total = value.detach().double()
    dist.all_reduce(total, group=world.group)
    return (total / world.ranks).to(value.dtype)


def fsdp_blocks(model: DualEncoder) -> Iterator[nn.Module]:
    """Yield the modules that FSDP gathers one at a time: trainable members of the towers' outermost module lists."""

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if isinstance(child, nn.ModuleList | nn.Sequential) and len(child) > 1:
                yield from (member for member in child if any(p.requires_grad for p in member.parameters()))
            else:
                yield from walk(child)

    for tower in (model.visual, model.text):
        yield from walk(tower)
