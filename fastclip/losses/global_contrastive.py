"""The global contrastive loss of SogCLR and FastCLIP, whose negatives are the whole dataset, not the batch."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastclip._backends.problem import Side
from fastclip.distributed import Shards, check_comm, check_group, gather_rows, reported
from fastclip.losses.inputs.arguments import can_be_read, describe, flag, number
from fastclip.losses.inputs.batch import batch_size, prepare, statistics_of
from fastclip.ops import batched

__all__ = ["GlobalContrastiveLoss"]


class GlobalContrastiveLoss(nn.Module):
    """Compute the global contrastive loss: the loss over a whole dataset, estimated from small batches.

    A pair i has as negatives all texts of the dataset, of which a batch holds a few. In a batch of N pairs,
    ``g_i = mean over j != i of exp(z_ij - z_ii)``, where z are the logits, estimates the mean over the dataset. The
    module keeps a running mean u_i of g_i for every sample and direction (SogCLR, Yuan et al. 2022),
    ``u_i <- (1 - gamma) u_i + gamma g_i``, and a sample's first visit sets u_i to g_i. The loss of a batch is the mean
    over both directions and all pairs of ``log(eps + u_i)``, and its gradient is that of ``g_i / (eps + u_i)`` with
    u_i held constant. If a batch holds the whole dataset and gamma is 1, this is the gradient of the dataset's loss.

    The temperature is treated in one of these ways:

    - ``rho=None`` and a fixed logit_scale: SogCLR, or FastCLIP-v1 (Wei et al. 2024) if gamma follows a schedule.
    - ``rho=None`` and a learned logit_scale: FastCLIP-v0.
    - ``rho`` and a learned logit_scale: FastCLIP-v3. With the temperature tau = 1 / logit_scale, the loss is the mean
      of ``tau (log(eps + u_i) + rho)``. The paper adds the two directions, so that its loss is twice this one.

    Individual temperatures (iSogCLR, FastCLIP-v2) are not supported.

    The state, which `state_dict` holds, is the logarithm of u in two buffers (samples,), ``log_u_image`` for the images
    (over all texts) and ``log_u_text`` for the texts. It is -inf for samples that were not seen. The logarithm never
    overflows: at a logit_scale of 100, g_i reaches exp(200). A call updates the state in training mode and with
    gradients enabled, so that neither eval mode nor validation under `torch.no_grad` changes it. A call that is
    evaluated twice, as under activation checkpointing, updates it twice.

    Args:
        samples: number of pairs in the dataset.
        gamma: weight of the batch in the running means, above 0 and at most 1. The attribute ``gamma`` may be set
            before each call. FastCLIP begins each epoch e with ``0.5 (1 + cos(pi e / E)) (1 - c) + c``, c = 0.2, and
            keeps c from epoch E on, which is half of the epochs.
        rho: margin of the learned temperature (6.5 in FastCLIP-v3 on CC3M); None leaves the factor tau out.
        eps: number added to u, at least 0. It limits the weight of pairs whose g_i is below it.
        normalize, comm, equal_shards, backend: as in `contrastive_loss`.
        group: process group or device mesh, as in `contrastive_loss`. Each rank passes its shard of the batch. All
            ranks exchange their g_i and hold the same state, bit for bit. Before `init_process_group`,
            ``torch.distributed.group.WORLD`` is None: build the loss afterwards, or set the attribute ``group``.

    Raises:
        ValueError: a number is out of range, or an option does not exist.
        TypeError: an argument has a wrong type.
    """

    log_u_image: Tensor
    log_u_text: Tensor

    def __init__(
        self,
        samples: int,
        gamma: float = 0.8,
        *,
        rho: float | None = None,
        eps: float = 1e-14,
        normalize: bool = True,
        group: Any = None,
        comm: str = "gather",
        equal_shards: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(samples, bool) or not isinstance(samples, int):
            raise TypeError(
                f"samples must be the number of pairs in the dataset, an int, got {type(samples).__name__}. A dataset "
                "without a known length has no global loss"
            )
        if samples < 2:
            raise ValueError(f"samples must be at least 2, got {samples}")
        check_comm(comm)
        self.samples, self.gamma = samples, _checked_gamma(gamma)
        self.rho = None if rho is None else number("rho", rho)
        self.eps = number("eps", eps)
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"eps must be finite and at least 0, got {eps}")
        if self.rho is not None and not math.isfinite(self.rho):
            raise ValueError(f"rho must be finite, got {rho}")
        self.normalize, self.equal_shards = flag("normalize", normalize), flag("equal_shards", equal_shards)
        self.group, self.comm, self.backend = group, comm, backend
        self._before_ranks = group is None and not _ranks()
        for name in ("log_u_image", "log_u_text"):
            self.register_buffer(name, torch.full((samples,), -torch.inf, dtype=torch.float32))

    def extra_repr(self) -> str:
        return f"samples={self.samples}, gamma={self.gamma:g}, rho={self.rho}, eps={self.eps:g}"

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor, index: Tensor
    ) -> Tensor:
        """Return the loss of a batch and update the state.

        Pairs of the same sample are not negatives of each other. Their positive logit is the mean over all images and
        texts of the sample, and u_i is updated once, with the mean of their g_i. A pair without a negative has a loss
        of 0, no gradient and no update. An u_i is not updated by a g_i that is not finite, so that a step with an
        overflow can be skipped.

        Args:
            image_features, text_features: (N, D), float32, bfloat16, float16 or float64. Text i belongs to image i.
            logit_scale: factor of the cosines, already exponentiated, as in `contrastive_loss`.
            index: (N,) int64 or int32, position in the dataset of every pair, from 0 to samples - 1. An index on the
                CPU is checked at once. For one on a GPU the host does not wait: an index out of range is a device-side
                assertion.

        Returns:
            A scalar, float32, or float64 for float64 features. If ``group`` is given, its mean over the ranks is the
            loss of the batch, and gradients are as in `contrastive_loss`.

        Raises:
            ValueError: shapes, devices or options do not fit, an index is out of range, or the batch has one pair.
            TypeError: the features are not floating-point tensors of one dtype, the index is no tensor of integers, or
                the state has been converted to 16 bits.
            RuntimeError: as in `contrastive_loss`. Also if the loss was built without a group before
                `init_process_group`, and there are several processes now.
        """
        group = check_group(self.group)
        if group is None and self._before_ranks and _ranks() > 1:
            raise RuntimeError(
                "the loss was built before init_process_group, when torch.distributed.group.WORLD was None, and would "
                "ignore the other processes: set loss.group = torch.distributed.group.WORLD, or build the loss after "
                "init_process_group (with group=None if each process shall have its own loss)"
            )
        updates = self.training and torch.is_grad_enabled()
        with reported(group, self.equal_shards, image_features):
            check_comm(self.comm)
            gamma = _checked_gamma(self.gamma)
            index = self._checked(image_features, text_features, index)
        agreed = {
            "function": "GlobalContrastiveLoss",
            "comm": self.comm,
            "samples": self.samples,
            "gamma": gamma,
            "rho and eps": (self.rho, self.eps),
            "training with gradients enabled": updates,
        }
        batch = prepare(
            image_features,
            text_features,
            logit_scale,
            normalize=self.normalize,
            image_labels=index,
            text_labels=index,
            exclude_self=False,
            ignore_label=None,
            label_smoothing=0.0,
            group=group,
            agreed=agreed,
            equal_shards=self.equal_shards,
            backend=self.backend,
        )
        shards, scale = batch.shards, batch.problem.scale
        N, _ = batch_size(batch.problem.image, batch.problem.text, shards)
        if N < 2:
            raise ValueError("the global loss needs at least two pairs in a batch: a single pair has no negative")
        sides = statistics_of(batch, self.comm, self.backend)
        assert batch.counts is not None
        repeats, _ = batch.counts  # the same for images and texts
        negatives = N - repeats
        log_g = torch.stack([_log_mean(side, repeats, negatives) for side in sides], dim=1)
        log_u = self._estimates(index, log_g.detach(), gamma if updates else None, shards)
        if self.eps:
            log_u = torch.logaddexp(log_u, torch.full_like(log_u, math.log(self.eps)))
        # Without a negative log g is -inf, and log u may be: masked, because 0 times NaN is a gradient of NaN
        negative = negatives[:, None] > 0
        log_u = torch.where(negative, log_u, 0.0)
        ratio = torch.exp(log_g - log_u)
        losses = log_u + (ratio - ratio.detach())
        if self.rho is not None:
            losses = (losses + self.rho) / scale
        losses = torch.where(negative, losses, 0.0)  # last, because rho / scale has a gradient, too
        total = losses.sum() / (2 * N)
        return (total if shards is None else shards.ranks * total).to(scale.dtype)

    def _checked(self, image: Any, text: Any, index: Any) -> Tensor:
        """Return the index (N,) as int64 on the features' device. The features themselves are checked by `prepare`."""
        if not isinstance(index, Tensor):
            raise TypeError(f"index must be a torch.Tensor of integers, got {type(index).__name__}")
        if index.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"index must be int64 or int32: {describe('index', index)}")
        for name, x in (("image_features", image), ("text_features", text)):
            if isinstance(x, Tensor) and (index.dim() != 1 or x.dim() == 0 or len(index) != len(x)):
                raise ValueError(
                    f"index must hold the sample of every pair, (N,): {describe('index', index)} for "
                    f"{describe(name, x)}"
                )
        state = self.log_u_image
        if state.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"the state of the loss must be float32 or float64: {describe('log_u_image', state)}")
        device = image.device if isinstance(image, Tensor) else index.device
        if state.device != device:
            raise ValueError(
                f"the state of the loss must be on the features' device: {describe('log_u_image', state)}, features on "
                f"{device}. Call .to({str(device)!r}) on the loss"
            )
        if can_be_read(index):
            wrong = index[(index < 0) | (index >= self.samples)]
            if len(wrong):
                raise ValueError(
                    f"index must be from 0 to {self.samples - 1}, because samples={self.samples}, got {int(wrong[0])}"
                )
        elif index.device.type in ("cpu", "cuda") and not batched(index):  # other devices may lack the assertion
            valid = ((index >= 0) & (index < self.samples)).all()
            torch._assert_async(valid, f"index must be from 0 to {self.samples - 1}")
        return index.long().to(device, non_blocking=True)

    @torch.no_grad()
    def _estimates(self, index: Tensor, log_g: Tensor, gamma: float | None, shards: Shards | None) -> Tensor:
        """Update the state from this rank's log g (n, 2), and return the logarithms of its u, (n, 2).

        Every rank makes the updates of all ranks, and no sum depends on an order, so that all of them have the same
        bits. The state is only read if gamma is None.
        """
        own = slice(None)
        if shards is not None:
            own = shards.own_images
            log_g = gather_rows(log_g, shards.images, shards.group)
            index = gather_rows(index, shards.images, shards.group, after=log_g)
        log_g = _mean_of_repeats(index, log_g)
        before = torch.stack([self.log_u_image[index], self.log_u_text[index]], dim=1).to(log_g.dtype)
        log_u = torch.where(before == -torch.inf, log_g, before)
        if gamma is not None:
            rest = math.log1p(-gamma) if gamma < 1 else -math.inf
            moved = torch.where(before == -torch.inf, log_g, torch.logaddexp(before + rest, log_g + math.log(gamma)))
            log_u = torch.where(log_g.isfinite(), moved, before)
            for state, values in zip((self.log_u_image, self.log_u_text), log_u.unbind(1)):
                state[index] = values.to(state.dtype)
        return log_u[own]


