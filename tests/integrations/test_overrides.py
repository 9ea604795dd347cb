"""Losses changed by other code: a patch leaves them as they are, and fastclip's own classes refuse them."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastclip
from support import needs

needs("models")

import open_clip.loss
from transformers.models.clip import modeling_clip
from transformers.models.siglip.modeling_siglip import SiglipConfig, SiglipModel

from fastclip.integrations import patch_open_clip, patch_transformers, unpatch
from support.patched_ranks import clip_batch, clip_model


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    unpatch()


class Soft(open_clip.loss.ClipLoss):
    """A loss whose targets are not a single text each."""

    def get_ground_truth(self, device: Any, num_logits: int) -> Tensor:
        return torch.full((num_logits, num_logits), 0.1 / num_logits).fill_diagonal_(0.9)


class SoftCoCa(Soft, open_clip.loss.CoCaLoss):
    pass


class SoftDistill(Soft, open_clip.loss.DistillClipLoss):
    pass


class Warm(open_clip.loss.DistillClipLoss):
    def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        return super().dist_loss(teacher_logits / 2, student_logits / 2)


class Margin(open_clip.loss.SigLipLoss):
    def get_logits(self, *args: Any) -> Tensor:
        return super().get_logits(*args) + 1


class Twice(open_clip.loss.SigLipLoss):
    def _loss(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super()._loss(*args, **kwargs)


def with_attribute() -> Any:
    loss = open_clip.loss.ClipLoss()
    loss.get_logits = lambda image, text, scale, logit_bias: (2 * scale * image @ text.T, scale * text @ image.T)
    return loss


CHANGED: dict[str, tuple[Callable[[], Any], str]] = {
    "Soft": (Soft, "Soft.get_ground_truth"),
    "SoftCoCa": (lambda: SoftCoCa(2.0, 1.0), "SoftCoCa.get_ground_truth"),
    "SoftDistill": (SoftDistill, "SoftDistill.get_ground_truth"),
    "Warm": (Warm, "Warm.dist_loss"),
    "Margin": (Margin, "Margin.get_logits"),
    "Twice": (Twice, "Twice._loss"),
    "an instance": (with_attribute, "ClipLoss.get_logits"),
}


def batch_of(loss: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = torch.nn.functional.normalize(torch.randn(2, 8, 4, generator=generator), dim=-1)
    inputs = [image, text, torch.tensor(10.0)]
    if isinstance(loss, open_clip.loss.SigLipLoss):
        inputs.append(torch.tensor(-3.0))
    if isinstance(loss, open_clip.loss.DistillClipLoss):
        inputs += [image.flip(0), text, torch.tensor(5.0)]
    if isinstance(loss, open_clip.loss.CoCaLoss):
        inputs[2:2] = [torch.randn(8, 5, 7, generator=generator), torch.ones(8, 5, dtype=torch.int64)]
    return inputs


def values(loss: Any) -> list[Tensor]:
    """Return the losses and the gradients of the features."""
    image, text, *others = batch_of(loss)
    leaves = [x.clone().requires_grad_() for x in (image, text)]
    found = loss(*leaves, *others)
    found = found if isinstance(found, tuple) else (found,)
    return [*found, *torch.autograd.grad(sum(found), leaves)]


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.fault("A subclass of open_clip's losses is patched", "Its own loss is computed, with one warning")
def test_changed_loss_of_open_clip_keeps_its_numbers(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, told = CHANGED[name]
    loss = make()
    expected = values(loss)
    patch_open_clip()
    with caplog.at_level(logging.WARNING):
        for other in (loss, make(), copy.deepcopy(loss)):
            torch.testing.assert_close(values(other), expected, rtol=0, atol=0)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("open_clip.loss computes the loss of") and message.endswith(f"were replaced: {told}")


def test_what_is_replaced_after_the_patch_is_called(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A method of the class, or a function of its module, that is replaced after the patch is called."""
    loss = open_clip.loss.ClipLoss()
    plain = values(loss)
    patch_open_clip()
    get_logits = open_clip.loss.ClipLoss.get_logits
    with monkeypatch.context() as patches:
        patches.setattr(
            open_clip.loss.ClipLoss, "get_logits", lambda *args, **kwargs: get_logits(*args, **kwargs)[::-1]
        )
        patches.setattr(open_clip.loss, "gather_features", None)
        swapped = values(loss)
    torch.testing.assert_close(swapped, plain)
    assert "were replaced: ClipLoss.get_logits, gather_features" in caplog.text
    caplog.clear()
    torch.testing.assert_close(values(loss), plain, rtol=1e-4, atol=1e-6)
    assert not caplog.records


