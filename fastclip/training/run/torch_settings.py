"""Settings and random state of torch, which a call of the trainer restores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from fastclip.system import env

__all__ = ["settings_kept"]


@contextmanager
def settings_kept(*, deterministic: bool = False) -> Iterator[None]:
    """Restore torch's random state and deterministic mode on exit, so that code inside may seed torch.

    Args:
        deterministic: use deterministic algorithms inside the context.
    """
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = memory.fill_uninitialized_memory
    # Reading a GPU's random state would initialise CUDA, which takes memory and prevents forking
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
