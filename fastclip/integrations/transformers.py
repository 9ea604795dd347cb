"""Patch that replaces the losses of CLIP, SigLIP and ALIGN in Hugging Face's transformers by fastclip's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastclip.distributed import check_group
from fastclip.integrations.patching import Calls, check_names, check_same_loss, check_version, original, replace
from fastclip.losses.contrastive import contrastive_loss
from fastclip.losses.sigmoid import sigmoid_loss

__all__ = ["patch_transformers"]

_PACKAGE = "transformers"
_OLDEST = (5, 0)
_LEFT_OUT = ("logits_per_image", "logits_per_text")  # N x N
_INSTEAD = "call fastclip's losses in your training code"


def patch_transformers(*, group: Any = None) -> None:
    """Make ``CLIPModel``, ``SiglipModel`` and ``AlignModel`` of transformers train with fastclip's losses.

    The patch takes effect if a model is in training mode and is called with ``return_loss=True``, which the `Trainer`
    passes on from the data collator. Then ``loss`` and its gradients are those of transformers up to rounding (the loss
    is float32 for 16-bit models), and no N x N matrix is stored. ``logits_per_image`` and ``logits_per_text`` are None,
    and the tuple of ``return_dict=False`` does not contain them. In evaluation mode, or without ``return_loss``, the
    model behaves as before, and returns logits.

    Under DDP, the loss of transformers covers the pairs of one process. The patch keeps this by default.

    If a function of a model's loss was replaced (such as ``modeling_clip.image_text_contrastive_loss``), the model
    keeps that loss, and a warning is logged once.

    Models of other classes (``Siglip2Model``, ``ChineseCLIPModel``, ``VisionTextDualEncoderModel``, ...) are not
    changed, nor are models whose forward has been wrapped as an instance attribute: patch before `Trainer` or
    accelerate prepares the model. `fastclip.integrations.unpatch` undoes the patch. A second call changes the group.

    Args:
        group: a process group, or "world" for the group of all processes, which is looked up when the loss is computed.
            The loss then covers the pairs of all processes of the group, as in `fastclip.contrastive_loss` and
            `sigmoid_loss` with ``group``: each process returns its share, and DDP's mean of the gradients is the
            gradient of the whole batch. If `torch.distributed` is not initialised when the loss is computed, "world"
            is this process alone.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the group is a string other than "world", or this process is not a member of it.
        TypeError: the group is not a process group.
        RuntimeError: transformers is older than 5.0, a forward was changed (by a later version or by other code), or
            `group` is a process group (not "world") but `torch.distributed` is not available or not initialised.
            Nothing is replaced.
    """
    from transformers import __version__ as version

    if isinstance(group, str):
        if group != "world":
            raise ValueError(f'group must be a process group, "world" or None, got {group!r}')
    else:
        check_group(group)
    check_version(_PACKAGE, version, _OLDEST, None, _INSTEAD)
    forwards = {}
    try:
        for kind in _kinds():
            dense = original(_PACKAGE, kind.model)
            _check(kind, dense)
            forwards[kind.model] = _forward(kind, dense, Calls(kind.model, dense, kind.honoured), group=group)
    except (AttributeError, ImportError, TypeError, ValueError) as error:  # a later version has moved or renamed a part
        raise RuntimeError(f"fastclip's patch does not fit transformers {version} ({error}): {_INSTEAD}") from error
    replace(_PACKAGE, forwards)


class _Kind(NamedTuple):
    """A class of models that can be patched."""

    model: Any  # the class
    output: Any  # class of the output of its forward
    encode: Callable[..., tuple[Any, Any, Tensor, Tensor]]  # returns outputs of both towers, image and text embeddings
    loss: Callable[..., Tensor]  # called with (model, normalised images, normalised texts, **options)
    tiny: Any  # small configuration without dropout, for `_check`
    honoured: tuple[str, ...] = ()  # methods that `encode` calls as the original forward does


def _kinds() -> tuple[_Kind, ...]:
    from transformers.models.align import modeling_align as align
    from transformers.models.clip import modeling_clip as clip
    from transformers.models.siglip import modeling_siglip as siglip

    width: dict[str, Any] = {"hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1, "num_hidden_layers": 1}
    words: dict[str, Any] = {**width, "vocab_size": 8, "max_position_embeddings": 4}
    pixels: dict[str, Any] = {**width, "image_size": 4, "patch_size": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 7, "pad_token_id": 1}
    undropped = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0}
    one_block: dict[str, Any] = {key: [1] for key in ("strides", "num_block_repeats", "expand_ratios")}
    one_block |= {"kernel_sizes": [3], "in_channels": [32], "out_channels": [8], "hidden_dim": 8, "image_size": 4}
    one_block |= {"width_coefficient": 1.0, "depth_coefficient": 1.0, "drop_connect_rate": 0.0}
    return (
        _Kind(
            clip.CLIPModel,
            clip.CLIPOutput,
            _encode_with("get_image_features", "get_text_features"),
            _clip_loss,
            clip.CLIPConfig(text_config=words | ends, vision_config=pixels, projection_dim=4),
            ("get_image_features", "get_text_features"),
        ),
        _Kind(
            siglip.SiglipModel,
            siglip.SiglipOutput,
            _encode_with("vision_model", "text_model"),
            _siglip_loss,
            siglip.SiglipConfig(text_config=words | ends, vision_config=pixels),
        ),
        _Kind(
            align.AlignModel,
            align.AlignOutput,
            _encode_align,
            _align_loss,
            align.AlignConfig(text_config=words | undropped, vision_config=one_block, projection_dim=8),
        ),
    )


def _forward(kind: _Kind, dense: Callable[..., Any], calls: Calls, **options: Any) -> Callable[..., Any]:
    """Return the new forward. `dense` is the original forward, which calls `calls`. `options` are those of the loss."""
    from transformers.utils.generic import can_return_tuple

    @can_return_tuple
    def fused(self: Any, *args: Any, **kwargs: Any) -> Any:
        image_output, text_output, image, text = kind.encode(self, *args, **kwargs)
        image = image / image.norm(dim=-1, keepdim=True)
        text = text / text.norm(dim=-1, keepdim=True)
        return kind.output(
            loss=kind.loss(self, image.to(text.device), text, **_resolved(options)),
            image_embeds=image,
            text_embeds=text,
            vision_model_output=image_output,
            text_model_output=text_output,
        )

    position = [*inspect.signature(dense).parameters].index("return_loss") - 1  # not counting self

    @functools.wraps(dense)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = args[position] if len(args) > position else kwargs.get("return_loss")
        return (fused if wanted and self.training and not calls.replaced(self) else dense)(self, *args, **kwargs)

    return forward


def _resolved(options: dict[str, Any]) -> dict[str, Any]:
    if options.get("group") != "world":
        return options
    # Looked up at each call, because the patch may precede `init_process_group`
    return options | {"group": dist.group.WORLD if dist.is_available() else None}


def _encode_with(image_encoder: str, text_encoder: str) -> Callable[..., tuple[Any, Any, Tensor, Tensor]]:
    """Return an encoder that calls these attributes, which subclasses may replace, as the model's forward does."""

    def encode(
        self: Any,
        input_ids: Any = None,
        pixel_values: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        return_loss: Any = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any, Tensor, Tensor]:
        image = getattr(self, image_encoder)(
            pixel_values=pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs
        )
        text = getattr(self, text_encoder)(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )
        return image, text, image.pooler_output, text.pooler_output

    return encode


