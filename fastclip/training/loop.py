"""The training loop: one model, one process, one loss."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastclip._backends import pick
from fastclip.data.batch import Batch
from fastclip.loss import contrastive_loss
from fastclip.models.dual_encoder import MAX_LOG_SCALE, DualEncoder

__all__ = ["History", "train", "warmup_cosine"]

logger = logging.getLogger(__name__)


class History(NamedTuple):
    """What a run leaves beside the trained model."""

    losses: list[float]  # one a step
    seconds: float  # wall clock of all steps
    backend: str  # that served the loss, a name of `fastclip.backends()`


def train(
    model: DualEncoder,
    batches: Iterable[Batch],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    warmup_steps: int = 20,
    weight_decay: float = 0.1,
    max_grad_norm: float | None = 1.0,
    backend: str | None = None,
    progress: bool = True,
) -> History:
    """Train `model` in place for `steps` batches, with AdamW on a warm-up and a cosine; it ends in eval mode.

    The loss is `fastclip.contrastive_loss` with labels (UniCL, Yang et al. 2022): an image belongs to every text of
    its label. The loop draws no random numbers: the same model and batches give the same losses.

    Args:
        batches: at least `steps` of them; each is moved to the model's device.
        learning_rate: at the end of the warm-up.
        weight_decay: of matrices; biases, LayerNorm and the logit scale have none.
        max_grad_norm: a longer gradient is scaled down to this norm; None leaves it alone.
        backend: passed to the loss.
        progress: show a progress bar on stderr.

    Raises:
        FloatingPointError: the loss is NaN or infinite; the step's update has not been made.
        ValueError: `steps` is not positive, or there are fewer batches.
    """
    if steps < 1:
        raise ValueError(f"steps must be positive, got {steps}")
    device = model.logit_scale.device
    groups = _parameter_groups(model, weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)
    losses: list[float] = []
    served = ""
    start = time.perf_counter()
    model.train()
    with tqdm(total=steps, disable=not progress, desc="training", unit="step") as bar:
        for step, batch in zip(range(steps), batches):
            images, ids, image_labels, text_labels = (x.to(device) for x in batch)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * warmup_cosine(step, warmup_steps=warmup_steps, steps=steps)

            image_features, text_features = model.encode_image(images), model.encode_text(ids)
            served = served or _served_by(backend, image_features)
            loss = contrastive_loss(  # it normalises the features
                image_features,
                text_features,
                model.logit_scale.exp(),
                image_labels=image_labels,
                text_labels=text_labels,
                backend=backend,
            )
            assert isinstance(loss, Tensor)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss of step {step} is {losses[-1]}; training stopped before its update")

            optimizer.zero_grad()
            loss.backward()
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, MAX_LOG_SCALE)
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    if len(losses) < steps:
        raise ValueError(f"the batches ended after {len(losses)} of {steps} steps")
    model.eval()
    return History(losses, time.perf_counter() - start, served)


def warmup_cosine(step: int, *, warmup_steps: int, steps: int) -> float:
    """Factor on the learning rate at `step` (from 0): linear up to 1, then half a cosine towards 0 at `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def _served_by(backend: str | None, features: Tensor) -> str:
    name, _ = pick(backend, features)
    logger.info("the contrastive loss is served by backend %r", name)
    return name


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
