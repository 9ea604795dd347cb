"""Embedding and evaluation on a GPU. Run with `pytest -m gpu`; skipped without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support import needs

needs("train")

from fastclip.data.sources.subset import Subset
from fastclip.data.spec import open_source
from fastclip.embedding.features import image_features, text_features
from fastclip.evaluation.retrieval import retrieval_recalls
from fastclip.models import create_model
from fastclip.models.embedder import load_embedder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
TEXTS = ["a handwritten three", "the number nine", "zero"]


@pytest.mark.parametrize(("precision", "near"), [("fp32", 1e-3), ("bf16", 3e-2)])
@pytest.mark.parametrize("name", ["ViT-tiny", "RN-tiny", "align-tiny", "florence-tiny"])
def test_gpu_embeds_as_the_cpu_does(tmp_path: Path, name: str, precision: str, near: float) -> None:
    create_model(name).save_pretrained(tmp_path / "model")
    source = Subset(open_source("digits", held_out=True), range(40))
    cpu = load_embedder(tmp_path / "model", device="cpu")
    gpu = load_embedder(tmp_path / "model", precision=precision)
    assert gpu.device.type == "cuda" and (precision == "bf16") == (
        load_embedder(tmp_path / "model").precision == precision
    )
    for ours, true in (
        (image_features(gpu, source, batch_size=16).features, image_features(cpu, source, batch_size=16).features),
        (text_features(gpu, TEXTS), text_features(cpu, TEXTS)),
    ):
        assert ours.device.type == "cpu" and ours.dtype == torch.float32
        assert float((ours - true).norm(dim=1).max()) < near


def test_recalls_on_the_gpu_are_the_cpus() -> None:
    image = torch.randn(3000, 64)
    text = image.repeat_interleave(5, 0) + 2 * torch.randn(15000, 64)
    pairs = torch.stack([torch.arange(15000) // 5, torch.arange(15000)], 1)
    cpu = retrieval_recalls(image.double(), text.double(), pairs)
    gpu = retrieval_recalls(image.double().cuda(), text.double().cuda(), pairs.cuda())
    assert gpu == cpu and 0.1 < cpu["text_retrieval_recall@10"] < 1
