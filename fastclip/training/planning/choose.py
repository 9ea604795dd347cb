"""Choice of the micro-batch and of the number of kept graphs: `--micro-batch auto` and `--keep-graphs auto`.

If the step of a process fits into its memory, gradient caching is not used. Otherwise the micro-batch is the one with
which a step takes the least work: large micro-batches have fewer passes, and small ones leave more memory for the
graphs of micro-batches that need no second forward pass.
"""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from fastclip.models.config import ModelConfig
from fastclip.models.dual_encoder import DualEncoder
from fastclip.models.dual_encoder import build_model as empty_model
from fastclip.system import machine
from fastclip.system.rounding import ceil_div
from fastclip.training.from_options import Towers
from fastclip.training.options import TrainOptions, flag
from fastclip.training.planning.footprint import Footprint, footprint, rough_footprint
from fastclip.training.planning.memory import MEANS, Plan, most_graphs, plan
from fastclip.training.planning.report import readable
from fastclip.training.planning.teachers import plan_teachers
from fastclip.training.ranks import World, of_all_ranks

__all__ = ["SHARE", "Choice", "choose", "has_statistics", "settle", "usable_memory"]

logger = logging.getLogger(__name__)
# Share of the memory that is used: the prediction is not exact, and the main memory also holds the loaders and others
SHARE = {"cuda": 0.9, "cpu": 0.5}
_FREE = 0.9  # share of the main memory that is free now
_OVERHEAD = {"cuda": 32, "cpu": 4}  # fixed cost of a pass over a micro-batch, in pairs
_FEW = 16  # pairs of a micro-batch if none is predicted to fit
_AUTO = (None, "auto")


class Choice(NamedTuple):
    """Micro-batch and kept graphs of a run."""

    micro_batch: int
    keep_graphs: int


def choose(
    p: Plan,
    memory: float,
    *,
    micro_batch: int | None = None,
    keep_graphs: int | None = None,
    largest: bool = False,
    caching: bool = False,
) -> Plan | None:
    """Return `p` with the micro-batch and the number of kept graphs that are best, or None if nothing fits.

    Args:
        p: plan of the step with any micro-batch.
        memory: bytes that a process may use.
        micro_batch, keep_graphs: values that are given; None chooses them.
        largest: take the largest micro-batch, because the model depends on it (`has_statistics`).
        caching: choose a micro-batch with which the step uses gradient caching.
    """
    if micro_batch is not None:
        sizes = [min(micro_batch, p.pairs)]
    else:
        whole = replace(p, micro_batch=p.pairs, keep_graphs=0)
        if not caching and whole.total <= memory:
            return whole
        sizes = list(_sizes(p))
    plans = [_with_graphs(replace(p, micro_batch=size), memory, keep_graphs) for size in sizes]
    fitting = [one for one in plans if one.total <= memory]
    return max(fitting, key=lambda one: (0 if largest else -_work(one), one.micro_batch), default=None)


def _sizes(p: Plan) -> Iterator[int]:
    """Yield the micro-batches to choose from: divisors of the pairs of a process, and powers of two."""
    fewest = p.batch_size // p.world_size  # pairs of the process that has the fewest
    for size in range(1, ceil_div(p.pairs, 2) + 1):
        # Under FSDP all processes must have equally many micro-batches
        even = not p.sharded or ceil_div(fewest, size) == ceil_div(p.pairs, size)
        if even and (p.pairs % size == 0 or size & size - 1 == 0):
            yield size


def _with_graphs(p: Plan, memory: float, keep_graphs: int | None) -> Plan:
    return replace(p, keep_graphs=p.largest_keep_graphs(memory) if keep_graphs is None else keep_graphs)


def _work(p: Plan) -> int:
    """Return the work of a step, in forward passes of one pair; a pass backward counts as two."""
    once = 3 * (p.pairs + p.micro_batches * _OVERHEAD[p.device])
    kept = p.kept_graphs * (p.micro_batch + _OVERHEAD[p.device])
    return once + p.pairs + p.micro_batches * _OVERHEAD[p.device] - kept if p.cached else once