def _encode_align(
    self: Any,
    input_ids: Any = None,
    pixel_values: Any = None,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    position_ids: Any = None,
    inputs_embeds: Any = None,
    return_loss: Any = None,
    **kwargs: Any,
) -> tuple[Any, Any, Tensor, Tensor]:
    image = self.vision_model(pixel_values=pixel_values, **kwargs)
    text = self.text_model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        token_type_ids=token_type_ids,
        position_ids=position_ids,
        inputs_embeds=inputs_embeds,
        **kwargs,
    )
    return image, text, image[1], self.text_projection(text[0][:, 0, :])


def _clip_loss(self: Any, image: Tensor, text: Tensor, **options: Any) -> Any:
    scale = self.logit_scale.exp().to(text.device)
    return contrastive_loss(image, text, scale, normalize=False, **options)


def _siglip_loss(self: Any, image: Tensor, text: Tensor, **options: Any) -> Any:
    scale, bias = self.logit_scale.to(text.device).exp(), self.logit_bias.to(text.device)
    return sigmoid_loss(image, text, scale, bias, normalize=False, **options)


def _align_loss(self: Any, image: Tensor, text: Tensor, **options: Any) -> Any:
    """Return the mean of both directions, as transformers does. The ALIGN paper uses the sum."""
    scale = 1 / self.temperature
    return contrastive_loss(image, text, scale, normalize=False, label_smoothing=0.1, **options)


def _check(kind: _Kind, dense: Callable[..., Any]) -> None:
    """Raise RuntimeError unless both forwards of a tiny random model give the same loss, gradients and fields."""
    name = f"{kind.model.__name__}.forward of transformers"
    known = ("args", *inspect.signature(kind.encode).parameters)
    check_names(f"the parameters of {name}", inspect.signature(dense).parameters, known)
    # The user's random state and default device must not change
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = kind.model(kind.tiny).double().train()
        batch = {
            "pixel_values": torch.randn(3, 3, 4, 4, dtype=torch.float64),
            "input_ids": torch.tensor([[2, 3, 7], [3, 4, 7], [4, 5, 7]]),
            "return_loss": True,
        }
        fused = _forward(kind, dense, Calls(kind.model, dense), backend="reference")
        check_same_loss(
            name,
            lambda: dense(model, **batch).loss,
            lambda: fused(model, **batch).loss,
            [x for x in model.parameters() if x.requires_grad],
        )
        check_names(f"the output of {name}", dense(model, **batch), {*fused(model, **batch), *_LEFT_OUT})
