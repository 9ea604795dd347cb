"""Fine-tuning of an image tower with a linear head that is initialised as the zero-shot classifier.

OUTPUT/finetune.json        everything the run depends on; a run with other settings ends with an error here
       metrics.jsonl        one line per logged step, with TensorBoard's events in tensorboard/
       checkpoints/         from which the same command resumes
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
from fastclip.models.transforms import PixelNormalization
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
    """Return exp(logit_scale) times the class embeddings of `fastclip.evaluation.zero_shot`, (C, D) float32."""
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
    """Train the image tower and a linear head with cross entropy over the classes of `source`, in a single process.

    The optimiser is AdamW with torch's default betas. The learning rate warms up and then follows a cosine to 0.

    The same call resumes a run that was stopped or killed from its last checkpoint. On a CPU the result is identical
    bit for bit, because batches, crops and dropout are functions of the seed, the step and the sample.

    Args:
        embedder: model whose image tower is trained in place. The tower is in eval mode afterwards. With precision
            "bf16" it is trained under autocast.
        source: dataset with classes.
        output: folder of the run: new, empty, or the folder of this same run.
        templates: caption templates from which the head is computed (default: the dataset's, else CLIP's 80).

    Raises:
        ValueError: `source` has no classes, too many images cannot be used, `output` holds something else, or several
            processes were started.
        FloatingPointError: the loss or a gradient is not finite; the update was not made.
        OSError: another process owns `output` (`fastclip.system.owner`), or it cannot be written.
        Interrupted: the process received SIGTERM or Ctrl-C and has written a checkpoint.
    """
    if not source.class_names:
        raise ValueError(f"{source.spec} has no classes to fine-tune on")
    if (process := env.launched()) is not None and process.ranks > 1:
        raise ValueError(f"fine-tuning runs in a single process, but torchrun has started {process.ranks}")
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
        assert embedder.model.config is not None
        self.normalize_pixels = PixelNormalization.of(embedder.model.config)
        self.classifier = ImageClassifier(visual, weight, source.class_names, freeze_image=options.freeze_image)
        self.zero_shot = self._state()
        visual.set_grad_checkpointing(options.grad_checkpointing)
        self.optimizer = build_optimizer(
            "adamw", self.classifier, lr=options.lr, weight_decay=options.weight_decay, betas=(0.9, 0.999), eps=1e-8
        )

    def _claim(self, templates: Sequence[str]) -> None:
        """Check that the folder is new, empty or holds this run.

        Raises:
            ValueError: the folder holds something else, or a run with other data or options, which the message names.
        """
        asked: dict[str, Any] = {
            "checkpoint": self.embedder.identity,  # a digest of its weights
            "data": absolute_spec(self.source.spec),
            "samples": len(self.source),
            "order and captions": fingerprint(self.source),
            "max_pixels": Image.MAX_IMAGE_PIXELS,
            "class_names": self.source.class_names,
            "templates": templates,
            **{name: value for name, value in asdict(self.options).items() if name not in _MAY_CHANGE},
        }

        def older(before: dict[str, Any]) -> dict[str, Any]:
            """Return the record `before`, which an older version wrote, in the current form.

            Old records lack the order and the captions of the samples, may contain a relative path of the data, and
            contain options that no longer have to be the same when the command is repeated.
            """
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
            hint="run the same command again to resume",
        )
        loop.resume("auto")
        for doubt in doubts_of_schedule(warmup=warmup, steps=steps, lr=options.lr):
            logger.warning("%s", doubt)
        try:
            losses = loop.run()
        finally:
            self.classifier.eval()  # the embedder's towers are in eval mode, too
        vars(self.embedder).pop("identity", None)  # cached, but the weights have changed
        tuned, complete = self._state(), loop.last == steps
        return Finetuned(
            self.folder, self.embedder, loop.last, losses, self.classifier, self.zero_shot, tuned, complete
        )

    def _update(self, batches: Sequence[Batch], step: int, *, logged: bool, status: Callable[[], int]) -> Update:
        """Make one AdamW update. Its metric "acc1" is the share of the batch's images that are classified correctly."""
        device, classes = self.embedder.device, len(self.source.class_names)
        self.optimizer.zero_grad()
        losses, hits = [], 0
        for batch in batches:
            if bool((batch.labels >= classes).any()):  # without a class, the label is a hash of the caption
                unknown = [key for key, label in zip(batch.keys, batch.labels.tolist()) if label >= classes]
                raise ValueError(f"{self.source.spec}: images without a class: {', '.join(unknown[:_SHOWN])}")
            labels = batch.labels.to(device)
            images = self.normalize_pixels(batch.images.to(device, non_blocking=True))
            with torch.autocast(device.type, torch.bfloat16, enabled=self.embedder.precision == "bf16"):
                logits = self.classifier(images)
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
