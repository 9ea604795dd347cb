"""Build the loss and the model that the options of a run describe, and pick the backend of the loss."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fastclip._backends import pick
from fastclip.models.config import EfficientNetConfig, ModelConfig, ResNetConfig
from fastclip.models.dual_encoder import DualEncoder
from fastclip.models.factory import create_model
from fastclip.training.options import TrainOptions
from fastclip.training.ranks import World, of_all_ranks, one_for_all, shards
from fastclip.training.step.losses import NamedLoss, cosine_gamma, named_loss

__all__ = [
    "Towers",
    "build_loss",
    "build_model",
    "gamma_of",
    "placed",
    "resolve",
    "resolve_compile",
    "served_by",
    "tower_dtype",
]

logger = logging.getLogger(__name__)
_CONVOLUTIONAL = (ResNetConfig, EfficientNetConfig)  # other towers only embed and merge patches by convolutions
_COMPILED = ("cuda",)  # types of devices on which --compile is the default


def resolve(options: TrainOptions, config: ModelConfig) -> TrainOptions:
    """Return `options` with None replaced by the recipe of the model's authors, except options that depend on data.

    Raises:
        ValueError: a prefix is longer than the model's features.
    """
    if options.prefixes is not None and max(options.prefixes) > config.embed_dim:
        raise ValueError(
            f"--prefixes must be at most {config.embed_dim}, the length of the features of {options.model}, "
            f"got {max(options.prefixes)}"
        )
    recipe = config.train_cfg
    loss = options.loss or recipe.loss
    smoothing = recipe.label_smoothing if loss == recipe.loss else 0.1 if loss == "align" else 0.0
    defaults: dict[str, Any] = {
        "loss": loss,
        "label_smoothing": smoothing,
        "optimizer": recipe.optimizer,
        "lr": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
    }
    if loss == "global":
        defaults |= {"gamma": 0.2, "gamma_schedule": "cosine"}  # Wei et al. 2024, on CC3M
        if options.temperature is None:
            defaults["rho"] = 6.5
    if options.distill is not None:
        defaults["distill_weight"] = 1.0
    return replace(options, **{name: value for name, value in defaults.items() if getattr(options, name) is None})


def served_by(options: TrainOptions, device: torch.device) -> str:
    """Return the name of the backend that computes the loss of features on `device`.

    Raises:
        ValueError: the backend named by --backend does not exist or cannot compute this loss.
    """
    where = device if options.features_on == "device" else "cpu"
    dtype = tower_dtype(options) or torch.float32
    try:
        name, _ = pick(options.backend, torch.empty(2, 2, device=where, dtype=dtype))
    except RuntimeError as error:
        raise ValueError(f"--backend: {error}") from error
    logger.info("the %s loss is computed by backend %r", options.loss, name)
    return name


def tower_dtype(options: TrainOptions) -> torch.dtype | None:
    """Return the dtype in which the towers compute, or None for that of the weights."""
    return torch.bfloat16 if options.precision == "bf16" else None


def build_loss(options: TrainOptions, world: World, *, samples: int | None = None) -> NamedLoss:
    """Build the loss over all processes from options that `resolve` has completed.

    Args:
        samples: number of different samples of the dataset, which the global loss needs.
    """
    assert options.loss is not None and options.label_smoothing is not None
    loss = named_loss(
        options.loss,
        label_smoothing=options.label_smoothing,
        image_weight=options.image_weight,
        prefixes=options.prefixes,
        group=world.group,
        comm=options.comm,
        equal_shards=options.batch_size % world.ranks == 0,
        backend=options.backend,
        samples=samples,
        rho=options.rho,
        temperature=options.temperature,
    )
    if loss.module is not None:
        loss.module.to(world.device if options.features_on == "device" else "cpu")
    return loss


def gamma_of(options: TrainOptions, epoch: int, epochs: int) -> float:
    """Return the gamma of the global loss in an epoch, counted from 0, of a run of `epochs`."""
    assert options.gamma is not None
    return options.gamma if options.gamma_schedule == "constant" else cosine_gamma(epoch, epochs / 2, options.gamma)


class Towers(NamedTuple):
    """The options of a run that change the operations and the memory of the towers."""

    lock_image: bool
    lock_text: bool
    patch_dropout: float
    grad_checkpointing: bool

    @classmethod
    def of(cls, options: Any) -> Towers:
        """Take the values from the attributes of the same names."""
        return cls(*(getattr(options, name) for name in cls._fields))

    def prepare(self, model: DualEncoder) -> None:
        """Set the towers of a model accordingly. It may be a model without weights.

        Raises:
            ValueError: the image tower has no patches to leave out.
        """
        if self.lock_image:
            model.lock_image_tower()
        if self.lock_text:
            model.lock_text_tower()
        if self.grad_checkpointing:
            model.set_grad_checkpointing()
        if self.patch_dropout:
            try:
                model.set_patch_dropout(self.patch_dropout)
            except ValueError as error:
                raise ValueError(f"--patch-dropout {self.patch_dropout:g}: {error}") from None


def build_model(options: TrainOptions, loss: NamedLoss, world: World) -> DualEncoder:
    """Build the model on a rank's device with the scale and bias that `loss` needs.

    New weights depend only on the seed.
    """
    torch.manual_seed(options.seed)  # on every rank, so that all start from the same weights
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
    if model.logit_bias is not None:  # DDP would wait for the gradient of a bias that the loss does not use
        model.logit_bias.requires_grad_(loss.init_logit_bias is not None)
    Towers.of(options).prepare(model)
    # FSDP2 shards contiguous parameters only (torch 2.14)
    return placed(model, world.device, convolutions=not shards(options.parallel, world))


def placed(model: DualEncoder, device: torch.device, *, convolutions: bool = True) -> DualEncoder:
    """Move a model to the device on which it is trained, and return it.

    Args:
        convolutions: bring the weights of a ResNet or an EfficientNet into channels-last order. Convolutions are faster
            in it, and the activations take on the order of the weights.
    """
    if convolutions and model.config is not None and isinstance(model.config.vision_cfg, _CONVOLUTIONAL):
        model.visual.to(memory_format=torch.channels_last)
    return model.to(device)


def resolve_compile(
    options: TrainOptions, world: World, trial: Callable[[], str | None], *, asked: bool | None
) -> TrainOptions:
    """Return `options` with a value for --compile. All ranks get the same.

    Args:
        options: options, of which `compile` may be None.
        world: this process and its group.
        trial: function that returns why this process cannot compile, or None. It is called if --compile is wanted.
        asked: --compile as the user gave it, or None.

    Raises:
        ValueError: --compile was given and a rank cannot compile.
        Exception: `trial` raised it, on this rank or on another.
    """
    wanted = world.device.type in _COMPILED if options.compile is None else options.compile
    found = None
    with one_for_all(world):
        if wanted:
            found = trial()
    for rank, why in enumerate(of_all_ranks(found, world)):
        if why is not None:
            message = f"torch.compile does not work here: {why}" + (f" (on rank {rank})" if world.ranks > 1 else "")
            if asked:
                raise ValueError(f"--compile: {message}. --no-compile trains without it")
            logger.warning("the towers are not compiled: %s", message)
            return replace(options, compile=False)
    return replace(options, compile=wanted)
