"""Warnings about a run before it begins or goes on, a line each, for the log.

Settings with which it learns nothing, or not what was meant; and what has changed since the checkpoint it goes on from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fastclip.data.source import Source
from fastclip.data.spec import absolute_spec
from fastclip.system import env, machine
from fastclip.training.options import TrainOptions, flag

__all__ = ["changes", "doubts", "doubts_of_device", "doubts_of_labels", "doubts_of_schedule"]


_MAY_CHANGE = (
    *("output", "resume", "stop_after", "workers", "log_every", "save_every", "keep", "async_save", "val_every"),
    *("max_bad", "timeout", "wandb", "force"),
)


def changes(before: dict[str, Any], options: TrainOptions, source: Source, fingerprint: str) -> Iterator[str]:
    """Yield what differs from a checkpoint's state, of all that the numbers of a run depend on."""
    for name, value in asdict(options).items():
        now, then = list(value) if isinstance(value, tuple) else value, before["options"].get(name)
        if name == "data":  # another spelling of the place is none
            now, then = absolute_spec(options.data), absolute_spec(then or "")
        if name not in _MAY_CHANGE and then != now:
            yield f"{flag(name)} was {then}, is {now}"
    if (samples := before["samples"]) != len(source):
        yield f"the data had {samples} samples and have {len(source)}, which come in another order"
    elif before.get("fingerprint", fingerprint) != fingerprint:  # older checkpoints have none
        yield "the data have other names, another order or other captions: steps take other samples than they would"


def doubts(
    options: TrainOptions, *, samples: int, ranks: int, with_labels: bool, resumed: bool = False
) -> Iterator[str]:
    """Yield a warning for each setting with which a run learns nothing, or not what was meant.

    Args:
        options: with the model's own values and the length of the schedule filled in.
        with_labels: the loss takes repeats of a pair for positives.
        resumed: a checkpoint holds the weights that the run begins with.
    """
    steps, warmup, lr = options.max_steps, options.warmup, options.lr
    assert steps is not None and warmup is not None and lr is not None
    if options.batch_size == 1 and options.loss != "siglip":
        yield "--batch-size 1: the loss of one pair is 0, and nothing is learned"
    if samples < options.batch_size and not with_labels:
        yield (
            f"a batch of {options.batch_size} from {samples} samples repeats some, and the {options.loss} loss takes "
            "repeats for negatives: --loss unicl takes them for positives"
        )
    yield from doubts_of_schedule(warmup=warmup, steps=steps, lr=lr)
    assert options.weight_decay is not None
    if (away := lr * options.weight_decay) >= 0.1:
        yield f"--lr {lr:g} times --weight-decay {options.weight_decay:g}: a step takes away {away:.0%} of the matrices"
    share, micro = options.largest_share(ranks), options.micro_batch
    if micro is not None and options.is_cached(ranks) and (rest := share % micro):
        yield f"--micro-batch {micro} does not divide the {share} pairs of a process: the last has {rest}"
    if options.label_smoothing == 1:
        yield "--label-smoothing 1: every text is as right as another, and nothing is learned"
    if options.pretrained is None and not resumed:
        for tower in ("image", "text"):
            if getattr(options, f"lock_{tower}"):
                yield f"--lock-{tower} without --pretrained: the {tower} tower stays as random as it begins"
    if options.val_data == options.data != "digits":
        yield f"--val-data is --data {options.data}: validation tells nothing of other data"


def doubts_of_schedule(*, warmup: int, steps: int, lr: float) -> Iterator[str]:
    if warmup >= steps:
        reached = f"{lr * steps / warmup:.3g}" if warmup else "0"
        yield f"--warmup {warmup} of {steps} steps: the learning rate rises to {reached} at the end and never decays"


def doubts_of_device(options: TrainOptions, device: torch.device) -> Iterator[str]:
    """Yield a warning if GPUs stay idle although nobody asked for the CPU."""
    if options.device != "auto" or device.type != "cpu":
        return
    if gpus := torch.cuda.device_count():
        launched = env.launched()
        processes = launched.local_ranks if launched else 1
        yield f"{gpus} GPUs are too few for {processes} processes of this machine: all train on the CPU"
    elif "CUDA_VISIBLE_DEVICES" not in env.in_effect() and (there := machine.unseen_gpu()):
        yield f"trains on the CPU: {'; '.join(there)}"


def doubts_of_labels(labels: Sequence[Tensor], loss: str | None, *, with_labels: bool) -> Iterator[str]:
    """Yield a warning if the pairs of a step share their labels: a class, or a caption, with which the loss fails."""
    whole = torch.cat(list(labels))
    _, counts = whole.unique(return_counts=True)
    if len(counts) == 1 and len(whole) > 1 and with_labels:
        yield f"all {len(whole)} pairs of the first batch have one class or caption: their {loss} loss is 0"
    repeats = int(counts[counts > 1].sum())
    if 2 * repeats > len(whole) and not with_labels:
        yield (
            f"{repeats} of the {len(whole)} pairs of the first batch share their class or caption with another, "
            f"and the {loss} loss takes those for negatives: --loss unicl takes them for positives"
        )
