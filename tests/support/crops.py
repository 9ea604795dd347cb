"""Real images: crops of the two photographs that come with scikit-learn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.datasets import load_sample_images


def write_crops(folder: Path) -> list[str]:
    """Write 24 images, 12 of a temple in China and 12 of a flower, and return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, pixels in zip(("china", "flower"), load_sample_images().images):
        image = Image.fromarray(pixels)
        for k in range(12):
            left, top = 160 * (k % 4), 140 * (k // 4)
            names.append(f"{name}{k}.jpg")
            image.crop((left, top, left + 160, top + 140)).save(folder / names[-1])
    return names


def sentences(names: Sequence[str]) -> list[list[str]]:
    """Return five or six captions for each name."""
    return [[f"{name[:-4]} seen as number {c} of {k}" for c in range(5 + k % 2)] for k, name in enumerate(names)]


def split_file(path: Path, images: Sequence[dict[str, Any]], dataset: str = "flickr30k") -> Path:
    """Write a file in Karpathy's format; the "sentences" of `images` are strings."""
    told = [image | {"sentences": [{"raw": text, "tokens": []} for text in image["sentences"]]} for image in images]
    path.write_text(json.dumps({"images": told, "dataset": dataset}), encoding="utf-8")
    return path
