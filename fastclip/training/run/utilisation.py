"""Model FLOP utilisation of a run: its useful operations per second as a share of the rate of matrix products."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from fastclip.models.dual_encoder import DualEncoder
from fastclip.training.planning.operations import Operations, matrix_rate, operations_of
from fastclip.training.ranks import World, of_all_ranks

__all__ = ["Utilisation"]

logger = logging.getLogger(__name__)


class Utilisation:
    """Model FLOP utilisation (Chowdhery et al. 2022, appendix B) over all processes of a run.

    The first call counts the operations of the model and measures the rate of matrix products, on the device of each
    process and in the dtype in which the towers compute. If either is impossible, the log says why, and there is no
    utilisation.

    Args:
        model: model to train.
        world: this process and its group.
        batch_size: pairs of all processes in a step.
        autocast: dtype in which the towers compute (None: fp32).
        prefixes: lengths of the prefixes of the features that the loss compares (None: the whole features alone).
    """

    def __init__(
        self,
        model: DualEncoder,
        world: World,
        *,
        batch_size: int,
        autocast: torch.dtype | None,
        prefixes: Sequence[int] | None = None,
    ) -> None:
        self._model, self._world, self._batch_size, self._prefixes = model, world, batch_size, prefixes
        self._dtype = autocast or torch.float32
        self._measured = False
        self._operations: Operations | None = None
        self._rate: float | None = None  # operations per second of all processes; None if it cannot be known

    def __call__(self, steps: int, tokens: int, seconds: float) -> float | None:
        """Return the utilisation over some steps, or None if it cannot be known. All ranks must make the first call.

        Args:
            steps: number of steps.
            tokens: tokens of the texts of these steps, of all processes and without padding.
            seconds: duration of these steps.
        """
        if not self._measured:
            self._measured, self._rate = True, self._measure()
        if self._rate is None or self._operations is None or not steps:
            return None
        useful = steps * self._operations.useful(self._batch_size, tokens / (steps * self._batch_size))
        return useful / (seconds * self._rate)

    def _measure(self) -> float | None:
        rate = None
        try:
            self._operations = operations_of(self._model, self._prefixes)
            rate = matrix_rate(self._world.device, self._dtype)
        except (ValueError, RuntimeError) as error:  # torch raises a RuntimeError if memory is too small
            logger.warning("the metrics will have no model FLOP utilisation (mfu): %s", error)
        rates = of_all_ranks(rate, self._world)
        known = [each for each in rates if each is not None]
        if len(known) < len(rates):
            return None
        if self._world.rank == 0:
            name = "bf16" if self._dtype == torch.bfloat16 else "fp32"
            together = f" of {len(known)} processes together" if len(known) > 1 else ""
            logger.info("matrix products: %.3g TFLOP/s in %s%s", sum(known) / 1e12, name, together)
        return sum(known)
