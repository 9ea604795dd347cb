"""Run the two ranks of tests/integrations/test_integrations.py.

    cd tests; python -m support.patched_ranks FOLDER    leaves FOLDER/rank.pt

The processes are forked, so that the packages are imported once, and meet at a file of FOLDER.
"""

from __future__ import annotations

import logging
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import open_clip.loss
import torch
import torch.distributed as dist
from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPConfig, CLIPModel

from fastclip.integrations import patch_open_clip, patch_transformers, unpatch
from support.processes import join_group

N = 6  # pairs per rank
FLAGS = [(local, gather) for local in (False, True) for gather in (False, True)]


def features() -> tuple[Tensor, Tensor]:
    """Return the features of all ranks."""
    torch.manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(2, 2 * N, 8, dtype=torch.float64), dim=-1).unbind()


def clip_model() -> Any:
    torch.manual_seed(0)
    width = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    words = {"vocab_size": 20, "max_position_embeddings": 4, "bos_token_id": 0, "eos_token_id": 19, "pad_token_id": 1}
    config = CLIPConfig(
        text_config=width | words, vision_config=width | {"image_size": 8, "patch_size": 4}, projection_dim=8
    )
    return CLIPModel(config).train()


def clip_batch() -> dict[str, Any]:
    """Return the batch of all ranks."""
    torch.manual_seed(1)
    ids = torch.randint(2, 19, (2 * N, 4))
    ids[:, -1] = 19
    return {"pixel_values": torch.randn(2 * N, 3, 8, 8), "input_ids": ids}


def of_open_clip(rank: int) -> dict[Any, Any]:
    """Return value and gradients by (patched, loss)."""
    own = slice(rank * N, (rank + 1) * N)
    losses = {flags: open_clip.loss.ClipLoss(*flags, rank=rank, world_size=2) for flags in FLAGS}
    losses |= {impl: open_clip.loss.SigLipLoss(rank=rank, world_size=2, dist_impl=impl) for impl in ("bidir", "reduce")}
    found = {}
    for patched in (False, True):
        if patched:
            patch_open_clip()
        for name, loss in losses.items():
            leaves = [x[own].clone().requires_grad_() for x in features()]
            leaves += [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (7.0, -3.0)]
            value = loss(*leaves)
            grads = torch.autograd.grad(value, leaves, materialize_grads=True, allow_unused=True)
            found[patched, name] = [value.detach(), *grads]
    unpatch()
    return found


def of_transformers(rank: int) -> dict[Any, Any]:
    """Return this rank's loss, and the gradients after DDP's mean, by (patched, group)."""
    own = {key: x[rank * N : (rank + 1) * N] for key, x in clip_batch().items()}
    found = {}
    for patched, group in ((False, None), (True, None), (True, "world"), (True, dist.group.WORLD)):
        if patched:
            patch_transformers(group=group)
        model = torch.nn.parallel.DistributedDataParallel(clip_model())
        loss = model(**own, return_loss=True).loss
        loss.backward()
        name = "a group" if group is dist.group.WORLD else group
        found[patched, name] = [loss.detach(), *(x.grad for x in model.parameters())]
    unpatch()
    return found


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fastclip").addHandler(handler)
    join_group(rank, 2, folder)
    found = {"open_clip": of_open_clip(rank), "transformers": of_transformers(rank), "warnings": warnings}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    patch_transformers()  # imports all models
    unpatch()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, sys.argv[1])) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes) and f"the ranks failed; see {Path(sys.argv[1])}")
