"""Fine-tuning of an image tower with a linear head that begins as the zero-shot classifier.

OUTPUT/finetune.json        what the run depends on: another run refuses the folder
       metrics.jsonl        a line a logged step; TensorBoard's events beside it
       checkpoints/         from which the same call goes on
       model/               image-text model with the tuned image tower, head.safetensors, classes.json
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastclip.data.batch import Batch
from fastclip.data.identity import fingerprint
from fastclip.data.loading.order import Order
from fastclip.data.loading.workers import naming_dead_workers
from fastclip.data.picture import older_limit
from fastclip.data.source import Source
from fastclip.data.spec import absolute_spec
from fastclip.evaluation.zero_shot import class_embeddings, templates_for
from fastclip.models.classifier import ImageClassifier
from fastclip.models.embedder import Embedder
from fastclip.system import env
from fastclip.system.claim import claim
from fastclip.system.owner import owning
from fastclip.training.doubts import doubts_of_schedule
from fastclip.training.options import FinetuneOptions
from fastclip.training.ranks import World
from fastclip.training.run.loop import Loop, Update
from fastclip.training.run.torch_settings import settings_kept
from fastclip.training.step.optim import build_optimizer, clip_gradients, gradient_norm
from fastclip.training.wise_ft import Finetuned

__all__ = ["FinetuneOptions", "Finetuned", "finetune", "zero_shot_head"]

logger = logging.getLogger(__name__)
_MAY_CHANGE = ("workers", "log_every", "save_every", "keep", "max_bad", "stop_after")
_SHOWN = 5  # names in an error


def zero_shot_head(embedder: Embedder, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return exp(logit_scale) times the class embeddings, (C, D) float32 (`fastclip.evaluation.zero_shot`)."""
    scale = embedder.model.logit_scale.detach().exp().cpu()
    return scale * class_embeddings(embedder, class_names, templates)


@owning
def finetune(
    embedder: Embedder,
    source: Source,
    options: FinetuneOptions | None = None,
    *,
    output: str | Path,
    templates: Sequence[str] = (),
) -> Finetuned:
    """Train image tower and head with cross entropy over the classes of `source`, in this process alone.

    A call with the same arguments goes on where one that was stopped or killed has written its last checkpoint, and on
    a CPU ends with the same bits: batches, crops and dropout are functions of the seed, the step and the sample. AdamW
    with torch's betas, warm-up and a cosine to 0.

    Args:
        embedder: its image tower is trained in place, and in eval mode afterwards; its precision "bf16" is autocast.
        source: one with classes.
        output: folder of the run, a new or empty one, or this run's.
        templates: of the captions that make the head; default: the source's own, else CLIP's 80

    Raises:
        ValueError: `source` has no classes, or too many pictures cannot be used; `output` holds something else; several
            processes were started.
        FloatingPointError: loss or gradient is not finite; the update was not made.
        OSError: `output` is another process's (`fastclip.system.owner`), or cannot be written.
        Interrupted: SIGTERM or Ctrl-C came, and a checkpoint is written.
    """
    if not source.class_names:
        raise ValueError(f"{source.spec} has no classes")
    if (process := env.launched()) is not None and process.ranks > 1:
        raise ValueError(f"fine-tuning runs in one process, and torchrun has started {process.ranks}")
    templates = tuple(templates) or templates_for(source)
    with settings_kept(), naming_dead_workers():
        return _Run(embedder, source, options or FinetuneOptions(), Path(output), templates).run()


