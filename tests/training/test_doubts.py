"""Warnings about settings with which a run learns nothing, or not what was meant; and side
effects that a run must not leave.
"""

from __future__ import annotations

import logging
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support import needs

needs("train")
from PIL import Image

from fastclip.data.sources.subset import Subset
from fastclip.data.spec import open_source
from fastclip.models import create_model
from fastclip.models.embedder import Embedder
from fastclip.models.tokenizers.clip import ClipTokenizer
from fastclip.system import machine
from fastclip.training import TrainOptions, doubts, train
from fastclip.training.finetune import FinetuneOptions, finetune


def options(folder: Path, **changed: Any) -> TrainOptions:
    values = {"data": "digits", "model": "ViT-tiny", "output": str(folder), "context_length": 16, "loss": "unicl"}
    values |= {"batch_size": 16, "max_steps": 2, "workers": 0, "device": "cpu"}
    return TrainOptions(**{**values, **changed})


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, None),
        ({"batch_size": 1, "loss": "siglip"}, None),
        ({"batch_size": 1, "loss": "clip"}, "--batch-size 1: the loss of one pair is always 0, so nothing is learned"),
        (
            {"warmup": 4},
            "--warmup 4 of 2 steps: the learning rate rises to 0.00025 at the last step and never decays",
        ),
        ({"warmup": 2}, "--warmup 2 of 2 steps: the learning rate rises to 0.0005 at the last step and never decays"),
        ({"warmup": 1}, None),
        (
            {"micro_batch": 7},
            "--micro-batch 7 does not divide the 16 pairs of a process: the last micro-batch has only 2, which wastes",
        ),
        ({"micro_batch": 32}, None),
        ({"micro_batch": 4, "keep_graphs": 4}, None),
        (
            {"micro_batch": 4, "keep_graphs": 5},
            "--keep-graphs 5 is more than the 4 micro-batches of a process: as many",
        ),
        (
            {"micro_batch": 16, "keep_graphs": 2},
            "--keep-graphs 2 has no effect: all 16 pairs of a process are embedded",
        ),
        ({"micro_batch": 16, "keep_graphs": 0}, None),
        (
            {"weight_decay": 400.0},
            "--lr 0.0005 times --weight-decay 400 is so large that each step shrinks the matrices by 20%: lower one",
        ),
        ({"prefixes": (8, 16)}, "--prefixes 8 16: of 64 features only the first 16 are trained: add 64 to train all"),
        ({"prefixes": (64, 16)}, None),
        ({"label_smoothing": 1.0}, "--label-smoothing 1: every text is equally correct, so nothing is learned"),
        ({"lock_text": True}, "--lock-text without --pretrained: the text tower keeps its random initial weights"),
        (
            {"val_data": "a.csv", "data": "a.csv"},
            "--val-data is the same as --data (a.csv): validation measures nothing about unseen data",
        ),
        (
            {"batch_size": 101, "loss": "clip"},
            "a batch of 101 from 100 samples repeats some, and the clip loss treats ",
        ),
    ],
)
def test_setting_that_ruins_a_run_is_told(tmp_path: Path, changed: dict[str, Any], told: str | None) -> None:
    asked = options(tmp_path, **{"lr": 5e-4, "warmup": 0, "weight_decay": 0.2, **changed})
    about = {"samples": 100, "ranks": 1, "with_labels": asked.loss == "unicl", "embed_dim": 64}
    found = list(doubts.doubts(asked, **about))
    assert len(found) == (told is not None), found
    assert told is None or found[0].startswith(told)


def test_tower_of_a_resumed_run_is_not_random(tmp_path: Path) -> None:
    asked = options(tmp_path, lr=5e-4, warmup=0, weight_decay=0.2, lock_text=True)
    assert not list(doubts.doubts(asked, samples=100, ranks=1, with_labels=True, embed_dim=64, resumed=True))


def test_doubts_are_in_the_log_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(options(tmp_path, loss="clip", warmup=7, micro_batch=7))
    schedule, micro, repeats = warnings(caplog)
    assert schedule.startswith("--warmup 7 of 2 steps") and micro.startswith("--micro-batch 7")
    assert re.fullmatch(r"1\d of the 16 pairs of the first batch share .*, and the clip loss .* positives", repeats)


def test_labels_of_one_class_leave_nothing_to_learn() -> None:
    parts = [torch.tensor([3, 3]), torch.tensor([3])]
    assert list(doubts.doubts_of_labels(parts, "unicl", with_labels=True)) == [
        "all 3 pairs of the first batch have the same class or caption: their unicl loss is 0"
    ]
    assert list(doubts.doubts_of_labels([torch.tensor([3, 3, 4, 5])], "clip", with_labels=False)) == []


def test_gpus_that_stay_idle_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(**changed: Any) -> list[str]:
        return list(doubts.doubts_of_device(options(tmp_path, **changed), torch.device("cpu")))

    monkeypatch.setattr(machine, "unseen_gpu", lambda: ("torch sees none, nvidia-smi lists H200", "install another"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert told() == []  # --device cpu was given
    assert told(device="auto") == ["training on the CPU: torch sees none, nvidia-smi lists H200; install another"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert told(device="auto") == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in {"RANK": "0", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert told(device="auto") == ["4 GPUs are too few for 8 processes on this machine: all of them train on the CPU"]


def test_folder_of_classes_is_validated_by_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    digits = open_source("digits")
    for k in range(20):
        record = digits[k]
        folder = tmp_path / "val" / digits.class_names[record.label or 0]
        folder.mkdir(parents=True, exist_ok=True)
        record.image.save(folder / f"{k}.png")
    run = train(options(tmp_path / "run", val_data=str(tmp_path / "val"), max_steps=1))
    assert 0 <= run.validation["zero_shot_top1"] <= 1
    assert "folders are read as classes" in caplog.text


def settings() -> list[Any]:
    """Return the global state that other code of the process would notice."""
    return [
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        (torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_default_dtype()),
        (torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32, torch.is_grad_enabled()),
        (logging.getLogger().handlers[:], logging.getLogger("fastclip").level),
        dict(os.environ),
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # type: ignore[index,union-attr]
        random.getstate(),
    ]


@pytest.mark.parametrize("strict", [False, True])
def test_training_leaves_the_process_as_it_was(tmp_path: Path, strict: bool) -> None:
    open_source("digits")  # loading scikit-learn sets environment variables for OpenMP
    torch.use_deterministic_algorithms(strict, warn_only=True)
    before = settings()
    try:
        train(options(tmp_path / "a", deterministic=True, val_data="digits", max_steps=1, stop_after=1))
        assert settings() == before
        with pytest.raises(ValueError, match="abacus"):
            train(options(tmp_path / "b", deterministic=True, backend="abacus"))
        assert settings() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_fine_tuning_leaves_the_process_and_an_embedder_in_eval_mode(tmp_path: Path) -> None:
    embedder = Embedder(create_model("RN-tiny"), ClipTokenizer(context_length=16), name="RN-tiny")
    source = Subset(open_source("digits"), range(16))  # loading scikit-learn sets environment variables
    before = settings()
    told = FinetuneOptions(batch_size=8, epochs=1, workers=0, lr=1e-3)
    finetune(embedder, source, told, output=tmp_path / "run")
    assert settings() == before
    assert not any(module.training for module in embedder.model.modules())
    images = torch.stack([embedder.transform(Image.new("RGB", (8, 8), (k, 0, 0))) for k in (0, 200)])
    one, other = embedder.embed_images(images), embedder.embed_images(images[:1])
    torch.testing.assert_close(one[:1], other)  # BatchNorm does not use the statistics of the batch
