"""The processes of a comparison, started by this module or by torchrun."""

from __future__ import annotations

import json
import os
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing

from fastclip._backends import backends, check_name
from fastclip.distributed import before_group
from fastclip.parity.compare import Row, Settings, compare
from fastclip.system import env
from fastclip.system.parent import end_with_parent

__all__ = ["Report", "run"]

_TIMEOUT = timedelta(seconds=120)  # for the rendezvous and for every collective
_c10d: Any = dist
_mp: Any = torch.multiprocessing


class Report(NamedTuple):
    """Result of `run`: a line that describes the comparison, and its rows."""

    about: str
    rows: list[Row]


def run(
    *,
    nproc: int | None = None,
    batch: int = 64,
    dim: int = 64,
    seed: int = 0,
    backend: str | None = None,
    device: str | None = None,
) -> Report:
    """Compare every form, backend and dtype that can run here, in several processes.

    The processes are started here, unless torchrun started this one (RANK and WORLD_SIZE in the environment).

    Args:
        nproc: number of processes. None means 2, or under torchrun the number that it started.
        batch: number of images per process.
        backend: a single backend of `fastclip.backends()`. None means all.
        device: "cpu" (gloo) or "cuda" (NCCL, one GPU per process). None means GPUs if there are enough.

    Returns:
        The report. Under torchrun only rank 0 receives rows.

    Raises:
        ValueError: the options do not fit this machine.
        OSError: a process was killed, or the processes did not find each other.
    """
    launched = env.launched()
    for name, value, least in (("nproc", 1 if nproc is None else nproc, 1), ("batch", batch, 4), ("dim", dim, 2)):
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if nproc and launched and nproc != launched.ranks:
        raise ValueError(
            f"--nproc is {nproc}, but the launcher started {launched.ranks} processes (WORLD_SIZE): leave --nproc out"
        )
    ranks = launched.ranks if launched else nproc or 2
    check_name(backend)
    if backend and (state := backends()[backend]) != "available":
        raise ValueError(f"the backend {backend} (--backend) cannot run here: {state}")
    local = launched.local_ranks if launched else ranks
    device = device or ("cuda" if torch.cuda.device_count() >= local else "cpu")
    if device == "cuda" and torch.cuda.device_count() < local:
        raise ValueError(
            f"--device cuda needs a GPU for each of {local} processes, torch sees {torch.cuda.device_count()}"
        )
    settings = Settings(batch, dim, seed, backend, device)
    about = f"{ranks} process{'es' * (ranks > 1)} on {device}, {batch} images each, D = {dim}, seed {seed}"
    rows = _member(*launched[:3], settings, None) if launched else _start(ranks, settings)
    if not rows:
        raise ValueError(f"--backend {backend} does not support features on {device}")
    return Report(about, rows if launched is None or launched.rank == 0 else [])


def _start(ranks: int, settings: Settings) -> list[Row]:
    """Return the rows of `ranks` processes started on this machine.

    Their rendezvous is a file, which needs no port that a firewall could block.
    """
    how = {"join": False, "daemon": True, "start_method": "spawn"}
    with tempfile.TemporaryDirectory(prefix="fastclip-parity-") as folder:
        try:
            _join(_mp.start_processes(_spawned, (ranks, settings, folder, os.getpid()), nprocs=ranks, **how))
        except _mp.ProcessExitedException as error:
            raise ChildProcessError(f"a process was killed (out of memory?): {error}") from error
        except _mp.ProcessRaisedException as error:
            last = str(error).strip().splitlines()[-1]
            if last.startswith(("torch.distributed.DistNetworkError", "torch.distributed.DistStoreError")):
                raise ConnectionError(f"the processes did not find each other: {last}") from error
            raise
        return [Row(*row) for row in json.loads((Path(folder) / "rows.json").read_text())]


def _join(context: Any) -> None:
    """Wait for the processes. If the wait is interrupted, kill them: the folder that they write to will be removed."""
    try:
        while not context.join():
            pass
    finally:
        for process in context.processes:
            process.kill()
        for process in context.processes:
            process.join()


def _spawned(rank: int, ranks: int, settings: Settings, folder: str, parent: int) -> None:
    end_with_parent(parent)
    torch.set_num_threads(max(torch.get_num_threads() // ranks, 1))
    rows = _member(rank, ranks, rank, settings, folder)
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))


def _member(rank: int, ranks: int, local_rank: int, settings: Settings, folder: str | None) -> list[Row]:
    """Run the comparison on this rank and return its rows, the same on all ranks.

    folder: contains the rendezvous file. None means the rendezvous of the launcher.
    """
    device = torch.device("cuda", local_rank) if settings.device == "cuda" else torch.device("cpu")
    where: dict[str, Any] = {"init_method": "env://"}
    if folder is not None:
        where = {"store": _c10d.FileStore(f"{folder}/store", ranks), "rank": rank, "world_size": ranks}
    if device.type == "cuda":
        torch.cuda.set_device(device)
    before_group()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT, **where)
    try:
        return compare(settings, device)
    finally:
        dist.destroy_process_group()
