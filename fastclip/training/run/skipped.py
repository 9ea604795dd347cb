"""Count of the samples of a run that could not be used, over all processes, and the limit on it."""

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
    """Count of the samples that could not be used, the same on every rank. A sample counts once per epoch.

    Args:
        order: order in which samples are drawn.
        max_bad: largest allowed share of the samples drawn, 0 to 1.
        world: this process and its group.
    """

    def __init__(self, order: Order, max_bad: float, world: World) -> None:
        self._order, self._max_bad, self._world = order, max_bad, world
        self.tally = Tally()

    def count(self, batches: Sequence[Batch], step: int) -> None:
        """Add the bad samples of all ranks in `step`, counted from 0. The first sample of each cause is logged.

        Raises:
            ValueError: more than `max_bad` of the samples are bad. This is raised before the end of an epoch if the
                rest of the epoch cannot change it, or if chance cannot explain the share so far (`too_many`).
        """
        faults = [fault for batch in batches for fault in batch.skipped]
        if mean_over_ranks(torch.tensor(float(len(faults)), device=self._world.device), self._world) == 0:
            return
        # Most steps have no bad samples and return above: exchanging a number is cheaper than exchanging objects
        everyone = of_all_ranks(faults, self._world)
        for fault in self.tally.add(fault for of_rank in everyone for fault in of_rank):
            logger.warning("skipped sample %s (%s): %s", fault.key, fault.cause, fault.reason)
        drawn = (step + 1) * self._order.batch_size
        if too_many(self.tally.total, drawn, self._order.epoch_length, self._max_bad, size=self._order.size):
            raise ValueError(f"more than --max-bad {self._max_bad:g}: {self.summary(drawn)}")

    def summary(self, drawn: int) -> str:
        """Return a sentence with how many of the `drawn` samples cannot be used, and for which causes."""
        share = self.tally.total / drawn
        return f"{self.tally.total:,} of {drawn:,} samples drawn ({share:.2%}) cannot be used: {self.tally}"

    def state(self) -> dict[str, Any]:
        """Return a copy of the counts, for a checkpoint."""
        return {
            "counts": dict(self.tally.counts),
            "keys": {cause: list(keys) for cause, keys in self.tally.keys.items()},
        }

    def load(self, state: dict[str, Any], path: Path) -> None:
        """Add counts that `state` returned and the checkpoint `path` holds. Raise ValueError if they are damaged."""
        try:
            tally = Tally.of(state.get("counts"), state.get("keys"))
        except ValueError as error:
            raise ValueError(f"{path / 'state.json'} is damaged: {error}") from error
        self.tally.merge(tally.counts, tally.keys)


def too_many(bad: int, drawn: int, epoch_length: int, max_bad: float, *, size: int | None = None) -> bool:
    """Return True if it is certain or very likely that more than the share `max_bad` of the samples is bad.

    It is certain if there are more bad samples than `max_bad` times `size` for each epoch begun so far, since an epoch
    draws each sample at most once. It is very likely if the count is more than about 4 standard deviations above
    `max_bad` times `drawn`.

    Args:
        bad: bad samples so far.
        drawn: samples drawn so far.
        epoch_length: samples that an epoch draws.
        max_bad: largest allowed share, 0 to 1.
        size: samples of the dataset (default: epoch_length).
    """
    at_the_end = max_bad * math.ceil(drawn / epoch_length) * (size or epoch_length)
    expected = max_bad * drawn
    return bad > at_the_end or (max_bad < 1 and bad > expected + 4 * math.sqrt(expected) + 4)  # of a Poisson count
