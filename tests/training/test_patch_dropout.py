"""`--patch-dropout`: fewer patches in training, all of them elsewhere, and the same bits again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support import needs

needs("train")

from fastclip import create_model
from fastclip.training import Run, plan, train
from fastclip.training.options import read_options
from fastclip.training.planning.operations import operations_of
from support.digits_run import digits_run


def run(folder: Path, **changed: Any) -> Run:
    return train(digits_run(folder, **{"patch_dropout": 0.5, **changed}))


def test_training_sees_half_of_the_patches_and_the_class_token() -> None:
    torch.manual_seed(0)
    model, images = create_model("ViT-tiny"), torch.rand(4, 3, 32, 32)
    whole = model.eval().encode_image(images)
    model.set_patch_dropout(0.5)
    torch.testing.assert_close(model.eval().encode_image(images), whole, rtol=0, atol=0)
    seen = []
    model.visual.blocks[0].register_forward_pre_hook(lambda block, arguments: seen.append(arguments[0].shape[1]))
    torch.manual_seed(1)
    first = model.train().encode_image(images)
    assert seen == [1 + 8] and not torch.equal(first, whole)
    assert not torch.equal(model.encode_image(images), first)  # other patches
    torch.manual_seed(1)
    assert torch.equal(model.encode_image(images), first)
    model.set_patch_dropout(0.99)
    model.encode_image(images)
    assert seen[-1] == 1 + 1
    model.set_patch_dropout(0)
    assert torch.equal(model.encode_image(images), whole)


def test_run_with_caching_or_a_resume_draws_the_same_patches(tmp_path: Path) -> None:
    cached = {"micro_batch": 8, "keep_graphs": 0}
    whole = run(tmp_path / "a", **cached)
    assert whole.losses != run(tmp_path / "b", **cached, patch_dropout=0.0).losses
    begun = run(tmp_path / "c", **cached, stop_after=1)
    assert begun.losses + run(tmp_path / "c", **{**cached, "keep_graphs": 2}, resume="auto").losses == whole.losses
    assert read_options(tmp_path / "c" / "config.yaml").patch_dropout == 0.5
    assert "patch_drop" not in "".join(create_model(pretrained=tmp_path / "c" / "model").state_dict())


def test_plan_and_operations_count_the_patches_that_are_left() -> None:
    model = create_model("ViT-B-32", device="meta")
    before, memory = operations_of(model), plan(model, batch_size=64, device="cpu").activations
    model.set_patch_dropout(0.5)
    after = operations_of(model)
    assert (1 + 24) / (1 + 49) < after.image / before.image < 0.52 and after.texts == before.texts
    assert plan(model, batch_size=64, device="cpu").activations < 0.8 * memory


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"patch_dropout": 1.0}, "--patch-dropout must be at least 0 and below 1, got 1.0"),
        ({"lock_image": True}, "--patch-dropout has no effect on a frozen tower: leave it or --lock-image out"),
        ({"model": "RN-tiny"}, r"--patch-dropout 0.5: only a ViT can leave out patches"),
    ],
)
def test_option_that_cannot_be_used_is_an_error(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **changed)
