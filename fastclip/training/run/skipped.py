"""Samples of a run that could not be used: counted over all processes, and when they are too many."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastclip.data.batch import Batch
from fastclip.data.faults import Tally
from fastclip.data.loading.order import Order
from fastclip.training.ranks import World, mean_over_ranks, of_all_ranks

__all__ = ["Skipped"]

logger = logging.getLogger(__name__)


class Skipped:
    """Counts bad samples, the same on every rank; a sample counts once an epoch.

    Args:
        max_bad: the largest share of the samples drawn, 0 to 1.
    """

    def __init__(self, order: Order, max_bad: float, world: World) -> None:
        self._order, self._max_bad, self._world = order, max_bad, world
        self.tally = Tally()

    def count(self, batches: Sequence[Batch], step: int) -> None:
        """Add the bad samples of all ranks' parts of `step` (from 0); a cause that is new is logged.

        Raises:
            ValueError: there are more than `max_bad`: at the end of an epoch, or before it where they are too many
                whatever follows, or by more than chance.
        """
        faults = [fault for batch in batches for fault in batch.skipped]
        if mean_over_ranks(torch.tensor(float(len(faults)), device=self._world.device), self._world) == 0:
            return
        # Most steps end above: a number travels faster than objects
        everyone = of_all_ranks(faults, self._world)
        for fault in self.tally.add(fault for of_rank in everyone for fault in of_rank):
            logger.warning("skipped, %s: %s: %s", fault.cause, fault.key, fault.reason)
        drawn = (step + 1) * self._order.batch_size
        if too_many(self.tally.total, drawn, self._order.epoch_length, self._max_bad, size=self._order.size):
            raise ValueError(f"more than --max-bad {self._max_bad:g}: {self.summary(drawn)}")

    def summary(self, drawn: int) -> str:
        """Say how many of the samples `drawn` so far cannot be used, and why."""
        share = self.tally.total / drawn
        return f"{self.tally.total:,} of {drawn:,} samples drawn ({share:.2%}) cannot be used: {self.tally}"

    def state(self) -> dict[str, Any]:
        """Return a copy of the counts, for a checkpoint."""
        return {
            "counts": dict(self.tally.counts),
            "keys": {cause: list(keys) for cause, keys in self.tally.keys.items()},
        }

    def load(self, state: dict[str, Any], path: Path) -> None:
        """Add what `state` returned, from the checkpoint `path`; ValueError if it holds something else."""
        try:
            tally = Tally.of(state.get("counts"), state.get("keys"))
        except ValueError as error:
            raise ValueError(f"{path / 'state.json'} is damaged: {error}") from error
        self.tally.merge(tally.counts, tally.keys)


def too_many(bad: int, drawn: int, epoch_length: int, max_bad: float, *, size: int | None = None) -> bool:
    """Return True if a share above `max_bad` of the data is certain, or a smaller one would be most unlikely.

    An epoch draws `epoch_length` of `size` samples, each once: more bad ones than the data may have are too many.
    """
    at_the_end = max_bad * math.ceil(drawn / epoch_length) * (size or epoch_length)
    expected = max_bad * drawn
    return bad > at_the_end or (max_bad < 1 and bad > expected + 4 * math.sqrt(expected) + 4)  # 4 standard deviations