def has_statistics(model: DualEncoder) -> bool:
    """Return True if a trained tower normalises with statistics of the micro-batch (BatchNorm)."""
    trained = [tower for tower in (model.visual, model.text) if any(p.requires_grad for p in tower.parameters())]
    return any(isinstance(x, nn.modules.batchnorm._BatchNorm) for tower in trained for x in tower.modules())


def usable_memory(device: torch.device, *, processes: int = 1, held: int = 0, share: float | None = None) -> float:
    """Return the bytes that a step of this process may take, infinite if unknown.

    This is a share of the whole memory, so that the same run gets the same value again, unless less is free.

    Args:
        device: device of the process.
        processes: number of processes of the run on this machine, which share the main memory.
        held: bytes that are already allocated on a GPU for the step, such as the parameters.
        share: share of the whole memory (default: that of `SHARE`).
    """
    share = SHARE[device.type] if share is None else share
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        ours = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) + held
        return min(share * total, free + ours)
    whole = min(machine.memory_bytes(), machine.container_bytes())
    return min(share * whole, _FREE * machine.available_bytes()) / processes


def settle(
    options: TrainOptions,
    model: DualEncoder,
    world: World,
    *,
    before: Mapping[str, Any] | None = None,
    teachers: Sequence[DualEncoder] = (),
    samples: int = 0,
) -> Choice:
    """Return the micro-batch and the kept graphs of a run, equal on all ranks, and log what was chosen.

    Args:
        options: options of the run, of which `micro_batch` and `keep_graphs` may be "auto".
        model: model of the run. It is left unchanged.
        world: this process and its group.
        before: contents of state.json of the checkpoint that is resumed. Its micro-batch is used again if the batch and
            the number of processes are the same, because BatchNorm and the rounding depend on it.
        teachers: frozen models whose features the step compares, on the device.
        samples: samples of the dataset of which the global loss holds running means, which are allocated already.
    """
    share = options.largest_share(world.ranks)
    micro_batch = None if options.micro_batch in _AUTO else int(options.micro_batch)
    keep_graphs = None if options.keep_graphs in _AUTO else int(options.keep_graphs)
    if micro_batch is None and before is not None and _alike(before, options, world):
        then = before["options"].get("micro_batch")
        micro_batch = then if isinstance(then, int) else share  # older versions recorded None for the whole share
    if micro_batch is not None and (keep_graphs is not None or micro_batch >= share):
        return Choice(micro_batch, min(keep_graphs or 0, most_graphs(options.batch_size, world.ranks, micro_batch)))
    memory = _smallest_memory([model, *teachers], world, samples)
    if math.isinf(memory):
        return _without_plan(options, world, micro_batch, keep_graphs, "the size of the memory is unknown")
    try:
        return _planned(options, [model, *teachers], world, memory, micro_batch, keep_graphs, samples)
    except Exception as error:  # of whatever kind the code of a model raises
        return _without_plan(options, world, micro_batch, keep_graphs, f"its memory cannot be planned ({error})")


def _smallest_memory(models: Sequence[DualEncoder], world: World, samples: int, *, share: float | None = None) -> float:
    """Return `usable_memory` of the rank that has the least, all of which hold these models and running means."""
    hosts = of_all_ranks(socket.gethostname(), world)
    tensors = [
        x.to_local() if hasattr(x, "to_local") else x for one in models for x in (*one.parameters(), *one.buffers())
    ]
    held = sum(x.untyped_storage().nbytes() for x in tensors) + MEANS * samples
    processes = hosts.count(hosts[world.rank])
    return min(of_all_ranks(usable_memory(world.device, processes=processes, held=held, share=share), world))


def _alike(before: Mapping[str, Any], options: TrainOptions, world: World) -> bool:
    return bool(
        before["options"].get("batch_size") == options.batch_size and before.get("ranks", world.ranks) == world.ranks
    )


def _without_plan(
    options: TrainOptions, world: World, micro_batch: int | None, keep_graphs: int | None, why: str
) -> Choice:
    share = options.largest_share(world.ranks)
    size = micro_batch or (ceil_div(share, 2) if options.features_on == "cpu" else share)
    number = min(keep_graphs or 0, most_graphs(options.batch_size, world.ranks, size))
    logger.warning(
        "%s: %s: micro-batches of %s pairs are used, and %s graphs are kept. Give --micro-batch if memory runs out",
        options.model,
        why,
        f"{size:,}",
        number,
    )
    return Choice(size, number)


