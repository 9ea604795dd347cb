"""Options of the small training run that many tests make: ViT-tiny on scikit-learn's digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastclip.training import TrainOptions

__all__ = ["digits_run"]


def digits_run(folder: Path, **changed: Any) -> TrainOptions:
    """Return the options of a run of three steps into `folder`, some of them changed."""
    values: dict[str, Any] = {
        "data": "digits",
        "model": "ViT-tiny",
        "output": str(folder),
        "context_length": 16,
        "loss": "unicl",
        "batch_size": 24,
        "max_steps": 3,
        "workers": 0,
        "device": "cpu",
    }
    return TrainOptions(**{**values, **changed})
