"""A slower path that is taken because a module is missing is reported once per process."""

from __future__ import annotations

import importlib.resources
import logging
from pathlib import Path

import pytest
import torch

import fastclip
from fastclip import _backends, doctor
from fastclip._backends import cpu, native, triton
from fastclip._backends.advice import mending

REASON = "the native module was not built: `cmake -S` failed (no C++ compiler was found)"
TODO = "install a C++ compiler, then rebuild fastclip in the folder of its source code: pip install"


@pytest.fixture(autouse=True)
def without_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTCLIP_BACKEND", raising=False)
    monkeypatch.setattr(cpu, "missing", lambda: REASON)
    monkeypatch.setattr(_backends, "_warned", set())


def features(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def test_dense_loss_for_lack_of_a_module_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        fastclip.contrastive_loss(*features())
        fastclip.sigmoid_loss(*features(torch.bfloat16), 10.0, -10.0)
    (told,) = warnings(caplog)
    assert told.startswith("the reference backend computes the loss: it stores the N x N similarities")
    assert REASON in told and TODO in told and "\n" not in told


def test_dense_loss_that_was_asked_for_is_not_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastclip.contrastive_loss(*features(), backend="reference")
    fastclip.contrastive_loss(*features(torch.float64))  # documented
    monkeypatch.setenv("FASTCLIP_BACKEND", "reference")
    fastclip.contrastive_loss(*features())
    assert warnings(caplog) == []


@pytest.mark.full  # loads the compiler
def test_compiled_loss_tells_as_well(caplog: pytest.LogCaptureFixture) -> None:
    compiled = torch.compile(fastclip.contrastive_loss, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled(*features())
    assert len(warnings(caplog)) == 1


def test_python_in_the_root_of_a_clone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise ImportError("No module named 'fastclip._cpu'")

    for name in ("fastclip", "csrc"):
        (tmp_path / name).mkdir()
    monkeypatch.setitem(native._IMPORT, "_cpu", absent)
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path / package)
    module, reason = native.load("_cpu")
    assert module is None and reason is not None
    assert reason == f"fastclip is imported from {tmp_path}, which has no native modules built for this Python"
    todo = "start Python in another folder, to import the installed package, or run pip install --editable"
    assert mending("cpu", reason) == f"{todo} {tmp_path}"
    told = "Triton does not load (ModuleNotFoundError: No module named 'fastclip.triton_kernels')"
    assert mending("triton", told) == f"{todo} {tmp_path}"
    (tmp_path / "fastclip" / "_cpu_build_report.txt").write_text("no compiler")
    assert native.load("_cpu")[1] == "the native module was not built: no compiler" and native.bare_clone() is None


def test_doctor_has_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {finding.name: finding for finding in doctor._backends()}
    assert found["cpu"].state == "warning" and found["cpu"].value == REASON and found["cpu"].advice.startswith(TODO)
    reason = "the package triton is not installed"
    monkeypatch.setattr(triton, "missing", lambda: reason)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda k: (8, 0))
    found = {finding.name: finding for finding in doctor._backends()}
    assert (
        (found["triton"].value, found["triton"].advice)
        == (reason, "pip install triton")
        == (reason, mending("triton", reason))
    )
    assert found["cuda"].advice == ""  # the backend is for Hopper alone
