"""Floating-point operations of a training step, and the rate of matrix products, against which they are measured.

Useful operations are those that the update needs: the forward pass, the backward pass of trained towers and the loss,
for every pair once and for texts without their padding. Executed operations include those of gradient caching and
gradient checkpointing, which embed some or all pairs again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastclip.models.config import ModelConfig
from fastclip.models.dual_encoder import DualEncoder, build_model
from fastclip.training.planning.footprint import start_autograd

__all__ = ["Operations", "matrix_rate", "operations_of"]

_BACKWARD = 2  # products of a backward pass for each of the forward pass: for the inputs and for the weights
# The measurement of the rate: its seconds, and elements of a row of its first and largest matrices. Only large products
# reach the full rate of a GPU, and on a slow device they would take too long
_SECONDS = {"cpu": 0.06, "cuda": 0.25}
_SIZES = {"cpu": (64, 4096), "cuda": (256, 8192)}
_AT_A_TIME = {"cpu": 1, "cuda": 10}  # products between two waits of the host for the device, at most


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of a model, where a multiplication and an addition count as two.

    Products of matrices, convolutions and attention are counted. Attention counts as a whole, also with a causal mask.
    """

    image: int  # forward pass of an image
    texts: tuple[tuple[int, int], ...]  # tokens of a text and operations of its forward pass, for up to three lengths
    dim: int  # D of the features, or the sum of the lengths of the prefixes that the loss compares
    trains_image: bool
    trains_text: bool
    checkpointing: bool = False  # trained towers run forward again in the backward pass

    def text(self, tokens: float) -> float:
        """Return the operations of the forward pass of a text with this number of tokens.

        They are a quadratic polynomial in the tokens, which the three known lengths determine.
        """
        total = 0.0
        for place, operations in self.texts:
            weight = 1.0
            for other, _ in self.texts:
                if other != place:
                    weight *= (tokens - other) / (place - other)
            total += weight * operations
        return total

    def forward(self, tokens: float) -> float:
        """Return the operations of the forward pass of a pair, whose text has this number of tokens."""
        return self.image + self.text(tokens)

    def _trained(self, tokens: float) -> float:
        return self.trains_image * self.image + self.trains_text * self.text(tokens)

    def _loss(self, pairs: float) -> float:
        """Return the operations of one product of all image features with all text features."""
        return 2 * pairs * pairs * self.dim

    def useful(self, pairs: float, tokens: float) -> float:
        """Return the useful operations of a step.

        Args:
            pairs: pairs of all processes.
            tokens: tokens of a text on average, without padding.
        """
        towers = self.forward(tokens) + _BACKWARD * self._trained(tokens)
        return pairs * towers + (1 + self.trains_image + self.trains_text) * self._loss(pairs)

    def executed(self, pairs: float, tokens: float, *, again: float = 0.0) -> float:
        """Return the operations that a step executes, of which some only save memory.

        Args:
            pairs, tokens: as for `useful`. Padding is not counted.
            again: share of the pairs that gradient caching embeds twice.
        """
        towers = again * self.forward(tokens) + self.checkpointing * self._trained(tokens)
        return self.useful(pairs, tokens) + pairs * towers + self._loss(pairs)  # the loss computes its logits again


def operations_of(model: DualEncoder, prefixes: Sequence[int] | None = None) -> Operations:
    """Count the operations of a model as its configuration describes it, without any weights.

    Args:
        model: model with a configuration.
        prefixes: lengths of the prefixes of the features that the loss compares (default: the whole features alone).

    Raises:
        ValueError: the model has no configuration, or cannot be run on tensors without contents.
    """
    if model.config is None:
        raise ValueError("the model has no configuration with the sizes of its inputs: build it with create_model")
    try:
        image, texts = _forward(model.config, _patch_dropout(model))
    except Exception as error:
        raise ValueError(f"the operations of the model cannot be counted: {error}") from error
    return Operations(
        image,
        texts,
        sum(prefixes) if prefixes else model.config.embed_dim,
        trains_image=any(p.requires_grad for p in model.visual.parameters()),
        trains_text=any(p.requires_grad for p in model.text.parameters()),
        checkpointing=_checkpoints(model),
    )


def _checkpoints(model: nn.Module) -> bool:
    names = ("grad_checkpointing", "gradient_checkpointing")  # the second one is transformers'
    return any(getattr(module, name, False) is True for module in model.modules() for name in names)


def _patch_dropout(model: DualEncoder) -> float:
    return float(getattr(getattr(model.visual, "patch_drop", None), "prob", 0.0))


@cache
def _forward(config: ModelConfig, patch_dropout: float) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Return the operations of an image and of texts of up to three lengths, with their lengths.

    The towers run on fake tensors of the CPU, and not on the meta device, where transformers' BERT cannot run.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode  # slow to load

    start_autograd()
    model = build_model(config, device="meta").eval()
    if patch_dropout:
        model.set_patch_dropout(patch_dropout)
        model.get_submodule("visual.patch_drop").train()
    side, longest = config.vision_cfg.image_size, config.text_cfg.context_length
    counted: list[int] = []

    def count(tower: nn.Module, *shape: int, dtype: torch.dtype) -> int:
        with FlopCounterMode(display=False) as counter:
            tower(torch.empty(*shape, dtype=dtype))
        counted.append(counter.get_total_flops())
        return counted[-1]

    # The counter does not know the fused attention of a CPU
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.to_empty(device="cpu")
        image = count(model.visual, 1, 3, side, side, dtype=torch.float32)
        lengths = sorted({1, longest // 2 or 1, longest})
        return image, tuple((tokens, count(model.text, 1, tokens, dtype=torch.int64)) for tokens in lengths)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure how many operations per second products of large square matrices reach on `device`.

    It takes less than 0.1 s on a CPU and 0.3 s on a GPU, and the time in which torch loads its kernels, once in a
    process for each dtype and number of threads. torch's random state stays as it is.
    """
    return _matrix_rate(device, dtype, torch.get_num_threads(), torch.get_float32_matmul_precision())


@cache
def _matrix_rate(device: torch.device, dtype: torch.dtype, threads: int, precision: str) -> float:
    kind = device.type
    generator = torch.Generator(device).manual_seed(0)

    def seconds(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            torch.mm(a, a, out=product)
        if kind == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    size, largest = _SIZES[kind]
    # Random numbers, because a GPU multiplies constants faster. A CPU draws those of a large matrix for longer than
    # the measurement may take, so that larger matrices repeat them
    a = torch.rand(size, size, generator=generator, device=device).to(dtype)
    product = torch.empty_like(a)
    seconds(1)  # libraries load their kernels
    best, count, expected = 0.0, 1, 0.0
    end = time.perf_counter() + _SECONDS[kind]
    while best == 0 or time.perf_counter() + expected < end:
        one = seconds(count) / count
        best = max(best, 2 * size**3 / one)
        left = end - time.perf_counter()
        if size < largest and 16 * one < left:  # twice the size takes eight times as long, and at most half of the rest
            size, count, one = 2 * size, 1, 8 * one
            a = a.repeat(2, 2)
            product = torch.empty_like(a)
        else:
            count = max(1, min(_AT_A_TIME[kind], int(left / 4 / one)))
        expected = count * one
    return best
