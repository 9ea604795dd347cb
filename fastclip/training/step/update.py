"""One update of a model from the micro-batches of a process, and the checks that stop a run before a bad update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastclip.data.batch import Batch
from fastclip.data.loading.order import mix
from fastclip.losses.stats import contrastive_stats
from fastclip.models.dual_encoder import MAX_LOG_SCALE, DualEncoder
from fastclip.training.ranks import World, is_sharded, mean_over_ranks, of_all_ranks, reduce_unsharded
from fastclip.training.signals import STATUSES
from fastclip.training.step.cached import cached_step
from fastclip.training.step.distillation import Distillation, Taught
from fastclip.training.step.losses import NamedLoss
from fastclip.training.step.micro_batches import MicroBatch, micro_batches, to_device
from fastclip.training.step.moving_average import MovingAverage
from fastclip.training.step.optim import clip_gradients, gradient_norm

__all__ = ["FAILED", "StepReport", "Stepper", "seed_step"]

FAILED = 1  # exit status of a run whose checkpoint could not be written
_STATUSES = (FAILED, *STATUSES)
_SHOWN = 10  # names in an error
_FEW_LENGTHS = 16  # texts are cut to multiples of this number of tokens, where few lengths are better
# Texts of like length that the text tower takes at a time. On a CPU, groups of 32 to 64 are fastest; a GPU needs more
# texts to be busy
_TEXT_GROUP = {"cpu": 64, "cuda": 512}


class StepReport(NamedTuple):
    """Report of one update over the batch of all processes. It is the same on every rank."""

    loss: float
    grad_norm: float  # before clipping
    image_top1: float | None  # share of images whose most similar text in the batch is their own
    text_top1: float | None  # share of texts whose most similar image in the batch is their own
    logit_scale: float  # exponentiated, after the update
    status: int = 0  # exit status if some process needs to end, else 0
    tokens: int = 0  # tokens of all texts, without padding
    loss_contrastive: float | None = None  # the parts of `loss`, if there are teachers
    loss_distillation: float | None = None


class Gradients(NamedTuple):
    """Loss of a step whose gradients were computed, and what went into it, of this rank."""

    loss: Tensor  # ()
    parts: list[Tensor]  # contrastive and distillation loss (); empty without teachers
    labels: Tensor  # (N,) int64
    features: list[Tensor]  # image features, text features and the scale
    taught: Taught | None  # features of the teachers
    tokens: int  # tokens of the texts, without padding


class Stepper:
    """Updates of one model.

    Args:
        model: model to train.
        wrapped: result of `fastclip.training.ranks.wrap` for `model`.
        loss: loss over the group of `world`.
        optimizer: optimiser of the model's parameters.
        world: this process and its group.
        ema: moving average that is updated after each update of the weights.
        max_grad_norm: largest norm of the gradients; larger gradients are scaled down to it (None: no clipping).
        autocast: dtype in which the towers compute (None: the dtype of the weights).
        keep_on, keep_graphs: arguments of `cached_step`.
        cached: use `cached_step` for a single micro-batch, too. This is needed if other ranks have several, because
            the features of all ranks must agree on whether they require gradients.
        normalize_pixels: function applied to a micro-batch's images on the device (default: they are used as they are).
        few_lengths: texts have few different lengths in tokens, each of which costs a compiled graph. On a GPU, whose
            tensor cores take multiples of 8, they always have.
        distillation: teachers whose distillation loss is added to `loss`.
    """

    def __init__(
        self,
        model: DualEncoder,
        wrapped: nn.Module,
        loss: NamedLoss,
        optimizer: torch.optim.Optimizer,
        world: World,
        *,
        ema: MovingAverage | None = None,
        max_grad_norm: float | None = None,
        autocast: torch.dtype | None = None,
        keep_on: torch.device | str | None = None,
        cached: bool = False,
        keep_graphs: int = 0,
        normalize_pixels: Callable[[Tensor], Tensor] = lambda images: images,
        few_lengths: bool = False,
        distillation: Distillation | None = None,
    ) -> None:
        self.model, self.wrapped, self.loss, self.optimizer, self.world = model, wrapped, loss, optimizer, world
        self.ema, self.max_grad_norm, self.autocast, self.keep_on = ema, max_grad_norm, autocast, keep_on
        self.cached, self.keep_graphs, self.normalize_pixels = cached, keep_graphs, normalize_pixels
        self.distillation = distillation
        self._length_multiple = _FEW_LENGTHS if few_lengths or world.device.type == "cuda" else 1
        self._sharded = is_sharded(wrapped, world)
        # Under FSDP all ranks must call the text tower equally often, but their micro-batches may differ by a pair
        self._text_group = None if self._sharded else _TEXT_GROUP[world.device.type]
        # FSDP's gradients are DTensors, with which torch's fused optimisers take no tensor that tells them to skip
        self._skips_on_device = getattr(optimizer, "_step_supports_amp_scaling", False) and not self._sharded

    def step(
        self,
        batches: Sequence[Batch],
        *,
        step: int,
        accuracy: bool = False,
        status: Callable[[], int] = lambda: 0,
    ) -> StepReport:
        """Make one update from this rank's micro-batches.

        Args:
            batches: micro-batches of this rank.
            step: number of the step, counted from 0, for messages.
            accuracy: compute the top-1 shares of the report.
            status: function that is called once, after the gradients are computed. It returns the exit status with
                which this process needs to end, or 0. All ranks agree on one status in the report.

        Raises:
            FloatingPointError: the loss or a gradient is not finite. The message names the step and the samples, and
                the weights are unchanged.
        """
        made = self._gradients(batches)
        value = made.loss
        # Accuracy of the features before the update: embedding the batch again would cost another forward pass
        shares = self._accuracy(made.labels, *made.features) if accuracy else []
        device = self.world.device
        # All ranks must end at the same step, because a rank that continues would wait for the others in a collective.
        # A signal may reach them at different times, so the share of ranks with each status is exchanged with the loss.
        wished = status()
        wishes = [torch.full_like(value, wished == code, dtype=torch.float64) for code in _STATUSES]
        count = torch.full_like(value, made.tokens, dtype=torch.float64)
        shared = torch.stack(
            [x.to(device, torch.float64) for x in (value.detach(), *wishes, count, *made.parts, *shares)]
        )
        shared = mean_over_ranks(shared, self.world)
        if self._sharded:  # DDP has averaged all gradients
            reduce_unsharded(self.model, self.world)
        norm = gradient_norm(self.model.parameters()).to(device)
        # The host waits for the device once in a step, after it has given it all the work. The update is therefore
        # skipped on the device if a number is not finite. An optimiser that cannot do so waits for the host instead.
        if self._skips_on_device:
            self._update(norm, skip=~(shared[0].isfinite() & norm.isfinite()))
        numbers = torch.cat([shared, torch.stack([norm, self.model.logit_scale.detach().exp()]).double()]).tolist()
        whole, grad_norm = float(torch.tensor(numbers[0], dtype=value.dtype)), numbers[-2]
        agreed = next((code for code, share in zip(_STATUSES, numbers[1:]) if share), 0)
        if not math.isfinite(whole):
            raise FloatingPointError(self._explained(f"the loss of step {step} is {whole}", batches, made))
        if not math.isfinite(grad_norm):
            message = f"the gradient of step {step} is {grad_norm}"
            raise FloatingPointError(self._explained(message, batches, made, with_gradients=True))
        if not self._skips_on_device:
            self._update(norm)
            numbers[-1] = float(self.model.logit_scale.detach().exp())
        if self.ema is not None:
            self.ema.update()
        mean_tokens, *others = numbers[1 + len(_STATUSES) : -2]
        contrastive, distillation = others[: len(made.parts)] or (None, None)
        image_top1, text_top1 = others[len(made.parts) :] or (None, None)
        tokens = round(mean_tokens * self.world.ranks)
        scale = numbers[-1]
        return StepReport(whole, grad_norm, image_top1, text_top1, scale, agreed, tokens, contrastive, distillation)

    def _gradients(self, batches: Sequence[Batch]) -> Gradients:
        """Compute the gradients of the loss."""
        device = self.world.device
        pieces, text_order = micro_batches(
            batches,
            self.model,
            device,
            length_multiple=self._length_multiple,
            group=self._text_group,
        )
        labels = torch.cat([batch.labels for batch in batches])
        labels = to_device(labels, device if self.keep_on is None else torch.device(self.keep_on))
        known_by = labels
        if self.loss.module is not None:
            known_by = to_device(torch.cat([batch.samples for batch in batches]), labels.device)
        features: list[Tensor] = []
        parts: list[Tensor] = []
        self.optimizer.zero_grad()  # frees memory for the teachers
        taught = None if self.distillation is None else self.distillation.embed(pieces, text_order)

        def forward(piece: MicroBatch) -> tuple[Tensor, ...]:
            images, ids = piece.arguments()
            images = self.normalize_pixels(images)
            with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
                return self.wrapped(images, ids, normalize=False)

        def loss(image: Tensor, text: Tensor, *scale_and_bias: Tensor) -> Tensor:
            text = text_order.in_batch_order(text)
            features.extend(x.detach() for x in (image, text, scale_and_bias[0]))

            def contrastive() -> Tensor:
                return self.loss.function(image, text, known_by, *scale_and_bias)

            if self.distillation is None or taught is None:
                return contrastive()
            both = self.distillation.losses((image, text, scale_and_bias[0]), taught, contrastive)
            parts.extend(x.detach() for x in both)
            return both[0] + self.distillation.weight * both[1]

        if len(pieces) == 1 and not self.cached:
            value = loss(*forward(pieces[0]))
            value.backward()
        else:
            value = cached_step(
                forward,
                [(piece,) for piece in pieces],
                loss,
                modules=[self.wrapped],
                keep_on=self.keep_on,
                keep_graphs=self.keep_graphs,
            )
        return Gradients(value, parts, labels, features, taught, text_order.tokens)

    def _update(self, norm: Tensor, skip: Tensor | None = None) -> None:
        """Clip the gradients, of the given `norm`, and update the weights, unless `skip` (), bool, is true."""
        if self.max_grad_norm is not None:
            # If the norm is not finite, the gradients must not change before they are named
            clip_gradients(self.model.parameters(), self.max_grad_norm, norm.where(norm.isfinite(), 0.0))
        if skip is not None:
            self.optimizer.found_inf = skip.float()  # type: ignore[attr-defined]  # as torch.amp.GradScaler does
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, MAX_LOG_SCALE)  # Radford et al. 2021, section 2.5

    def _accuracy(self, labels: Tensor, image: Tensor, text: Tensor, scale: Tensor) -> list[Tensor]:
        """Return the shares () of this rank's images and texts whose most similar counterpart is their own."""
        pairs: dict[str, Any] = {"image_labels": labels, "text_labels": labels} if self.loss.with_labels else {}
        stats = contrastive_stats(image, text, scale, group=self.world.group, **pairs)
        return [stats.row_hit.double().mean(), stats.col_hit.double().mean()]

    def _explained(
        self, message: str, batches: Sequence[Batch], made: Gradients, *, with_gradients: bool = False
    ) -> str:
        """Return `message` with the samples or weights that caused it, over all ranks.

        If there are several causes, the one that a step computes first is named.
        """
        keys = [key for batch in batches for key in batch.keys]

        def named(tensors: Sequence[Tensor]) -> list[str]:
            finite = torch.cat([x.detach().flatten(1).isfinite().all(dim=1).cpu() for x in tensors])
            return [key for key, is_finite in zip(keys, finite.tolist()) if not is_finite]

        parameters, features = dict(self.model.named_parameters()), made.features
        causes = {
            "pixels": named([batch.images for batch in batches]),  # integer images are always finite
            "weights": [name for name, p in parameters.items() if not _finite(p)],
            "image features": named(features[:1]),
            "text features": named(features[1:2]),
        }
        if self.distillation is not None and made.taught is not None:
            of_teachers = zip(self.distillation.teachers, made.taught.images, made.taught.texts)
            causes |= {
                f"features of the teacher {t.path}": named([torch.cat([a, b], dim=1)]) for t, a, b in of_teachers
            }
        if with_gradients:  # if the loss is not finite, neither are most gradients, which then do not show the cause
            causes["gradients"] = [n for n, p in parameters.items() if p.grad is not None and not _finite(p.grad)]
        message += "; training stopped before its update: "
        everyone = of_all_ranks(causes, self.world)
        for cause in causes:
            names = list(dict.fromkeys(name for of_rank in everyone for name in of_rank[cause]))
            if names:
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                return f"{message}{cause} of {', '.join(names[:_SHOWN])}{more} are not finite"
        return (
            f"{message}all features are finite and the logit scale is {float(features[2]):.4g}. The batch begins with "
            f"{keys[0]} and ends with {keys[-1]}"
        )


def _finite(x: Tensor) -> bool:
    local = x.to_local() if hasattr(x, "to_local") else x
    return bool(local.isfinite().all())


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for the dropout of a step, so that a resumed run draws the same masks as an uninterrupted one."""
    torch.manual_seed(mix(seed, step, rank, 0))
