"""Memory and operations of the frozen teachers of a step (`--distill`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

from fastclip.models.config import ModelConfig
from fastclip.models.dual_encoder import build_model
from fastclip.training.planning.footprint import Moment, embedding_moments
from fastclip.training.planning.operations import Operations, operations_of

__all__ = ["NO_TEACHERS", "TeachersPlan", "plan_teachers"]

_FP32 = 4
_PRODUCTS = 2  # products of a teacher's image features with its text features: forward, and again backward


@dataclass(frozen=True)
class TeachersPlan:
    """Sums over the teachers of a step. Without teachers, all numbers are 0."""

    count: int = 0
    parameters: int = 0
    buffers: int = 0  # bytes
    features: int = 0  # bytes of the features of a pair
    texts: int = 0  # bytes of the features of a text
    moments: tuple[Moment, ...] = field(default=(), repr=False)  # of each teacher's forward pass, one after the other
    count_operations: Callable[[], list[Operations]] = field(default=list, repr=False, compare=False)

    def held(self, pairs: int) -> int:
        """Return the bytes of the weights, which each process holds whole, and of the features of all pairs."""
        return self.parameters * _FP32 + self.buffers + pairs * self.features

    def peak(self, pairs: int) -> int:
        """Return the peak in bytes of the forward pass of any teacher, with its input."""
        return max((m.fixed + pairs * m.pair for m in self.moments), default=0)

    def executed(self, pairs: float, tokens: float) -> float:
        """Return the operations of a step: the forward pass of every pair, and the products of the loss."""
        return sum(
            pairs * each.forward(tokens) + _PRODUCTS * 2 * pairs * pairs * each.dim for each in self.count_operations()
        )


NO_TEACHERS = TeachersPlan()


def plan_teachers(
    configs: Sequence[ModelConfig], *, context_length: int, precision: str = "fp32", device: str = "cuda"
) -> TeachersPlan:
    """Measure the forward pass of teachers on tensors that have sizes but no contents.

    Args:
        configs: configurations of the teachers.
        context_length: tokens per text of the student.
        precision: "fp32", or "bf16" for autocast.
        device: "cuda" or "cpu".
    """
    each = [_of(config, context_length, precision, device) for config in configs]
    return TeachersPlan(
        count=len(each),
        parameters=sum(one.parameters for one in each),
        buffers=sum(one.buffers for one in each),
        features=sum(one.features for one in each),
        texts=sum(one.texts for one in each),
        moments=tuple(m for one in each for m in one.moments),
        count_operations=lambda: [operations for one in each for operations in one.count_operations()],
    )


@cache
def _of(config: ModelConfig, context_length: int, precision: str, device: str) -> TeachersPlan:
    model = build_model(config, device="meta").requires_grad_(False)
    side, parameters = config.vision_cfg.image_size, list(model.parameters())
    moments, size = embedding_moments(model, side, context_length, precision, device)
    images = 3 * side**2 * (1 + _FP32)  # resized, and normalised
    return TeachersPlan(
        count=1,
        parameters=sum(p.numel() for p in parameters),
        buffers=sum(x.numel() * x.element_size() for x in model.buffers()),
        features=2 * config.embed_dim * size,
        texts=config.embed_dim * size,
        moments=tuple(m._replace(pair=m.pair + images) for m in moments),
        count_operations=lambda: [operations_of(model)],
    )
