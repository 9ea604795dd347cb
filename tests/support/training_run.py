"""A small two-tower training that every machine repeats: weights and batches are functions of a seed.

    python tests/support/training_run.py --write     computes tests/golden/training_*.json again

It uses plain torch layers, and numpy's RandomState, whose stream is frozen (NEP 19), so that no version of a library
changes the training. Nothing here uses fastclip; the golden runs are dense torch in fp64.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a run as a program
from torch import Tensor, nn

from support.accuracy import dense

GOLDEN = Path(__file__).parents[1] / "golden"
STEPS = 100
BATCH_SIZE = 64
ATTRIBUTES, VALUES = 6, 8  # a caption has 6 words, each one of 8
PIXELS, WIDTH, EMBEDDING = 144, 96, 128
NOISE = 4.0  # per pixel, against patterns of 1: the task is not solved, and the loss keeps its digits
# Binary fractions are equal in fp32 and fp64: 1 - lr * decay rounded to fp32 would shift the scale in the same
# direction at every step, and the two trainings would be ten times further apart.
LEARNING_RATE, DECAY, BETAS, EPS = 2**-9, 2**-3, (1 - 2**-3, 1 - 2**-6), 2**-20


@dataclass(frozen=True)
class Case:
    """A training with its way of calling the loss: `loss(image, text, scale, [bias,] **labels, **options)`."""

    labels: bool = False  # pairs that share their first two words are positives of each other
    texts: int = BATCH_SIZE  # with fewer texts than images, some images have no positive
    scale: float = 1 / 0.07  # at step 0; its log is learned
    bias: float | None = None  # at step 0 of the sigmoid loss, learned too; None selects the softmax loss
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "clip": Case(),
    "align": Case(options={"label_smoothing": 0.1}),
    "siglip": Case(scale=10.0, bias=-10.0),
    "unicl": Case(labels=True, texts=48, options={"image_weight": 0.75, "label_smoothing": 0.1}),
}


@dataclass(frozen=True)
class Run:
    """One number per step: the loss, the norms of its gradients by the features, and the
    gradients by log scale and bias.

    The losses alone would not suffice: AdamW divides by the size of the gradient, so that a gradient twice
    too large trains the same model.
    """

    loss: list[float] = field(default_factory=list)
    d_image: list[float] = field(default_factory=list)
    d_text: list[float] = field(default_factory=list)
    d_log_scale: list[float] = field(default_factory=list)
    d_bias: list[float] = field(default_factory=list)


class TwoTowers(nn.Module):
    """Towers from pixels (M, PIXELS) and words (N, ATTRIBUTES) to features (M, EMBEDDING) and
    (N, EMBEDDING), not normalised.
    """

    def __init__(self, case: Case, stream: np.random.RandomState) -> None:
        super().__init__()
        self.image = tower(PIXELS)
        self.words = nn.Embedding(ATTRIBUTES * VALUES, WIDTH)
        self.text = tower(WIDTH)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    bound = math.sqrt(3 / module.weight.shape[1])
                    module.weight.copy_(uniform(stream, bound, tuple(module.weight.shape)))
                if isinstance(module, nn.Linear):
                    module.bias.zero_()
        self.log_scale = nn.Parameter(torch.tensor(math.log(case.scale)))
        self.bias = None if case.bias is None else nn.Parameter(torch.tensor(case.bias))

    def forward(self, pixels: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(pixels), self.text(self.words(words).mean(1))


def tower(inputs: int) -> nn.Module:
    # GELU has no kink at which two trainings could diverge
    return nn.Sequential(nn.Linear(inputs, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, EMBEDDING))


def uniform(stream: np.random.RandomState, bound: float, shape: tuple[int, ...]) -> Tensor:
    """Return fp32 numbers within +-bound, equal in runs in fp32 and fp64, and of few bits, so that their sums are
    exact.
    """
    return torch.from_numpy(bound * (stream.randint(-(2**15), 2**15 + 1, shape, dtype=np.int64) / 2**15)).float()


def batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return STEPS pairs of pixels (BATCH_SIZE, PIXELS), which show the patterns of the words, and
    words (BATCH_SIZE, ATTRIBUTES).
    """
    stream = np.random.RandomState(seed)
    patterns = uniform(stream, 1.0, (ATTRIBUTES * VALUES, PIXELS))
    found = []
    for _ in range(STEPS):
        values = stream.randint(0, VALUES, (BATCH_SIZE, ATTRIBUTES), dtype=np.int64)
        words = torch.from_numpy(values + VALUES * np.arange(ATTRIBUTES))
        found.append((patterns[words].sum(1) + uniform(stream, NOISE, (BATCH_SIZE, PIXELS)), words))
    return found


def train(
    loss_function: Callable[..., Tensor], case: Case, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Run:
    """Run a whole training in `dtype`, which the features and so the loss have."""
    model = TwoTowers(case, np.random.RandomState(seed + 1)).to(dtype)
    matrices, others = ([p for p in model.parameters() if (p.dim() > 1) is is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]  # as in CLIP
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS)
    run = Run()
    for pixels, words in batches(seed):
        image, text = model(pixels.to(dtype), words[: case.texts])
        labels, bias = {}, () if model.bias is None else (model.bias,)
        if case.labels:
            y = VALUES * ATTRIBUTES * words[:, 0] + words[:, 1]
            labels = {"image_labels": y, "text_labels": y[: case.texts]}
        image.retain_grad()
        text.retain_grad()
        loss = loss_function(image, text, model.log_scale.exp(), *bias, **labels, **case.options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        run.loss.append(loss.item())
        run.d_image.append(image.grad.double().norm().item())
        run.d_text.append(text.grad.double().norm().item())
        run.d_log_scale.append(model.log_scale.grad.item())
        run.d_bias.extend(x.grad.item() for x in bias)
    return run


def dense_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    image_labels: Tensor | None = None,
    text_labels: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Call `support.accuracy.dense` with the arguments of `contrastive_loss` and `sigmoid_loss`."""
    if image_labels is not None:
        options["labels"] = image_labels, text_labels
    return dense(image, text, scale, bias, **options)


def golden_run(name: str) -> Run:
    return Run(**json.loads((GOLDEN / f"training_{name}.json").read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train every case in fp64 with the dense loss and print its losses.")
    parser.add_argument("--write", action="store_true", help=f"replace the files in {GOLDEN.parent.name}/{GOLDEN.name}")
    args = parser.parse_args()
    for name, case in CASES.items():
        run = train(dense_loss, case, dtype=torch.float64)
        print(name, *(f"{loss:.3f}" for loss in (*run.loss[::10], run.loss[-1])))
        if args.write:
            GOLDEN.mkdir(exist_ok=True)
            text = json.dumps(dataclasses.asdict(run), indent=1)
            (GOLDEN / f"training_{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
