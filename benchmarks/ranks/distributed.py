"""One loss over several processes: bytes and operations per rank are counted, steps are timed, against the peers.

    python -m benchmarks.ranks.distributed --ranks 1,2,4 --local 1024 --D 512

The processes use gloo on this machine, with one thread each. Rows go to results/distributed.csv.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.harness import Timings, append, machine, quantile
from benchmarks.losses.peak_memory import peak_of, return_what_is_freed
from benchmarks.losses.peers import Unavailable
from benchmarks.ranks.counting import Counts, counted
from fastclip.bench.losses import SCALARS, CheckFailed, Loss, features
from fastclip.distributed import before_group
from fastclip.parity.truth import blockwise_truth
from fastclip.system.installed import installed_version

RESULTS = Path(__file__).parents[1] / "results" / "distributed.csv"
EXACT = "exact"


@dataclass(frozen=True)
class Case:
    """Case with N pairs on each of W ranks."""

    W: int
    local_N: int
    D: int
    dtype: str

    @property
    def unit(self) -> float:
        """Return the operations of the loss's four matrix products per rank."""
        return 8.0 * self.W * self.local_N**2 * self.D

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the leaves of the whole batch, the same in every process."""
        (scale,) = SCALARS["softmax"]
        return *features(self.W * self.local_N, self.D, self.dtype), torch.tensor(scale, requires_grad=True)


@dataclass(frozen=True)
class Competitor:
    """A competitor, whose `build()` is called on every rank and returns the loss of its shard. After DDP's
    mean over ranks, the gradient of the encoders is `encoders(W)` times that of the whole batch's mean loss,
    and the scale's `scale(W)` times.
    """

    build: Callable[[], Loss]
    gradient: str = EXACT
    encoders: Callable[[int], float] = lambda W: 1.0
    scale: Callable[[int], float] = lambda W: 1.0


def _ours(comm: str) -> Loss:
    import fastclip

    return cast(Loss, partial(fastclip.contrastive_loss, normalize=False, group=dist.group.WORLD, comm=comm))


def _open_clip(**flags: bool) -> Loss:
    from open_clip.loss import ClipLoss

    return ClipLoss(rank=dist.get_rank(), world_size=dist.get_world_size(), **flags)


def _inf_cl() -> Loss:
    # The package's own ring with its blocks in plain torch; the blocks of cal_inf_loss are Triton kernels and need a
    # GPU
    from inf_cl import cal_ring_loss

    if dist.get_world_size() == 1:
        raise Unavailable("its ring sends to itself, which gloo refuses")

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        head = min(256, image.shape[1])
        by_image = cal_ring_loss(image, text, scale=scale, head_dim=head)
        return (by_image + cal_ring_loss(text, image, scale=scale, head_dim=head)) / 2

    return loss


PEER = "open_clip_local"
COMPETITORS = {
    "fastclip_gather": Competitor(lambda: _ours("gather")),
    "fastclip_ring": Competitor(lambda: _ours("ring")),
    "open_clip": Competitor(_open_clip, "1/W of the encoders'", encoders=lambda W: 1 / W),
    PEER: Competitor(lambda: _open_clip(local_loss=True, gather_with_grad=True)),
    # it all-reduces the scale's gradient, and DDP takes the mean of the result
    "inf_cl_ring": Competitor(_inf_cl, "W times the scale's", scale=lambda W: W),
}
INF_CL = "inf_cl"  # the same ring around kernels for GPUs, counted from their source


@dataclass
class Result:
    """Result of one competitor, from the rank that sends most."""

    forward: Counts
    backward: Counts
    seconds: list[float]
    peak_mib: float | str = ""
    status: str = ""


def check(name: str, case: Case, value: Tensor, shard: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Raise CheckFailed on a rank whose value or gradients differ from the fp64 loss by more than the dtype allows."""
    one = COMPETITORS[name]
    image, text, scale = (x.grad for x in shard)
    assert image is not None and text is not None and scale is not None
    summed = torch.stack([value.detach().double(), scale.double()])
    dist.all_reduce(summed)
    mean_value, mean_scale = summed / case.W
    rows = slice(dist.get_rank() * case.local_N, (dist.get_rank() + 1) * case.local_N)
    true_value, true_image, true_text, true_scale = expected
    encoders = case.W * one.encoders(case.W)
    pairs = {
        "loss": (mean_value, true_value),
        "d_image": (image, encoders * true_image[rows]),
        "d_text": (text, encoders * true_text[rows]),
        "d_scale": (mean_scale, one.scale(case.W) * true_scale),
    }
    limit = 1e-4 if case.dtype == "float32" else 5e-2
    errors = {what: float(torch.dist(x.double(), y.double()) / y.double().norm()) for what, (x, y) in pairs.items()}
    if not all(error <= limit for error in errors.values()):
        raise CheckFailed(f"{name}, {case}: relative errors {', '.join(f'{k} {v:.1e}' for k, v in errors.items())}")


