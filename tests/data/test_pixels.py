"""Images leave the data workers as uint8 pixels, and the model's device normalises them to the bits of a float path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from support import needs

needs("train")

from torchvision.transforms import Normalize, ToTensor

import fastclip
from fastclip.data.batch import Batch
from fastclip.data.loading.batches import evaluation_batches, pair_batches, training_batches
from fastclip.data.sources.subset import Subset
from fastclip.data.spec import open_source
from fastclip.embedding.features import image_features
from fastclip.evaluation.validate import validate
from fastclip.models.config import load_config
from fastclip.models.embedder import Embedder
from fastclip.models.transforms import PixelNormalization, image_transform, pixel_transform, split_normalization
from fastclip.training import TrainOptions, train
from fastclip.training.finetune import FinetuneOptions, finetune
from fastclip.training.ranks import World
from fastclip.training.run.loop import Loop
from fastclip.training.step.losses import named_loss
from fastclip.training.step.optim import build_optimizer
from fastclip.training.step.update import Stepper

SETS = sorted({(x.mean, x.std) for x in (load_config(n).preprocess_cfg for n in fastclip.list_models())})
GPU = pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


def every_value() -> Tensor:
    """Return an image (3, 16, 16) in which each channel has all 256 values."""
    return torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(3, 1, 1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize(("mean", "std"), [*SETS, ((0.1, 0.3, 0.7), (0.229, 0.224, 0.225))])
def test_normalisation_has_the_bits_of_torchvision(device: str, mean: Any, std: Any) -> None:
    pixels = every_value()
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    expected = Normalize(mean, std)(ToTensor()(image))
    normalize = PixelNormalization(mean, std)
    for images in (pixels, pixels[None].repeat(5, 1, 1, 1)):
        found = normalize(images.to(device))
        assert found.dtype == torch.float32 and found.device.type == device and found.shape == images.shape
        assert torch.equal(found.cpu(), expected.expand_as(images))
    assert torch.equal(pixels, every_value())  # not changed in place


def test_floating_point_images_stay_as_they_are() -> None:
    normalize = PixelNormalization((0.5,) * 3, (0.5,) * 3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        images = torch.rand(2, 3, 4, 4).to(dtype)
        assert normalize(images) is images
    with pytest.raises(TypeError, match=r"images must be uint8 or floating-point, got torch\.int64"):
        normalize(torch.zeros(2, 3, 4, 4, dtype=torch.int64))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ["ViT-tiny", "align-tiny"])
def test_pixels_have_the_crops_of_the_image_transform(name: str, train: bool) -> None:
    config = load_config(name)
    values = torch.randint(256, (60, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(values.numpy())
    torch.manual_seed(1)
    expected = image_transform(config, train=train)(image)
    torch.manual_seed(1)
    pixels = pixel_transform(config, train=train)(image)
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    assert torch.equal(PixelNormalization.of(config)(pixels), expected) and expected.dtype == torch.float32


def test_other_transforms_are_not_split() -> None:
    for transform in (ToTensor(), pixel_transform(load_config("ViT-tiny")), lambda image: torch.zeros(3, 2, 2)):
        whole, normalize = split_normalization(transform)
        assert whole is transform and normalize(images := torch.zeros(1, 3, 2, 2)) is images


@pytest.fixture(scope="module")
def digits() -> Subset:
    return Subset(open_source("digits"), range(40))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_have_a_quarter_of_the_bytes(digits: Subset, workers: int) -> None:
    config = load_config("ViT-tiny")
    parts = pixel_transform(config), image_transform(config)

    def read(transform: Any) -> Iterator[Tensor]:
        steps = training_batches(
            digits, transform, lambda x: torch.zeros(len(x), 1), batch_size=16, last_step=2, workers=workers
        )
        yield from (batch.images for (batch,) in steps)
        yield from (images for images, *_ in evaluation_batches(digits, transform, batch_size=20, workers=workers))
        yield from (x.images for x in pair_batches(digits, transform, batch_size=40) if x.images is not None)

    for pixels, images in zip(read(parts[0]), read(parts[1])):
        assert pixels.dtype == torch.uint8 and 4 * pixels.nbytes == images.nbytes and pixels.is_contiguous()
        assert torch.equal(PixelNormalization.of(config)(pixels), images)


@pytest.mark.parametrize("size", [12, 5], ids=["whole", "cached"])
@pytest.mark.parametrize("name", ["ViT-tiny", "RN-tiny", "align-tiny"])
def test_step_with_pixels_has_the_bits_of_the_float_path(name: str, size: int) -> None:
    def trained(as_pixels: bool) -> tuple[list[float], dict[str, Tensor]]:
        torch.manual_seed(0)
        model = fastclip.create_model(name, context_length=8)
        assert model.config is not None
        generator = torch.Generator().manual_seed(1)
        pixels = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8, generator=generator)
        ids = torch.randint(1, 170, (12, 8), generator=generator)
        normalize = PixelNormalization.of(model.config)
        images = pixels if as_pixels else normalize(pixels)
        whole = Batch(images, ids, torch.arange(12), tuple(map(str, range(12))))
        batches = [Batch(*(x[k : k + size] for x in whole)) for k in range(0, 12, size)]
        optimizer = build_optimizer("adamw", model, lr=1e-3, weight_decay=0.1)
        options: dict[str, Any] = {"normalize_pixels": normalize} if as_pixels else {}
        stepper = Stepper(
            model, model, named_loss("clip"), optimizer, World(0, 1, torch.device("cpu"), None), **options
        )
        return [stepper.step(batches, step=k).loss for k in range(2)], model.state_dict()

    (losses, weights), (expected, others) = trained(True), trained(False)
    assert losses == expected
    assert all(torch.equal(x, others[key]) for key, x in weights.items())


def embedder_of(name: str = "ViT-tiny") -> Embedder:
    torch.manual_seed(0)
    return Embedder(fastclip.create_model(name), fastclip.get_tokenizer(name))


@pytest.mark.parametrize("tuned", [False, True], ids=["train", "finetune"])
def test_training_reads_pixels(tuned: bool, tmp_path: Path, digits: Subset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's batches are uint8, and its losses are those of batches that the workers have normalised."""

    def losses(folder: str) -> list[float]:
        common: dict[str, Any] = {"batch_size": 16, "stop_after": 2, "workers": 0}
        if tuned:
            return finetune(embedder_of(), digits, FinetuneOptions(**common), output=tmp_path / folder).losses
        options = TrainOptions(model="ViT-tiny", data="digits", output=str(tmp_path / folder), device="cpu", **common)
        return train(options).losses

    dtypes = set()
    batches = Loop._batches

    def seen(loop: Loop, normalize: bool) -> Iterator[Any]:
        for step in batches(loop):
            dtypes.update(batch.images.dtype for batch in step)
            yield [x._replace(images=PixelNormalization.of(loop.config)(x.images)) for x in step] if normalize else step

    found = []
    for normalize in (False, True):
        monkeypatch.setattr(Loop, "_batches", lambda loop, normalize=normalize: seen(loop, normalize))
        found.append(losses(str(normalize)))
    assert dtypes == {torch.uint8} and found[0] == found[1] and len(found[0]) == 2


def test_evaluation_reads_pixels(digits: Subset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features and metrics are those of a transform that returns normalised images, and workers return uint8."""
    from fastclip.data.loading import batches

    embedder, dtypes, loaded = embedder_of(), list[torch.dtype](), batches.load

    def load(*args: Any, **options: Any) -> Iterator[Any]:
        for x in loaded(*args, **options):
            dtypes.append(x[0].dtype)
            yield x

    monkeypatch.setattr(batches, "load", load)
    whole = image_transform(load_config("ViT-tiny"))
    own = Embedder(embedder.model, embedder.tokenize, transform=lambda image: whole(image))
    features = [image_features(x, digits, batch_size=20).features for x in (embedder, own)]
    metrics = [
        validate(x.model, digits, x.transform, x.tokenize, batch_size=20, max_samples=20) for x in (embedder, own)
    ]
    assert torch.equal(*features) and metrics[0] == metrics[1]
    assert dtypes == [torch.uint8, torch.uint8, torch.float32, torch.float32, torch.uint8, torch.float32]
