"""The model: an image tower and a text tower with a shared embedding space."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.models.checkpoints.writing import CONFIG, OWN_FILES, WEIGHTS, new_model, write_weights
from fastclip.models.config import BertConfig, ModelConfig
from fastclip.models.loading import describe_misfit, load_weights, resolve
from fastclip.models.tokenizers.vocabulary import VOCABULARY, is_file_name, vocabulary_beside
from fastclip.system.durable import write_bytes, write_json
from fastclip.system.lazy import uncollected

__all__ = ["DualEncoder", "MAX_LOG_SCALE", "build_model", "create_model", "without_padding"]

_COMPILED = "_orig_mod."  # prefix that torch.compile adds to the names of a module's parameters
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")
MAX_LOG_SCALE = math.log(100)  # Radford et al. 2021, section 2.5: the logit scale is at most 100


class DualEncoder(nn.Module):
    """Image-text model with one tower per modality (Radford et al. 2021, figure 3), created by `fastclip.create_model`.

    The keys of the state dict begin with ``visual.`` and ``text.``, apart from ``logit_scale`` and, for the sigmoid
    loss, ``logit_bias``. The logit scale is stored as its natural logarithm.

    Args:
        visual: image tower, images (B, 3, H, W) -> features (B, D).
        text: text tower, token ids (B, L) -> features (B, D) with the same D.
        config: configuration that both towers were built from (required by `save_pretrained`).
        init_logit_scale: initial value of ``logit_scale``, the natural logarithm of the scale.
        init_logit_bias: initial value of ``logit_bias`` (SigLIP: -10, with a log scale of log 10). The model has no
            bias by default.

    Attributes:
        vocabulary: contents of the vocabulary file next to the configuration, or None if there is none. The bytes are
            kept because the file may be gone by the time the model is saved.
    """

    logit_bias: nn.Parameter | None

    def __init__(
        self,
        visual: nn.Module,
        text: nn.Module,
        *,
        config: ModelConfig | None = None,
        init_logit_scale: float = math.log(1 / 0.07),
        init_logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        self.visual = visual
        self.text = text
        self.config = config
        self.logit_scale = nn.Parameter(torch.tensor(float(init_logit_scale)))
        self.logit_bias = None if init_logit_bias is None else nn.Parameter(torch.tensor(float(init_logit_bias)))
        self.vocabulary = None if config is None else vocabulary_beside(config)
        self._locked: set[str] = set()

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Return the features of images, (B, 3, H, W) float -> (B, D), scaled to unit length with ``normalize``."""
        features = self.visual(images)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, ids: Tensor | Sequence[Tensor], normalize: bool = False) -> Tensor:
        """Return the features of texts, token ids (B, L) -> (B, D), scaled to unit length with ``normalize``.

        Several tensors of ids may have different lengths L. Their features are concatenated.
        """
        features = self.text(ids) if isinstance(ids, Tensor) else torch.cat([self.text(part) for part in ids])
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, images: Tensor, ids: Tensor | Sequence[Tensor], normalize: bool = True) -> tuple[Tensor, ...]:
        """Return image features (M, D), text features (N, D) and the exponentiated logit scale.

        A model with ``logit_bias`` returns the bias as a fourth value, like open_clip's models. The outputs are the
        arguments of the loss.

        Args:
            images: (M, 3, H, W) float.
            ids: token ids (N, L), or several tensors of them, as `encode_text` takes.
            normalize: scale the features to unit length. With False, features keep the length and dtype of the towers'
                outputs (bfloat16 under autocast), and fastclip's losses normalise them without an additional rounding.
        """
        image_features = self.encode_image(images, normalize=normalize)
        text_features = self.encode_text(ids, normalize=normalize)
        if self.logit_bias is not None:
            return image_features, text_features, self.logit_scale.exp(), self.logit_bias
        return image_features, text_features, self.logit_scale.exp()

    def lock_image_tower(self) -> None:
        """Freeze the image tower (LiT, Zhai et al. 2022).

        The tower gets no gradients and stays in eval mode, even after ``train()``, so that BatchNorm statistics do not
        move and no dropout is applied.
        """
        self._lock("visual")

    def lock_text_tower(self) -> None:
        """Freeze the text tower, as `lock_image_tower` freezes the image tower."""
        self._lock("text")

    def _lock(self, name: str) -> None:
        self._locked.add(name)
        self.get_submodule(name).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> DualEncoder:
        super().train(mode)
        for name in self._locked:
            self.get_submodule(name).eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Store only the inputs of the blocks and recompute the blocks in the backward pass.

        Activation checkpointing saves memory and makes a training step about a third slower.
        """
        for tower in (self.visual, self.text):
            tower.set_grad_checkpointing(enable)  # type: ignore[operator]

    def set_patch_dropout(self, share: float) -> None:
        """Leave out a random share of each image's patches in training mode (FLIP, Li et al. 2023).

        The class token is kept, and so is at least one patch. The weights and the saved model stay as they are.

        Raises:
            ValueError: the image tower is no ViT, or the share is not at least 0 and below 1.
        """
        from timm.layers import PatchDropout
        from timm.models.vision_transformer import VisionTransformer

        if not 0 <= share < 1:
            raise ValueError(f"the share of patches to leave out must be at least 0 and below 1, got {share}")
        if not isinstance(self.visual, VisionTransformer):
            raise ValueError("only a ViT can leave out patches: choose a model whose name begins with ViT")
        self.visual.patch_drop = PatchDropout(share) if share else nn.Identity()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model's weights and configuration into a folder.

        The files are ``model.safetensors``, ``config.json`` and, for a model with a vocabulary file, ``vocab.txt``.
        They replace existing files of the same names, either all of them or none. Other files in the folder are kept.
        Load the model with `create_model(pretrained=folder)` or `DualEncoder.from_pretrained(folder)`.

        Raises:
            OSError: the files cannot be written.
            ValueError: the folder contains another model, whose files would remain next to the new ones; or the model's
                parameters no longer match its configuration, or the vocabulary file was missing when the model was
                created.
        """
        with new_model(folder, OWN_FILES) as half:
            self.write_files(half)

    def write_files(self, folder: Path) -> None:
        """Write the files of `save_pretrained` one by one into a temporary folder that no reader opens yet."""
        if self.config is None:
            raise ValueError("save_pretrained needs a configuration, but this model was created without config=")
        state = {name.replace(_COMPILED, ""): tensor for name, tensor in self.state_dict().items()}
        self._check_readable(state)
        values = self.config.to_dict()
        if self.vocabulary is not None:
            write_bytes(folder / VOCABULARY, self.vocabulary)
            values["text_cfg"]["vocabulary"] = VOCABULARY
        elif isinstance(text := self.config.text_cfg, BertConfig) and is_file_name(text.vocabulary):
            raise ValueError(
                f"the vocabulary {text.vocabulary} was missing next to the configuration when this model was created: "
                "put the file there and create the model again"
            )
        write_json(folder / CONFIG, {"model_type": "fastclip", **values})
        write_weights(folder / WEIGHTS, state, config=folder / CONFIG)

    def _check_readable(self, state: dict[str, Tensor]) -> None:
        """Raise a ValueError for a state dict that `create_model` could not load with this model's configuration."""
        assert self.config is not None
        expected = build_model(self.config, device="meta").state_dict()  # names and shapes, without memory
        if "logit_bias" in state:  # accepted when the model is loaded, even if the configuration has none
            expected["logit_bias"] = expected["logit_scale"]
        misshapen = [name for name, x in state.items() if name in expected and x.shape != expected[name].shape]
        if misfit := describe_misfit(expected, state, misshapen):
            raise ValueError(f"the model was changed and no longer matches its configuration: {misfit}")

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> DualEncoder:
        """Load a model from a local folder or from a repository on the Hugging Face Hub.

        Args:
            source: path that `create_model(pretrained=...)` accepts, such as a folder written by `save_pretrained`, or
                the name of a repository, ``owner/name``.
            revision, token, cache_dir, local_files_only: options of the download, passed to
                `huggingface_hub.snapshot_download`.
            **options: further options of `create_model`.

        Raises:
            FileNotFoundError: `source` is neither an existing path nor a repository on the Hub, the revision does not
                exist, or the Hub cannot be reached.
        """
        path = Path(source)
        if not path.exists():
            if not _REPOSITORY.fullmatch(str(source)):
                raise FileNotFoundError(f"the checkpoint {source} does not exist")
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

            try:
                snapshot = snapshot_download(
                    str(source),
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                    allow_patterns=["*.json", "*.safetensors", VOCABULARY],  # never pickles
                )
            except (FileNotFoundError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
                message = " ".join(str(error).split())
                raise FileNotFoundError(
                    f"{source} is not a local folder, and could not be downloaded from the Hugging Face Hub: {message}"
                ) from error
            path = Path(snapshot)
        return create_model(pretrained=path, **options)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the model to the Hugging Face Hub.

        Args:
            repo_id: name of the repository, ``owner/name``, which is created if it does not exist.
            private: create a private repository.
            token: access token (default: the one that `huggingface_hub` has stored).

        Returns:
            The address of the uploaded files on the Hub.
        """
        from tempfile import TemporaryDirectory

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="fastclip model"))


def create_model(
    name: str | None = None,
    pretrained: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    image_size: int | None = None,
    context_length: int | None = None,
    init_logit_scale: float | None = None,
    init_logit_bias: float | None = None,
) -> DualEncoder:
    """Create an image-text model, optionally with the weights of a checkpoint.

    The model is returned in training mode, with float32 parameters.

    Args:
        name: model name from `list_models`, or path of a configuration ending in ``.json``. The name may be left out
            if `pretrained` is a folder that contains a configuration. A folder is accepted in place of a name, too.
        pretrained: path of a checkpoint: a file in the format of OpenAI (TorchScript archive or state dict) or of
            open_clip (``.pt``, ``.safetensors``), or a folder in the format of Hugging Face (CLIPModel, AlignModel),
            of open_clip or of `DualEncoder.save_pretrained`. By default, weights are drawn from torch's global
            generator, with the initialisation of the model's authors. Nothing is downloaded.
        device: device of the parameters. "meta" creates the model without allocating weights.
        image_size: side of the input images in pixels (default: the checkpoint's, else the configuration's). Position
            embeddings of another size are interpolated, which is logged.
        context_length: tokens per text (default: the checkpoint's, else the configuration's). Position embeddings of
            CLIP's text tower are interpolated as for `image_size`.
        init_logit_scale: initial natural logarithm of the logit scale (default: the configuration's; SigLIP: log 10).
            A checkpoint's value replaces it.
        init_logit_bias: initial logit bias for the sigmoid loss (SigLIP: -10). By default the model has a bias only if
            the configuration or the checkpoint has one. A checkpoint's value replaces it.

    Returns:
        The model, whose `DualEncoder.config` describes it.

    Raises:
        ValueError: the name is unknown, the configuration is invalid, its activation contradicts the checkpoint's, or
            the checkpoint does not fit the model. The message names missing, unexpected and misshapen parameters.
        FileNotFoundError: a path does not exist.
    """
    options = {
        "image_size": image_size,
        "context_length": context_length,
        "init_logit_scale": init_logit_scale,
        "init_logit_bias": init_logit_bias,
    }
    config, checkpoint = resolve(name, pretrained)
    config = config.with_changes(**options)
    try:
        model = build_model(config, device=device)
    except (ValueError, AssertionError, ArithmeticError, LookupError, TypeError) as error:  # timm checks with assert
        raise ValueError(f"{name or pretrained}: {error}") from error
    if checkpoint is not None:
        changed = [option for option, value in options.items() if value is not None]
        load_weights(model, config, checkpoint, name or str(pretrained), changed=changed)
    return model


def without_padding(ids: Tensor, model: nn.Module) -> Tensor:
    """Cut token ids (B, L) to the longest text, whose features do not depend on the padding, except for rounding.

    Texts are cut if the model's text tower has a method ``lengths`` (`TextTransformer.lengths`). They should be on the
    host, because their lengths determine a shape.
    """
    lengths_of = getattr(getattr(model, "text", None), "lengths", None)
    return ids if lengths_of is None or not len(ids) else ids[:, : int(lengths_of(ids).max())]


def build_model(config: ModelConfig, *, device: torch.device | str = "cpu") -> DualEncoder:
    """Build the model of a configuration with newly initialised weights."""
    # Imported outside of the torch.device context: otherwise tensors that timm creates on import would be on `device`.
    with uncollected():
        from fastclip.models.towers.build import image_tower, text_tower

    with torch.device(device), _default_dtype(torch.float32):
        return DualEncoder(
            image_tower(config),
            text_tower(config),
            config=config,
            init_logit_scale=config.init_logit_scale,
            init_logit_bias=config.init_logit_bias,
        )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
