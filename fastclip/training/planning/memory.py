"""Prediction of the memory of a training step, for `fastclip plan`.

A process holds the parameters, gradients and optimiser states, whole (DDP) or sharded (FSDP2), and the features of all
its pairs. With gradient caching (`cached_step`), the memory of the loss and the activations of a micro-batch are needed
one after the other, beside the graphs that are kept. Without it, both are needed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from fastclip._backends.cpu.blocks import BLOCK_M
from fastclip.models.dual_encoder import DualEncoder
from fastclip.system import env
from fastclip.system.rounding import ceil_div
from fastclip.training.planning.footprint import Footprint, footprint
from fastclip.training.planning.operations import Operations, operations_of
from fastclip.training.planning.sizes import Sizes, sizes_of
from fastclip.training.planning.teachers import NO_TEACHERS, TeachersPlan

__all__ = ["FRAGMENTATION", "MEANS", "PROCESS", "STATES", "Plan", "most_graphs", "plan"]

_FP32 = 4
STATES = {"adamw": 2, "lamb": 2}  # fp32 values per trainable parameter
_CHOICES = {
    "precision": ("fp32", "bf16"),
    "optimizer": tuple(STATES),
    "parallel": ("ddp", "fsdp"),
    "comm": ("gather", "ring"),
    "device": ("cuda", "cpu"),
}
_STATISTICS = 80  # bytes per text: log-sum-exps, factors and their gradients
MEANS = 2 * _FP32  # bytes per sample of the dataset: the running means of the global loss, in both directions
# Bytes outside of tensors. GPU: CUDA's context, workspaces of cuBLAS, cuDNN and NCCL. CPU: Python, torch, libraries
PROCESS = {"cuda": 2**30, "cpu": 2**29}
FRAGMENTATION = 0.05  # share of all tensors: gaps that the allocator cannot use


@dataclass(frozen=True)
class Plan:
    """Memory of one process in a training step, as predicted by `plan`.

    If processes differ, it is the memory of the process that needs most. All sizes are in bytes.
    ``dataclasses.replace(plan, micro_batch=64)`` gives the plan for other sizes without a new measurement.
    `precision` and `device` must not be replaced, because they also determine the footprint.
    """

    sizes: Sizes
    footprint: Footprint
    image_size: int  # pixels
    context_length: int  # tokens
    batch_size: int  # pairs of all processes together
    micro_batch: int  # pairs whose activations are in memory at a time
    world_size: int
    precision: str
    optimizer: str
    parallel: str
    comm: str
    ema: bool
    device: str
    workspace_limit: int  # FASTCLIP_WORKSPACE_MB, in bytes
    count_operations: Callable[[], Operations] = field(repr=False, compare=False)  # takes time, and memory needs none
    keep_graphs: int = 0  # micro-batches whose graphs gradient caching keeps; more than `most_graphs` are not kept
    teachers: TeachersPlan = NO_TEACHERS
    prefixes: tuple[int, ...] = ()  # lengths of the features that are compared; empty: the whole features
    samples: int = 0  # samples of the dataset that have running means, as with the global loss

    @property
    def pairs(self) -> int:
        """Pairs per step of the process that has the most."""
        return ceil_div(self.batch_size, self.world_size)

    @property
    def cached(self) -> bool:
        """True if a step uses gradient caching."""
        return self.micro_batch < self.pairs

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches of a process."""
        return ceil_div(self.pairs, self.micro_batch)

    @property
    def most_graphs(self) -> int:
        """Largest number of graphs that gradient caching can keep.

        With several processes the last micro-batch is always embedded again, because its pass exchanges the gradients.
        """
        return most_graphs(self.batch_size, self.world_size, self.micro_batch)

    @property
    def kept_graphs(self) -> int:
        """Number of graphs that gradient caching keeps."""
        return min(self.keep_graphs, self.most_graphs)

    @property
    def graphs(self) -> int:
        """Bytes of the graphs that gradient caching keeps, each with its own casts of the weights under autocast."""
        return self.kept_graphs * self.footprint.kept(self.micro_batch)

    @property
    def sharded(self) -> bool:
        """True if FSDP shards parameters, gradients and optimiser states."""
        return self.parallel == "fsdp" and self.world_size > 1

    def _share(self, elements: int) -> int:
        return ceil_div(elements * _FP32, self.world_size if self.sharded else 1)

    @property
    def parameters(self) -> int:
        """Bytes of parameters and buffers."""
        return self._share(self.sizes.parameters) + self.sizes.buffers

    @property
    def gathered(self) -> int:
        """Bytes that FSDP gathers: the block in use, the next block, and the parameters outside of all blocks.

        Without gradient caching, the unsharded gradients of one block and of the parameters outside of all blocks are
        added. They exist until they are exchanged.
        """
        if not self.sharded:
            return 0
        gradients = 0 if self.cached else self.sizes.block + self.sizes.trainable_rest
        return (2 * self.sizes.block + self.sizes.rest + gradients) * _FP32

    @property
    def gradients(self) -> int:
        """Bytes of gradients. With gradient caching, they are unsharded until the last micro-batch exchanges them."""
        return self.sizes.trainable * _FP32 if self.cached else self._share(self.sizes.trainable)

    @property
    def gradients_stay(self) -> bool:
        """True if gradients are in memory throughout a step: between micro-batches, or in DDP's buckets.

        Otherwise gradients appear while activations are freed, and are set to None before the next step.
        """
        return self.cached or self._ddp

    @property
    def buckets(self) -> int:
        """Bytes of DDP's buckets beside the gradients.

        With gradient caching, gradients are stored outside of the buckets until the last micro-batch exchanges them.
        """
        return self.gradients if self._ddp and self.cached else 0

    @property
    def _ddp(self) -> bool:
        return self.parallel == "ddp" and self.world_size > 1

    @property
    def optimizer_states(self) -> int:
        """Bytes of the optimiser's states."""
        return STATES[self.optimizer] * self._share(self.sizes.trainable)

    @property
    def update(self) -> int:
        """Bytes that the optimiser takes while it runs, at most. LAMB on a GPU computes two values for each weight."""
        return 2 * self._share(self.sizes.trainable) if (self.optimizer, self.device) == ("lamb", "cuda") else 0

    @property
    def average(self) -> int:
        """Bytes of the moving average of the trainable weights (EMA)."""
        return self._share(self.sizes.trainable) if self.ema else 0

    def _inputs(self, pairs: int) -> int:
        return pairs * (3 * self.image_size**2 + self.context_length * 8)  # uint8 pixels, int64 ids

    @property
    def inputs(self) -> int:
        """Bytes of images and token ids of a step on the device, with the normalised images of its micro-batches.

        The images of one micro-batch are normalised at a time. Kept graphs hold those of theirs.
        """
        normalized = min((self.kept_graphs + 1) * self.micro_batch, self.pairs) * 3 * self.image_size**2 * _FP32
        return self._inputs(self.pairs) + normalized

    @property
    def host(self) -> int:
        """Bytes of images and token ids of a whole step on the host. Loading the next step takes as much again."""
        return self._inputs(self.pairs)

    @property
    def features(self) -> int:
        """Bytes of the features' gradients, and with gradient caching also of the features of all micro-batches."""
        return (4 if self.cached else 2) * self.pairs * self.footprint.dim * self.footprint.feature_size

    @property
    def activations(self) -> int:
        """Peak of the forward and backward pass of a micro-batch, in bytes, with all temporary tensors."""
        return self.footprint.peak(min(self.micro_batch, self.pairs))

    @property
    def means(self) -> int:
        """Bytes of the running means of the global loss."""
        return MEANS * self.samples

    @property
    def loss(self) -> int:
        """Bytes that the loss takes while it runs, except the workspace on a CPU, which stays allocated.

        The losses of all prefixes keep their statistics and gathered texts until the backward pass, which handles one
        prefix at a time.
        """
        dim, size = self.footprint.dim, self.footprint.feature_size
        widths = self.prefixes or (dim,)
        widest = max(widths)
        if self.world_size == 1:  # the backends on a GPU sum the gradients of the texts in fp32
            held = self.pairs * widest * _FP32 if self.device == "cuda" else 0
        elif self.comm == "gather":  # texts, their gradients, and the gradients in fp32 or in transfer
            held = self.batch_size * (sum(widths) * size + widest * (size + _FP32))
        else:
            # Two blocks of texts, one in use and one in transfer, in the dtype of the features. Seven blocks in fp32,
            # among them the sums of the texts' gradients in use and in transfer, and those of the images' gradients
            held = self.pairs * widest * (2 * size + 7 * _FP32)
        if self.prefixes:  # the gradient of a prefix, which is padded with zeros and added to those of the others
            held += self.pairs * (widest + (len(widths) > 1) * dim) * size
        held += (self.world_size > 1) * self.batch_size * self.teachers.texts  # gathered
        held += len(widths) * _STATISTICS * self.batch_size
        return held + (self._workspace if self.device == "cuda" else 0)

    @property
    def workspace(self) -> int:
        """Bytes of the loss's logits on a CPU, where they are kept between steps. On a GPU they are part of `loss`."""
        return self._workspace if self.device == "cpu" else 0

    @property
    def _workspace(self) -> int:
        columns = self.batch_size if self.comm == "gather" else self.pairs
        if self.device == "cpu":
            return min(self.workspace_limit, _FP32 * min(self.pairs, BLOCK_M) * columns)
        return min(self.workspace_limit, self.footprint.feature_size * self.pairs * columns)

    @property
    def held(self) -> int:
        """Bytes that are in memory throughout the step."""
        parameters = self.parameters + self.gathered + self.optimizer_states + self.average
        gradients = self.gradients + self.buckets if self.gradients_stay else 0
        taught = self.teachers.held(self.pairs)
        return parameters + gradients + self.inputs + self.features + self.workspace + taught + self.means

    @property
    def tensors(self) -> int:
        """Peak of all tensors of a step, in bytes.

        The peak is in the loss, in the forward and backward pass, or in the optimiser with all gradients. During the
        loss, the activations of all pairs are in memory, too, unless gradient caching is used. It keeps some graphs
        while other micro-batches are embedded and in the loss; then each pass backward frees one. Teachers embed the
        batch before the model does.
        """
        kept = self.graphs if self.cached else self.footprint.kept(self.pairs)
        share = 0.0 if self.gradients_stay else self.gradients / (self.sizes.trainable * _FP32)
        micro_batch = min(self.micro_batch, self.pairs)
        highest = max(self.footprint.peak(micro_batch, share), self.teachers.peak(micro_batch))
        if self.kept_graphs:
            highest += self.graphs - self.footprint.kept(self.micro_batch)
            if self.kept_graphs < self.micro_batches:
                highest = max(highest, self.graphs + self.footprint.embedding_peak(self.micro_batch))
        update = self.update + (0 if self.gradients_stay else self.gradients)
        return self.held + max(highest, kept + self.loss, update)

    @property
    def reserve(self) -> int:
        """Bytes outside of tensors: 1 GiB for CUDA (0.5 GiB for a process on a CPU) and 5 % of the tensors."""
        return PROCESS[self.device] + int(FRAGMENTATION * self.tensors)

    @property
    def total(self) -> int:
        """Predicted peak in bytes: tensors and reserve."""
        return self.tensors + self.reserve

    def fits(self, micro_batch: int, memory: float) -> bool:
        """Return True if a step with this micro-batch fits into `memory` bytes."""
        return replace(self, micro_batch=micro_batch).total <= memory

    def largest_micro_batch(self, memory: float) -> int:
        """Return the largest micro-batch with which a step fits into `memory` bytes, or 0 if none does."""
        # Tested first, because without gradient caching FSDP keeps no unsharded gradients and may need less memory
        if self.fits(self.pairs, memory):
            return self.pairs
        low, high = 0, self.pairs  # `low` fits, `high` does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(middle, memory) else (low, middle)
        return low

    def largest_keep_graphs(self, memory: float) -> int:
        """Return the largest number of graphs with which a step fits into `memory` bytes, or 0 if none fits."""
        fit, beyond = 0, self.most_graphs + 1  # `beyond` is too many
        while beyond - fit > 1:
            middle = (fit + beyond) // 2
            fit, beyond = (middle, beyond) if replace(self, keep_graphs=middle).total <= memory else (fit, middle)
        return fit


