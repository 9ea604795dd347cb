"""A model for tests of search that is a formula of the mean colours of images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastclip.embedding.query import Term
from fastclip.search.engine import SearchEngine

DIM = 6
QUERY = [Term(1.0, "anything")]


class Colours:
    """A stand-in for an embedder and its model that counts what it embeds."""

    def __init__(self, identity: str = "colours") -> None:
        self.identity, self.pictures, self.texts, self.loaded = identity, 0, 0, 0

    @property
    def embedder(self) -> Any:
        self.loaded += 1
        return self

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        return prepared

    def embed_images(self, images: Tensor) -> Tensor:
        self.pictures += len(images)
        return torch.from_numpy(np.stack([unit_of(image) for image in images]))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return eight letters per text."""
        return torch.tensor([[*map(ord, text[:8].ljust(8))] for text in texts])

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        self.texts += len(texts)
        return torch.from_numpy(np.stack([text_vector(text) for text in texts]))


def prepared(picture: Image.Image) -> Tensor:
    pixels = np.array(picture.convert("RGB").resize((8, 8)), np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def unit_of(image: Tensor) -> Any:
    pixels = image.numpy().astype(np.float64)
    return _unit(np.concatenate([pixels.mean((1, 2)), pixels.std((1, 2)) + 0.01]))


def text_vector(text: str) -> Any:
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return _unit(np.random.default_rng(seed).standard_normal(DIM))


def picture_vector(path: Path) -> Any:
    return unit_of(prepared(Image.open(path)))


def _unit(vector: Any) -> Any:
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def draw(path: Path, seed: int) -> Path:
    """Write an image that differs from all others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    pixels[..., seed % 3] //= 2 + seed % 5
    Image.fromarray(pixels).save(path)
    return path


def engine(tmp_path: Path, model: Colours | None = None, folder: str = "photos", **options: object) -> SearchEngine:
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    return SearchEngine(model or Colours(), tmp_path / folder, indices=tmp_path / "cache", **options)  # type: ignore[arg-type]


def counts(searched: SearchEngine, **options: int) -> tuple[int, int, int, int]:
    done = searched.update(**options)
    return done.files, done.embedded, done.known, done.removed


def check(searched: SearchEngine, photos: list[Path]) -> None:
    """Check that a search finds exactly these files, with the scores of the formula."""
    found = {one.path: one.score for one in searched.find(QUERY, 1000)}
    assert found.keys() == {str(photo) for photo in photos}
    for photo in photos:
        assert found[str(photo)] == pytest.approx(float(text_vector("anything") @ picture_vector(photo)), abs=1e-6)
