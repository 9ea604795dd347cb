"""The digits, the training loop, the zero-shot figure, and the examples as a user runs them."""

from __future__ import annotations

import copy
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm", reason="timm, which the demo needs, is not installed")
pytest.importorskip("open_clip", reason="open_clip, which the demo needs, is not installed")
pytest.importorskip("tokenizers", reason="tokenizers, which the demo needs, is not installed")
pytest.importorskip("sklearn", reason="sklearn, which the demo needs, is not installed")
pytest.importorskip("matplotlib", reason="matplotlib, which the demo needs, is not installed")
pytest.importorskip("tqdm", reason="tqdm, which the demo needs, is not installed")

from fastclip.data.batch import Batch
from fastclip.data.digits import CLASS_NAMES, TEMPLATES, Digits, digit_batches, load_digits
from fastclip.evaluation.zero_shot import class_embeddings, zero_shot_accuracy
from fastclip.models import DualEncoder, create_model
from fastclip.models.tokenizer import ClipTokenizer
from fastclip.training.loop import History, train, warmup_cosine

EXAMPLES = Path(__file__).parent.parent / "examples"
CONTEXT_LENGTH = 16


@pytest.fixture(scope="module")
def tokenize() -> ClipTokenizer:
    return ClipTokenizer(context_length=CONTEXT_LENGTH)


@pytest.fixture(scope="module")
def digits() -> tuple[Digits, Digits]:
    return load_digits()


@pytest.fixture
def model() -> DualEncoder:
    torch.manual_seed(0)
    return create_model("ViT-tiny", context_length=CONTEXT_LENGTH)


@pytest.fixture
def batches(digits: tuple[Digits, Digits], tokenize: ClipTokenizer) -> Iterator[Batch]:
    return digit_batches(digits[0], tokenize, batch_size=32, seed=0)


def test_digits_split_is_fixed_stratified_and_disjoint(digits: tuple[Digits, Digits]) -> None:
    train_digits, held_out = digits
    assert train_digits.images.shape == (1437, 3, 32, 32) and held_out.images.shape == (360, 3, 32, 32)
    assert train_digits.images.dtype == torch.float32 and train_digits.labels.dtype == torch.int64
    assert float(held_out.images.min()) == -1 and float(held_out.images.max()) == 1
    share = held_out.labels.bincount() / (held_out.labels.bincount() + train_digits.labels.bincount())
    assert len(share) == 10 and float((share - 0.2).abs().max()) < 0.005
    seen = {image.numpy().tobytes() for image in train_digits.images}
    assert not any(image.numpy().tobytes() in seen for image in held_out.images)
    assert held_out.labels[:12].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]
    for first, second in zip(digits, load_digits(), strict=True):
        assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


def test_batches_are_functions_of_the_seed(digits: tuple[Digits, Digits], tokenize: ClipTokenizer) -> None:
    def first_batches(seed: int) -> list[Batch]:
        return list(islice(digit_batches(digits[0], tokenize, batch_size=500, seed=seed), 4))  # two epochs

    once, again, other = first_batches(3), first_batches(3), first_batches(4)
    assert all(torch.equal(x, y) for a, b in zip(once, again, strict=True) for x, y in zip(a, b, strict=True))
    assert not torch.equal(once[0].image_labels, other[0].image_labels)
    assert not torch.equal(once[0].image_labels, once[2].image_labels)  # the second epoch has another order


def test_batches_pair_images_with_captions_of_their_digit(tokenize: ClipTokenizer) -> None:
    ten = Digits(torch.rand(10, 3, 32, 32), torch.arange(10))
    batches = digit_batches(ten, tokenize, batch_size=5, seed=0)
    captions = {tuple(tokenize(t.format(name))[0].tolist()): c for c, name in enumerate(CLASS_NAMES) for t in TEMPLATES}
    used = set()
    for _ in range(40):
        epoch = [next(batches), next(batches)]
        assert torch.cat([batch.image_labels for batch in epoch]).sort().values.tolist() == list(range(10))
        for batch in epoch:
            assert [captions[tuple(ids.tolist())] for ids in batch.ids] == batch.text_labels.tolist()
            assert torch.equal(batch.image_labels, batch.text_labels)
            assert batch.images.shape == (5, 3, 32, 32)
            used |= {tuple(ids.tolist()) for ids in batch.ids}
    assert used == set(captions)
    with pytest.raises(ValueError, match="batch_size"):
        next(digit_batches(ten, tokenize, batch_size=11, seed=0))