def _losses(names: Iterable[str]) -> tuple[dict[str, Loss], dict[str, str]]:
    losses: dict[str, Loss] = {}
    status: dict[str, str] = {}
    for name in names:
        try:
            losses[name] = COMPETITORS[name].build()
        except (Unavailable, ImportError) as reason:
            status[name] = str(reason)
    return losses, status


def _count(name: str, loss: Loss, case: Case, shard: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> Result:
    with counted() as forward:
        value = loss(*shard)
    with counted() as backward:
        value.backward()
    check(name, case, value, shard, expected)
    everyone: list[Any] = [None] * case.W
    dist.all_gather_object(everyone, (forward, backward))
    forward, backward = max(everyone, key=lambda counts: counts[0].sent + counts[1].sent)
    return Result(forward, backward, [])


def _largest(value: float) -> float:
    """Return the largest value over the ranks."""
    x = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x.item()


def _work(rank: int, case: Case, names: list[str], rounds: int, peak: bool, folder: str) -> None:
    """Run one rank. Every competitor is checked and counted, then timed in turns. With `peak`, the only
    competitor's peak memory is measured.
    """
    torch.set_num_threads(1)
    # raised by functions that open_clip calls
    warnings.filterwarnings("ignore", category=FutureWarning, module="open_clip")
    if peak:
        return_what_is_freed()
    before_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=case.W)
    losses, status = _losses(names)
    rows = slice(rank * case.local_N, (rank + 1) * case.local_N)
    leaves = case.leaves()
    shard = (*(x[rows].detach().clone().requires_grad_() for x in leaves[:2]), leaves[2])

    def step(loss: Loss, leaves: tuple[Tensor, ...] = shard) -> None:
        for x in leaves:
            x.grad = None
        loss(*leaves).backward()

    results = {name: Result(Counts(), Counts(), [], status=reason) for name, reason in status.items()}
    if peak:
        del leaves
        for name, loss in losses.items():
            small = tuple(x[:8].detach().requires_grad_() if x.dim() else x for x in shard)
            step(loss, small)  # loads libraries, starts threads, connects the ranks
            for x in shard[:2]:
                x.grad = torch.ones_like(x)  # touched, as part of the baseline
            dist.barrier()
            mib = _largest(peak_of(lambda loss=loss: step(loss)))  # type: ignore[misc]
            results[name] = Result(Counts(), Counts(), [], peak_mib=round(mib, 1))
    else:
        expected = torch.load(Path(folder) / "truth.pt")
        for name, loss in losses.items():
            results[name] = _count(name, loss, case, shard, expected)
            shard[0].grad = shard[1].grad = shard[2].grad = None
        for _ in range(rounds):
            for name, loss in losses.items():
                dist.barrier()
                start = time.perf_counter()
                step(loss)
                results[name].seconds.append(_largest(time.perf_counter() - start))
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    dist.destroy_process_group()


