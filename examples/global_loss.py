"""The global contrastive loss (SogCLR, Yuan et al. 2022) with batches of 64, against the plain loss with 64 and 1,024.

    python examples/global_loss.py [--data latent] [--seeds 3] [--epochs 5] [--gamma 0.8]

All runs see the same number of pairs, so that a batch of 1,024 makes a sixteenth of the updates. The table shows R@1 on
held-out pairs: the share of images whose most similar text is their own, and of texts whose most similar image is their
own, with mean and range over the seeds. With gamma 1 the global loss forgets earlier batches, so that this line shows
what the running means contribute.

latent  20,000 synthetic pairs. Image and text are different functions of a latent vector, with noise. The latent
        vectors lie in 400 groups, so that the texts that are hard to tell apart rarely meet in a batch of 64.
digits  1,438 of scikit-learn's handwritten digits. The image is the left half of a digit, the text the right half.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastclip

SCALE = 1 / 0.07  # of the logits, fixed in every run
GROUPS, LATENT, WIDTH = 400, 16, 64


class Pairs(NamedTuple):
    """Images and texts for training, (N, D) each, and for tests."""

    images: Tensor
    texts: Tensor
    test_images: Tensor
    test_texts: Tensor


class Method(NamedTuple):
    """A line of the table. Learning rates are about the best for the plain loss, of powers of 2 from 1e-3 on."""

    name: str
    batch_size: int
    lr: float
    gamma: float | None = None  # of the global loss; None: the plain loss


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the global contrastive loss with the plain one.")
    parser.add_argument("--data", choices=DATA, nargs="+", default=list(DATA), help="data sets (default: both)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="passes over the data (default: 5 for latent, 40 for digits)")
    parser.add_argument("--gamma", type=float, default=0.8, help="weight of the batch (default: %(default)s)")
    args = parser.parse_args()
    for name in args.data:
        pairs, epochs = DATA[name][0](), args.epochs or DATA[name][1]
        small, large = DATA[name][2:]
        print(f"{name}: {len(pairs.images):,} pairs, {epochs} epochs, R@1 on {len(pairs.test_images):,} held-out pairs")
        for method in (
            Method("plain loss", 64, small),
            Method("global loss, gamma 1", 64, small, 1.0),
            Method(f"global loss, gamma {args.gamma:g}", 64, small, args.gamma),
            Method("plain loss", 1024, large),
        ):
            start = time.perf_counter()
            found = torch.tensor([train(pairs, method, epochs, seed) for seed in range(args.seeds)])
            seconds = (time.perf_counter() - start) / args.seeds
            spread = f"{found.mean():5.1f} %  ({found.min():.1f} to {found.max():.1f})"
            print(f"  {method.name:22} batch {method.batch_size:5,}   {spread}   {seconds:.0f} s per run", flush=True)


def train(pairs: Pairs, method: Method, epochs: int, seed: int) -> float:
    """Train two encoders and return R@1 in per cent."""
    torch.manual_seed(seed)
    N, B = len(pairs.images), method.batch_size
    image, text = encoder(pairs.images.shape[1]), encoder(pairs.texts.shape[1])
    optimizer = torch.optim.AdamW([*image.parameters(), *text.parameters()], lr=method.lr, weight_decay=0.1)
    of_dataset = None if method.gamma is None else fastclip.GlobalContrastiveLoss(N, method.gamma)
    steps = epochs * N // B
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, method.lr, total_steps=steps, pct_start=0.1)
    order = torch.cat([torch.randperm(N) for _ in range(epochs)])
    for index in order[: steps * B].split(B):
        features = image(pairs.images[index]), text(pairs.texts[index])
        if of_dataset is None:
            loss = fastclip.contrastive_loss(*features, SCALE)
        else:
            loss = of_dataset(*features, SCALE, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return recall(image, text, pairs)


def encoder(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 256), nn.GELU(), nn.Linear(256, 64))


@torch.no_grad()
def recall(image: nn.Module, text: nn.Module, pairs: Pairs) -> float:
    """Return the mean R@1 of both directions in per cent."""
    similar = F.normalize(image(pairs.test_images), dim=1) @ F.normalize(text(pairs.test_texts), dim=1).T
    own = torch.arange(len(similar))
    return 50 * float((similar.argmax(1) == own).float().mean() + (similar.argmax(0) == own).float().mean())


def latent(size: int = 20_000, tests: int = 2_000) -> Pairs:
    """Return pairs of two random functions of a latent vector, which is near one of the groups' centres."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    centres, total = normal(GROUPS, LATENT), size + tests
    z = centres[torch.randint(GROUPS, (total,), generator=generator)] + 0.2 * normal(total, LATENT)
    sides = []
    for _ in range(2):
        x = torch.tanh(1.5 * z @ normal(LATENT, 2 * WIDTH) / math.sqrt(LATENT)) @ normal(2 * WIDTH, WIDTH)
        sides.append(x / x.std() + 0.15 * normal(total, WIDTH))
    return Pairs(sides[0][:size], sides[1][:size], sides[0][size:], sides[1][size:])


def digits() -> Pairs:
    """Return the left and the right halves of scikit-learn's digits, one fifth of them for tests."""
    from sklearn.datasets import load_digits

    x = torch.from_numpy(load_digits().images).float() / 8 - 1  # (1797, 8, 8)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    left, right = x[:, :, :4].flatten(1), x[:, :, 4:].flatten(1)
    tests = len(x) // 5
    return Pairs(left[tests:], right[tests:], left[:tests], right[:tests])


# data -> function, epochs, and the learning rates of batches of 64 and of 1,024
DATA = {"latent": (latent, 5, 4e-3, 8e-3), "digits": (digits, 40, 4e-3, 8e-3)}


if __name__ == "__main__":
    main()