def test_batches_move_images_a_little(digits: tuple[Digits, Digits], tokenize: ClipTokenizer) -> None:
    same = Digits(digits[0].images[:1].repeat(64, 1, 1, 1), digits[0].labels[:1].repeat(64))
    moved = next(digit_batches(same, tokenize, batch_size=64, seed=0)).images
    assert len({image.numpy().tobytes() for image in moved}) == 64
    assert float(moved.min()) >= -1 and float(moved.max()) <= 1
    correlation = torch.corrcoef(torch.stack([moved.mean(dim=0).flatten(), same.images[0].flatten()]))
    assert float(correlation[0, 1]) > 0.9  # the mean of the moved images is the image, blurred


def test_training_repeats_bit_by_bit(digits: tuple[Digits, Digits], tokenize: ClipTokenizer) -> None:
    def run(seed: int) -> list[float]:
        torch.manual_seed(seed)
        batches = digit_batches(digits[0], tokenize, batch_size=32, seed=seed)
        return train(create_model("ViT-tiny", context_length=CONTEXT_LENGTH), batches, steps=5, progress=False).losses

    once = run(0)
    assert len(once) == 5 and once == run(0)
    assert once != run(1)


def test_training_loss_is_the_dense_one_with_labels(model: DualEncoder, batches: Iterator[Batch]) -> None:
    batch = next(batches)
    with torch.no_grad():
        images, texts, scale = model.double()(batch.images.double(), batch.ids)
        logits = scale * images @ texts.T
        positive = (batch.image_labels[:, None] == batch.text_labels).double()
        rows = -(logits.log_softmax(dim=1) * positive).sum(dim=1) / positive.sum(dim=1)
        columns = -(logits.log_softmax(dim=0) * positive).sum(dim=0) / positive.sum(dim=0)
    history = train(model.float(), [batch], steps=1, progress=False)
    assert history.losses[0] == pytest.approx(float(rows.mean() + columns.mean()) / 2, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_training_stops_before_the_update_of_a_non_finite_loss(
    model: DualEncoder, batches: Iterator[Batch], value: float
) -> None:
    before: dict[str, Tensor] = {}

    def poisoned() -> Iterator[Batch]:
        yield next(batches)
        yield next(batches)
        before.update(copy.deepcopy(model.state_dict()))
        batch = next(batches)
        batch.images[7, 0, 3, 3] = value
        yield batch

    with pytest.raises(FloatingPointError, match="loss of step 2 is nan"):
        train(model, poisoned(), steps=5, progress=False)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_training_clamps_the_scale(model: DualEncoder, batches: Iterator[Batch]) -> None:
    with torch.no_grad():
        model.logit_scale.fill_(6.0)
    train(model, batches, steps=1, progress=False)
    assert model.logit_scale.exp().item() == pytest.approx(100)


def test_training_decays_matrices_only(model: DualEncoder, batches: Iterator[Batch]) -> None:
    before = copy.deepcopy(model.state_dict())
    # A gradient clipped to 1e-13 moves nothing beside AdamW's epsilon: what is left is the decay by 0.1 * 0.5.
    options = {"learning_rate": 0.1, "weight_decay": 0.5, "max_grad_norm": 1e-13}
    train(model, batches, steps=1, warmup_steps=1, backend=None, progress=False, **options)
    for name, x in model.named_parameters():
        expected = before[name] * (0.95 if x.dim() >= 2 else 1)
        assert torch.allclose(x, expected, rtol=1e-5, atol=1e-6), name


def test_training_clips_gradients_only_if_asked(model: DualEncoder, batches: Iterator[Batch]) -> None:
    batch, start = next(batches), model.logit_scale.item()

    def moved(max_grad_norm: float | None) -> float:
        trained = copy.deepcopy(model)
        train(trained, [batch], steps=1, warmup_steps=1, max_grad_norm=max_grad_norm, progress=False)
        return abs(trained.logit_scale.item() - start)

    assert moved(1e-13) < 1e-6  # AdamW's epsilon outweighs such a gradient
    assert moved(None) == pytest.approx(1e-3, rel=0.01)  # its first step is the learning rate


def test_training_names_its_backend_and_refuses_what_it_cannot_do(model: DualEncoder, batches: Iterator[Batch]) -> None:
    assert train(model, batches, steps=1, backend="reference", progress=False).backend == "reference"
    assert not model.training
    with pytest.raises(ValueError, match="'abacus' is unknown"):
        train(model, batches, steps=1, backend="abacus", progress=False)
    with pytest.raises(ValueError, match="ended after 2 of 3 steps"):
        train(model, [next(batches), next(batches)], steps=3, progress=False)
    with pytest.raises(ValueError, match="steps must be positive"):
        train(model, batches, steps=0, progress=False)


def test_training_takes_no_batch_too_many(model: DualEncoder, batches: Iterator[Batch]) -> None:
    supply = iter([next(batches), next(batches), next(batches)])
    assert isinstance(train(model, supply, steps=2, progress=False), History)
    assert len(list(supply)) == 1


def test_warmup_cosine_rises_and_falls() -> None:
    factors = [warmup_cosine(step, warmup_steps=4, steps=12) for step in range(13)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.5) and factors[12] == pytest.approx(0)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert warmup_cosine(0, warmup_steps=0, steps=1) == 1


def test_zero_shot_averages_templates_and_counts_hits() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 4.0], [0.0, 2.0], [-3.0, 0.0]])  # two captions each of two classes
    model = DualEncoder(nn.Flatten(), nn.Sequential(nn.Embedding.from_pretrained(vectors), nn.Flatten()))
    order = ["a up", "the up", "a left", "the left"]
    classes = class_embeddings(
        model, lambda texts: torch.tensor([[order.index(t)] for t in texts]), ["up", "left"], ["a {}", "the {}"]
    )
    half = 0.5**0.5
    torch.testing.assert_close(classes, torch.tensor([[half, half], [-half, half]]))
    images = torch.tensor([[3.0, 1.0], [1.0, 9.0], [-1.0, 2.0], [-5.0, 0.1]]).view(4, 1, 1, 2)
    labels = torch.tensor([0, 0, 1, 0])
    assert zero_shot_accuracy(model, images, labels, classes) == 0.75
    assert zero_shot_accuracy(model, images, labels, classes, batch_size=3) == 0.75


