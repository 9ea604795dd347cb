"""The ring form: texts go from rank to rank while the block before them computes; no rank ever holds all of them.

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

from fastclip._backends import reference
from fastclip.distributed.collectives import resolve
from fastclip.ops import Statistics, merge_logsumexp

__all__ = ["ring_sigmoid_pairs", "ring_statistics"]


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

    def own(self) -> Tensor:
        """Of this rank's texts, after the last step."""
        total = self._arrived()
        assert total is not None and self.step == self.ring.ranks
        return total


_PROBLEM = (
    "Tensor image, Tensor text, Tensor scale, Tensor? image_labels, Tensor? text_labels, bool exclude_self, "
    "bool normalize, str? backend, SymInt[] sizes, str group"
)
_PROBLEM_SIZE = 10
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
torch.library.define("fastclip::ring_fwd", f"({_PROBLEM}) -> ({', '.join(['Tensor'] * 8)})", tags=_TAGS)
torch.library.define(
    "fastclip::ring_bwd",
    f"({_PROBLEM}, Tensor[] stats, Tensor[] grads, bool[] needs) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _block_problem(ring: Ring, owner: int, block: Tensor, problem: list[Any]) -> tuple[Any, ...]:
    """The arguments of `fastclip::contrastive_fwd` for this rank's images and the texts of `owner`."""
    image, _, scale, image_labels, text_labels, exclude_self, normalize, backend = problem
    labels = None if text_labels is None else text_labels[ring.columns(owner)]
    offset = ring.first[ring.rank] - ring.first[owner]
    return image, block, scale, image_labels, labels, offset, exclude_self, normalize, backend


@torch.library.impl("fastclip::ring_fwd", "default")
def _fwd(*args: Any) -> tuple[Tensor, ...]:
    """As `fastclip::contrastive_fwd` of this rank's images and the texts of all ranks."""
    *problem, sizes, group = args
    ring = Ring(sizes, group)
    ring.open(args[1])
    found: list[Any] = [None] * ring.ranks
    for owner, block in ring.blocks(args[1]):
        of_block = _block_problem(ring, owner, block, problem)
        found[owner] = Statistics(*torch.ops.fastclip.contrastive_fwd(*of_block))
        del block, of_block  # not kept while the next is worked on

    def rows(name: str) -> Tensor:
        return torch.stack([getattr(stats, name) for stats in found])

    def columns(name: str) -> Tensor:
        return torch.cat([getattr(stats, name) for stats in found])

    row_pos_lse = merge_logsumexp(rows("row_pos_lse"))
    row = merge_logsumexp(rows("row_neg")), rows("row_pos").sum(0), row_pos_lse, found[ring.rank].image_inv_norm
    col = (columns(name) for name in ("col_neg", "col_pos", "col_pos_lse", "text_inv_norm"))
    return tuple(x for pair in zip(row, col) for x in pair)


@torch.library.register_fake("fastclip::ring_fwd")
def _fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    image, text, scale, image_labels, text_labels, exclude_self, normalize, backend, sizes, _ = args
    texts = text.new_empty(sum(sizes), text.shape[1])
    return torch.ops.fastclip.contrastive_fwd(
        image, texts, scale, image_labels, text_labels, 0, exclude_self, normalize, backend
    )


@torch.library.impl("fastclip::ring_bwd", "default")
def _bwd(*args: Any) -> tuple[Tensor, ...]:
    *problem, sizes, group, stats, grads, needs = args
    image, text, scale = args[:3]
    ring = Ring(sizes, group)
    sums = Sums(ring)
    wide = torch.promote_types(text.dtype, torch.float32)
    d_image = torch.zeros_like(image, dtype=wide) if needs[0] else None
    d_scale = torch.zeros_like(scale)
    for owner, block in ring.blocks(text):
        columns = ring.columns(owner)
        # Images' and texts' in turn. The images' norms as a copy: a backend may know the original from the forward,
        # whose last block had other texts
        stats_of_block, grads_of_block = (
            [x[columns] if k % 2 and len(x) else x for k, x in enumerate(of_all)] for of_all in (stats, grads)
        )
        stats_of_block[6] = stats_of_block[6].clone()
        of_block = _block_problem(ring, owner, block, problem)
        shares = torch.ops.fastclip.contrastive_bwd(*of_block, stats_of_block, grads_of_block, needs)
        if d_image is not None:
            d_image += shares[0]
        if needs[1]:
            sums.add(shares[1].to(wide))
        if needs[2]:
            d_scale += shares[2]
        del block, of_block, shares
    nothing = image.new_empty(0)
    return (
        nothing if d_image is None else d_image.to(image.dtype),
        sums.own().to(text.dtype) if needs[1] else nothing.clone(),
        d_scale if needs[2] else nothing.clone(),
    )


@torch.library.register_fake("fastclip::ring_bwd")
def _bwd_fake(*args: Any) -> tuple[Tensor, ...]:
    *_, needs = args
    return tuple(x.new_empty(x.shape) if need else args[0].new_empty(0) for x, need in zip(args[:3], needs))


def _save_fwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.options = inputs[5:]


def _fwd_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: what a checkpoint computes again it gives once
    problem, stats = saved[:5], saved[5:]
    needs = list(ctx.needs_input_grad[:3])
    upstream = [torch.zeros_like(x) if d is None else d for x, d in zip(stats[:6], grads)]
    out = torch.ops.fastclip.ring_bwd(*problem, *ctx.options, list(stats), upstream, needs)
    return *(d if need else None for d, need in zip(out, needs)), *[None] * (_PROBLEM_SIZE - 3)


torch.library.register_autograd("fastclip::ring_fwd", _fwd_backward, setup_context=_save_fwd)


def _no_second(ctx: Any, *grads: Tensor | None) -> Any:
    raise RuntimeError(
        "comm='ring' has no second derivatives (create_graph=True was used through the loss); "
        "comm='gather' with backend='reference' has"
    )


torch.library.register_autograd("fastclip::ring_bwd", _no_second, setup_context=lambda ctx, inputs, output: None)


def ring_statistics(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: tuple[Tensor, Tensor] | None,
    *,
    exclude_self: bool,
    normalize: bool,
    backend: str | None,
    sizes: Sequence[int],
    group: str,
) -> Statistics:
    """`contrastive_statistics` of this rank's images and the texts of all ranks (`sizes` on each), whose ids are
    `ids[1]`. The gradient of `text` is the sum over all ranks."""
    *stats, r, c = torch.ops.fastclip.ring_fwd(
        image, text, scale, *(ids or (None, None)), exclude_self, normalize, backend, sizes, group
    )
    stats += r.detach(), c.detach()
    return Statistics(*stats)


_SIGMOID = (
    "Tensor image, Tensor text, Tensor scale, Tensor bias, SymInt divisor, bool normalize, str? backend, "
    "SymInt[] sizes, str group, bool[] needs"
)
torch.library.define("fastclip::ring_sigmoid_fwd", f"({_SIGMOID}) -> ({', '.join(['Tensor'] * 5)})", tags=_TAGS)


@torch.library.impl("fastclip::ring_sigmoid_fwd", "default")
def _sigmoid_fwd(*args: Any) -> tuple[Tensor, ...]:
    """As `fastclip::sigmoid_fwd` of this rank's images and the texts of all ranks; d_text (N, D) of its own texts."""
    image, text, scale, bias, divisor, normalize, backend, sizes, group, needs = args
    ring = Ring(sizes, group)
    ring.open(text)
    sums = Sums(ring)
    totals: list[Tensor] = []
    for owner, block in ring.blocks(text):
        offset = ring.first[ring.rank] - ring.first[owner]
        shares = torch.ops.fastclip.sigmoid_fwd(image, block, scale, bias, divisor, offset, normalize, backend, needs)
        loss, d_image, d_text, d_scale, d_bias = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in shares)
        if needs[1]:
            sums.add(d_text)
        others = [loss, d_image, d_scale, d_bias]
        totals = [total + share for total, share in zip(totals, others)] if totals else others
        del block, shares, d_image, d_text, others
    loss, d_image, d_scale, d_bias = totals
    kept = reference.saved_dtype(image)
    d_text = sums.own().to(kept) if needs[1] else image
    grads = d_image.to(kept), d_text, d_scale, d_bias
    return loss, *(d if need else image.new_empty(0) for d, need in zip(grads, needs))


