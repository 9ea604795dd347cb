"""A saved model can be read again, or saving it is refused."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastclip
from support import needs

needs("models")

import huggingface_hub
from huggingface_hub.errors import LocalEntryNotFoundError

from fastclip.models.dual_encoder import DualEncoder


def drawn(name: str = "ViT-tiny", **options: Any) -> DualEncoder:
    torch.manual_seed(0)
    return fastclip.create_model(name, **options)


def same_block_twice(model: DualEncoder) -> None:
    blocks: Any = model.text.get_submodule("transformer.resblocks")
    blocks[1] = blocks[0]


def compiled(model: DualEncoder) -> None:
    model.visual = torch.compile(model.visual)  # type: ignore[assignment]


@pytest.mark.parametrize("change", [compiled, same_block_twice])
def test_wrapped_and_tied_parameters_are_saved(change: Callable[[DualEncoder], None], tmp_path: Path) -> None:
    model = drawn()
    change(model)
    model.save_pretrained(tmp_path / "saved")
    again = fastclip.create_model(pretrained=tmp_path / "saved").state_dict()
    for name, x in model.state_dict().items():
        assert torch.equal(again[name.replace("_orig_mod.", "")], x)


def wider_head(model: DualEncoder) -> None:
    model.visual.head = nn.Linear(3, 64)  # type: ignore[assignment]


def another_part(model: DualEncoder) -> None:
    model.extra = nn.Linear(2, 2)


def parametrised(model: DualEncoder) -> None:
    nn.utils.parametrizations.weight_norm(model.visual.head)


def without_its_bias(model: DualEncoder) -> None:
    model.config = model.config.with_changes(init_logit_bias=-10)  # type: ignore[union-attr]


def bias_of_another_shape(model: DualEncoder) -> None:
    model.logit_bias = nn.Parameter(torch.zeros(1))


@pytest.mark.fault(
    "A model was modified and no longer fits its configuration when it is saved",
    "It is refused, because it could not be loaded again. The folder is unchanged",
)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (wider_head, r"1 unexpected: visual.head.bias; 1 of another shape: visual.head.weight"),
        (without_its_bias, "1 missing: logit_bias"),
        (bias_of_another_shape, "1 of another shape: logit_bias"),
        (another_part, "2 unexpected: extra.weight, extra.bias"),
        (parametrised, "1 missing: visual.head.weight; 2 unexpected: visual.head.param"),
    ],
)
def test_changed_models_are_refused(change: Callable[[DualEncoder], None], told: str, tmp_path: Path) -> None:
    model = drawn()
    change(model)
    with pytest.raises(ValueError, match=f"the model was changed and no longer matches its configuration.*{told}"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.fault(
    "The folder of a model has disappeared, or the working directory has changed, when the model is saved",
    "Its vocabulary is saved all the same",
)
def test_vocabulary_is_kept_from_when_the_model_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn("align-tiny").save_pretrained(tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    models = [fastclip.create_model(pretrained=path) for path in ("first", tmp_path / "first")]
    vocabulary = (tmp_path / "first" / "vocab.txt").read_bytes()
    shutil.rmtree(tmp_path / "first")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
        assert (tmp_path / str(number) / "vocab.txt").read_bytes() == vocabulary


def test_vocabulary_that_was_never_there_is_told(tmp_path: Path) -> None:
    drawn("align-tiny").save_pretrained(tmp_path / "first")
    (tmp_path / "first" / "vocab.txt").unlink()
    model = fastclip.create_model(pretrained=tmp_path / "first")
    with pytest.raises(ValueError, match=r"vocab.txt was missing next to the configuration when .* put the file there"):
        model.save_pretrained(tmp_path / "second")


@pytest.mark.parametrize("source", ["runs/last/model", "nothere", "./a/b", "/nothere/model"])
def test_path_that_does_not_exist_is_no_repository(source: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"the checkpoint {source} does not exist"):
        DualEncoder.from_pretrained(source)


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (
            LocalEntryNotFoundError("no connection"),
            FileNotFoundError,
            "owner/name is not a local folder, and could not be downloaded .*no connection",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), OSError, "^.Errno 28. No space"),
    ],
)
def test_what_the_hub_does_not_give_is_told(
    error: OSError, kind: type[OSError], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:

    def fails(*args: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(kind, match=told):
        DualEncoder.from_pretrained("owner/name")


@pytest.mark.parametrize("value", [-10, -10.0, np.float32(-10), np.int64(-10)])
def test_numbers_of_any_kind_begin_scale_and_bias(value: Any) -> None:
    model = drawn(init_logit_bias=value, init_logit_scale=-value)
    assert model.logit_bias is not None and model.logit_bias.item() == -10 and model.logit_scale.item() == 10
    assert model.logit_bias.dtype == model.logit_scale.dtype == torch.float32
    DualEncoder(nn.Identity(), nn.Identity(), init_logit_bias=value, init_logit_scale=2)


@pytest.mark.parametrize(
    ("value", "told"), [(float("nan"), "a finite number, got nan"), ("x", "float, got 'x'"), (True, "float, got True")]
)
def test_what_is_no_number_is_refused(value: Any, told: str) -> None:
    for name in ("init_logit_bias", "init_logit_scale"):
        with pytest.raises(ValueError, match=f"{name} must be {told}"):
            fastclip.create_model("ViT-tiny", **{name: value})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype_changes_no_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    model = drawn()
    model.save_pretrained(tmp_path)
    torch.set_default_dtype(dtype)
    try:
        models = drawn(), fastclip.create_model(pretrained=tmp_path)
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    for again in models:
        for name, x in model.state_dict().items():
            assert x.dtype == again.state_dict()[name].dtype and torch.equal(x, again.state_dict()[name])
