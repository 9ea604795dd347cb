"""The native resizing of images gives Pillow's bits, or leaves the image to Pillow."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from support import needs

needs("models")

from torchvision.transforms import InterpolationMode, RandomResizedCrop, Resize

from fastclip._backends.cpu import native
from fastclip.models import resize
from fastclip.models.resize import RandomPart, Resized, native_resize, resized

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


@pytest.fixture
def by_native_code(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return a list that grows by one entry for each image that the native code has resized."""
    if native.missing() is not None or native.module.isa() == "portable":
        pytest.skip(f"there is no native resizing here: {native.missing() or 'no AVX2'}")
    if not hasattr(Image.Image, "__arrow_c_array__"):
        pytest.skip("Pillow is older than 11.2")
    assert native_resize() is not None  # if this fails with a new version of Pillow, its resize has other bits
    calls: list[object] = []
    once = resize._native

    def counted(*arguments: object) -> Image.Image:
        image = once(*arguments)  # type: ignore[arg-type]
        calls.append(arguments)
        return image

    monkeypatch.setattr(resize, "_native", counted)
    return calls


@pytest.fixture
def undecided() -> Iterator[None]:
    """Let `native_resize` decide anew, in the test and after it."""
    native_resize.cache_clear()
    yield
    native_resize.cache_clear()


def noise(width: int, height: int, *, extreme: bool = False) -> Image.Image:
    generator = np.random.default_rng(width * 1000 + height)
    values = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray((values > 127).astype(np.uint8) * np.uint8(255) if extreme else values)


def by_pillow(image: Image.Image, part: tuple[int, int, int, int], size: tuple[int, int], resample: int) -> Image.Image:
    x, y, width, height = part
    return image.crop((x, y, x + width, y + height)).resize(size, resample)


def test_native_resize_has_pillows_bits(by_native_code: list[object]) -> None:
    generator = np.random.default_rng(0)
    for k in range(150):
        width, height, new_width, new_height = map(int, generator.integers(30, 300, 4))
        part = (k % 7, k % 11, width - 13, height - 17)
        if k % 3 == 0:  # near the limit from which Pillow 13 resizes the columns first
            new_height = max(1, part[3] - 2 * (part[2] - new_width) + k % 5 - 2)
        image, resample = noise(width, height, extreme=bool(k % 2)), BICUBIC if k % 4 else BILINEAR
        found = resized(image, part, (new_width, new_height), resample)
        assert found.mode == "RGB" and found.size == (new_width, new_height)
        assert found.tobytes() == by_pillow(image, part, (new_width, new_height), resample).tobytes(), (
            image.size,
            part,
        )
    assert len(by_native_code) > 100


@pytest.mark.parametrize("interpolation", [InterpolationMode.BICUBIC, InterpolationMode.BILINEAR])
def test_steps_equal_torchvisions(interpolation: InterpolationMode, by_native_code: list[object]) -> None:
    for size in ((70, 90), (90, 70), (64, 64), (300, 61)):
        image = noise(*size)
        crop = RandomResizedCrop(48, scale=(0.5, 1.0), interpolation=interpolation)
        found, wanted = [], []
        for step, images in ((RandomPart(crop), found), (crop, wanted)):
            torch.manual_seed(0)
            images += [step(image).tobytes() for _ in range(5)]
        assert found == wanted
        for side in (48, (40, 50)):
            step = Resize(side, interpolation)
            assert Resized(step)(image).tobytes() == step(image).tobytes()
            assert Resized(step)(image).size == step(image).size
    assert len(by_native_code) == 4 * (5 + 4)


@pytest.mark.parametrize(
    ("image", "size", "resample"),
    [
        (noise(60, 50).convert("L"), (24, 24), BICUBIC),
        (noise(60, 50).convert("CMYK"), (24, 24), BICUBIC),
        (noise(60, 50), (24, 24), Image.Resampling.LANCZOS),
        (noise(3, 50), (24, 24), BICUBIC),
        (noise(30, 1600), (24, 24), BICUBIC),
        (noise(2100, 2100), (24, 24), BICUBIC),  # in several blocks of memory
    ],
    ids=["grey", "CMYK", "Lanczos", "narrow", "tall", "large"],
)
def test_pillow_resizes_what_native_code_does_not(
    image: Image.Image, size: tuple[int, int], resample: int, by_native_code: list[object]
) -> None:
    whole = (0, 0, *image.size)
    found = resized(image, whole, size, resample)
    assert found.mode == image.mode and found.tobytes() == image.resize(size, resample).tobytes()
    assert not by_native_code


def test_pillow_with_other_bits_is_noticed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, by_native_code: list[object], undecided: None
) -> None:
    caplog.set_level(logging.INFO)
    changed = Image.Image.resize

    def other(image: Image.Image, *arguments: object) -> Image.Image:
        pixels = np.array(changed(image, *arguments))  # type: ignore[arg-type]
        pixels[0, 0, 0] ^= 1
        return Image.fromarray(pixels)

    monkeypatch.setattr(Image.Image, "resize", other)
    assert native_resize() is None
    assert "Pillow resizes the images" in caplog.text and "this version of Pillow has other bits" in caplog.text
    native_resize()
    assert len(caplog.records) == 1  # the decision is made, and logged, once


@pytest.mark.parametrize(
    ("reason", "words"),
    [("missing", "it was not built"), ("older", "built from older sources"), ("portable", "a processor with AVX2")],
)
def test_reason_for_pillow_is_logged(
    reason: str, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, undecided: None
) -> None:
    caplog.set_level(logging.INFO)
    if reason != "missing" and native.module is None:
        pytest.skip("the native module is missing")
    monkeypatch.setattr(resize, "missing", lambda: "it was not built" if reason == "missing" else None)
    if reason == "older":
        monkeypatch.setattr(resize, "module", object())
    isa = native.module.isa() if native.module else ""
    try:
        if reason == "portable":
            native.module.select_isa("portable")
        assert native_resize() is None and words in caplog.text
        image = noise(60, 50)
        assert resized(image, (0, 0, 60, 50), (24, 24), BICUBIC).tobytes() == image.resize((24, 24), BICUBIC).tobytes()
    finally:
        if isa:
            native.module.select_isa(isa)
