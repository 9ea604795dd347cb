"""Train a small CLIP on handwritten digits with fastclip's loss, classify held-out digits by captions, draw both.

    python examples/train_digits.py [--steps 400] [--batch-size 64] [--seed 0] [--output runs/digits]

Takes about half a minute on two CPU cores. Writes OUTPUT/digits.png; fails when zero-shot top-1 is under 95 %.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files: no display is needed
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

import fastclip
from fastclip.data.batch import Batch
from fastclip.data.digits import CLASS_NAMES, TEMPLATES, Digits, digit_batches, load_digits
from fastclip.evaluation.zero_shot import class_embeddings, zero_shot_accuracy, zero_shot_similarities
from fastclip.models import create_model, get_tokenizer
from fastclip.training.loop import train

REQUIRED_TOP1 = 0.95
CONTEXT_LENGTH = 16  # tokens; the longest caption has 10
IMAGES_PER_CLASS = 2  # in the picture


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    tokenize = get_tokenizer(args.model, context_length=CONTEXT_LENGTH)
    model = create_model(args.model, context_length=CONTEXT_LENGTH)
    train_digits, held_out = load_digits()

    def batches() -> Iterable[Batch]:
        return digit_batches(train_digits, tokenize, batch_size=args.batch_size, seed=args.seed)

    history = train(model, batches(), steps=args.steps, backend=args.backend)
    classes = class_embeddings(model, tokenize, CLASS_NAMES, TEMPLATES)
    top1 = zero_shot_accuracy(model, held_out.images, held_out.labels, classes)

    states = ", ".join(f"{name}: {state}" for name, state in fastclip.backends().items())
    print(f"loss served by backend {history.backend!r} ({states})")
    print(f"trained {args.steps} steps of {args.batch_size} in {history.seconds:.1f} s, loss {history.losses[-1]:.3f}")
    print(f"zero-shot top-1 on {len(held_out.labels)} held-out digits: {100 * top1:.1f} %")

    shown = pick_images(held_out)
    captions = class_embeddings(model, tokenize, CLASS_NAMES, TEMPLATES[:1])
    similarities = zero_shot_similarities(model, shown.images, captions)
    title = f"Zero-shot top-1 {100 * top1:.1f} % on {len(held_out.labels)} held-out digits"
    path = args.output / "digits.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, title, history.losses, least_loss(islice(batches(), args.steps)), shown, similarities)
    print(f"wrote {path}")
    if top1 < REQUIRED_TOP1:
        sys.exit(f"zero-shot top-1 is {100 * top1:.1f} %, under the promised {100 * REQUIRED_TOP1:.0f} %")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small CLIP on handwritten digits and draw what it learned.")
    parser.add_argument("--model", default="ViT-tiny", help="a name of fastclip.list_models() (default %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="training steps (default %(default)s, 18 epochs)")
    parser.add_argument("--batch-size", type=int, default=64, help="images and captions a step (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches (default %(default)s)")
    parser.add_argument("--backend", choices=fastclip.backends(), help="of the loss (default: the best available)")
    parser.add_argument("--output", type=Path, default=Path("runs/digits"), help="folder (default %(default)s)")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    return args


def pick_images(digits: Digits) -> Digits:
    """The first few images of every digit, in the order of the digits."""
    chosen = torch.cat([(digits.labels == c).nonzero()[:IMAGES_PER_CLASS, 0] for c in range(len(CLASS_NAMES))])
    return Digits(digits.images[chosen], digits.labels[chosen])


def least_loss(batches: Iterable[Batch]) -> float:
    """What a perfect model would reach: an image's n texts share its probability, so that each has 1 / n of it."""
    labels = [batch.image_labels for batch in batches]
    return float(torch.stack([x.bincount()[x].log().mean() for x in labels]).mean())


def draw(path: Path, title: str, losses: list[float], least: float, shown: Digits, similarities: Tensor) -> None:
    """Loss curve on the left; on the right the cosines (B, 10) of the shown images and one caption a digit."""
    figure = plt.figure(figsize=(14, 5.2), layout="constrained")
    figure.suptitle(title, fontsize=14)
    left, right = figure.subfigures(1, 2, width_ratios=(2, 3), squeeze=False)[0]
    draw_losses(left.subplots(), losses, least)
    matrix, strip = right.subplots(2, 1, sharex=True, height_ratios=(10, 0.75))
    draw_similarities(matrix, strip, shown, similarities)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_losses(axes: Axes, losses: list[float], least: float) -> None:
    window = max(1, len(losses) // 20)
    smooth = torch.tensor(losses).unfold(0, window, 1).mean(dim=1)
    axes.plot(range(1, len(losses) + 1), losses, color="tab:blue", alpha=0.3, label="each step")
    axes.plot(range(window, len(losses) + 1), smooth, color="tab:blue", label=f"mean of the last {window} steps")
    axes.axhline(least, color="black", linestyle="--", linewidth=1, label="the least possible on these batches")
    axes.set(title="Training loss", xlabel="step", ylabel="contrastive loss with labels (UniCL)")
    axes.grid(alpha=0.3)
    axes.legend()


def draw_similarities(matrix: Axes, strip: Axes, shown: Digits, similarities: Tensor) -> None:
    count = len(shown.labels)
    heat = matrix.imshow(similarities.T, aspect="auto", cmap="viridis")
    best = similarities.argmax(dim=1)
    for right, marker, color in ((True, "o", "white"), (False, "X", "red")):
        columns = ((best == shown.labels) == right).nonzero()[:, 0]
        matrix.scatter(columns, best[columns], marker=marker, color=color, edgecolor="black")
    matrix.set_title("Held-out images and captions; the most similar one is marked (red: wrong)")
    matrix.set_yticks(range(len(CLASS_NAMES)), [TEMPLATES[0].format(name) for name in CLASS_NAMES])
    matrix.tick_params(bottom=False)
    matrix.figure.colorbar(heat, ax=matrix, label="cosine similarity")

    row = torch.cat(list(shown.images[:, 0]), dim=1)
    strip.imshow(row, cmap="gray", extent=(-0.5, count - 0.5, 0, 1), aspect="auto")
    strip.set_yticks([])
    strip.set_xticks(range(count), [str(label) for label in shown.labels.tolist()])
    strip.set_xlabel("held-out images and their labels")


if __name__ == "__main__":
    main()
