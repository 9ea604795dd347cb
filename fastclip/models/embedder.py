"""A model together with its image transform and tokenizer: images and texts in, unit vectors out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastclip.models.config import mapping
from fastclip.models.dual_encoder import DualEncoder, without_padding
from fastclip.models.factory import create_model, tokenizer_of
from fastclip.models.tokenizers.clip import texts_of
from fastclip.models.transforms import image_transform, split_normalization
from fastclip.system.reading import read_json

__all__ = ["Embedder", "load_embedder", "load_model"]


class Embedder:
    """Embed images and texts with one model, in eval mode and without gradients.

    Args:
        model: the model, which is put into eval mode.
        tokenize: tokenizer, B texts -> token ids (B, L).
        transform: image transform, a PIL image of any mode -> (3, H, W) float32 (default: the model's transform for
            evaluation).
        precision: "fp32", or "bf16" for autocast to bfloat16.
        name: name of the model in results.

    Raises:
        ValueError: the precision is unknown.
    """

    def __init__(
        self,
        model: DualEncoder,
        tokenize: Callable[[list[str]], Tensor],
        *,
        transform: Callable[[Image.Image], Tensor] | None = None,
        precision: str = "fp32",
        name: str = "",
    ) -> None:
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {precision!r}")
        if transform is None:
            assert model.config is not None, "a model without a configuration needs transform="
            transform = image_transform(model.config)
        self.model, self.tokenize, self.transform = model.eval(), tokenize, transform
        self.precision, self.name = precision, name

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @property
    def pixel_transform(self) -> Callable[[Image.Image], Tensor]:
        """Part of `transform` for data workers. For a model's transform, it ends in uint8 pixels (3, H, W)."""
        return split_normalization(self.transform)[0]

    def normalized(self, images: Tensor) -> Tensor:
        """Move the results of `transform` or `pixel_transform` (B, 3, H, W) to the model's device, normalised there."""
        return split_normalization(self.transform)[1](images.to(self.device, non_blocking=True))

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Embed transformed images.

        Args:
            images: results of `transform`, or of `pixel_transform`, (B, 3, H, W) on any device.

        Returns:
            Unit vectors (B, D), float32 on the CPU.
        """
        images = self.normalized(images)
        with self._autocast():
            features = self.model.encode_image(images)
        return _unit(features)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Embed one text or B texts.

        Args:
            texts: a string or a sequence of strings.
            batch_size: texts per forward pass.

        Returns:
            Unit vectors (B, D), float32 on the CPU.
        """
        units, texts = [], texts_of(texts)
        for start in range(0, len(texts), batch_size):
            ids = without_padding(self.tokenize(texts[start : start + batch_size]), self.model).to(self.device)
            with self._autocast():
                units.append(_unit(self.model.encode_text(ids)))
        return torch.cat(units) if units else torch.empty(0, self.dim)

    @cached_property
    def dim(self) -> int:
        """Length D of the vectors."""
        assert self.model.config is not None
        return self.model.config.embed_dim

    @cached_property
    def identity(self) -> str:
        """Digest of weights, configuration (including the transform's options), tokenizer and precision.

        It has 32 hexadecimal digits. Vectors may be compared only if the identities of their embedders are equal.
        Computing the digest reads all weights once.
        """
        assert self.model.config is not None
        config = replace(self.model.config, folder=None)  # copies of a model in different folders are the same model
        digest = hashlib.blake2b(digest_size=16)
        tokenizer = getattr(self.tokenize, "identity", type(self.tokenize).__name__)
        digest.update(repr((config, tokenizer, self.precision)).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def load_embedder(
    checkpoint: str | Path,
    *,
    model: str | None = None,
    device: torch.device | str | None = None,
    precision: str | None = None,
    vocabulary: str | Path | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
) -> Embedder:
    """Load a checkpoint with its image transform and tokenizer, ready to embed images and texts.

    Args:
        checkpoint: path of a checkpoint, as in `create_model`. From the output folder of ``fastclip train``, the final
            model in ``model/`` is loaded. A training checkpoint (``checkpoints/step-...``) is loaded with the moving
            average of the weights if it contains one.
        model: model name, needed if the checkpoint contains no configuration.
        device: device of the model (default: a GPU if there is one, otherwise the CPU).
        precision: "fp32" or "bf16" (default: "bf16" on a GPU, otherwise "fp32").
        vocabulary: vocabulary of a BERT model, as in `get_tokenizer`.
        image_size: side of the input images in pixels (default: the checkpoint's).
        context_length: tokens per text (default: the checkpoint's).

    Raises:
        FileNotFoundError: the checkpoint or the vocabulary does not exist.
        ValueError: the checkpoint does not fit the model, or an option is invalid.
        ImportError: open_clip_torch, which contains CLIP's vocabulary, is not installed.
    """
    made, path = load_model(
        checkpoint, model=model, image_size=image_size, context_length=context_length, device=_device(device)
    )
    assert made.config is not None
    tokenize = tokenizer_of(made.config, model or str(path), vocabulary=vocabulary)
    if precision is None:
        precision = "bf16" if made.logit_scale.device.type == "cuda" else "fp32"
    return Embedder(made, tokenize, precision=precision, name=model or str(checkpoint))


def load_model(
    checkpoint: str | Path,
    *,
    model: str | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[DualEncoder, Path]:
    """Load the model of a checkpoint, with the arguments and errors of `load_embedder`.

    Returns:
        The model, and the path that its weights were read from.
    """
    path, sizes = Path(checkpoint), {"image_size": image_size, "context_length": context_length}
    if (path / "checkpoints").is_dir() or (path / "metrics.jsonl").is_file():  # the output folder of a training run
        if not (path / "model").is_dir():
            raise FileNotFoundError(
                f"the run {path} has not ended and contains no model/: name one of its checkpoints, "
                f"{path}/checkpoints/step-..."
            )
        path = path / "model"
    name = model
    if (state := path / "state.json").is_file():  # a training checkpoint, which contains options but no config.json
        options = mapping(read_json(state).get("options", {}), f"{state}: options")
        name = model or options.get("model")  # the caller's arguments take precedence over the run's options
        if not isinstance(name, str):
            raise ValueError(f"{state}: the option 'model' must be a model name, got {name!r}")
        sizes = {size: options.get(size) if value is None else value for size, value in sizes.items()}
        path = path / "ema.safetensors" if (path / "ema.safetensors").is_file() else path
    return create_model(name, path, device=device, **sizes), path


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "cuda"):
            torch.zeros(1, device=chosen).item()  # fails for "meta", which stores no numbers, and for missing devices
    except (RuntimeError, AssertionError, ImportError) as error:  # raised for devices that torch was not built for
        raise ValueError(f"the device must be cpu, cuda, cuda:1 or the like, got {device!r}") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"the device {device} does not exist: torch finds {torch.cuda.device_count()} GPUs")
    return chosen


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1).cpu()
