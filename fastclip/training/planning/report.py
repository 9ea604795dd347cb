"""Text of a plan, as `fastclip plan` prints it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from fastclip.training.planning.memory import FRAGMENTATION, PROCESS, STATES, Plan

__all__ = ["machine_memory", "readable", "remedies", "table"]

_GIB, _MIB = 2**30, 2**20
_MATTERS = 0.05  # smallest saving, as a share of the memory, for which a remedy is suggested
_SPELT = {"adamw": "AdamW", "lamb": "LAMB", "ddp": "DDP", "fsdp": "FSDP", "cuda": "a GPU", "cpu": "a CPU"}


def machine_memory(device: str) -> int:
    """Return the memory of the first GPU ("cuda") or of this machine ("cpu"), in bytes.

    Raises:
        ValueError: there is no GPU, or the machine does not report its memory.
    """
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "torch sees no GPU here: give the memory of the GPU in GiB with --memory, or use --device cpu"
            )
        return int(torch.cuda.get_device_properties(0).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError) as error:
        raise ValueError("this machine does not report how much memory it has: give it in GiB with --memory") from error


def readable(size: int) -> str:
    """Format `size` bytes in GiB, or in MiB below 1 GiB."""
    return f"{size / _GIB:,.2f} GiB" if size >= _GIB else f"{size / _MIB:,.1f} MiB"


def table(p: Plan) -> str:
    """Return the plan as a table: a heading, then one line per part with its size and a description."""
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
    yield "parameters", p.parameters, f"{p.sizes.parameters / 1e6:,.1f} M{', sharded' if p.sharded else ''}"
    if p.sharded:
        yield (
            "gathered",
            p.gathered,
            f"two transformer blocks, parameters outside of blocks{'' if p.cached else ', gradients of one block'}",
        )
    when = ", unsharded until the last micro-batch" if p.sharded and p.cached else ""
    when = (
        when
        if p.gradients_stay
        else ", which appear as activations are freed: the total includes the gradients that exist at the peak"
    )
    yield "gradients", p.gradients, f"of {trained}{when}"
    if p.buckets:
        yield "DDP's buckets", p.buckets, "for exchanging gradients in the last micro-batch"
    yield "optimiser", p.optimizer_states, f"{_SPELT[p.optimizer]}: {STATES[p.optimizer]} fp32 states per parameter"
    if p.ema:
        yield "moving average", p.average, "of the weights"
    if p.teachers.count:
        frozen = f"{p.teachers.parameters / 1e6:,.1f} M"
        yield (
            "teachers",
            p.teachers.held(p.pairs),
            f"{p.teachers.count} frozen, of {frozen}, and their features of {p.pairs:,} pairs",
        )
    if p.means:
        yield "running means", p.means, f"of the global loss, of {p.samples:,} samples"
    images = f"images of {p.image_size} x {p.image_size}, uint8 and fp32"
    yield "inputs", p.inputs, f"{images}, and {p.context_length} ids per text"
    kept = "and their gradients" if p.cached else "gradients only"
    yield "features", p.features, f"of {p.pairs:,} pairs, {kept}"
    if p.workspace:
        yield "workspace", p.workspace, "logits of the loss, kept between steps"
    yield "activations", p.activations, f"of a micro-batch of {pairs:,}, with all temporary tensors"
    if p.cached:
        if p.kept_graphs:
            yield (
                "kept graphs",
                p.graphs,
                f"of {p.kept_graphs} of {p.micro_batches} micro-batches, also during the loss",
            )
        yield "loss", p.loss, "not at the same time as the activations: the total includes the larger of the two"
    else:
        kept = readable(p.footprint.kept(p.pairs))
        yield (
            "loss",
            p.loss,
            f"beside {kept} of kept activations: the total includes the sum, or the line above if that is larger",
        )
    what = "CUDA and libraries" if p.device == "cuda" else "Python and libraries"
    note = f"{readable(PROCESS[p.device])} for {what}, {FRAGMENTATION:.0%} of the rest for the allocator"
    yield "reserve", p.reserve, note


def remedies(p: Plan, *, grad_checkpointing: bool) -> list[str]:
    """Return the options that notably reduce the memory of a step with micro-batches of one pair.

    The sharding options are listed with the memory that the step then takes.
    """
    one = replace(p, micro_batch=1)
    options = []
    for option, other in {
        "--parallel fsdp": replace(one, parallel="fsdp"),
        "--comm ring": replace(one, comm="ring"),
    }.items():  # they change nothing for a single process
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
