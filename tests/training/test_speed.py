"""The seconds of a step that `fastclip plan` predicts, against the limit by hand and a measured step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from support import needs

needs("models")

import fastclip.training.planning.speed as speeds
from fastclip import create_model
from fastclip.cli import main
from fastclip.training import Plan, plan
from fastclip.training.planning.speed import machine_rate, sentences, speed

RATE = 790e12  # of an H200 in bf16, as measured
WORDS = "plan --model ViT-tiny --batch-size 64 --micro-batch 16 --memory 8"


@pytest.fixture(scope="module")
def large() -> Plan:
    model = create_model("ViT-B-32", device="meta")
    return plan(model, batch_size=32768, micro_batch=1024, precision="bf16")


def test_limit_is_that_of_a_count_by_hand(large: Plan) -> None:
    """A pair has 8.290 and 5.589 GFLOP forward: 6 % less than with all tokens in the last blocks."""
    pair = 8.290e9 + 5.589e9
    cached, once = speed(large, RATE), speed(replace(large, micro_batch=32768), RATE)
    assert cached.limit == pytest.approx(4 * pair * 32768 / RATE, rel=0.01) == pytest.approx(2.308, abs=0.006)
    assert once.limit == pytest.approx(3 * pair * 32768 / RATE, rel=0.01) == pytest.approx(1.727, abs=0.006)
    assert once.executed == pytest.approx(once.useful, rel=1e-3) == pytest.approx(cached.useful, rel=1e-3)
    kept = speed(replace(large, keep_graphs=12), RATE)
    assert kept.limit - once.limit == pytest.approx(20 / 32 * (cached.limit - once.limit))


def test_prediction_is_near_the_measured_step(large: Plan) -> None:
    """A step took 8.5195 s on an H200, with texts of 77 tokens and with 6 % more operations."""
    found = speed(large, RATE)
    assert found.seconds == pytest.approx(8.5195 / 1.065, rel=0.01)
    assert found.pairs_per_second == pytest.approx(32768 / found.seconds)
    assert found.mfu == pytest.approx(0.29 * found.useful / found.executed)


def test_options_of_the_prediction(large: Plan) -> None:
    found = speed(large, RATE)
    assert speed(large, 2 * RATE).seconds == pytest.approx(found.seconds / 2)
    half = speed(large, RATE, utilisation=0.145)
    assert half.limit == found.limit and half.seconds == pytest.approx(2 * found.seconds)
    short = speed(large, RATE, tokens=20)
    assert short.seconds / found.seconds == pytest.approx((8.290 + 1.42) / (8.290 + 5.589), rel=1e-2)


def test_processes_share_the_work(large: Plan) -> None:
    alone, eight = speed(large, RATE), speed(replace(large, world_size=8), RATE)
    assert eight.executed == alone.executed and eight.limit == pytest.approx(alone.limit / 8)
    assert eight.mfu == pytest.approx(alone.mfu) and eight.pairs_per_second == pytest.approx(8 * alone.pairs_per_second)
    odd = replace(large, batch_size=9, world_size=8, micro_batch=2)  # a process has two pairs
    assert speed(odd, RATE).limit == pytest.approx(speed(odd, RATE).executed * 2 / 9 / RATE)


def test_reasons_are_told(large: Plan) -> None:
    assert "embeds 32 of 32 micro-batches twice" in sentences(large, RATE)
    assert "embeds 2 of 32 micro-batches twice" in sentences(replace(large, keep_graphs=30), RATE)
    whole = sentences(replace(large, micro_batch=32768), RATE)
    assert ", because" not in whole and "limit of a step: 1.73 s, at 790 TFLOP/s" in whole
    checkpointing = replace(large.count_operations(), checkpointing=True)
    assert "because gradient checkpointing" in sentences(
        replace(large, micro_batch=32768, count_operations=lambda: checkpointing), RATE
    )


def test_rate_is_measured_or_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(WORDS.split()) == 0
    printed = capsys.readouterr().out
    assert "useful operations of a step: " in printed and "give the rate of matrix products on the GPU" in printed
    assert "expected" not in printed
    monkeypatch.setattr(speeds, "matrix_rate", lambda device, dtype: {"cpu": 2e11}[device.type])
    assert main([*WORDS.split(), "--device", "cpu"]) == 0
    assert "at 200 GFLOP/s of each process" in capsys.readouterr().out
    assert main([*WORDS.split(), "--tflops", "3", "--utilisation", "0.5", "--tokens", "7"]) == 0
    printed = capsys.readouterr().out
    for told in ("at 3 TFLOP/s of each process", "2 times the limit, at a utilisation of 0.5", "a text of 7 tokens"):
        assert told in printed


def test_gpu_without_free_memory_has_no_rate(large: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> float:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(speeds, "matrix_rate", fails)
    assert machine_rate(large) is None