def run_example(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    # One thread: hardly slower on models this small, and many times faster than two on cores that others use too.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / name), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


def test_demo_reaches_95_percent_and_draws(tmp_path: Path) -> None:
    result = run_example("train_digits.py", "--steps", "300", "--output", str(tmp_path))  # a quarter less, for time
    assert result.returncode == 0, result.stdout + result.stderr
    top1 = re.search(r"zero-shot top-1 on 360 held-out digits: ([\d.]+) %", result.stdout)
    assert top1 and float(top1[1]) >= 95
    assert "loss served by backend" in result.stdout and "300/300" in result.stderr  # the progress bar
    picture = (tmp_path / "digits.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_demo_fails_when_it_did_not_learn(tmp_path: Path) -> None:
    result = run_example("train_digits.py", "--steps", "2", "--output", str(tmp_path))
    assert result.returncode != 0
    assert "under the promised 95 %" in result.stderr and "Traceback" not in result.stderr


def test_one_import_swapped_gives_open_clip_losses() -> None:
    result = run_example("open_clip_one_import.py")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if re.match(r"\s*\d+ ", line)]
    losses = [(float(theirs), float(ours)) for _, theirs, ours, _ in rows]
    assert len(losses) == 20 and losses[-1][0] < 0.1 * losses[0][0]
    assert all(ours == pytest.approx(theirs, rel=1e-5) for theirs, ours in losses)