def _planned(
    options: TrainOptions,
    models: Sequence[DualEncoder],
    world: World,
    memory: float,
    micro_batch: int | None,
    keep_graphs: int | None,
    samples: int,
) -> Choice:
    """Return the choice for the first of the models, of which the others are teachers."""
    config, *teachers = (model.config for model in models if model.config is not None)
    towers = Towers.of(options)
    twin, rough = _rough(config, towers)
    given: dict[str, Any] = {"micro_batch": micro_batch, "keep_graphs": keep_graphs}
    given |= {"largest": has_statistics(twin), "caching": options.features_on == "cpu"}
    known: dict[str, Any] = {
        "batch_size": options.batch_size,
        "world_size": world.ranks,
        "precision": options.precision,
        "optimizer": options.optimizer or "adamw",
        "parallel": options.parallel,
        "comm": options.comm,
        "ema": options.ema is not None,
        "device": world.device.type,
        "prefixes": options.prefixes,
        "samples": samples,
    }
    sizes: dict[str, Any] = {"context_length": config.text_cfg.context_length, "precision": options.precision}
    known["teachers"] = plan_teachers(teachers, **sizes, device=world.device.type)
    chosen = choose(plan(twin, **known, measured=rough), memory, **given)
    if chosen is None or (chosen.cached and (micro_batch is None or chosen.kept_graphs < chosen.most_graphs)):
        # There may not be enough memory for everything, so the exact plan is needed
        twin, measured = _exact(config, towers, options.precision, world.device.type)
        exact = plan(twin, **known, measured=measured)
        chosen = choose(exact, memory, **given)
        if chosen is None:  # no step fits into the share of the memory: all that is free is tried
            chosen = choose(exact, _smallest_memory(models, world, samples, share=1.0), **given)
        if chosen is None:
            few = micro_batch or max((size for size in _sizes(exact) if size <= _FEW), default=exact.pairs)
            chosen = replace(exact, micro_batch=few, keep_graphs=keep_graphs or 0)
        _log(options, chosen, memory)
    elif chosen.cached:
        _log(options, chosen, memory, "at most ")
    return Choice(chosen.micro_batch, chosen.kept_graphs)


def _twin(config: ModelConfig, towers: Towers) -> DualEncoder:
    """Return a model of the configuration without weights."""
    twin = empty_model(config, device="meta")
    towers.prepare(twin)
    return twin


# Both are cached, because a program may train the same model again and again


@cache
def _rough(config: ModelConfig, towers: Towers) -> tuple[DualEncoder, Footprint]:
    twin = _twin(config, towers._replace(grad_checkpointing=False))
    return twin, rough_footprint(twin, **_sizes_of_inputs(config))


@cache
def _exact(config: ModelConfig, towers: Towers, precision: str, device: str) -> tuple[DualEncoder, Footprint]:
    twin = _twin(config, towers)
    return twin, footprint(twin, **_sizes_of_inputs(config), precision=precision, device=device)


def _sizes_of_inputs(config: ModelConfig) -> dict[str, int]:
    return {"image_size": config.vision_cfg.image_size, "context_length": config.text_cfg.context_length}


def _log(options: TrainOptions, p: Plan, memory: float, bound: str = "") -> None:
    """Log what was chosen, with the prediction; a warning if it is more than the memory.

    Args:
        bound: words before the predicted memory, such as "at most ".
    """
    chosen = [name for name in ("micro_batch", "keep_graphs") if getattr(options, name) in _AUTO]
    named = " ".join(f"{flag(name)} auto" for name in chosen)
    if p.cached:
        what = f"micro-batches of {p.micro_batch:,} pairs, {p.kept_graphs} of {p.micro_batches} graphs kept"
    else:
        what = f"all {p.pairs:,} pairs of a process at once"
    words = f"{named}: {what}: a step takes {bound}{readable(p.total)} of {readable(int(memory))}"
    if p.total <= memory:
        logger.info("%s", words)
    else:
        logger.warning("%s, by prediction. `fastclip plan` names the options that save memory", words)
