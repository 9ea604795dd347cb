"""Modules that exchange gradients between processes, and how to keep them from doing so for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

from torch import nn

__all__ = ["exchanging", "no_exchange"]


@contextmanager
def no_exchange(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Keep DistributedDataParallel and FSDP from exchanging gradients inside the context."""
    with ExitStack() as stack:
        for module in modules:
            for one in exchanging(module):
                stack.enter_context(_left_alone(one))
        yield


def exchanging(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules that exchange gradients: `module`, or modules inside that are wrapped one by one."""
    if hasattr(module, "no_sync") or hasattr(module, "set_requires_gradient_sync"):
        yield module
        return
    for child in module.children():
        yield from exchanging(child)


@contextmanager
def _left_alone(module: nn.Module) -> Iterator[None]:
    no_sync = getattr(module, "no_sync", None)  # DistributedDataParallel, FSDP
    switch = getattr(module, "set_requires_gradient_sync", None)  # FSDP2
    if switch is not None:
        switch(False)
    try:
        with nullcontext() if no_sync is None else no_sync():
            yield
    finally:
        if switch is not None:
            switch(True)