@torch.library.register_fake("fastclip::ring_sigmoid_fwd")
def _sigmoid_fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    image, text, scale, bias, divisor, normalize, backend, _, _, needs = args
    return torch.ops.fastclip.sigmoid_fwd(image, text, scale, bias, divisor, 0, normalize, backend, needs)


torch.library.define(
    "fastclip::ring_sigmoid_bwd",
    f"(Tensor image, Tensor text, Tensor scale, Tensor bias, bool[] needs, Tensor[] kept, Tensor d_loss) -> "
    f"({', '.join(['Tensor'] * 4)})",
    tags=_TAGS,
)


def _sigmoid_bwd(*args: Any) -> tuple[Tensor, ...]:
    """`fastclip::sigmoid_bwd`, whose second derivatives would be those of this rank's block alone."""
    *inputs, needs, kept, d_loss = args
    return torch.ops.fastclip.sigmoid_bwd(*inputs, 1, 0, True, None, needs, kept, d_loss)


torch.library.impl("fastclip::ring_sigmoid_bwd", "default", _sigmoid_bwd)
torch.library.register_fake("fastclip::ring_sigmoid_bwd", _sigmoid_bwd)
torch.library.register_autograd(
    "fastclip::ring_sigmoid_bwd", _no_second, setup_context=lambda ctx, inputs, output: None
)


def _save_sigmoid(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _sigmoid_backward(ctx: Any, d_loss: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    inputs, kept = saved[:4], saved[4:]
    needs = list(ctx.needs_input_grad[:4])
    out = torch.ops.fastclip.ring_sigmoid_bwd(*inputs, needs, list(kept), d_loss)
    return *(d if need else None for d, need in zip(out, needs)), *[None] * 6


torch.library.register_autograd("fastclip::ring_sigmoid_fwd", _sigmoid_backward, setup_context=_save_sigmoid)


def ring_sigmoid_pairs(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    divisor: int,
    normalize: bool,
    backend: str | None,
    sizes: Sequence[int],
    group: str,
) -> Tensor:
    """`sigmoid_pairs` of this rank's images and the texts of all ranks, as `ring_statistics`."""
    tensors = image, text, scale, bias
    needs = [torch.is_grad_enabled() and x.requires_grad for x in tensors]
    loss: Tensor = torch.ops.fastclip.ring_sigmoid_fwd(*tensors, divisor, normalize, backend, sizes, group, needs)[0]
    return loss
