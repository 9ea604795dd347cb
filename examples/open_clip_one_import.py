"""open_clip's training step with one import replaced: the same model, the same batches, the same losses.

    python examples/open_clip_one_import.py [--seed 0]

Trains a small open_clip model with random weights for 20 steps twice, once with open_clip's ClipLoss and once with
fastclip's. Prints the losses side by side, and fails if their relative difference
exceeds 1e-5.
"""

from __future__ import annotations

import argparse
import sys

import torch
from open_clip.loss import ClipLoss as OpenClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import nn

from fastclip import ClipLoss  # replaces `from open_clip.loss import ClipLoss`

TOLERANCE = 1e-5
STEPS = 20
BATCH_SIZE = 64
LEARNING_RATE = 5e-4  # open_clip's default; with 1e-2, rounding errors exceed the tolerance after 20 steps
CONTEXT_LENGTH, VOCAB_SIZE = 16, 512


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an open_clip model with open_clip's and with fastclip's loss.")
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of the weights and the batches (default: %(default)s)"
    )
    args = parser.parse_args()

    theirs = train_losses(OpenClipLoss(), seed=args.seed)
    ours = train_losses(ClipLoss(), seed=args.seed)
    differences = [abs(a - b) / abs(a) for a, b in zip(theirs, ours)]
    print("step    open_clip     fastclip   relative difference")
    for step, (a, b, difference) in enumerate(zip(theirs, ours, differences)):
        print(f"{step:4d}   {a:10.7f}   {b:10.7f}   {difference:.1e}")
    print(f"largest relative difference {max(differences):.1e}, allowed {TOLERANCE:.0e}")
    if not all(difference <= TOLERANCE for difference in differences):  # NaN fails too
        sys.exit("the losses differ")


def train_losses(loss_function: nn.Module, *, seed: int) -> list[float]:
    """Train a model on one random batch and return the loss of each step. Weights and batch depend only on `seed`."""
    torch.manual_seed(seed)
    model = CLIP(
        embed_dim=64,
        vision_cfg=CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=8, image_size=32),
        text_cfg=CLIPTextCfg(context_length=CONTEXT_LENGTH, vocab_size=VOCAB_SIZE, width=64, heads=2, layers=2),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), eps=1e-6)
    images = torch.randn(BATCH_SIZE, 3, 32, 32)
    ids = torch.randint(1, VOCAB_SIZE - 1, (BATCH_SIZE, CONTEXT_LENGTH))
    ids[:, -1] = VOCAB_SIZE - 1  # the end token has the largest id

    losses = []
    for _ in range(STEPS):
        image_features, text_features, logit_scale = model(images, ids)
        loss = loss_function(image_features, text_features, logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    main()
