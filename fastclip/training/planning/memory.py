"""The memory of a training step before it runs: `fastclip plan`.

One process holds parameters, gradients and optimiser states, whole (DDP) or a shard of them (FSDP2); the features of
all its pairs; and, one after the other, what the loss takes and the activations of a micro-batch (`cached_step`), or,
where its pairs are one micro-batch, both at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from fastclip._backends.cpu.blocks import BLOCK_M
from fastclip.models.dual_encoder import DualEncoder
from fastclip.system import env
from fastclip.system.rounding import ceil_div
from fastclip.training.planning.footprint import Footprint, footprint
from fastclip.training.ranks import fsdp_blocks

__all__ = ["FRAGMENTATION", "PROCESS", "STATES", "Plan", "plan"]

_FP32 = 4
STATES = {"adamw": 2, "lamb": 2}  # fp32 values a trainable parameter
_CHOICES = {
    "precision": ("fp32", "bf16"),
    "optimizer": tuple(STATES),
    "parallel": ("ddp", "fsdp"),
    "comm": ("gather", "ring"),
    "device": ("cuda", "cpu"),
}
_STATISTICS = 80  # bytes a text: log-sum-exps, factors, their gradients
# Of no tensor. GPU: CUDA's context, workspaces of cuBLAS, cuDNN and NCCL; CPU: Python, torch and other libraries
PROCESS = {"cuda": 2**30, "cpu": 2**29}
FRAGMENTATION = 0.05  # of all tensors: gaps that an allocator cannot give away


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements of a model."""

    parameters: int
    trainable: int
    buffers: int  # bytes
    block: int  # of the largest block that FSDP gathers by itself
    rest: int  # of what is in no such block, gathered as long as a pass lasts
    trainable_rest: int


