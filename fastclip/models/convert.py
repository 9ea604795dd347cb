"""Writing a model in the form of open_clip or Hugging Face."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from fastclip.models.config import EfficientNetConfig, ModelConfig, write_json
from fastclip.models.conversion import map_names, to_form
from fastclip.models.dual_encoder import DualEncoder
from fastclip.models.huggingface import write_huggingface_config

__all__ = ["FORMS", "convert"]

FORMS = ("fastclip", "open_clip", "huggingface")


def convert(model: DualEncoder, target: str | Path, *, form: str) -> None:
    """Write `model` to `target` in a form that others load.

    Args:
        target: for "open_clip" a file ending in ``.pt`` or ``.safetensors``, or a folder (``local-dir:`` of open_clip's
            `create_model`); for "huggingface" (CLIPModel, AlignModel) and "fastclip" a folder.
        form: "open_clip", "huggingface" or "fastclip".

    Raises:
        ValueError: the form has no such model; nothing is written.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    config, target = model.config, Path(target)
    if config is None:
        raise ValueError("this model was made without a configuration, which convert needs")
    is_file = target.suffix in (".pt", ".safetensors")
    if is_file and form != "open_clip":
        raise ValueError(f"{form} is written as a folder, got {target}")
    image = config.vision_cfg
    if form == "huggingface" and isinstance(image, EfficientNetConfig) and image.depthwise_padding is None:
        raise ValueError(
            f"{image.timm_model_name} pads as TensorFlow does, by the size of each input; Hugging Face's AlignModel "
            "cannot. Models with depthwise_padding in vision_cfg convert"
        )
    if form == "fastclip":
        model.save_pretrained(target)
        return

    state = model.state_dict()
    tensors = {name: tensor.cpu() for name, tensor in to_form(state, map_names(state, config, form)).items()}
    folder = target.parent if is_file else target
    folder.mkdir(parents=True, exist_ok=True)
    if is_file:
        _write(tensors, target)
    elif form == "open_clip":
        _write(tensors, target / "open_clip_model.safetensors")
        write_json(_open_clip_config(config), target / "open_clip_config.json")
    else:
        if isinstance(image, EfficientNetConfig):  # AlignModel has BERT's pooler, and uses it for nothing
            width = tensors["text_model.embeddings.LayerNorm.weight"].numel()
            tensors["text_model.pooler.dense.weight"] = torch.zeros(width, width)
            tensors["text_model.pooler.dense.bias"] = torch.zeros(width)
        write_huggingface_config(config, target)
        _write(tensors, target / "model.safetensors")


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    if file.suffix == ".pt":
        torch.save(tensors, file)
        return
    from safetensors.torch import save_file

    save_file(tensors, file, metadata={"format": "pt"})


def _open_clip_config(config: ModelConfig) -> dict[str, object]:
    model: dict[str, object] = {"embed_dim": config.embed_dim}
    if config.quick_gelu:
        model["quick_gelu"] = True
    for name, part in (("vision_cfg", config.vision_cfg), ("text_cfg", config.text_cfg)):
        model[name] = {key: value for key, value in asdict(part).items() if key not in ("tower", "drop_path")}
    if config.init_logit_bias is not None:
        model |= {"init_logit_scale": config.init_logit_scale, "init_logit_bias": config.init_logit_bias}
    options = config.preprocess_cfg
    preprocess = {"mean": options.mean, "std": options.std, "interpolation": options.interpolation}
    return {"model_cfg": model, "preprocess_cfg": preprocess}
