"""A plan in words: what `fastclip plan` prints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from fastclip.training.planning.memory import FRAGMENTATION, PROCESS, STATES, Plan

__all__ = ["machine_memory", "readable", "remedies", "table"]

_GIB, _MIB = 2**30, 2**20
_MATTERS = 0.05  # share of the memory from which a remedy is worth naming
_SPELT = {"adamw": "AdamW", "lamb": "LAMB", "ddp": "DDP", "fsdp": "FSDP", "cuda": "a GPU", "cpu": "a CPU"}


def machine_memory(device: str) -> int:
    """Return the bytes of the first GPU, or of this machine.

    Raises:
        ValueError: there is no GPU, or the machine does not say.
    """
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "torch sees no GPU here: say with --memory how many GiB the other one has, or --device cpu"
            )
        return int(torch.cuda.get_device_properties(0).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError) as error:
        raise ValueError("this machine does not say how much memory it has: --memory does") from error


def readable(size: int) -> str:
    """Write `size` bytes in GiB, or in MiB below one."""
    return f"{size / _GIB:,.2f} GiB" if size >= _GIB else f"{size / _MIB:,.1f} MiB"


def table(p: Plan) -> str:
    """Return a line for each part of a plan, with its bytes and what it is."""
    rows = [*_rows(p), ("total", p.total, "")]
    labels, sizes = (max(len(text) for text in column) for column in zip(*((r[0], readable(r[1])) for r in rows)))
    lines = [f"{label:{labels}}  {readable(size):>{sizes}}  {note}".rstrip() for label, size, note in rows]
    each = f"{p.pairs:,} for each of {p.world_size} processes" if p.world_size > 1 else "one process"
    how = ["bf16 autocast" if p.precision == "bf16" else "fp32", _SPELT[p.optimizer]]
    how += [_SPELT[p.parallel], p.comm] if p.world_size > 1 else []
    return "\n".join([f"{p.batch_size:,} pairs, {each}, on {_SPELT[p.device]}: {', '.join(how)}", "", *lines])


def _rows(p: Plan) -> Iterator[tuple[str, int, str]]:
    trained = f"{p.sizes.trainable / 1e6:,.1f} M"
    pairs = min(p.micro_batch, p.pairs)
    yield "parameters", p.parameters, f"{p.sizes.parameters / 1e6:,.1f} M{', a shard of them' if p.sharded else ''}"
    if p.sharded:
        yield (
            "gathered",
            p.gathered,
            f"two blocks and what is in none{'' if p.cached else ', and gradients of one block'}",
        )
    when = ", whole until the last micro-batch" if p.sharded and p.cached else ""
    when = when if p.gradients_stay else ", as activations go: the total has what is there at the highest point"
    yield "gradients", p.gradients, f"of {trained}{when}"
    if p.buckets:
        yield "DDP's buckets", p.buckets, "into which gradients go in the last micro-batch"
    yield "optimiser", p.optimizer_states, f"{_SPELT[p.optimizer]}: {STATES[p.optimizer]} fp32 numbers for each of them"
    if p.ema:
        yield "moving average", p.average, "of the weights"
    yield "inputs", p.inputs, f"images of {p.image_size} x {p.image_size}, fp32, and {p.context_length} ids a text"
    kept = "and their gradients" if p.cached else "their gradients"
    yield "features", p.features, f"of {p.pairs:,} pairs, {kept}"
    if p.workspace:
        yield "workspace", p.workspace, "logits of the loss, kept between steps"
    yield "activations", p.activations, f"of a micro-batch of {pairs:,}, with everything temporary"
    if p.cached:
        yield "loss", p.loss, "before the activations that count: the larger of the two is in the total"
    else:
        kept = readable(p.footprint.kept(p.pairs))
        yield "loss", p.loss, f"on top of {kept} of activations: the larger of both and all activations is in the total"
    what = "CUDA and libraries" if p.device == "cuda" else "Python and libraries"
    note = f"{readable(PROCESS[p.device])} for {what}, {FRAGMENTATION:.0%} of the rest for the allocator"
    yield "reserve", p.reserve, note


def remedies(p: Plan, *, grad_checkpointing: bool) -> list[str]:
    """Return the options that make a step with one pair at a time notably smaller, with what it then takes."""
    one = replace(p, micro_batch=1)
    options = []
    for option, other in {
        "--parallel fsdp": replace(one, parallel="fsdp"),
        "--comm ring": replace(one, comm="ring"),
    }.items():  # of one process these change nothing
        if one.total - other.total > _MATTERS * one.total:
            options.append(f"{option} ({readable(other.total)})")
    if one.activations > _MATTERS * one.total:
        options += [] if grad_checkpointing else ["--grad-checkpointing"]
        options += [] if one.precision == "bf16" else ["--precision bf16"]
    if one.world_size == 1:
        options.append("more processes and --parallel fsdp")
    if one.held + one.loss - one.parameters - one.gradients - one.optimizer_states > _MATTERS * one.total:
        options.append("a smaller --batch-size")
    return options or ["more processes"]