@dataclass(frozen=True)
class Plan:
    """Bytes of one process in a training step, the largest where processes differ; made by `plan`.

    ``dataclasses.replace(plan, micro_batch=64)`` answers for other sizes at once. `precision` and `device` are of the
    footprint, too, and stay.
    """

    sizes: Sizes
    footprint: Footprint
    image_size: int  # pixels
    context_length: int  # tokens
    batch_size: int  # pairs of all processes
    micro_batch: int  # pairs whose activations are there at a time
    world_size: int
    precision: str
    optimizer: str
    parallel: str
    comm: str
    ema: bool
    device: str
    workspace_limit: int  # FASTCLIP_WORKSPACE_MB, in bytes

    @property
    def pairs(self) -> int:
        """Pairs of the process that has most of them."""
        return ceil_div(self.batch_size, self.world_size)

    @property
    def cached(self) -> bool:
        return self.micro_batch < self.pairs

    @property
    def sharded(self) -> bool:
        return self.parallel == "fsdp" and self.world_size > 1

    def _share(self, elements: int) -> int:
        return ceil_div(elements * _FP32, self.world_size if self.sharded else 1)

    @property
    def parameters(self) -> int:
        """Bytes of parameters and buffers."""
        return self._share(self.sizes.parameters) + self.sizes.buffers

    @property
    def gathered(self) -> int:
        """Bytes that FSDP gathers: two blocks, in use and on the way, one's whole gradients, what is in no block."""
        if not self.sharded:
            return 0
        gradients = 0 if self.cached else self.sizes.block + self.sizes.trainable_rest  # until they are exchanged
        return (2 * self.sizes.block + self.sizes.rest + gradients) * _FP32

    @property
    def gradients(self) -> int:
        """Bytes of gradients: FSDP keeps them whole until the last micro-batch, in which they are exchanged."""
        return self.sizes.trainable * _FP32 if self.cached else self._share(self.sizes.trainable)

    @property
    def gradients_stay(self) -> bool:
        """Whether gradients are there throughout: from one micro-batch to the next, or in DDP's buckets. Else they come
        as activations go, and are set to None before the next step."""
        return self.cached or self._ddp

    @property
    def buckets(self) -> int:
        """Bytes of DDP's buckets, from which gradients are apart until the last micro-batch, which is exchanged."""
        return self.gradients if self._ddp and self.cached else 0

    @property
    def _ddp(self) -> bool:
        return self.parallel == "ddp" and self.world_size > 1

    @property
    def optimizer_states(self) -> int:
        return STATES[self.optimizer] * self._share(self.sizes.trainable)

    @property
    def average(self) -> int:
        """The moving average of the weights that are trained (EMA)."""
        return self._share(self.sizes.trainable) if self.ema else 0

    def _inputs(self, pairs: int) -> int:
        return pairs * (3 * self.image_size**2 * _FP32 + self.context_length * 8)

    @property
    def inputs(self) -> int:
        """Images and token ids on the device: a GPU gets those of a micro-batch."""
        return self._inputs(self.pairs if self.device == "cpu" else min(self.micro_batch, self.pairs))

    @property
    def host(self) -> int:
        """Images and token ids of a whole step on the host: twice that while the next step's are loaded."""
        return self._inputs(self.pairs)

    @property
    def features(self) -> int:
        """Bytes of the features' gradients, and in `cached_step` of the features of all micro-batches."""
        return (4 if self.cached else 2) * self.pairs * self.footprint.dim * self.footprint.feature_size

    @property
    def activations(self) -> int:
        """Bytes of a micro-batch with all temporary tensors: the highest point of forward and backward pass."""
        return self.footprint.peak(min(self.micro_batch, self.pairs))

    @property
    def loss(self) -> int:
        """Bytes that `contrastive_loss` takes while it runs, on a CPU without the workspace, which is kept."""
        shard, texts = self.pairs * self.footprint.dim, self.batch_size * self.footprint.dim  # elements
        size = self.footprint.feature_size
        if self.world_size == 1:  # a GPU's backends sum the texts' gradients in fp32
            held = shard * _FP32 if self.device == "cuda" else 0
        elif self.comm == "gather":  # texts, their gradients, and those in fp32 or as they travel
            held = texts * (2 * size + _FP32)
        else:  # blocks here and coming; sums here and coming, shares, raw sums, the images' sum
            held = shard * (2 * size + 7 * _FP32)
        return held + _STATISTICS * self.batch_size + (self._workspace if self.device == "cuda" else 0)

    @property
    def workspace(self) -> int:
        """Logits of the loss: kept between the steps on a CPU, part of `loss` on a GPU."""
        return self._workspace if self.device == "cpu" else 0

    @property
    def _workspace(self) -> int:
        columns = self.batch_size if self.comm == "gather" else self.pairs
        if self.device == "cpu":
            return min(self.workspace_limit, _FP32 * min(self.pairs, BLOCK_M) * columns)
        return min(self.workspace_limit, self.footprint.feature_size * self.pairs * columns)

    @property
    def held(self) -> int:
        """Bytes that are there all the time."""
        parameters = self.parameters + self.gathered + self.optimizer_states + self.average
        gradients = self.gradients + self.buckets if self.gradients_stay else 0
        return parameters + gradients + self.inputs + self.features + self.workspace

    @property
    def tensors(self) -> int:
        """Bytes that a step holds at its highest point: in the loss, before the second pass or on top of the only one;
        in that pass; or in the optimiser, with all gradients."""
        kept = 0 if self.cached else self.footprint.kept(self.pairs)
        share = 0.0 if self.gradients_stay else self.gradients / (self.sizes.trainable * _FP32)
        highest = self.footprint.peak(min(self.micro_batch, self.pairs), share)
        return self.held + max(highest, kept + self.loss, 0 if self.gradients_stay else self.gradients)

    @property
    def reserve(self) -> int:
        """Bytes for what is no tensor: 1 GiB of CUDA's (a CPU's process: 0.5 GiB) and 5 % of the tensors."""
        return PROCESS[self.device] + int(FRAGMENTATION * self.tensors)

    @property
    def total(self) -> int:
        return self.tensors + self.reserve

    def fits(self, micro_batch: int, memory: int) -> bool:
        return replace(self, micro_batch=micro_batch).total <= memory

    def largest_micro_batch(self, memory: int) -> int:
        """Return the most pairs whose step fits into `memory` bytes, or 0."""
        if self.fits(self.pairs, memory):  # no caching: FSDP's gradients are never whole
            return self.pairs
        low, high = 0, self.pairs  # fits, does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(middle, memory) else (low, middle)
        return low

    def even_micro_batch(self, memory: int) -> int:
        """Return the largest that fits and cuts the pairs into equal parts, or a power of two if that is more; or 0."""
        largest = self.largest_micro_batch(memory)
        if largest == 0:
            return 0
        divisor = next(size for size in range(largest, 0, -1) if self.pairs % size == 0)
        return max(divisor, 1 << largest.bit_length() - 1)


