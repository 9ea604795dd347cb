"""Warnings about a run before it starts or resumes, one log line each.

They concern settings with which the run learns nothing or not what was intended, and changes since the checkpoint from
which the run resumes.
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
from fastclip.system.rounding import ceil_div
from fastclip.training.options import TrainOptions, flag

__all__ = ["changes", "doubts", "doubts_of_device", "doubts_of_labels", "doubts_of_schedule"]


_MAY_CHANGE = (
    *("output", "resume", "stop_after", "workers", "log_every", "save_every", "keep", "async_save", "val_every"),
    *("max_bad", "timeout", "wandb", "force", "keep_graphs", "distill"),  # of teachers, the weights are compared
)


def changes(
    before: dict[str, Any],
    options: TrainOptions,
    source: Source,
    fingerprint: str,
    teachers: Sequence[str] = (),
    *,
    ranks: int,
) -> Iterator[str]:
    """Yield a sentence for each difference between a checkpoint's state and this run that affects the run's results.

    Micro-batches differ only if gradient caching is used: otherwise each process has one, whatever its size.
    """
    for name, value in asdict(options).items():
        now, then = list(value) if isinstance(value, tuple) else value, before["options"].get(name)
        if name == "data":  # two spellings of the same place are no change
            now, then = absolute_spec(options.data), absolute_spec(then or "")
        if name == "micro_batch":
            now = _micro_batch(now, options.batch_size, ranks)
            then = _micro_batch(then, before["options"].get("batch_size", 0), before.get("ranks", ranks))
        if name not in _MAY_CHANGE and then != now:
            yield f"{flag(name)} was {then} and is now {now}"
    if before.get("teachers", []) != list(teachers):  # digests, because a checkpoint may move
        then, now = before["options"].get("distill"), None if options.distill is None else list(options.distill)
        yield (
            f"--distill was {then} and is now {now}"
            if then != now
            else f"--distill {' '.join(now or [])}: the weights of the teachers differ"
        )
    if (samples := before["samples"]) != len(source):
        yield f"the dataset had {samples} samples and now has {len(source)}, so the order of the samples differs"
    elif before.get("fingerprint", fingerprint) != fingerprint:  # checkpoints of older versions lack it
        yield "the dataset has other names, another order or other captions: steps draw other samples than before"


def _micro_batch(size: Any, batch_size: int, ranks: int) -> int | None:
    return size if isinstance(size, int) and size < ceil_div(batch_size, ranks) else None


def doubts(
    options: TrainOptions,
    *,
    samples: int,
    ranks: int,
    with_labels: bool,
    embed_dim: int,
    resumed: bool = False,
    chosen: bool = False,
) -> Iterator[str]:
    """Yield a warning for each setting with which a run learns nothing, or not what was intended.

    Args:
        options: options in which the model's defaults and the length of the schedule are filled in.
        samples: size of the dataset.
        ranks: world size.
        with_labels: the loss treats repeats of a pair as positives.
        embed_dim: length of the model's features.
        resumed: the run starts from the weights of a checkpoint.
        chosen: the micro-batch was not given but chosen.
    """
    steps, warmup, lr = options.max_steps, options.warmup, options.lr
    assert steps is not None and warmup is not None and lr is not None
    if options.batch_size == 1 and options.loss != "siglip":
        yield "--batch-size 1: the loss of one pair is always 0, so nothing is learned"
    if samples < options.batch_size and not with_labels and options.loss != "global":  # it leaves repeats out
        yield (
            f"a batch of {options.batch_size} from {samples} samples repeats some, and the {options.loss} loss treats "
            "repeats as negatives: --loss unicl treats them as positives"
        )
    yield from doubts_of_schedule(warmup=warmup, steps=steps, lr=lr)
    assert options.weight_decay is not None
    if (away := lr * options.weight_decay) >= 0.1:
        yield (
            f"--lr {lr:g} times --weight-decay {options.weight_decay:g} is so large that each step shrinks the "
            f"matrices by {away:.0%}: lower one of them"
        )
    yield from _doubts_of_caching(options, ranks, chosen=chosen)
    if options.label_smoothing == 1:
        yield "--label-smoothing 1: every text is equally correct, so nothing is learned"
    if options.prefixes is not None and (longest := max(options.prefixes)) < embed_dim:
        yield (
            f"--prefixes {' '.join(map(str, options.prefixes))}: of {embed_dim} features only the first {longest} are "
            f"trained: add {embed_dim} to train all of them"
        )
    if options.pretrained is None and not resumed:
        for tower in ("image", "text"):
            if getattr(options, f"lock_{tower}"):
                yield f"--lock-{tower} without --pretrained: the {tower} tower keeps its random initial weights"
    if options.val_data == options.data != "digits":
        yield f"--val-data is the same as --data ({options.data}): validation measures nothing about unseen data"


def _doubts_of_caching(options: TrainOptions, ranks: int, *, chosen: bool) -> Iterator[str]:
    share, micro, graphs = options.largest_share(ranks), options.micro_batch, options.keep_graphs
    if not isinstance(micro, int) or not options.is_cached(ranks):
        if isinstance(graphs, int) and graphs > 0:
            yield (
                f"--keep-graphs {graphs} has no effect: all {share} pairs of a process are embedded at once, without "
                "gradient caching"
            )
        return
    if (rest := share % micro) and not chosen:
        yield (
            f"--micro-batch {micro} does not divide the {share} pairs of a process: the last micro-batch has only "
            f"{rest}, which wastes time; a batch whose share is a multiple of {micro} avoids this"
        )
    if isinstance(graphs, int) and graphs > (count := ceil_div(share, micro)):
        most = f"the {count} micro-batches of a process"
        yield f"--keep-graphs {graphs} is more than {most}: as many as possible are kept"


def doubts_of_schedule(*, warmup: int, steps: int, lr: float) -> Iterator[str]:
    """Yield a warning if the warm-up is as long as the schedule."""
    if warmup >= steps:
        reached = f"{lr * steps / warmup:.3g}" if warmup else "0"
        rise = f"--warmup {warmup} of {steps} steps"
        yield f"{rise}: the learning rate rises to {reached} at the last step and never decays"


def doubts_of_device(options: TrainOptions, device: torch.device) -> Iterator[str]:
    """Yield a warning if GPUs stay idle although --device cpu was not given."""
    if options.device != "auto" or device.type != "cpu":
        return
    if gpus := torch.cuda.device_count():
        launched = env.launched()
        processes = launched.local_ranks if launched else 1
        yield f"{gpus} GPUs are too few for {processes} processes on this machine: all of them train on the CPU"
    elif "CUDA_VISIBLE_DEVICES" not in env.in_effect() and (there := machine.unseen_gpu()):
        yield f"training on the CPU: {'; '.join(there)}"


def doubts_of_labels(labels: Sequence[Tensor], loss: str | None, *, with_labels: bool) -> Iterator[str]:
    """Yield a warning if many pairs of a step share a label (a class or a caption), so that the loss teaches little.

    Args:
        labels: labels of this process's micro-batches.
    """
    whole = torch.cat(list(labels))
    _, counts = whole.unique(return_counts=True)
    if len(counts) == 1 and len(whole) > 1 and with_labels:
        yield f"all {len(whole)} pairs of the first batch have the same class or caption: their {loss} loss is 0"
    repeats = int(counts[counts > 1].sum())
    if 2 * repeats > len(whole) and not with_labels:
        yield (
            f"{repeats} of the {len(whole)} pairs of the first batch share their class or caption with another, "
            f"and the {loss} loss treats those as negatives: --loss unicl treats them as positives"
        )
