"""Prediction of the seconds of a training step, for `fastclip plan`: its operations over the rate of a device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastclip.training.planning.memory import Plan
from fastclip.training.planning.operations import matrix_rate

__all__ = ["UTILISATION", "Speed", "machine_rate", "sentences", "speed"]

# Share of the rate of matrix products that the executed operations of a step reach, by device and precision, and what
# it was measured with. Wider models reach more on a CPU: ViT-B-32 has 0.87 in fp32 and 0.61 in bf16
UTILISATION = {
    ("cuda", "bf16"): (0.29, "ViT-B-32 in bf16 on an H200"),
    ("cuda", "fp32"): (0.29, "ViT-B-32 in bf16 on an H200"),
    ("cpu", "bf16"): (0.1, "ViT-tiny in bf16 on one core"),
    ("cpu", "fp32"): (0.59, "ViT-tiny in fp32 on one core"),
}
_UNITS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))


class Speed(NamedTuple):
    """Prediction of a step's duration, without the loading of data and the communication between processes."""

    useful: float  # operations of a step that the update needs, of all processes
    executed: float  # operations of a step, of all processes
    limit: float  # seconds of the step if all executed operations ran at the rate of matrix products
    seconds: float
    pairs_per_second: float  # of all processes
    mfu: float  # model FLOP utilisation


def speed(p: Plan, rate: float, *, utilisation: float | None = None, tokens: float | None = None) -> Speed:
    """Predict how long a planned step takes.

    Args:
        p: plan of the step.
        rate: operations per second that matrix products reach on the device of a process.
        utilisation: share of `rate` that the executed operations reach (default: that of `UTILISATION`).
        tokens: tokens of a text on average, without padding (default: the context length).
    """
    tokens = p.context_length if tokens is None else tokens
    again = max(0, p.pairs - p.kept_graphs * p.micro_batch) / p.pairs if p.cached else 0.0
    operations = p.count_operations()
    useful = operations.useful(p.batch_size, tokens)
    executed = operations.executed(p.batch_size, tokens, again=again) + p.teachers.executed(p.batch_size, tokens)
    limit = executed * p.pairs / p.batch_size / rate  # of the process that has the most pairs
    seconds = limit / (UTILISATION[p.device, p.precision][0] if utilisation is None else utilisation)
    return Speed(useful, executed, limit, seconds, p.batch_size / seconds, useful / (seconds * p.world_size * rate))


def machine_rate(p: Plan) -> float | None:
    """Measure the rate of matrix products on this machine.

    None stands for a machine without a device of the planned kind, or whose GPU has too little free memory.
    """
    if p.device == "cuda" and not torch.cuda.is_available():
        return None
    try:
        return matrix_rate(torch.device(p.device), torch.bfloat16 if p.precision == "bf16" else torch.float32)
    except RuntimeError:
        return None


def sentences(p: Plan, rate: float | None, *, utilisation: float | None = None, tokens: float | None = None) -> str:
    """Describe the operations of a step and, if `rate` is known, its seconds. The arguments are those of `speed`."""
    found = speed(p, rate or 1.0, utilisation=utilisation, tokens=tokens)
    tokens = p.context_length if tokens is None else tokens
    operations = p.count_operations()
    image, text = _amount(operations.image), _amount(operations.text(tokens))
    twice = p.micro_batches - p.kept_graphs if p.cached else 0
    why = [f"gradient caching embeds {twice} of {p.micro_batches} micro-batches twice"] if twice else []
    why += ["gradient checkpointing runs towers again"] if operations.checkpointing else []
    needed = f"useful operations of a step: {_amount(found.useful)}; an image takes {image} in the forward pass, "
    needed += f"a text of {tokens:g} tokens {text}"
    why += ["teachers embed the batch"] if p.teachers.count else []
    because = f", because {' and '.join(why)}" if why else ""
    lines = [needed, f"executed operations: {_amount(found.executed)}{because}"]
    if rate is None:
        return "\n".join(
            [*lines, "to predict the seconds of a step, give the rate of matrix products on the GPU with --tflops"]
        )
    share, measured = UTILISATION[p.device, p.precision]
    which = f"{share:g}, as in {measured}" if utilisation is None else f"{utilisation:g}"
    times = f"{found.seconds / found.limit:.3g} times the limit"
    speed_of_all = f"{found.pairs_per_second:,.0f} pairs a second"
    lines += [
        f"limit of a step: {found.limit:,.3g} s, at {_amount(rate)}/s of each process",
        f"expected: {found.seconds:,.3g} s, {times}, at a utilisation of {which}",
        f"this is {speed_of_all} and a model FLOP utilisation of {found.mfu:.2g}",
    ]
    return "\n".join(lines)


def _amount(operations: float) -> str:
    """Format a number of operations, such as 8.29 GFLOP."""
    size, name = next((unit for unit in _UNITS if operations >= unit[0]), _UNITS[-1])
    return f"{operations / size:,.4g} {name}"