def plan(
    model: DualEncoder,
    *,
    batch_size: int,
    world_size: int = 1,
    micro_batch: int | None = None,
    precision: str = "fp32",
    optimizer: str = "adamw",
    parallel: str = "ddp",
    comm: str = "gather",
    ema: bool = False,
    device: str = "cuda",
) -> Plan:
    """Predict the memory of a training step.

    Nothing is computed or allocated: ``create_model(name, device="meta")`` will do.

    Args:
        model: as it will be trained: gradient checkpointing and locked towers as they are set; made by `create_model`.
        batch_size: pairs of all processes.
        world_size: processes, each with a device.
        micro_batch: pairs of a process whose activations are there at a time; default: all of them.
        precision: "fp32", or "bf16": autocast.
        optimizer: "adamw" or "lamb", both with two fp32 states.
        parallel: "ddp", or "fsdp": FSDP2 of the towers' blocks.
        comm: of the loss over several processes.
        ema: a moving average of the weights.
        device: "cuda" or "cpu"; none is used.

    Raises:
        ValueError: an option that no run can have, or a model without a configuration.
    """
    given = {"precision": precision, "optimizer": optimizer, "parallel": parallel, "comm": comm, "device": device}
    for name, value in given.items():
        if value not in _CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(_CHOICES[name])}, got {value!r}")
    for name, number in (("batch_size", batch_size), ("world_size", world_size), ("micro_batch", micro_batch)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if batch_size < world_size:
        raise ValueError(f"a batch of {batch_size} leaves nothing for some of {world_size} processes")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("both towers are locked: there is nothing to train")
    if model.config is None:
        raise ValueError("this model was made without a configuration, which tells the sizes of its inputs")
    image_size, length = model.config.vision_cfg.image_size, model.config.text_cfg.context_length
    pairs = ceil_div(batch_size, world_size)
    return Plan(
        sizes=_sizes_of(model),
        footprint=footprint(model, image_size=image_size, context_length=length, precision=precision, device=device),
        image_size=image_size,
        context_length=length,
        batch_size=batch_size,
        micro_batch=pairs if micro_batch is None else min(micro_batch, pairs),
        world_size=world_size,
        ema=ema,
        workspace_limit=env.workspace_bytes(device),
        **given,
    )


def _sizes_of(model: DualEncoder) -> Sizes:
    parameters = list(model.parameters())
    blocks = list(fsdp_blocks(model))
    in_blocks = {id(p) for block in blocks for p in block.parameters()}
    rest = [p for p in parameters if id(p) not in in_blocks]
    return Sizes(
        parameters=_count(parameters),
        trainable=_count(p for p in parameters if p.requires_grad),
        buffers=sum(x.numel() * x.element_size() for x in model.buffers()),
        block=max((_count(block.parameters()) for block in blocks), default=0),
        rest=_count(rest),
        trainable_rest=_count(p for p in rest if p.requires_grad),
    )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
