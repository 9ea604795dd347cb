"""fastclip's losses inside the installed open_clip and transformers: the same numbers, without an N x N matrix."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastclip.parity.promised import FP32_GRADIENT, LOSS
from support import ROOT, needs

needs("models")

import open_clip
import open_clip.loss
from transformers.models.align.modeling_align import AlignConfig, AlignModel
from transformers.models.clip.modeling_clip import CLIPModel
from transformers.models.siglip.modeling_siglip import SiglipConfig, SiglipModel

from fastclip.integrations import patch_open_clip, patch_transformers, unpatch
from support.once import once
from support.patched_ranks import clip_batch, clip_model

N = 96  # pairs; no other axis of a tensor has this length
CLASSES = {"clip": CLIPModel, "siglip": SiglipModel, "align": AlignModel}
PATCHED = (*CLASSES.values(), *(getattr(open_clip.loss, f"{k}Loss") for k in ("Clip", "SigLip", "DistillClip")))
ORIGINALS = [vars(owner)["forward"] for owner in PATCHED]


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    unpatch()
    assert all(vars(owner)["forward"] is forward for owner, forward in zip(PATCHED, ORIGINALS))


class Sizes(TorchDispatchMode):
    """A mode that records the shapes of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(x.shape) for x in torch.utils._pytree.tree_leaves(found) if isinstance(x, Tensor)}
        return found


def makes_matrix(call: Any) -> bool:
    with Sizes() as sizes:
        call()
    assert sizes.shapes
    return (N, N) in sizes.shapes


def model_of(name: str) -> Any:
    if name == "clip":
        return clip_model()
    torch.manual_seed(0)
    width: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    words = width | {"vocab_size": 20, "max_position_embeddings": 4, "pad_token_id": 1}
    if name == "siglip":
        words |= {"bos_token_id": 0, "eos_token_id": 19}
        return SiglipModel(
            SiglipConfig(text_config=words, vision_config=width | {"image_size": 8, "patch_size": 4})
        ).train()
    words |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    pixels: dict[str, Any] = {key: [1] for key in ("strides", "num_block_repeats", "expand_ratios")}
    pixels |= {"kernel_sizes": [3], "in_channels": [32], "out_channels": [16], "image_size": 8, "hidden_dim": 16}
    pixels |= {"width_coefficient": 1.0, "depth_coefficient": 1.0, "drop_connect_rate": 0.0}
    return AlignModel(AlignConfig(text_config=words, vision_config=pixels, projection_dim=16)).train()


def batch(count: int = N) -> dict[str, Any]:
    ids = torch.randint(2, 19, (count, 4))
    ids[:, -1] = 19
    mask = torch.ones_like(ids)
    mask[::2, 1] = 0
    return {"input_ids": ids, "pixel_values": torch.randn(count, 3, 8, 8), "attention_mask": mask}