def launch(case: Case, names: Iterable[str], rounds: int = 0, peak: bool = False) -> dict[str, Result]:
    """Return the results of the ranks of a case."""
    loopback = "lo" if any(name == "lo" for _, name in socket.if_nameindex()) else "lo0"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)  # all ranks are on this machine
    with tempfile.TemporaryDirectory() as folder:
        if not peak:
            torch.save(blockwise_truth("softmax", case.leaves(), torch.float64), Path(folder) / "truth.pt")
        mp.spawn(_work, (case, list(names), rounds, peak, folder), nprocs=case.W)
        return torch.load(Path(folder) / "results.pt", weights_only=False)


def _inf_cl_kernels(case: Case, ring: Result) -> Result:
    """Return the counts of inf-cl 1.2.1's cal_inf_loss: one product forward and two per side backward, in both
    directions.
    """
    product = 2 * 2 * case.W * case.local_N**2 * case.D
    forward, backward = replace(ring.forward, operations=product), replace(ring.backward, operations=4 * product)
    return Result(forward, backward, [], status="operations from its source, the rest as inf_cl_ring")


def rows(case: Case, results: dict[str, Result]) -> list[dict[str, Any]]:
    """Return one row per competitor; `benchmarks/README.md` describes the columns."""
    timings = Timings({name: result.seconds for name, result in results.items() if result.seconds})
    if (ring := results.get("inf_cl_ring")) and not ring.status:
        results = {**results, INF_CL: _inf_cl_kernels(case, ring)}
    out = []
    for name in (name for name in (*COMPETITORS, INF_CL) if name in results):
        result = results[name]
        both = result.forward.operations + result.backward.operations
        counts: dict[str, Any] = {
            "forward_bytes": round(result.forward.sent),
            "backward_bytes": round(result.backward.sent),
            "received_bytes": round(result.forward.received + result.backward.received),
            "calls": result.forward.calls + result.backward.calls,
            "operations": both,
            "operations_8NND_W": round(both / case.unit, 4),
        }
        if not result.forward.calls + both:
            counts = dict.fromkeys(counts, "")
        ms = [1e3 * x for x in result.seconds]
        times = (statistics.median(ms), quantile(ms, 0.2), quantile(ms, 0.8)) if ms else ()
        out.append(
            {
                "provider": name,
                **asdict(case),
                "gradient": COMPETITORS[name if name in COMPETITORS else "inf_cl_ring"].gradient,
                **counts,
                "peak_mib": result.peak_mib,
                "rounds": len(ms) or "",
                **dict(zip(("median_ms", "p20_ms", "p80_ms"), (round(x, 2) for x in times) if ms else ("",) * 3)),
                f"speedup_over_{PEER}": timings.ratio(name, PEER, 3) if ms else "",
                "status": result.status,
            }
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ranks", default="1,2,4", help="numbers of processes, separated by commas (default: %(default)s)"
    )
    parser.add_argument("--local", type=int, default=1024, help="pairs per process (default: %(default)s)")
    parser.add_argument("--D", type=int, default=512, help="width of the features (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="data type of the features (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=int, default=9, help="timed steps of each provider; 0 times none (default: %(default)s)"
    )
    parser.add_argument(
        "--peak", action="store_true", help="measure peak memory as well, in separate processes for each provider"
    )
    parser.add_argument("--rows", type=Path, default=RESULTS, help="CSV file to add rows to (default: %(default)s)")
    arguments = parser.parse_args()
    for W in map(int, arguments.ranks.split(",")):
        case = Case(W, arguments.local, arguments.D, arguments.dtype)
        load = round(os.getloadavg()[0], 1)  # other processes may use the machine
        results = launch(case, COMPETITORS, arguments.rounds)
        for name, result in results.items():
            if arguments.peak and not result.status:
                result.peak_mib = launch(case, [name], peak=True)[name].peak_mib
        measured = rows(case, results)
        append(
            arguments.rows, measured, {"load": load, **machine(), "threads": 1, "inf_cl": installed_version("inf-cl")}
        )
        for row in measured:
            print(*(row[key] for key in list(row) if key not in ("local_N", "D", "gradient", "rounds")), sep="\t")


if __name__ == "__main__":
    main()