def _checked_gamma(gamma: Any) -> float:
    gamma = number("gamma", gamma)
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must be above 0 and at most 1, got {gamma}")
    return gamma


def _log_mean(side: Side, repeats: Tensor, negatives: Tensor) -> Tensor:
    """Return log g (n,) of the rows or columns, -inf without a negative.

    repeats: number of pairs of the row's sample, over whose logits `side.pos` is the sum. negatives: number of others.
    """
    log_g = side.neg - side.pos / repeats - negatives.clamp_min(1).to(side.neg.dtype).log()
    return torch.where(negatives > 0, log_g, -torch.inf)


def _mean_of_repeats(index: Tensor, log_g: Tensor) -> Tensor:
    """Replace log g (N, 2) of samples that occur several times by the logarithm of the mean of their g.

    No shape depends on the data, so that the host need not wait. Samples that occur once keep their bits. A GPU adds
    at equal places in any order, so that the sums are those of integers, multiples of 2^-62, which no order changes.
    """
    places = torch.searchsorted(index.sort().values, index)  # equal for equal samples
    count = torch.zeros_like(index).index_add_(0, places, torch.ones_like(index))[places, None]
    top = torch.full_like(log_g, -torch.inf)
    top = top.scatter_reduce_(0, places[:, None].expand_as(log_g), log_g, "amax")[places]
    shares = ((log_g - top).exp() / count).nan_to_num(0.0)  # of the mean, which is at most 1: the sum cannot overflow
    mean = torch.zeros_like(log_g, dtype=torch.int64).index_add_(0, places, (shares * 2.0**62).long())[places]
    return (mean.to(log_g.dtype) * 2.0**-62).log() + top


def _ranks() -> int:
    """Return the number of processes of `torch.distributed`'s default group, or 0 if it is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 0
