"""Settings and random numbers of the process, which a call of the trainer leaves as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from fastclip.system import env

__all__ = ["settings_kept"]


@contextmanager
def settings_kept(*, deterministic: bool = False) -> Iterator[None]:
    """Let torch be seeded and `deterministic` inside; afterwards both are as the caller had them."""
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = memory.fill_uninitialized_memory
    # Asking for a GPU's random numbers would start CUDA, which takes memory and cannot be forked
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(gpus), env.deterministic_cublas() if deterministic else nullcontext():
        try:
            if deterministic:
                torch.use_deterministic_algorithms(True)
                memory.fill_uninitialized_memory = False
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            memory.fill_uninitialized_memory = filled
