"""The ring's schedule: texts go from rank to rank while the block before them computes; no rank ever holds all of them.

In step k rank r has the texts of rank r - k, and the next ones are on their way; the texts' gradients travel behind
them, each rank adds its share, and end at their owner, in fp32 where features are of 16 bits: every step would round
them. A rank holds a few blocks of texts and gradients, whatever W is.
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
    """The ranks of a group, each with its number of texts."""

    def __init__(self, sizes: Sequence[int], group: str) -> None:
        self.sizes, self.group = list(sizes), resolve(group)
        self.rank, self.ranks = dist.get_rank(self.group), len(sizes)
        self.first = [sum(self.sizes[:k]) for k in range(self.ranks)]

    def open(self, text: Tensor) -> None:
        """NCCL's first call in a group must be of all its ranks: those without texts exchange nothing."""
        if min(self.sizes) == 0:
            dist.all_reduce(text.new_zeros(1, dtype=torch.float32), group=self.group)

    def owner(self, step: int) -> int:
        """Whose texts are here in a step."""
        return (self.rank - step) % self.ranks

    def columns(self, owner: int) -> slice:
        return slice(self.first[owner], self.first[owner] + self.sizes[owner])

    def offset(self, owner: int) -> int:
        """Of a problem of this rank's images and the texts of `owner`."""
        return self.first[self.rank] - self.first[owner]

    def exchange(self, sent: Tensor, received: Tensor) -> list[Any]:
        """Starts sending to the next rank and receiving from the one before; what to wait for."""
        operations = []
        if len(sent):
            operations.append(dist.P2POp(dist.isend, sent, group=self.group, group_peer=(self.rank + 1) % self.ranks))
        if len(received):
            operations.append(
                dist.P2POp(dist.irecv, received, group=self.group, group_peer=(self.rank - 1) % self.ranks)
            )
        return dist.batch_isend_irecv(operations) if operations else []

    def blocks(self, text: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Every rank's texts with their owner, this rank's first; the next block arrives while one is worked on."""
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
    """Sums that travel behind the blocks: every rank adds to them, and the block's owner has them at last."""

    def __init__(self, ring: Ring) -> None:
        self.ring, self.step = ring, 0
        self.sent: Tensor | None = None  # kept until it has left
        self.arriving: Tensor | None = None
        self.works: list[Any] = []

    def _arrived(self) -> Tensor | None:
        for work in self.works:
            work.wait()
        self.works, self.sent = [], None
        return self.arriving

    def add(self, share: Tensor) -> None:
        """This rank's share of the current step's block."""
        before = self._arrived()
        total = share if before is None else before.add_(share)
        self.step += 1
        # After the last step the next rank is the block's owner
        self.arriving = total.new_empty(self.ring.sizes[self.ring.owner(self.step)], *total.shape[1:])
        if self.ring.ranks == 1:
            self.arriving = total
        else:
            self.sent, self.works = total, self.ring.exchange(total, self.arriving)

    def of_own_texts(self) -> Tensor:
        """The sum for this rank's texts, after the last step."""
        total = self._arrived()
        assert total is not None and self.step == self.ring.ranks
        return total
