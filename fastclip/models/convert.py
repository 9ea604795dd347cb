"""Convert a model to the file format of open_clip or Hugging Face."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from fastclip.models.checkpoints.huggingface import write_huggingface_config
from fastclip.models.checkpoints.parameter_names import map_names, to_form
from fastclip.models.checkpoints.writing import HUGGINGFACE_FILES, OPEN_CLIP_FILES, OWN_FILES, new_model, write_weights
from fastclip.models.config import OPEN_CLIP_PREPROCESS, BertConfig, EfficientNetConfig, ModelConfig
from fastclip.models.dual_encoder import DualEncoder
from fastclip.models.processor import PROCESSOR_FILES
from fastclip.models.tokenizers.vocabulary import TOKENIZER_FILES, VOCABULARY
from fastclip.system.durable import new_file, write_bytes, write_json

__all__ = ["FORMS", "check_target", "convert", "is_file_target"]

logger = logging.getLogger(__name__)
FORMS = {"fastclip": OWN_FILES, "open_clip": OPEN_CLIP_FILES, "huggingface": HUGGINGFACE_FILES}


def convert(model: DualEncoder, target: str | Path, *, form: str, source: str | Path | None = None) -> None:
    """Write a model in the format of another library.

    Existing files of the same names are replaced, either all of them or none.

    Args:
        model: the model to write.
        target: output path. For "open_clip", a file ending in ``.pt`` or ``.safetensors``, or a folder (which
            open_clip's `create_model` loads as ``local-dir:...``). For "huggingface" (CLIPModel, AlignModel) and
            "fastclip", a folder.
        form: "open_clip", "huggingface" or "fastclip".
        source: path that the model was read from, which is protected from being overwritten.

    Raises:
        OSError: `target` cannot be written. Existing files are unchanged.
        ValueError: the format cannot represent the model, or `target` is `source` or a folder that contains another
            model. Nothing is written.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    config, target = model.config, Path(target)
    if config is None:
        raise ValueError("convert needs a configuration, but this model was created without config=")
    check_target(target, form, None if source is None else Path(source))
    image = config.vision_cfg
    if form == "huggingface" and isinstance(image, EfficientNetConfig) and image.depthwise_padding is None:
        raise ValueError(
            f"{image.timm_model_name} uses TensorFlow's padding, which depends on the size of each input, and Hugging "
            "Face's AlignModel cannot do that: only models with depthwise_padding in vision_cfg can be converted"
        )
    if form == "fastclip":
        model.save_pretrained(target)
        return

    config_name, weights_name = FORMS[form][:2]
    state = model.state_dict()
    tensors = {name: tensor.cpu() for name, tensor in to_form(state, map_names(state, config, form)).items()}
    if is_file_target(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_file(tensors, target)
    elif form == "open_clip":
        with new_model(target, OPEN_CLIP_FILES) as half:
            write_json(half / config_name, _open_clip_config(config))
            write_weights(half / weights_name, tensors, config=half / config_name)
    else:
        if isinstance(image, EfficientNetConfig):  # AlignModel expects weights of BERT's pooler, but never uses them
            width = tensors["text_model.embeddings.LayerNorm.weight"].numel()
            tensors["text_model.pooler.dense.weight"] = torch.zeros(width, width)
            tensors["text_model.pooler.dense.bias"] = torch.zeros(width)
        # Files of another model that transformers would read in preference to the files written here
        read_first: tuple[str, ...] = PROCESSOR_FILES[:1]
        if isinstance(config.text_cfg, BertConfig):
            read_first += TOKENIZER_FILES if model.vocabulary else (*TOKENIZER_FILES, VOCABULARY)
        files = tuple(name for name in HUGGINGFACE_FILES if name not in read_first)
        with new_model(target, files, read_first=read_first) as half:
            write_huggingface_config(config, half)
            if model.vocabulary is not None:
                write_bytes(half / VOCABULARY, model.vocabulary)
            write_weights(half / weights_name, tensors, config=half / config_name)


def is_file_target(target: Path) -> bool:
    """Return True if `convert` writes a single file to `target`, and False if it writes a folder."""
    return target.suffix in (".pt", ".safetensors") and not target.is_dir()


def check_target(target: Path, form: str, source: Path | None = None) -> None:
    """Check the output path of `convert` before any work is done.

    Raises:
        ValueError: `target` is a file but `form` needs a folder, or writing it would overwrite `source`.
    """
    if is_file_target(target) and form != "open_clip":
        raise ValueError(f"the format {form} is written as a folder, but {target} is a file name: choose a folder")
    if not is_file_target(target) and target.is_file():
        raise ValueError(
            f"{target} is a file, not a folder: choose a folder, or for open_clip a file name that ends in .pt or "
            ".safetensors"
        )
    if source is None or not target.exists():
        return
    read = [source, *source.iterdir()] if source.is_dir() else [source]
    # Files are compared as well as folders, because a file of the target may be a link into the source.
    for path in (target, *(target / name for name in FORMS[form])):
        if path.exists() and any(path.samefile(file) for file in read if file.exists()):
            raise ValueError(
                f"{path} is the source that the model is read from, which is not overwritten: choose another target"
            )


def _write_file(tensors: dict[str, Tensor], file: Path) -> None:
    if file.suffix == ".safetensors":
        write_weights(file, tensors)
        return
    with new_file(file) as half:
        try:
            torch.save(tensors, half)
        except RuntimeError as error:  # torch's only type for operating system errors, without an errno
            raise OSError(f"{file} was not written: {str(error).splitlines()[0]}") from error


def _open_clip_config(config: ModelConfig) -> dict[str, object]:
    model: dict[str, object] = {"embed_dim": config.embed_dim}
    if config.quick_gelu:
        model["quick_gelu"] = True
    for name, part in (("vision_cfg", config.vision_cfg), ("text_cfg", config.text_cfg)):
        model[name] = {key: value for key, value in asdict(part).items() if key not in ("tower", "drop_path")}
    if config.init_logit_bias is not None:
        model |= {"init_logit_scale": config.init_logit_scale, "init_logit_bias": config.init_logit_bias}
    options = config.preprocess_cfg
    preprocess = {name: getattr(options, name) for name in OPEN_CLIP_PREPROCESS}
    if options.resize_size is not None:
        logger.warning("open_clip has no resize_size: it will resize images to %d pixels", config.vision_cfg.image_size)
    return {"model_cfg": model, "preprocess_cfg": preprocess}
