"""Samples of a run that could not be used: counted over all processes, and when they are too many."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastclip.data.batch import Batch
from fastclip.data.faults import Tally
from fastclip.data.order import Order
from fastclip.training.parallel import World, mean_over_ranks

__all__ = ["Skipped"]

logger = logging.getLogger(__name__)


class Skipped:
    """The count, the same on every rank; a sample counts once an epoch.

    Args:
        max_bad: the largest share of the samples drawn, 0 to 1.
    """

    def __init__(self, order: Order, max_bad: float, world: World) -> None:
        self._order, self._max_bad, self._world = order, max_bad, world
        self.tally = Tally()

    def count(self, batches: Sequence[Batch], step: int) -> None:
        """Those of this rank's part of `step` (from 0), and of the others'; a cause that is new is logged.

        Raises:
            ValueError: there are more than `max_bad`: at the end of an epoch, or before it where they are too many
                whatever follows, or by more than chance.
        """
        faults = [fault for batch in batches for fault in batch.skipped]
        if mean_over_ranks(torch.tensor(float(len(faults)), device=self._world.device), self._world) == 0:
            return
        everyone = [faults]
        if self._world.group is not None:
            everyone = [[] for _ in range(self._world.ranks)]
            dist.all_gather_object(everyone, faults, group=self._world.group)
        for fault in self.tally.add(fault for found in everyone for fault in found):
            logger.warning("skipped, %s: %s: %s", fault.cause, fault.key, fault.reason)
        drawn = (step + 1) * self._order.batch_size
        if too_many(self.tally.total, drawn, self._order.epoch_length, self._max_bad, size=self._order.size):
            raise ValueError(f"more than --max-bad {self._max_bad:g}: {self.told(drawn)}")

    def told(self, drawn: int) -> str:
        share = self.tally.total / drawn
        return f"{self.tally.total:,} of {drawn:,} samples drawn ({share:.2%}) cannot be used: {self.tally}"

    def state(self) -> dict[str, Any]:
        """A copy, for a checkpoint."""
        return {
            "counts": dict(self.tally.counts),
            "keys": {cause: list(keys) for cause, keys in self.tally.keys.items()},
        }

    def load(self, state: dict[str, Any], path: Path) -> None:
        """What `state` returned, which the checkpoint `path` holds; ValueError where that is something else."""
        try:
            found = Tally.of(state.get("counts"), state.get("keys"))
        except ValueError as error:
            raise ValueError(f"{path / 'state.json'} is damaged: {error}") from error
        self.tally.merge(found.counts, found.keys)


def too_many(bad: int, drawn: int, epoch_length: int, max_bad: float, *, size: int | None = None) -> bool:
    """Whether a share above `max_bad` of the data is certain, or a smaller one would be most unlikely.

    An epoch draws `epoch_length` of `size` samples, each once: more bad ones than the data may have are too many.
    """
    at_the_end = max_bad * math.ceil(drawn / epoch_length) * (size or epoch_length)
    expected = max_bad * drawn
    return bad > at_the_end or (max_bad < 1 and bad > expected + 4 * math.sqrt(expected) + 4)  # 4 standard deviations
