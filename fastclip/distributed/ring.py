"""The ring's schedule: texts pass from rank to rank while the previous block is computed, and no rank holds all texts.

The block of a rank is its shard of the texts. In step k = 0, ..., W - 1, rank r computes with the block of rank r - k
(modulo W): first its own block, which needs no communication, then the blocks that arrive from rank r - 1. While a rank
computes, it sends the block to rank r + 1 and receives the next block.

The gradients of a block follow it: each rank adds its share and sends the sum to the next rank. After the last step the
sum reaches the block's owner. For 16-bit features the sums are in fp32, because a 16-bit sum would be rounded in every
step. A rank holds a few blocks of texts and gradients, whatever W is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastclip.distributed.collectives import resolve

__all__ = ["Ring", "Sums"]


class Ring:
    """Positions and messages of this rank in the ring. `sizes` is the number of texts on every rank."""

    def __init__(self, sizes: Sequence[int], group: str) -> None:
        self.sizes, self.group = list(sizes), resolve(group)
        self.rank, self.ranks = dist.get_rank(self.group), len(sizes)
        self.first = [sum(self.sizes[:k]) for k in range(self.ranks)]  # first column of every rank's texts

    def open(self, text: Tensor) -> None:
        """Run a collective of all ranks if a shard is empty.

        NCCL needs all ranks in the first call of a group, but no messages are sent for empty blocks.
        """
        if min(self.sizes) == 0:
            dist.all_reduce(text.new_zeros(1, dtype=torch.float32), group=self.group)

    def owner(self, step: int) -> int:
        """Return the rank whose texts this rank computes with in `step`."""
        return (self.rank - step) % self.ranks

    def columns(self, owner: int) -> slice:
        """Return the columns of the texts of `owner` among the texts of all ranks."""
        return slice(self.first[owner], self.first[owner] + self.sizes[owner])

    def offset(self, owner: int) -> int:
        """Return `Problem.offset` for this rank's images and the texts of `owner`."""
        return self.first[self.rank] - self.first[owner]

    def exchange(self, sent: Tensor, received: Tensor) -> list[Any]:
        """Start sending to the next rank and receiving from the previous one. Return the `Work` handles to wait for."""
        # In one batch: NCCL runs separate calls one after another, and ranks that all send first would wait forever
        operations = []
        if len(sent):
            operations.append(dist.P2POp(dist.isend, sent, group=self.group, group_peer=(self.rank + 1) % self.ranks))
        if len(received):
            operations.append(
                dist.P2POp(dist.irecv, received, group=self.group, group_peer=(self.rank - 1) % self.ranks)
            )
        return dist.batch_isend_irecv(operations) if operations else []

    def blocks(self, text: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the owner and the texts of every block, this rank's first. The next block arrives in the meantime."""
        block = text.contiguous()
        for step in range(self.ranks):
            following, works = block, []
            if step + 1 < self.ranks:
                following = block.new_empty(self.sizes[self.owner(step + 1)], *block.shape[1:])
                works = self.exchange(block, following)
            yield self.owner(step), block
            for work in works:
                work.wait()
            block, works = following, []


class Sums:
    """Gradient sums that follow the blocks: every rank adds its share, and the sum ends at the owner of the block."""

    def __init__(self, ring: Ring) -> None:
        self.ring, self.step = ring, 0
        self.sent: Tensor | None = None  # kept alive until the send is complete
        self.arriving: Tensor | None = None
        self.works: list[Any] = []

    def _arrived(self) -> Tensor | None:
        for work in self.works:
            work.wait()
        self.works, self.sent = [], None
        return self.arriving

    def add(self, share: Tensor) -> None:
        """Add this rank's share for the block of the current step, and send the sum to the next rank."""
        before = self._arrived()
        total = share if before is None else before.add_(share)
        self.step += 1
        # After the last step, the next rank is the owner of the block
        self.arriving = total.new_empty(self.ring.sizes[self.ring.owner(self.step)], *total.shape[1:])
        if self.ring.ranks == 1:
            self.arriving = total
        else:
            self.sent, self.works = total, self.ring.exchange(total, self.arriving)

    def of_own_texts(self) -> Tensor:
        """Return the sum for this rank's texts, after the last step."""
        total = self._arrived()
        assert total is not None and self.step == self.ring.ranks
        return total
