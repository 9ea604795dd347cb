"""Compilation of the towers with torch.compile: one graph for all blocks of a kind.

A tower is a stack of blocks, and most of them differ only in their weights. Compiling the block instead of the tower
costs as much as compiling a single block, however deep the tower is. Blocks are compiled in place, so that the names of
the weights, the wrappers of DDP and FSDP, gradient checkpointing and checkpoints stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastclip.models.dual_encoder import DualEncoder

__all__ = ["Compilation", "blocks", "eager", "obstacle", "untraceable"]

logger = logging.getLogger(__name__)
_BACKEND = "inductor"
_GRAPHS = 4096  # more than the shapes of any run; beyond dynamo's own limit (8) a step would fail


class Compilation:
    """Compile the blocks of both towers in place, each when a step first meets its shapes.

    The kernels of a shape do not depend on the shapes that came before, so a resumed run has the bits of an
    uninterrupted one. Dropout draws torch's own random numbers, so that the two passes of gradient caching draw the
    same masks, which are also those of a run without compilation whose texts have the same lengths.

    Args:
        model: model whose blocks are compiled.
        deterministic: choose no kernel by its speed, which varies from run to run.

    Attributes:
        graphs: number of graphs that steps have compiled.
        seconds: duration of their compilation.
    """

    def __init__(self, model: DualEncoder, *, deterministic: bool = False) -> None:
        self.graphs, self.seconds = 0, 0.0
        for tower in (model.visual, model.text):
            for block in blocks(tower):
                block.compile(**_settings(deterministic))

    @contextmanager
    def of_step(self, step: int) -> Iterator[None]:
        """Let the step inside the context compile what it meets, and log what was compiled.

        Raises:
            ValueError: a block cannot be compiled. The weights are unchanged.
        """
        import torch._dynamo as dynamo  # takes a second

        graphs, seconds = _so_far()
        with _enough_graphs():
            try:
                yield
            except dynamo.exc.TorchDynamoException as error:
                raise ValueError(
                    f"step {step}: torch.compile failed: {_cause(error)}. --no-compile trains without it"
                ) from error
        graphs, seconds = (now - before for now, before in zip(_so_far(), (graphs, seconds)))
        if graphs:
            self.graphs, self.seconds = self.graphs + int(graphs), self.seconds + seconds
            logger.info("step %d: compiling the towers took %.0f s: %d graphs", step, seconds, graphs)


def blocks(tower: nn.Module) -> list[nn.Module]:
    """Return the innermost modules that a tower stacks: members, all of one class, of its module lists."""
    return [block for child in tower.children() for block in (_members(child) if _stacks(child) else blocks(child))]


def _members(stack: nn.Module) -> list[nn.Module]:
    """Return the blocks of a module list, whose members may themselves be stacks of blocks (stages)."""
    return [block for member in stack.children() for block in (_inside(member) or [member])]


def _inside(member: nn.Module) -> list[nn.Module]:
    return _members(member) if _stacks(member) else blocks(member)


def _stacks(module: nn.Module) -> bool:
    """Return True for a list of modules of one class that themselves consist of modules, such as Transformer blocks."""
    members = list(module.children())
    listed = isinstance(module, nn.ModuleList | nn.Sequential)
    return listed and len({type(x) for x in members}) == 1 and any(True for _ in members[0].children())


def eager() -> Any:
    """Return a context in which the blocks run without compilation, as for the batch sizes of a validation."""
    return torch.compiler.set_stance("force_eager")


def obstacle(device: torch.device, *, deterministic: bool = False) -> str | None:
    """Compile a function of one line on `device`, and return why that failed, or None.

    A compiler may be missing (a C++ compiler for CPUs, Triton for GPUs), or torch.compile may not support this Python.

    Args:
        device: device of the model.
        deterministic: as in `Compilation`. Older versions of torch have no such compilation.

    Raises:
        torch.OutOfMemoryError: the GPU has no free memory.
    """
    from torch._inductor import config  # takes a second

    if deterministic and not hasattr(config, "deterministic"):
        return f"torch {torch.__version__} always chooses some kernels by their speed, which is not deterministic"
    x = torch.ones(8, device=device, requires_grad=True)
    try:
        torch.compile(_trial, **_settings(deterministic))(x).backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # torch's compilers raise errors of many classes
        return _cause(error)
    return None


def untraceable(model: DualEncoder, autocast: torch.dtype | None = None) -> str | None:
    """Trace the blocks of both towers with two images and two texts, and return why that failed, or None.

    Most blocks that torch.compile cannot take as a whole are found before the first step, in a second for each kind
    of block, because no code is generated. The model is left as it was, but the forward passes may draw random numbers.

    Args:
        model: model whose blocks are traced.
        autocast: dtype in which the towers compute (None: the dtype of the weights).

    Raises:
        torch.OutOfMemoryError: the GPU has too little free memory even for two images and two texts.
    """
    assert model.config is not None
    vision, text = model.config.vision_cfg, model.config.text_cfg
    device = model.logit_scale.device
    buffers = [(x, x.clone()) for x in model.buffers()]  # statistics of BatchNorm
    stacked = [block for tower in (model.visual, model.text) for block in blocks(tower)]
    for block in stacked:
        block.compile(**_settings(deterministic=False, backend="eager"))
    try:
        with _enough_graphs(), torch.autocast(device.type, autocast, enabled=autocast is not None):
            model.visual(torch.zeros(2, 3, vision.image_size, vision.image_size, device=device))
            model.text(torch.ones(2, text.context_length, dtype=torch.int64, device=device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the compiler, and of the code that it calls
        return _cause(error)
    finally:
        for block in stacked:
            block._compiled_call_impl = None
        with torch.no_grad():
            for x, before in buffers:
                x.copy_(before)
    return None


def _trial(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() * x).sum()


@contextmanager
def _enough_graphs() -> Iterator[None]:
    """Let every shape have a graph inside the context."""
    import torch._dynamo as dynamo

    limits: dict[str, Any] = {"recompile_limit": _GRAPHS, "accumulated_recompile_limit": _GRAPHS}
    # Splitting graphs where DDP's buckets end is meant for whole models; the blocks are small enough as they are
    with dynamo.config.patch(optimize_ddp=False, **limits):
        yield


def _settings(deterministic: bool, backend: str | None = None) -> dict[str, Any]:
    """Return the arguments of torch.compile. Shapes are static: see `Compilation`."""
    settings: dict[str, Any] = {"backend": backend or _BACKEND, "dynamic": False, "fullgraph": True}
    if settings["backend"] == "inductor":
        options: dict[str, Any] = {"fallback_random": True}
        if deterministic:
            options["deterministic"] = True
        settings["options"] = options
    return settings


def _so_far() -> tuple[float, float]:
    """Return the number of graphs that this process has compiled, and the seconds that this took."""
    from torch._dynamo import utils

    # The first backward pass of a graph compiles its second half
    passes = ("_compile.compile_inner", "backward._backward_impl")
    return utils.counters["stats"]["unique_graphs"], sum(
        sum(utils.compilation_time_metrics.get(name, [])) for name in passes
    )


def _cause(error: BaseException) -> str:
    """Return the cause in torch's message: its first line, with the error's own cause or explanation if it has one.

    If the first line only introduces the second, as "backend='inductor' raised:" does, this is the second.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if lines[0].endswith(":") and len(lines) > 1:
        return lines[1].rstrip(".")
    explained = (line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation: "))
    more = _cause(error.__cause__) if error.__cause__ is not None else next(explained, "")
    return ": ".join(part.rstrip(".") for part in (lines[0], more) if part)