def most_graphs(batch_size: int, world_size: int, micro_batch: int) -> int:
    """Return the largest number of graphs that each process of a step can keep.

    It is the number of the process with the fewest pairs: if only some processes kept graphs, DistributedDataParallel
    would wait for the others in another order of collectives, because it exchanges its buckets in the first forward
    pass with a graph.
    """
    if micro_batch >= ceil_div(batch_size, world_size):
        return 0  # no gradient caching
    return ceil_div(batch_size // world_size, micro_batch) - (world_size > 1)


def plan(
    model: DualEncoder,
    *,
    batch_size: int,
    world_size: int = 1,
    micro_batch: int | None = None,
    keep_graphs: int = 0,
    precision: str = "fp32",
    optimizer: str = "adamw",
    parallel: str = "ddp",
    comm: str = "gather",
    ema: bool = False,
    device: str = "cuda",
    measured: Footprint | None = None,
    teachers: TeachersPlan = NO_TEACHERS,
    prefixes: Sequence[int] | None = None,
    samples: int = 0,
) -> Plan:
    """Predict the memory of a training step.

    The step is measured on tensors that have sizes but no memory, so a model from ``create_model(name, device="meta")``
    is enough.

    Args:
        model: model from `create_model`, with gradient checkpointing and locked towers set as in training.
        batch_size: pairs of all processes together.
        world_size: number of processes, each with a device.
        micro_batch: pairs of a process whose activations are in memory at a time (default: all of them).
        keep_graphs: micro-batches whose graphs gradient caching keeps from the first pass on.
        precision: "fp32", or "bf16" for autocast.
        optimizer: "adamw" or "lamb", both with two fp32 states per parameter.
        parallel: "ddp", or "fsdp" for FSDP2 of the blocks of the towers.
        comm: "gather" or "ring", the exchange of the loss over several processes.
        ema: keep a moving average of the weights.
        device: "cuda" or "cpu", the kind of device to plan for. It need not exist on this machine.
        measured: footprint of the model, if it is known (default: it is measured).
        teachers: frozen teachers of the step, as `plan_teachers` returns them.
        prefixes: lengths of the prefixes of the features whose losses are added (default: the whole features alone).
        samples: samples of the dataset of which the global loss holds running means (default: another loss is used).

    Raises:
        ValueError: an option is invalid, both towers are locked, or the model has no configuration.
    """
    given = {"precision": precision, "optimizer": optimizer, "parallel": parallel, "comm": comm, "device": device}
    for name, value in given.items():
        if value not in _CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(_CHOICES[name])}, got {value!r}")
    for name, number in (("batch_size", batch_size), ("world_size", world_size), ("micro_batch", micro_batch)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    for name, number in (("keep_graphs", keep_graphs), ("samples", samples)):
        if number < 0:
            raise ValueError(f"{name} must be at least 0, got {number}")
    if batch_size < world_size:
        raise ValueError(f"a batch of {batch_size} is too small for {world_size} processes: each needs a pair")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("both towers are locked: there is nothing to train")
    if model.config is None:
        raise ValueError("the model has no configuration with the sizes of its inputs: build it with create_model")
    lengths, dim = tuple(prefixes or ()), model.config.embed_dim
    if not all(0 < d <= dim for d in lengths) or len(set(lengths)) < len(lengths):
        raise ValueError(
            f"prefixes must be distinct numbers from 1 to {dim}, the length of the features, got {lengths}"
        )
    image_size, length = model.config.vision_cfg.image_size, model.config.text_cfg.context_length
    pairs = ceil_div(batch_size, world_size)
    if measured is None:
        measured = footprint(model, image_size=image_size, context_length=length, precision=precision, device=device)
    return Plan(
        sizes=sizes_of(model),
        footprint=measured,
        image_size=image_size,
        context_length=length,
        batch_size=batch_size,
        micro_batch=pairs if micro_batch is None else min(micro_batch, pairs),
        keep_graphs=keep_graphs,
        world_size=world_size,
        ema=ema,
        workspace_limit=env.workspace_bytes(device),
        count_operations=partial(operations_of, model, lengths),
        teachers=teachers,
        prefixes=lengths,
        samples=samples,
        **given,
    )
