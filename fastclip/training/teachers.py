"""The teachers of a run (`--distill`): their checkpoints, and checks that they fit the student."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from fastclip.losses.distillation import distillation_loss
from fastclip.models.config import ModelConfig, list_models
from fastclip.models.embedder import Embedder, load_model
from fastclip.models.factory import tokenizer_of
from fastclip.training.from_options import placed, tower_dtype
from fastclip.training.options import TrainOptions
from fastclip.training.ranks import World
from fastclip.training.step.distillation import Distillation, Teacher

__all__ = ["build_distillation", "check_context", "check_distillation", "split_teacher"]

logger = logging.getLogger(__name__)
_LOSSES = ("clip", "unicl", "align", "convirt")


def split_teacher(spec: str) -> tuple[str | None, str]:
    """Return the model's name, or None, and the path of a teacher given as ``PATH`` or ``MODEL=PATH``."""
    name, equals, path = spec.partition("=")
    return (name, path) if equals and name in list_models() else (None, spec)


def check_distillation(options: TrainOptions) -> None:
    """Check the options of distillation, before anything is loaded.

    Args:
        options: options that `resolve` has completed.

    Raises:
        ValueError: the loss or another option does not go with teachers.
        FileNotFoundError: a checkpoint does not exist.
    """
    if options.distill is None:
        if options.distill_weight is not None:
            raise ValueError("--distill-weight belongs to --distill: leave it out, or name a teacher")
        return
    if not options.distill:
        raise ValueError("--distill needs the path of at least one checkpoint")
    if options.loss not in _LOSSES:
        raise ValueError(
            f"--distill adds a loss of softmaxes, which does not go with --loss {options.loss}: choose "
            f"{', '.join(_LOSSES[:-1])} or {_LOSSES[-1]}"
        )
    if options.prefixes is not None:
        raise ValueError("--distill compares whole features: leave out --prefixes")
    if options.comm == "ring":
        raise ValueError("--distill needs --comm gather: the texts of the whole batch are compared with the teachers'")
    for spec in options.distill:
        if not Path(split_teacher(spec)[1]).exists():
            raise FileNotFoundError(f"--distill {spec}: there is no such file or folder")


def build_distillation(options: TrainOptions, config: ModelConfig, world: World) -> Distillation | None:
    """Load the teachers of a run onto the device, or return None if it has none.

    Args:
        options: options that `resolve` has completed.
        config: configuration of the student.
        world: this process and its group.

    Raises:
        ValueError: a checkpoint cannot be read, a teacher's tokenizer is not the student's, it takes fewer tokens than
            the student, or the backend named by --backend has no distillation loss.
    """
    if options.distill is None:
        return None
    assert options.distill_weight is not None
    teachers = [_load(spec, options, config, world.device) for spec in options.distill]
    _try_backend(options, config, teachers, world.device)
    return Distillation(
        teachers,
        weight=options.distill_weight,
        plain=options.loss == "clip" and not options.label_smoothing and options.image_weight in (None, 0.5),
        group=world.group,
        equal_shards=options.batch_size % world.ranks == 0,
        backend=options.backend,
        autocast=tower_dtype(options),
    )


def _load(spec: str, options: TrainOptions, config: ModelConfig, device: torch.device) -> Teacher:
    name, path = split_teacher(spec)
    try:
        model, source = load_model(path, model=name)
    except ValueError as error:
        why = str(error)
        if name is None and "contains no configuration" in why:  # whose advice is --model, here the student's
            why = f"the checkpoint contains no configuration: name its model, as in --distill ViT-B-32={path}"
        raise ValueError(f"--distill {spec}: {why}") from error
    assert model.config is not None
    check_context(spec, model.config, config)
    # Both with the same length, which is part of a tokenizer's identity
    theirs = tokenizer_of(model.config, name or str(source), context_length=config.text_cfg.context_length)
    ours = tokenizer_of(config, options.model)
    if _identity(theirs) != _identity(ours):
        raise ValueError(
            f"--distill {spec}: the teacher has another tokenizer ({_described(theirs)}) than the student "
            f"{options.model} ({_described(ours)}), so it cannot read the student's token ids: choose a teacher with "
            "the same tokenizer"
        )
    digest = Embedder(model, theirs).identity
    logger.info("teacher %s: %s parameters", spec, f"{sum(p.numel() for p in model.parameters()):,}")
    return Teacher(spec, placed(model, device), digest)


def check_context(spec: str, teacher: ModelConfig, student: ModelConfig) -> None:
    """Raise ValueError if a teacher, given as `spec`, takes fewer tokens than the texts of the student have."""
    length, longest = student.text_cfg.context_length, teacher.text_cfg.context_length
    if longest < length:
        raise ValueError(
            f"--distill {spec}: the teacher takes {longest} tokens, but the student's texts have up to {length}: "
            f"choose another teacher, or --context-length {longest}"
        )


def _identity(tokenizer: object) -> tuple[str, object]:
    return type(tokenizer).__name__, getattr(tokenizer, "identity", None)


def _described(tokenizer: object) -> str:
    return f"{type(tokenizer).__name__} of {getattr(tokenizer, 'vocab_size', 0):,} tokens"


def _try_backend(options: TrainOptions, config: ModelConfig, teachers: list[Teacher], device: torch.device) -> None:
    """Raise ValueError if the backend named by --backend has no distillation loss of these features."""
    if options.backend is None:
        return
    where, dtype = (device if options.features_on == "device" else "cpu"), tower_dtype(options) or torch.float32
    dims = [config.embed_dim, *(t.model.config.embed_dim for t in teachers if t.model.config is not None)]
    student, *taught = (torch.ones(2, dim, device=where, dtype=dtype) for dim in dims)
    try:
        distillation_loss(student, student, 1.0, taught, taught, [1.0] * len(taught), backend=options.backend)
    except RuntimeError as error:
        raise ValueError(f"--backend: {error}") from error