def test_subclass_that_changes_no_step_of_the_loss_is_fastclips(caplog: pytest.LogCaptureFixture) -> None:
    """A subclass that changes no step of the loss uses fastclip. Its forward may prepare
    features and call its parent's.
    """

    class Scaled(open_clip.loss.ClipLoss):
        def forward(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
            return super().forward(image, text, 2 * scale)

    loss = Scaled()
    expected = values(loss)
    patch_open_clip()
    assert pickle.loads(pickle.dumps(open_clip.loss.ClipLoss())).forward.__func__ is open_clip.loss.ClipLoss.forward
    torch.testing.assert_close(values(loss), expected, rtol=1e-4, atol=1e-6)
    assert not caplog.records


def test_patched_loss_compiles_whole() -> None:
    loss = open_clip.loss.ClipLoss()
    expected = loss(*batch_of(loss))
    patch_open_clip()
    found = torch.compile(loss, fullgraph=True, backend="eager")(*batch_of(loss))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("hook", ["get_logits", "get_ground_truth", "_loss"])
@pytest.mark.parametrize("kind", [fastclip.ClipLoss, fastclip.SigLipLoss])
def test_hook_that_would_not_be_called_is_refused(kind: Any, hook: str) -> None:
    changed = type("Mine", (kind,), {hook: lambda *_: None})
    inputs = batch_of(open_clip.loss.SigLipLoss() if kind is fastclip.SigLipLoss else None)
    by_attribute = kind()
    setattr(by_attribute, hook, None)
    for loss, name in ((changed(), "Mine"), (by_attribute, kind.__name__)):
        if hook == "_loss" and kind is fastclip.ClipLoss:
            loss(*inputs)  # ClipLoss has no such hook
            continue
        with pytest.raises(TypeError, match=f"{name}.{hook} would not be called: inherit from open_clip.loss"):
            loss(*inputs)
    own = type("Whole", (changed,), {"forward": lambda self, *_: "its own"})
    assert own()(*inputs) == "its own"


def losses(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    output = model(**inputs, return_loss=True)
    return [output.loss, *torch.autograd.grad(output.loss, [model.logit_scale])]


def test_replaced_loss_of_transformers_keeps_its_numbers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = clip_model(), clip_batch()
    patch_transformers()
    plain = losses(model, inputs)
    assert not caplog.records
    # image_text_contrastive_loss calls it
    monkeypatch.setattr(modeling_clip, "contrastive_loss", lambda logits: 10 * logits.logsumexp(1).mean())
    changed = losses(model, inputs)
    unpatch()
    torch.testing.assert_close(changed, losses(model, inputs), rtol=0, atol=0)
    assert (changed[0] - plain[0]).abs() > 1
    assert "computes the loss of CLIPModel" in caplog.text and "were replaced: contrastive_loss" in caplog.text


def test_towers_of_a_subclass_are_asked_as_before() -> None:
    """The towers of a subclass are called as before: CLIP's forward calls get_image_features, which a subclass
    may override; SigLIP's does not.
    """
    clip = clip_model()
    width: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    words = width | {"vocab_size": 20, "max_position_embeddings": 4, "eos_token_id": 19, "pad_token_id": 1}
    pixels = width | {"image_size": 8, "patch_size": 4}
    siglip = SiglipModel(SiglipConfig(text_config=words, vision_config=pixels)).train()
    for model in (clip, siglip):

        def get_image_features(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = super(type(self), self).get_image_features(*args, **kwargs)
            output.pooler_output = output.pooler_output.flip(0)
            return output

        model.__class__ = type("Mine", (type(model),), {"get_image_features": get_image_features})
        expected = losses(model, clip_batch())
        patch_transformers()
        torch.testing.assert_close(losses(model, clip_batch()), expected, rtol=1e-5, atol=1e-6)
        assert model(**clip_batch(), return_loss=True).logits_per_image is None
        unpatch()


def test_patch_on_top_of_a_patch_is_not_lost_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    """A second patch is not lost silently: patching again, which would replace it, raises, and
    `unpatch` reports its removal.
    """
    before = open_clip.loss.ClipLoss.forward
    patch_open_clip()
    ours = open_clip.loss.ClipLoss.forward

    def forward(self: Any, *args: Any) -> Any:
        return 2 * ours(self, *args)

    open_clip.loss.ClipLoss.forward = forward  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"ClipLoss\.forward was replaced by other code since it was patched"):
        patch_open_clip()
    assert open_clip.loss.ClipLoss.forward is forward and not caplog.records
    unpatch()
    assert open_clip.loss.ClipLoss.forward is before
    assert [record.getMessage() for record in caplog.records] == [
        "another replacement of the patched ClipLoss.forward of open_clip is undone too"
    ]
    caplog.clear()
    patch_open_clip()
    patch_open_clip()
    unpatch()
    assert not caplog.records


def test_bias_that_is_a_number_changes_nothing() -> None:
    """A bias given as a number changes nothing, as in open_clip, whose softmax ignores it too."""
    inputs = batch_of(None)
    torch.testing.assert_close(fastclip.ClipLoss()(*inputs, 3.0), open_clip.loss.ClipLoss()(*inputs, 3.0))
