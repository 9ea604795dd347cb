"""JPEGs are decoded at a fraction of their size if training needs no more."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from support import needs

needs("train")

from PIL import Image
from torchvision.transforms import ToTensor

from fastclip.data import evaluation_batches, open_source, training_batches
from fastclip.data.faults import BadSample
from fastclip.data.picture import read_picture
from fastclip.data.source import read_sample
from fastclip.data.sources.mixture import Mixture


def encoded(width: int, height: int, suffix: str = "JPEG", *, exif: Image.Exif | None = None) -> bytes:
    """Encode smooth waves, which resemble most of a photograph."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 23 + k) * np.cos(y / 31 - k) for k in range(3)]
    pixels = (127.5 + 110 * np.stack(waves, -1)).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, suffix, quality=95, **({"exif": exif} if exif else {}))
    return file.getvalue()


@pytest.mark.parametrize(
    ("size", "min_side", "expected"),
    [
        ((512, 384), 224, (512, 384)),
        ((600, 448), 224, (300, 224)),
        ((448, 600), 224, (224, 300)),
        ((600, 447), 224, (600, 447)),
        ((1800, 900), 224, (450, 225)),
        ((1800, 900), 20, (225, 113)),
        ((600, 448), None, (600, 448)),
        ((64, 64), 224, (64, 64)),
    ],
)
def test_jpeg_keeps_the_side_that_is_needed(
    size: tuple[int, int], min_side: int | None, expected: tuple[int, int]
) -> None:
    assert read_picture(io.BytesIO(encoded(*size)), "x", min_side=min_side).size == expected


def test_other_formats_are_whole() -> None:
    for suffix in ("PNG", "WEBP"):
        assert read_picture(io.BytesIO(encoded(600, 448, suffix)), "x", min_side=64).size == (600, 448)


def test_scaled_jpeg_is_turned_as_its_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotates by 90 degrees clockwise
    assert read_picture(io.BytesIO(encoded(600, 448, exif=exif)), "x", min_side=224).size == (224, 300)


def test_faults_of_a_scaled_jpeg_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(600, 448)
    with pytest.raises(BadSample) as caught:
        read_picture(io.BytesIO(data[: len(data) // 2]), "x", min_side=224)
    assert caught.value.fault.cause == "truncated image"
    # a limit for the image in the file, not for the scaled one
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600 * 448 - 1)
    with pytest.raises(BadSample) as caught:
        read_picture(io.BytesIO(data), "x", min_side=224)
    assert caught.value.fault.cause == "image too large"


def test_scaled_jpeg_looks_the_same() -> None:
    data = encoded(1024, 768)

    def resized(min_side: int | None) -> np.ndarray:
        image = read_picture(io.BytesIO(data), "x", min_side=min_side)
        return np.asarray(image.resize((299, 224), Image.Resampling.BICUBIC), np.float64)

    assert np.abs(resized(224) - resized(None)).mean() < 1  # in levels of 255


@pytest.fixture
def photographs(tmp_path: Path) -> dict[str, str]:
    """Store the same JPEG of 64 x 48 pixels in every kind of source."""
    data = encoded(64, 48)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jpg").write_bytes(data)
    (tmp_path / "folder" / "a.txt").write_text("1 2")
    (tmp_path / "t.csv").write_text("filepath,title\nfolder/a.jpg,1 2\n")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.jpg", "a.txt"):
            tar.add(tmp_path / "folder" / name, name)
    names = {"folder": "folder", "table": "t.csv", "shards": "x.tar"}
    return {kind: str(tmp_path / name) for kind, name in names.items()}


@pytest.mark.parametrize("kind", ["folder", "table", "shards", "mixture"])
def test_training_scales_and_evaluation_does_not(photographs: dict[str, str], kind: str) -> None:
    spec = photographs.get(kind, "2*" + photographs["shards"])
    source = open_source(spec)
    assert isinstance(source, Mixture) == (kind == "mixture")
    assert source[0].image.size == (64, 48) and read_sample(source, 0, min_side=12).image.size == (16, 12)

    def tokenize(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[int(word) for word in text.split()] for text in texts])

    def shape(**options: int) -> tuple[int, ...]:
        ((batch,),) = training_batches(source, ToTensor(), tokenize, batch_size=1, last_step=1, **options)
        return tuple(batch.images.shape[2:])

    assert shape(min_side=24) == (24, 32) and shape() == (48, 64)
    ((images, _, _), *_) = evaluation_batches(source, ToTensor(), batch_size=1)
    assert tuple(images.shape[2:]) == (48, 64)


@pytest.mark.parametrize(
    ("model", "side"), [("ViT-B-32", 249), ("align-efficientnet-b7-bert-base", 346), ("ViT-tiny", 36)]
)
def test_training_takes_no_crop_that_would_be_enlarged(model: str, side: int) -> None:
    needs("models")
    from fastclip.models.config import load_config
    from fastclip.models.transforms import image_transform, training_side

    config = load_config(model)
    assert training_side(config) == side
    if config.preprocess_cfg.train_crop == "resized":
        crop = image_transform(config, train=True).transforms[1].crop
        torch.manual_seed(0)
        for size in ((side, side), (side, 2 * side), (side, 10 * side)):
            crops = [crop.get_params(Image.new("L", size), crop.scale, crop.ratio) for _ in range(500)]
            assert min(min(height, width) for _, _, height, width in crops) >= config.vision_cfg.image_size
