"""Conditions under which the CUDA backend serves, and its reasons for refusing. No test here needs a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fastclip
from fastclip._backends import cuda, pick, triton
from support import ROOT

pytest.importorskip("triton")

pytestmark = pytest.mark.usefixtures("emulated_cuda")


class Pretended:
    """Stand-in for a tensor on a GPU."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.device = dtype, torch.device("cuda:0")

    def get_device(self) -> int:
        return 0


class Built:
    """Stand-in for the native module's build information, on a machine with the given driver."""

    EMULATED, RUNTIME = False, 13000

    def __init__(self, driver: int) -> None:
        self.driver = lambda: driver


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (0, "there is no NVIDIA driver"),
        (12040, "the NVIDIA driver supports CUDA 12.4, but the native module was built with CUDA 13.0"),
        (13020, None),
        (14000, None),
    ],
)
def test_backend_says_why_not(monkeypatch: pytest.MonkeyPatch, driver: int, reason: str | None) -> None:
    monkeypatch.setattr(cuda, "_module", Built(driver))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cuda._driver_reason.cache_clear()
    try:
        assert fastclip.backends()["cuda"] == (reason or "available")
        if reason:
            with pytest.raises(RuntimeError, match=f"backend='cuda' cannot serve this call: {reason}"):
                pick("cuda", Pretended(torch.bfloat16))
    finally:
        cuda._driver_reason.cache_clear()


def test_machine_without_hopper_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a Hopper GPU is reported once other code has initialised CUDA; the query itself
    must not do so.
    """
    capabilities = [(8, 0), (12, 0)]
    monkeypatch.setattr(cuda, "_module", Built(13000))
    for name, answer in [("is_available", True), ("is_initialized", False), ("device_count", 2)]:
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    found = []
    for initialized, second in [(False, (12, 0)), (True, (12, 0)), (True, (9, 0))]:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda initialized=initialized: initialized)
        capabilities[1] = second
        cuda._driver_reason.cache_clear()
        cuda._other_gpu.cache_clear()
        found.append(fastclip.backends()["cuda"])
    cuda._driver_reason.cache_clear()
    cuda._other_gpu.cache_clear()
    assert found == ["available", "it is for Hopper (compute capability 9.0), not GPU 0", "available"]


def test_triton_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "import_error", lambda: "the package triton is not installed")
    reason = "it needs Triton for its small kernels, and the package triton is not installed"
    assert fastclip.backends()["cuda"] == reason


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((9, 0), torch.bfloat16, None),
        ((9, 0), torch.float16, None),
        ((9, 0), torch.float32, "it supports bfloat16 and float16, not float32"),
        ((8, 0), torch.bfloat16, "it is for Hopper (compute capability 9.0), not a GPU"),
        ((10, 0), torch.bfloat16, "it is for Hopper (compute capability 9.0), not a GPU"),
    ],
    ids=str,
)
def test_other_gpus_and_dtypes_are_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    cuda._other_gpu.cache_clear()
    try:
        assert cuda.refuses(Pretended(dtype), named=True) == reason
    finally:
        cuda._other_gpu.cache_clear()


def test_preferred_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA backend is preferred to Triton on Hopper for 16-bit features, and never for tensors on
    the CPU, even with an emulator.
    """
    assert list(fastclip.backends()) == ["cuda", "triton", "cpu", "reference"]
    monkeypatch.setattr(cuda, "_other_gpu", lambda index: None)
    for dtype, expected in [(torch.bfloat16, "cuda"), (torch.float32, "triton")]:
        monkeypatch.setattr(triton, "refuses", lambda image, named: None)
        assert pick(None, Pretended(dtype))[0] == expected
    monkeypatch.undo()
    assert pick(None, torch.eye(4, dtype=torch.bfloat16, device="cpu"))[0] == "cpu"


WITHOUT_A_DRIVER = """
import fastclip, torch
import fastclip
from fastclip._backends import cuda, pick, triton
from fastclip.triton_kernels.launch import BwdSide, FwdSide
if cuda._not_loaded: raise SystemExit("NOT BUILT " + cuda._not_loaded)
print(cuda._module.driver(), fastclip.backends()["cuda"])
x, f, tiles = torch.zeros(8, 8, dtype=torch.bfloat16), torch.zeros(64), cuda._Tiles(torch.device("cpu"))
tile = tiles.config("contrastive_fwd", 8, 8, False)
for call in (
    lambda: tiles.contrastive_fwd(tile, x, x, FwdSide(f, None, f), FwdSide(f, None, f), f, 0, False),
    lambda: tiles.contrastive_bwd(tile, x, x, BwdSide(f, f), BwdSide(f, f), f, 0, False, x.clone(), f),
    lambda: tiles.sigmoid_fwd(tile, x, x, f, f, f, 0, f, x.clone(), f.double().view(8, 8)),
):
    try:
        call()
    except RuntimeError as error:
        print(error)
print(fastclip.build_info()["cuda"])
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_module_without_a_driver() -> None:
    """The module of the installed build loads on a machine without a driver, and every entry raises with the reason."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_A_DRIVER], capture_output=True, text=True, cwd=ROOT)
    if "NOT BUILT" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    driver, *errors, build = done.stdout.splitlines()
    assert driver == "0 there is no NVIDIA driver"
    assert errors == ["fastclip: there is no NVIDIA driver, or it is too old for this build of fastclip._cuda"] * 3
    assert build.startswith("nvcc ") and build.endswith(", sm_90a")