class _Run:
    def __init__(
        self, embedder: Embedder, source: Source, options: FinetuneOptions, folder: Path, templates: Sequence[str]
    ) -> None:
        self.embedder, self.source, self.options, self.folder = embedder, source, options, folder
        self._claim(templates)
        weight = zero_shot_head(embedder, source.class_names, templates).to(embedder.device)
        visual: Any = embedder.model.visual
        self.classifier = ImageClassifier(visual, weight, source.class_names, freeze_image=options.freeze_image)
        self.zero_shot = self._state()
        visual.set_grad_checkpointing(options.grad_checkpointing)
        self.optimizer = build_optimizer(
            "adamw", self.classifier, lr=options.lr, weight_decay=options.weight_decay, betas=(0.9, 0.999), eps=1e-8
        )

    def _claim(self, templates: Sequence[str]) -> None:
        """Check that the folder is this run's, or new.

        Raises:
            ValueError: the folder holds something else, or a run of other data or options; the message names these.
        """
        asked: dict[str, Any] = {
            "checkpoint": self.embedder.identity,  # its weights
            "data": absolute_spec(self.source.spec),
            "samples": len(self.source),
            "order and captions": fingerprint(self.source),
            "max_pixels": Image.MAX_IMAGE_PIXELS,
            "class_names": self.source.class_names,
            "templates": templates,
            **{name: value for name, value in asdict(self.options).items() if name not in _MAY_CHANGE},
        }

        def older(before: dict[str, Any]) -> dict[str, Any]:
            """Of older versions: no order, a relative path, and options that may change now."""
            known = {"order and captions": asked["order and captions"], **older_limit(before)}
            if "data" in known:
                known["data"] = absolute_spec(known["data"])
            return {name: value for name, value in known.items() if name in asked}

        claim(self.folder, asked, result="*", name="finetune.json", older=older)

    def run(self) -> Finetuned:
        options, config = self.options, self.embedder.model.config
        assert config is not None
        order = Order(len(self.source), options.batch_size, options.seed)
        steps = order.steps(options.epochs)
        warmup = min(500, steps // 10) if options.warmup is None else options.warmup
        save_every = options.save_every or max(1, order.epoch_length // options.batch_size)
        loop = Loop(
            options=replace(options, warmup=warmup, save_every=save_every),
            folder=self.folder,
            world=World(0, 1, self.embedder.device, None),
            source=self.source,
            config=config,
            tokenize=_no_ids,
            order=order,
            steps=steps,
            model=self.classifier,
            optimizer=self.optimizer,
            update=self._update,
            hint="again, it goes on",
        )
        loop.resume("auto")
        for doubt in doubts_of_schedule(warmup=warmup, steps=steps, lr=options.lr):
            logger.warning("%s", doubt)
        try:
            losses = loop.run()
        finally:
            self.classifier.eval()  # as the embedder's towers are
        vars(self.embedder).pop("identity", None)  # it is another model now
        tuned, complete = self._state(), loop.last == steps
        return Finetuned(
            self.folder, self.embedder, loop.last, losses, self.classifier, self.zero_shot, tuned, complete
        )

    def _update(self, batches: Sequence[Batch], step: int, *, logged: bool, status: Callable[[], int]) -> Update:
        """Make a step of AdamW; acc1 is the share of the pictures that are classified rightly."""
        device, classes = self.embedder.device, len(self.source.class_names)
        self.optimizer.zero_grad()
        losses, hits = [], 0
        for batch in batches:
            if bool((batch.labels >= classes).any()):  # a hash of the caption where a picture has no class
                unknown = [key for key, label in zip(batch.keys, batch.labels.tolist()) if label >= classes]
                raise ValueError(f"{self.source.spec}: pictures without a class: {', '.join(unknown[:_SHOWN])}")
            labels = batch.labels.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.embedder.precision == "bf16"):
                logits = self.classifier(batch.images.to(device, non_blocking=True))
            each = F.cross_entropy(logits, labels, reduction="none")
            (each.sum() / self.options.batch_size).backward()
            losses.append(each.detach())
            hits += int((logits.argmax(dim=1) == labels).sum())
        whole = torch.cat(losses)
        loss = float(whole.double().mean())
        if not math.isfinite(loss):
            keys = [key for batch in batches for key in batch.keys]
            named = [key for key, finite in zip(keys, whole.isfinite().tolist()) if not finite]
            raise FloatingPointError(
                f"the loss of step {step} is {loss}; training stopped before its update, at {', '.join(named[:_SHOWN])}"
            )
        norm = gradient_norm(self.classifier.parameters())
        if not norm.isfinite():
            raise FloatingPointError(f"the gradient of step {step} is {norm}; training stopped before its update")
        clip_gradients(self.classifier.parameters(), self.options.max_grad_norm, norm)
        self.optimizer.step()
        return Update(loss, {"grad_norm": norm.item(), "acc1": hits / self.options.batch_size}, status())

    def _state(self) -> dict[str, Tensor]:
        return {name: x.detach().cpu().clone() for name, x in self.classifier.state_dict().items()}


def _no_ids(texts: list[str]) -> Tensor:
    return torch.empty(len(texts), 0, dtype=torch.int64)
