"""The model: an image tower and a text tower that meet in one embedding space."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
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

__all__ = ["DualEncoder", "MAX_LOG_SCALE", "build_model", "create_model"]

_COMPILED = "_orig_mod."  # what torch.compile puts before the names of a module's parameters
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")
MAX_LOG_SCALE = math.log(100)  # Radford et al. 2021, section 2.5: the logits are scaled by 100 at most


class DualEncoder(nn.Module):
    """Radford et al. 2021, figure 3; made by `fastclip.create_model`.

    State dict keys: ``visual.``, ``text.``, ``logit_scale`` and, for the sigmoid loss, ``logit_bias``. The scale is
    stored as its logarithm.

    Args:
        visual: images (B, 3, H, W) -> features (B, D).
        text: token ids (B, L) -> features (B, D) of the same D.
        config: what both were made from; `save_pretrained` needs it.
        init_logit_scale: a logarithm.
        init_logit_bias: given, the model carries ``logit_bias`` (SigLIP: -10, with a scale of log 10).

    Attributes:
        vocabulary: what the vocab.txt beside `config` holds, which may be gone when the model is saved; or None.
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
        """images (B, 3, H, W) float -> features (B, D), of unit length with ``normalize``."""
        features = self.visual(images)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, ids: Tensor, normalize: bool = False) -> Tensor:
        """Token ids (B, L) -> features (B, D), of unit length with ``normalize``."""
        features = self.text(ids)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, images: Tensor, ids: Tensor, normalize: bool = True) -> tuple[Tensor, ...]:
        """Normalised image features (M, D), normalised text features (N, D), the exponentiated logit scale.

        A model with ``logit_bias`` returns it fourth, as open_clip's: what comes out is what the loss takes. Without
        ``normalize`` features are of the length and dtype that the towers give them, bfloat16 under autocast:
        fastclip's losses normalise without rounding once more.
        """
        image_features = self.encode_image(images, normalize=normalize)
        text_features = self.encode_text(ids, normalize=normalize)
        if self.logit_bias is not None:
            return image_features, text_features, self.logit_scale.exp(), self.logit_bias
        return image_features, text_features, self.logit_scale.exp()

    def lock_image_tower(self) -> None:
        """Freeze the image tower (LiT, Zhai et al. 2022): no gradients, and eval mode whatever `train` asks for.

        In eval mode no BatchNorm statistics move and nothing is dropped out.
        """
        self._lock("visual")

    def lock_text_tower(self) -> None:
        """Freeze the text tower, as `lock_image_tower` does the other."""
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
        """Keep the blocks' inputs only and compute them again in the backward pass: less memory, a third more time."""
        for tower in (self.visual, self.text):
            tower.set_grad_checkpointing(enable)  # type: ignore[operator]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` (and a vocabulary of its own) into `folder`.

        `create_model(pretrained=folder)` and `DualEncoder.from_pretrained(folder)` read them. They replace those there,
        all or none; other files stay.

        Raises:
            OSError: the files cannot be written.
            ValueError: `folder` holds another model, of which files would stay beside these; the model was changed, so
                that its parameters are not those of its configuration; its vocabulary was not there when it was made.
        """
        with new_model(folder, OWN_FILES) as half:
            self.write_files(half)

    def write_files(self, folder: Path) -> None:
        """Write what `save_pretrained` writes into a folder that nobody reads yet."""
        if self.config is None:
            raise ValueError("this model was made without a configuration, which save_pretrained has to write")
        state = {name.replace(_COMPILED, ""): tensor for name, tensor in self.state_dict().items()}
        self._check_readable(state)
        values = self.config.to_dict()
        if self.vocabulary is not None:
            write_bytes(folder / VOCABULARY, self.vocabulary)
            values["text_cfg"]["vocabulary"] = VOCABULARY
        elif isinstance(text := self.config.text_cfg, BertConfig) and is_file_name(text.vocabulary):
            raise ValueError(f"the vocabulary {text.vocabulary} of this model was not beside its configuration")
        write_json(folder / CONFIG, {"model_type": "fastclip", **values})
        write_weights(folder / WEIGHTS, state, config=folder / CONFIG)

    def _check_readable(self, state: dict[str, Tensor]) -> None:
        """Refuse what `create_model` could not read again."""
        assert self.config is not None
        expected = build_model(self.config, device="meta").state_dict()  # names and shapes, without memory
        if "logit_bias" in state:  # which a reader takes, whatever the configuration says
            expected["logit_bias"] = expected["logit_scale"]
        misshapen = [name for name, x in state.items() if name in expected and x.shape != expected[name].shape]
        if misfit := describe_misfit(expected, state, misshapen):
            raise ValueError(
                f"the model was changed and does not fit its configuration, which is written too: {misfit}"
            )

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
        """Return the model of a folder that `save_pretrained` wrote, or of a repository on Hugging Face's hub.

        Args:
            source: any folder that `create_model(pretrained=)` reads, or the repository's name, ``owner/name``.
            revision, token, cache_dir, local_files_only: of the repository, as `huggingface_hub.snapshot_download`'s.
            options: `create_model`'s.

        Raises:
            FileNotFoundError: there is no such folder, and no such repository or revision, or the hub does not answer.
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
                    allow_patterns=["*.json", "*.safetensors", VOCABULARY],  # pickles stay there
                )
            except (FileNotFoundError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
                message = " ".join(str(error).split())
                raise FileNotFoundError(
                    f"{source} is no folder here, and Hugging Face's hub does not give it: {message}"
                ) from error
            path = Path(snapshot)
        return create_model(pretrained=path, **options)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload what `save_pretrained` writes to ``owner/name`` on Hugging Face's hub, and return its address."""
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
    """Return an image-text model, in training mode, in float32.

    Args:
        name: one of `list_models`, or the path of a configuration ending in ``.json``. May be left out when
            `pretrained` is a folder that holds its configuration.
        pretrained: path of a checkpoint: a file of OpenAI (TorchScript archive or state dict) or open_clip (.pt,
            .safetensors), or a folder of Hugging Face (CLIPModel, AlignModel), open_clip or `save_pretrained`. Without,
            weights are drawn from torch's global generator as the authors of the model drew them.
        device: "meta" makes no weights at all.
        image_size: pixels, in place of the checkpoint's or else the configuration's. Position embeddings of another
            size are interpolated, and that is logged. Left out, a checkpoint keeps the size that its weights have,
            whatever the configuration says.
        context_length: tokens a text, likewise.
        init_logit_scale: a logarithm, in place of the configuration's (SigLIP: log 10).
        init_logit_bias: given, the model carries ``logit_bias`` for the sigmoid loss (SigLIP: -10).

    Raises:
        ValueError: the name is unknown; the configuration or the checkpoint does not fit, with the names of missing,
            unexpected and mis-shaped parameters; activations contradict each other.
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
    except (ValueError, AssertionError, ArithmeticError, LookupError, TypeError) as error:  # timm asserts
        raise ValueError(f"{name or pretrained}: {error}") from error
    if checkpoint is not None:
        changed = [option for option, value in options.items() if value is not None]
        load_weights(model, config, checkpoint, name or str(pretrained), changed=changed)
    return model


def build_model(config: ModelConfig, *, device: torch.device | str = "cpu") -> DualEncoder:
    """Return a model of `config` with new weights."""
    with uncollected():  # and outside of torch.device, which tensors of timm would obey
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
