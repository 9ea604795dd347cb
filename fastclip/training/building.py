"""What the options of a run mean: its loss, its model, and who serves the loss."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch

from fastclip._backends import pick
from fastclip.models.config import ModelConfig
from fastclip.models.dual_encoder import DualEncoder
from fastclip.models.factory import create_model
from fastclip.training.losses import NamedLoss, named_loss
from fastclip.training.options import TrainOptions
from fastclip.training.parallel import World

__all__ = ["build_loss", "build_model", "resolve", "served_by"]

logger = logging.getLogger(__name__)


def resolve(options: TrainOptions, config: ModelConfig) -> TrainOptions:
    """`options` with the model's own values in place of None, where the length of the data does not matter."""
    own = config.train_cfg
    loss = options.loss or own.loss
    smoothing = own.label_smoothing if loss == own.loss else 0.1 * (loss == "align")
    found: dict[str, Any] = {
        "loss": loss,
        "label_smoothing": smoothing,
        "optimizer": own.optimizer,
        "lr": own.learning_rate,
        "weight_decay": own.weight_decay,
    }
    return replace(options, **{name: value for name, value in found.items() if getattr(options, name) is None})


def served_by(options: TrainOptions, device: torch.device) -> str:
    """The backend of the loss on features of `device`; ValueError where the one that is asked for cannot serve."""
    where = device if options.features_on == "device" else "cpu"
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    try:
        name, _ = pick(options.backend, torch.empty(2, 2, device=where, dtype=dtype))
    except RuntimeError as error:
        raise ValueError(f"--backend: {error}") from error
    logger.info("the %s loss is served by backend %r", options.loss, name)
    return name


def build_loss(options: TrainOptions, world: World) -> NamedLoss:
    """Of `resolve`'s options, over all processes."""
    assert options.loss is not None and options.label_smoothing is not None
    return named_loss(
        options.loss,
        label_smoothing=options.label_smoothing,
        image_weight=options.image_weight,
        group=world.group,
        comm=options.comm,
        equal_shards=options.batch_size % world.ranks == 0,
        backend=options.backend,
    )


def build_model(options: TrainOptions, loss: NamedLoss, device: torch.device) -> DualEncoder:
    """On `device`, its new weights a function of the seed, with what `loss` needs and frozen as asked."""
    torch.manual_seed(options.seed)
    model = create_model(
        options.model,
        options.pretrained,
        image_size=options.image_size,
        context_length=options.context_length,
        init_logit_scale=loss.init_logit_scale,
        init_logit_bias=loss.init_logit_bias,
    )
    if loss.fixed_scale:
        assert loss.init_logit_scale is not None
        model.logit_scale.requires_grad_(False).fill_(loss.init_logit_scale)
    if model.logit_bias is not None:  # DDP waits for gradients that no loss gives
        model.logit_bias.requires_grad_(loss.init_logit_bias is not None)
    if options.lock_image:
        model.lock_image_tower()
    if options.lock_text:
        model.lock_text_tower()
    if options.grad_checkpointing:
        model.set_grad_checkpointing()
    if options.compile:
        model.compile()
    return model.to(device)
