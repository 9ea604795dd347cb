"""SimCLR (Chen et al. 2020) on handwritten digits: an image encoder is trained without labels.

    python examples/simclr_digits.py [--steps 200] [--seed 0]

Two random views of an image are positives of each other, and all other views in the batch are negatives. Before and
after training, held-out digits are classified by their nearest neighbour among ten labelled images per digit. The loss
with labels (SupCon, Khosla et al. 2020) needs only other values of `image_labels` and `text_labels`.
"""

from __future__ import annotations

import argparse
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastclip
from fastclip.data.spec import open_source

BATCH_SIZE = 128
TEMPERATURE = 0.2
LABELLED = 10  # images per digit


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an encoder of digits without labels, and print its accuracy.")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed of the weights, the views and the labels (default: %(default)s)",
    )
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    images, labels = digits(held_out=False)
    tests, test_labels = digits(held_out=True)
    few = torch.cat([(labels == c).nonzero()[:LABELLED, 0] for c in range(10)])
    encoder = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))  # used in training only (section 4.2)

    def accuracy() -> float:
        return nearest_accuracy(encoder, images[few], labels[few], tests, test_labels)

    before = accuracy()
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=2e-3, weight_decay=1e-4)
    for step in range(1, args.steps + 1):
        batch = images[torch.randint(len(images), (BATCH_SIZE,))]
        z = head(encoder(torch.cat([view(batch), view(batch)])))  # (2N, D)
        y = torch.arange(BATCH_SIZE).repeat(2)  # index of the image of which each row is a view
        loss = fastclip.contrastive_loss(z, z, 1 / TEMPERATURE, image_labels=y, text_labels=y, exclude_self=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 50 == 0:
            print(f"step {step:4d}   loss {loss.item():.4f}")

    after = accuracy()
    print(f"top-1 on {len(tests)} held-out digits with {LABELLED} labels per digit:")
    print(f"  random encoder   {100 * before:.1f} %")
    print(f"  after SimCLR     {100 * after:.1f} %")
    if after <= before:
        sys.exit("the accuracy did not improve")


def digits(*, held_out: bool) -> tuple[Tensor, Tensor]:
    """Return images (B, 1, 16, 16) with values from 0 to 1, and labels (B,)."""
    source = open_source("digits", held_out=held_out)
    records = [source[k] for k in range(len(source))]
    images = torch.from_numpy(np.stack([np.array(x.image.convert("L")) for x in records]))
    return F.avg_pool2d(images[:, None].float() / 255, 2), torch.tensor([x.label for x in records])


def view(images: Tensor) -> Tensor:
    """Return a random view of each image: rotated, scaled, sheared, shifted, brighter or darker, and with noise."""
    count = len(images)
    angle, slant = (torch.randn(2, count, 1) * math.radians(10)).unbind()
    scale = 1 + 0.15 * torch.randn(count, 1)
    first = torch.cat([angle.cos(), slant - angle.sin(), 0.15 * torch.randn(count, 1) / scale], dim=1)
    second = torch.cat([angle.sin(), angle.cos(), 0.15 * torch.randn(count, 1) / scale], dim=1)
    affine = scale[:, :, None] * torch.stack([first, second], dim=1)  # (B, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    brightness = 1 + 0.3 * torch.randn(count, 1, 1, 1)
    return brightness * moved + 0.05 * torch.randn_like(moved)


@torch.no_grad()
def nearest_accuracy(encoder: nn.Module, images: Tensor, labels: Tensor, tests: Tensor, test_labels: Tensor) -> float:
    """Return the share of test images whose most similar labelled image has the same label."""
    encoder.eval()
    known, asked = (F.normalize(encoder(x), dim=1) for x in (images, tests))
    encoder.train()
    return float((labels[(asked @ known.T).argmax(dim=1)] == test_labels).float().mean())


if __name__ == "__main__":
    main()