def loss_and_gradients(model: Any, inputs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    model = copy.deepcopy(model)  # the running statistics of batch normalisation change
    output = model(**inputs, return_loss=True)
    return output, [*torch.autograd.grad(output.loss, [*model.parameters()], materialize_grads=True, allow_unused=True)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Compare all gradients of a model as one vector, because some are zero except for rounding."""
    a, b = (torch.cat([x.double().flatten() for x in found]) for found in (ours, theirs))
    assert (a - b).norm() <= FP32_GRADIENT * b.norm() and b.norm() > 0


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_loss_and_gradients_are_the_same(name: str) -> None:
    model, inputs = model_of(name), batch()
    theirs, their_grads = loss_and_gradients(model, inputs)
    assert makes_matrix(lambda: loss_and_gradients(model, inputs))
    patch_transformers()
    ours, our_grads = loss_and_gradients(model, inputs)
    assert not makes_matrix(lambda: loss_and_gradients(model, inputs))
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=LOSS)
    assert_same(our_grads, their_grads)
    assert type(ours) is type(theirs) and theirs.logits_per_image.shape == (N, N)
    assert ours.logits_per_image is None and ours.logits_per_text is None
    for key in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(ours[key], theirs[key])
    for key in ("vision_model_output", "text_model_output"):
        assert ours[key].keys() == theirs[key].keys()
        torch.testing.assert_close(ours[key].pooler_output, theirs[key].pooler_output)


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_logits_stay_outside_training(name: str) -> None:
    model, inputs = model_of(name), batch(5)
    patch_transformers()
    for training, return_loss in ((False, True), (False, False), (True, False)):
        output = model.train(training)(**inputs, return_loss=return_loss)
        assert output.logits_per_image.shape == (5, 5) and (output.loss is not None) == return_loss
    expected = output.logits_per_image  # a model in training mode, without a loss
    unpatch()
    torch.testing.assert_close(model(**inputs).logits_per_image, expected, rtol=0, atol=0)


def test_transformers_forward_is_called_as_before() -> None:
    """The patched forward takes positional arguments, returns tuples, and keeps the signature that the Trainer
    inspects.
    """
    model, inputs = model_of("clip"), batch(5)
    signature = inspect.signature(CLIPModel.forward)
    expected = model(**inputs, return_loss=True)
    patch_transformers()
    assert inspect.signature(CLIPModel.forward) == signature
    found = model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"], None, True)
    assert found.logits_per_image is None
    torch.testing.assert_close(found.loss, expected.loss)
    first, *others = model(**inputs, return_loss=True, return_dict=False)
    torch.testing.assert_close(first, expected.loss)
    assert [x.shape for x in others[:2]] == [(5, 8), (5, 8)]


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_loss_in_16_bits(name: str) -> None:
    model, inputs = model_of(name), batch()
    expected = loss_and_gradients(model.double(), inputs | {"pixel_values": inputs["pixel_values"].double()})[0].loss
    model.float()
    patch_transformers()
    with torch.autocast("cpu", torch.bfloat16):
        output, grads = loss_and_gradients(model, inputs)
    assert output.loss.item() == pytest.approx(expected.item(), rel=2e-2)
    assert all(x.isfinite().all() for x in grads)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    output, grads = loss_and_gradients(model.bfloat16(), inputs)
    assert output.loss.item() == pytest.approx(expected.item(), rel=5e-2)
    assert output.loss.dtype == torch.float32 and all(x.dtype == torch.bfloat16 for x in grads)


def test_transformers_patched_model_compiles() -> None:
    model, inputs = model_of("clip"), batch(5)
    patch_transformers()
    expected = model(**inputs, return_loss=True).loss
    found = torch.compile(model, backend="eager")(**inputs, return_loss=True).loss
    torch.testing.assert_close(found, expected)


def test_trainer_trains_to_the_same_losses(tmp_path: Path) -> None:
    """The Trainer reaches the same losses, and its evaluation, with the model in eval mode, still returns
    the logits.
    """
    needs("accelerate")
    from transformers import Trainer, TrainingArguments

    data = [{key: x[0] for key, x in batch(1).items()} for _ in range(24)]

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]} | {"return_loss": True}

    def train() -> tuple[list[float], Any]:
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            per_device_eval_batch_size=8,
            logging_steps=1,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = Trainer(clip_model(), arguments, collate, data, data)
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
        return [row["loss"] for row in trainer.state.log_history if "loss" in row], evaluated

    theirs, their_evaluation = train()
    patch_transformers()
    ours, evaluation = train()
    assert len(ours) == 6 and ours[-1] < ours[0]
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert evaluation == pytest.approx(their_evaluation, rel=1e-4)


def arguments(**options: Any) -> SimpleNamespace:
    """Return the arguments that open_clip_train passes to open_clip.create_loss."""
    return SimpleNamespace(
        **{
            "model": "ViT-B-32",
            "distill": False,
            "siglip": False,
            "local_loss": False,
            "gather_with_grad": False,
            "rank": 0,
            "world_size": 1,
            "horovod": False,
            "loss_dist_impl": None,
            "coca_caption_loss_weight": 2.0,
            "coca_contrastive_loss_weight": 1.0,
        }
        | options
    )


OPEN_CLIP = {
    "ClipLoss": arguments(),
    "SigLipLoss": arguments(siglip=True),
    "CoCaLoss": arguments(model="coca_ViT-B-32"),
    "DistillClipLoss": arguments(distill=True),
}


@pytest.mark.parametrize("name", [*OPEN_CLIP, "of a teacher that is trained"])
@pytest.mark.parametrize("before", [False, True], ids=["made after", "made before"])
def test_open_clip_losses_are_the_same(name: str, before: bool) -> None:
    """Losses of open_clip stay the same without the logits, except for that of a teacher that requires gradients."""
    trained = name == "of a teacher that is trained"
    name = "DistillClipLoss" if trained else name
    dense = open_clip.create_loss(OPEN_CLIP[name])
    leaves = [x.requires_grad_() for x in torch.nn.functional.normalize(torch.randn(4, N, 8), dim=-1)]
    scale, bias = torch.tensor(20.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    inputs: dict[str, Any] = {"image_features": leaves[0], "text_features": leaves[1], "logit_scale": scale}
    if name == "SigLipLoss":
        inputs["logit_bias"] = bias
    elif name == "CoCaLoss":
        inputs |= {"logits": torch.randn(N, 5, 7), "labels": torch.randint(0, 7, (N, 5))}
    elif name == "DistillClipLoss":
        teacher = [x if trained else x.detach() for x in leaves[2:]]
        inputs |= {"dist_image_features": teacher[0], "dist_text_features": teacher[1], "dist_logit_scale": 10.0}
    variables = [*leaves[: 4 if trained else 2], scale, *([bias] if "logit_bias" in inputs else [])]

    def values(loss: Any) -> dict[str, Tensor]:
        return loss(**inputs, output_dict=True)

    theirs = values(dense)
    their_grads = torch.autograd.grad(sum(theirs.values()), variables)
    assert makes_matrix(lambda: values(dense))
    patch_open_clip()
    loss = dense if before else open_clip.create_loss(OPEN_CLIP[name])
    assert isinstance(loss, getattr(open_clip.loss, name))
    assert isinstance(loss, open_clip.ClipLoss) == (name != "SigLipLoss")
    ours = values(loss)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key].item() == pytest.approx(theirs[key].item(), rel=LOSS)
    assert_same([*torch.autograd.grad(sum(ours.values()), variables)], [*their_grads])
    assert makes_matrix(lambda: values(loss)) == trained


TRAIN = """
import sys, open_clip
from open_clip_train.main import main
if sys.argv[1] == "patched":
    from fastclip.integrations import patch_open_clip
    patch_open_clip()
    open_clip.loss.F = None  # not called
open_clip.add_model_config(sys.argv[2])
main(sys.argv[3:])
"""


def test_command_of_open_clip_trains_to_the_same_losses(tmp_path: Path) -> None:
    """The command of open_clip trains to the same losses with its own parser and loop, and fastclip's loss."""
    needs("train", "pandas", "webdataset")
    pytest.importorskip("open_clip_train", reason="open_clip's trainer is not installed")
    from PIL import Image

    tower = {"width": 16, "layers": 1}
    config = {
        "embed_dim": 8,
        "vision_cfg": {**tower, "image_size": 16, "patch_size": 8, "head_width": 8},
        "text_cfg": {**tower, "heads": 2, "context_length": 8, "vocab_size": 49408},
    }
    (tmp_path / "dot.json").write_text(json.dumps(config))
    rows = ["filepath\ttitle"]
    for k in range(24):
        path = tmp_path / f"{k}.png"
        Image.new("RGB", (16, 16), (10 * k, 255 - 10 * k, 100)).save(path)
        rows.append(f"{path}\tpicture {k}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    words = f"--model dot --train-data {tmp_path}/pairs.csv --dataset-type csv --epochs 2 --workers 0"
    words += f" --batch-size 8 --lr 1e-3 --warmup 0 --device cpu --precision fp32 --seed 0 --logs {tmp_path}/logs"
    words += " --log-every-n-steps 1"
    losses = {}
    for kind in ("patched", "own"):
        command = [sys.executable, "-c", TRAIN, kind, str(tmp_path / "dot.json"), *words.split(), "--name", kind]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        losses[kind] = [float(x) for x in re.findall(r"Contrastive_loss: ([\d.]+)", done.stdout + done.stderr)]
    assert len(losses["own"]) == 6
    assert losses["patched"] == pytest.approx(losses["own"], rel=1e-4)


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """Results of two processes."""
    if not hasattr(os, "fork"):
        pytest.skip("the ranks are forked")

    def start(folder: Path) -> None:
        # As a module of tests/: the folder of a script would come first in the path, and transformers would import our
        # kernels.py
        command = [sys.executable, "-m", "support.patched_ranks", str(folder)]
        done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]

    folder = once("patched ranks", start)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_open_clip_of_several_processes_has_its_own_numbers(ranks: list[dict[str, Any]]) -> None:
    """Results of open_clip over several processes stay the same with every combination of flags, including those that
    fastclip does not serve. Gradients of the scale are compared after DDP's mean.
    """
    names = {name for _, name in ranks[0]["open_clip"]}
    assert len(names) == 6
    for name in names:
        theirs, ours = ([found["open_clip"][patched, name] for found in ranks] for patched in (False, True))
        for mine, own in zip(ours, theirs):
            torch.testing.assert_close(mine[:3], own[:3])
        torch.testing.assert_close([x + y for x, y in zip(*ours)], [x + y for x, y in zip(*theirs)])
        differs = any(not torch.equal(a, b) for mine, own in zip(ours, theirs) for a, b in zip(mine, own))
        assert differs == (name not in ((False, False), (False, True), (True, False))), "which loss was it?"


def test_open_clip_that_is_left_alone_is_told_once(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        (warning,) = found["warnings"]
        assert "world_size=2, fastclip computes the loss only for local_loss=True and gather_with_grad=True" in warning


def test_transformers_under_ddp(ranks: list[dict[str, Any]]) -> None:
    """Under DDP, each process uses its own pairs by default. With a group, loss and gradients are those
    of one process with all pairs.
    """
    own, ours, world, group = zip(*(found["transformers"].values() for found in ranks))
    for rank in range(2):
        torch.testing.assert_close(ours[rank][0], own[rank][0])
        assert_same(ours[rank][1:], own[rank][1:])
        torch.testing.assert_close(group[rank], world[rank])
    whole, grads = loss_and_gradients(clip_model(), clip_batch())
    assert (world[0][0] + world[1][0]).item() / 2 == pytest.approx(whole.loss.item(), rel=LOSS)
    assert_same(world[0][1:], grads)


def test_unpatch_gives_back_the_very_forwards() -> None:
    unpatch()
    for times in (1, 2):
        for _ in range(times):
            patch_open_clip()
            patch_transformers()
        assert not any(vars(owner)["forward"] is forward for owner, forward in zip(PATCHED, ORIGINALS))
        unpatch()
        assert all(vars(owner)["forward"] is forward for owner, forward in zip(PATCHED, ORIGINALS))


@pytest.mark.parametrize(
    ("package", "version"),
    [
        *(("open_clip", x) for x in ("2.32.0", "3.2.0", "3.4.0.dev0", "4.3.0", "unknown")),
        *(("transformers", x) for x in ("4.57.1", "unknown")),
    ],
)
def test_unknown_version_is_refused(package: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[package], "__version__", version)  # transformers replaces its module in sys.modules
    known = "3.3" if package == "open_clip" else "5.0 and newer"
    with pytest.raises(
        RuntimeError, match=f"can patch {package} {known}, but {version} is installed: install a supported version, or"
    ):
        (patch_open_clip if package == "open_clip" else patch_transformers)()
    assert all(vars(owner)["forward"] is forward for owner, forward in zip(PATCHED, ORIGINALS))


def test_later_version_is_asked_for_what_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version is patched if its classes are as before, and refused if they are not."""
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "6.1.0.dev0")
    patch_transformers()
    assert CLIPModel.forward is not ORIGINALS[0]
    unpatch()
    forward = CLIPModel.forward

    def with_parameter(self: Any, return_loss: Any = None, margin: float = 0.0, **kwargs: Any) -> Any:
        return forward(self, return_loss=return_loss, **kwargs)

    def with_field(self: Any, return_loss: Any = None, **kwargs: Any) -> Any:
        output = forward(self, return_loss=return_loss, **kwargs)
        output["margin"] = torch.zeros(())
        return output

    def without_loss(self: Any, **kwargs: Any) -> Any:
        return forward(self, **{**kwargs, "return_loss": None})

    for changed, message in {
        with_parameter: r"does not know margin of the parameters of CLIPModel\.forward of transformers; it was not",
        with_field: r"does not know margin of the output of CLIPModel\.forward of transformers; it was not",
        without_loss: r"patch does not fit transformers 6\.1\.0\.dev0 \(.*\): call fastclip's losses in your",
    }.items():
        monkeypatch.setattr(CLIPModel, "forward", changed)
        with pytest.raises(RuntimeError, match=message):
            patch_transformers()
        assert CLIPModel.forward is changed
        monkeypatch.setattr(CLIPModel, "forward", forward)


CHANGES = {"loss": lambda loss: 2 * loss, "gradients": lambda loss: 2 * loss - loss.detach()}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("owner", PATCHED, ids=lambda owner: owner.__name__)
def test_class_that_computes_something_else_is_refused(
    owner: Any, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class that computes something else is refused, such as one of a known version that another package
    has patched.
    """
    forward = owner.forward

    def changed(self: Any, *args: Any, return_loss: Any = None, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs, **({"return_loss": True} if return_loss else {}))
        if isinstance(output, Tensor):
            return change(output)
        if isinstance(output, tuple):  # the two losses of DistillClipLoss
            return output[0], change(output[1])
        output.loss = change(output.loss)
        return output

    with monkeypatch.context() as patches:
        patches.setattr(owner, "forward", changed)
        with pytest.raises(RuntimeError, match=rf"{owner.__name__}.forward.* does not compute the expected loss"):
            (patch_open_clip if owner.__module__ == "open_clip.loss" else patch_transformers)()
        assert vars(owner)["forward"] is changed
    assert all(vars(owner)["forward"] is forward for owner, forward in zip(PATCHED, ORIGINALS))


def test_patching_draws_no_random_numbers_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    before = torch.random.get_rng_state()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        patch_open_clip()
        patch_transformers()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not caplog.records


def test_unknown_group_is_refused() -> None:
    with pytest.raises(ValueError, match=r'^group must be a process group, "world" or None, got \'all\'$'):
        patch_transformers(group="all")
    with pytest.raises(TypeError, match=r"^group must be a torch\.distributed\.ProcessGroup .*, got int$"):
        patch_transformers(group=3)
    patch_transformers(group=None)  # value of `torch.distributed.group.WORLD` before the group exists
