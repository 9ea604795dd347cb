"""Train a few steps and print the MiB that they took, as a program or as one of torchrun's processes.

python tests/support/measured_step.py '{"model": "ViT-tiny", "pairs": 64, "micro_batch": 16}'
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# benchmarks/ is not installed, and transformers would import kernels.py of this folder
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.losses.peak_memory import peak_of, return_what_is_freed
from fastclip import contrastive_loss, create_model
from fastclip.distributed import before_group
from fastclip.system.env import launched
from fastclip.training import cached_step


def main(options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    return_what_is_freed()
    with _group():
        train({**options, "pairs": 4, "micro_batch": 2})  # loads libraries
        gc.disable()
        peak = peak_of(lambda: train(options))
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(peak)


@contextmanager
def _group() -> Iterator[None]:
    if launched() is None:
        yield
        return
    before_group()
    dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()


def train(options: dict[str, Any]) -> None:
    """Take three steps. The second has optimiser states, and in it DDP builds its final buckets, which the
    third fills.
    """
    model = create_model(options["model"])
    model.set_grad_checkpointing(options.get("grad_checkpointing", False))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    called: nn.Module = model
    if dist.is_initialized():
        called = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    assert model.config is not None
    text, size = model.config.text_cfg, model.config.vision_cfg.image_size
    images = torch.randn(options["pairs"], 3, size, size)
    ids = torch.randint(1, text.vocab_size, (options["pairs"], text.context_length))
    pieces = [x.split(options["micro_batch"]) for x in (images, ids)]

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        group = dist.group.WORLD if dist.is_initialized() else None
        value = contrastive_loss(image, text, scale, group=group)
        assert isinstance(value, Tensor)
        return value

    for _ in range(3 if dist.is_initialized() else 2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=options.get("precision") == "bf16"):
            if len(pieces[0]) > 1:
                cached_step(called, zip(*pieces), loss, keep_graphs=options.get("keep_graphs", 0))
            else:
                loss(*called(images, ids)).backward()
        optimizer.step()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
