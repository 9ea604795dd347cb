"""The GPU benchmark, as far as it can be tested without a GPU: providers, checks, rows and their statuses."""

from __future__ import annotations

import csv
import math
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from support import ROOT, needs

needs("models")


from benchmarks import plot
from benchmarks.gpu import case as gpu_case
from benchmarks.gpu import device as gpu
from benchmarks.gpu.device import Clocks, DeviceLost, Gpu
from benchmarks.gpu.pretended import DRY_RUN, Pretended
from benchmarks.harness import Case, append, machine
from benchmarks.losses import cases, peers
from benchmarks.losses import providers as losses
from benchmarks.losses.peers import PEERS, Peer, Unavailable
from fastclip.parity import truth

N, D = 64, 32
FIGURES = ["rounds", "median_ms", "p20_ms", "p80_ms", "tflops", "floor_percent", "speedup_over_open_clip", "peak_mib"]


def dense(image, text, scale):
    z = scale * image @ text.T
    labels = torch.arange(len(z))
    return (F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)) / 2


def dense_sigmoid(image, text, scale, bias):
    z = scale * image @ text.T + bias
    return (F.softplus(z).sum() - z.trace()) / len(z)


DENSE = {"softmax": dense, "sigmoid": dense_sigmoid}


@pytest.mark.parametrize("loss", DENSE)
def test_truth_is_the_dense_loss(loss: str, monkeypatch) -> None:
    leaves = losses.leaves_of(Case(loss, "both", 50, D, "float32"))
    exact = [x.detach().double().requires_grad_() for x in leaves]
    value = DENSE[loss](*exact)
    expected = (value, *torch.autograd.grad(value, exact))
    for rows in (7, 50):  # blocks that do not divide N; a single block
        monkeypatch.setattr(truth, "BLOCK_BYTES", 4 * 50 * rows)
        for dtype, error in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
            for x, y in zip(truth.blockwise_truth(loss, leaves, dtype), expected, strict=True):
                assert torch.dist(x.double(), y) < error * y.norm()


def test_sizes_are_pairs() -> None:
    assert cases.parse_sizes("1024,4096x768", "cpu") == [(1024, 512), (4096, 768)]
    assert cases.parse_sizes(None, "cuda") == [(8192, 512), (32768, 512), (65536, 768), (131072, 1024)]
    assert [N for N, D in cases.parse_sizes(None, "cpu")] == [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
    for wrong in ("12x", "x512", "8,", "1e3", "0", "8x0", "8 x 8"):
        with pytest.raises(ValueError, match="is not N or NxD"):
            cases.parse_sizes(wrong, "cuda")


# Modules with the published signatures. Called with other options, they compute something else.


def fake_inf_cl(broken: bool) -> ModuleType:
    def cal_flash_loss(q, k, labels=None, scale=None, head_dim=256):
        z = (1.0 if scale is None else scale) * q @ k.T
        return z.logsumexp(1) - (1 + broken) * z.diagonal()

    return SimpleNamespace(cal_flash_loss=cal_flash_loss)


def fake_memeff(broken: bool) -> ModuleType:
    class MemoryEfficientCLIPLoss:
        def __init__(self, temperature=0.07, normalized_inputs=False, stable=True):
            self.temperature, self.normalized_inputs, self.stable = temperature, normalized_inputs, stable

        def __call__(self, image, text):
            if not self.normalized_inputs:
                image, text = (F.normalize(x, dim=1) for x in (2 * image + text, text))
            loss = dense(image, text, 1 / self.temperature)
            stretch = 7.0 if self.stable or broken else 1.0
            return stretch * loss - (stretch - 1) * loss.detach()  # the same value with other gradients

    return SimpleNamespace(MemoryEfficientCLIPLoss=MemoryEfficientCLIPLoss)


def fake_cut_cross_entropy(broken: bool, impls: tuple[str, ...] = ("CCE", "TORCH_COMPILE")) -> ModuleType:
    def linear_cross_entropy(e, c, targets, filter_eps="high", impl="cce"):
        exact = impl == "cce_exact" if "CCE_EXACT" in impls else (impl, filter_eps) == ("cce", None)
        loss = F.cross_entropy(e @ c.T, targets)
        return loss if exact and not broken else loss.detach() + 0 * (e.sum() + c.sum())

    names = SimpleNamespace(**dict.fromkeys(impls, 1))
    return SimpleNamespace(linear_cross_entropy=linear_cross_entropy, LinearCrossEntropyImpl=names)


def fake_newer_cut_cross_entropy(broken: bool) -> ModuleType:
    return fake_cut_cross_entropy(broken, ("CCE", "TORCH_COMPILE", "CCE_EXACT"))


def fake_siglip_kernel(broken: bool) -> ModuleType:
    def fused_siglip_loss(img_features, txt_features, log_temperature, bias, use_fp8=False, backend="auto"):
        return dense_sigmoid(img_features, txt_features, log_temperature.exp(), bias.detach() if broken else bias)

    return SimpleNamespace(fused_siglip_loss=fused_siglip_loss)


FAKES = [
    ("inf_cl", fake_inf_cl),
    ("memeff", fake_memeff),
    ("cut_cross_entropy", fake_cut_cross_entropy),
    ("cut_cross_entropy", fake_newer_cut_cross_entropy),
    ("siglip_kernel", fake_siglip_kernel),
]


@pytest.mark.parametrize(("name", "fake"), FAKES, ids=[fake.__name__ for _, fake in FAKES])
def test_peer_is_called_for_the_same_loss(name: str, fake, monkeypatch) -> None:
    (loss,) = PEERS[name].build
    leaves = losses.leaves_of(Case(loss, "both", N, D, "float32"))
    expected = truth.blockwise_truth(loss, leaves)
    monkeypatch.setitem(sys.modules, name, fake(broken=False))
    losses.check_one(name, peers.build(name, loss), leaves, expected)
    monkeypatch.setitem(sys.modules, name, fake(broken=True))
    with pytest.raises((losses.CheckFailed, RuntimeError), match=f"{name}: relative errors|appears to not"):
        losses.check_one(name, peers.build(name, loss), leaves, expected)


def test_nan_fails_the_check() -> None:
    leaves = losses.leaves_of(Case("softmax", "both", N, D, "float32"))
    with pytest.raises(losses.CheckFailed, match="loss nan"):
        losses.check_one("x", lambda *x: math.nan * dense(*x), leaves, truth.blockwise_truth("softmax", leaves))


def test_missing_peers_say_why(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "memeff", None)  # the import raises ImportError
    monkeypatch.setattr(peers, "installed_version", lambda package: "")
    with pytest.raises(Unavailable, match=r"^not installed$"):
        peers.build("memeff", "softmax")
    monkeypatch.setattr(peers, "installed_version", lambda package: "9.9")
    with pytest.raises(Unavailable, match=r"^error: ModuleNotFoundError: "):
        peers.build("memeff", "softmax")
    monkeypatch.setitem(sys.modules, "memeff", SimpleNamespace())  # another interface
    with pytest.raises(Unavailable, match=r"^error: ImportError: cannot import name 'MemoryEfficientCLIPLoss'"):
        peers.build("memeff", "softmax")


def test_gpu_providers_are_not_the_cpus() -> None:
    assert {"inf_cl", "memeff", "cut_cross_entropy", "fastclip_triton"} <= set(losses.names("softmax", "cuda"))
    assert "siglip_kernel" in losses.names("sigmoid", "cuda") and "memeff" not in losses.names("sigmoid", "cuda")
    for loss in losses.MODES:
        assert set(losses.names(loss, "cpu")) <= {*losses.DENSE, "linear_cross_entropy", "fastclip"}
    assert losses.named("memeff", "cuda") == ["memeff"]
    with pytest.raises(ValueError, match="no provider fastclip here"):
        losses.named("fastclip", "cuda")


def test_own_backend_that_is_not_there(monkeypatch) -> None:
    monkeypatch.setattr(losses.fastclip, "backends", lambda: {"cpu": "available", "cuda": "no driver"})
    found, status = losses.load_losses("softmax", "cuda", ["fastclip_triton", "fastclip_cuda"])
    assert not found
    assert status == {
        "fastclip_triton": "not available: not in this version",
        "fastclip_cuda": "not available: no driver",
    }
    monkeypatch.setattr(losses.fastclip, "backends", lambda: {"triton": "available"})
    ((name, loss),) = losses.load_losses("softmax", "cuda", ["fastclip_triton"])[0].items()
    assert name == "fastclip_triton" and loss.keywords == {"normalize": False, "backend": "triton"}


def raises(error: Exception):
    def loss(*leaves):
        raise error

    return loss


def set_peer(monkeypatch, name: str, loss, **options) -> None:
    monkeypatch.setitem(PEERS, name, Peer(name, {"softmax": lambda: loss}, gpu_only=True, **options))


class Stopwatch:
    """The part of pytest-benchmark's fixture that the benchmark uses."""

    @staticmethod
    def pedantic(target, setup, rounds: int) -> None:
        for _ in range(rounds):
            setup()
            target()


def run_case(gpu: Gpu, wanted: list[str], path: Path, mode: str = "both") -> dict[str, dict[str, str]]:
    needs("bench")
    from benchmarks.test_losses import on_gpu

    on_gpu(Stopwatch(), gpu, Case("softmax", mode, N, D, "bfloat16"), wanted, path)
    with path.open(newline="") as file:
        return {row["provider"]: row for row in csv.DictReader(file)}


def test_everyone_has_a_row(tmp_path: Path, monkeypatch) -> None:
    set_peer(monkeypatch, "inf_cl", raises(torch.OutOfMemoryError("too much\nof it")))
    set_peer(monkeypatch, "memeff", lambda image, text, scale: dense(image, text, 1.1 * scale))
    set_peer(monkeypatch, "cut_cross_entropy", raises(AssertionError("bf16 only")))
    monkeypatch.setattr(losses, "ours", lambda backend, loss: dense)
    monkeypatch.setattr(gpu_case, "SECONDS", 0.0)  # three rounds
    wanted = [name for name in losses.names("softmax", "cuda") if name not in ("open_clip_compiled", "fastclip_cuda")]
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)

    rows = run_case(Pretended(), wanted, tmp_path / "rows.csv")
    assert sorted(rows) == sorted(["floor", *wanted])
    ran = {name for name, row in rows.items() if not row["status"]}
    assert ran == {"floor", "open_clip", "fastclip_triton"}
    assert rows["inf_cl"]["status"] == "error: OutOfMemoryError: too much"
    assert rows["memeff"]["status"].startswith("check failed: memeff: relative errors loss ")
    assert rows["cut_cross_entropy"]["status"] == "error: AssertionError: bf16 only"
    assert rows["linear_cross_entropy"]["status"] == f"not in torch {torch.__version__}"
    for name, row in rows.items():
        assert (row["loss"], row["mode"], row["N"], row["D"]) == ("softmax", "both", str(N), str(D))
        assert row["gpu"] == DRY_RUN and row["copy_gbs"] and row["gemm_tflops"] and not row["sm_mhz"]
        assert [bool(row[x]) for x in FIGURES] == [name in ran and (x, name) != ("peak_mib", "floor") for x in FIGURES]
    assert rows["open_clip"]["rounds"] == "3" and rows["open_clip"]["peak_mib"] == "2.0"
    assert rows["open_clip"]["version"] and not rows["fastclip_triton"]["version"]


def test_dense_losses_run_where_they_fit(tmp_path: Path) -> None:
    # open_clip needs five times 2 N^2 bytes in bf16
    row = run_case(Pretended(memory=41_000), ["open_clip"], tmp_path / "fits.csv")["open_clip"]
    assert row["status"] == ""
    row = run_case(Pretended(memory=40_900), ["open_clip"], tmp_path / "not.csv")["open_clip"]
    assert row["status"].startswith("does not fit") and row["median_ms"] == ""


def test_halves_of_a_step(tmp_path: Path) -> None:
    rows = run_case(Pretended(), ["open_clip", "linear_cross_entropy"], tmp_path / "rows.csv", mode="backward")
    assert rows["open_clip"]["status"] == "" and rows["open_clip"]["peak_mib"] == ""
    assert rows["linear_cross_entropy"]["status"] in ("only whole steps", f"not in torch {torch.__version__}")


def test_own_failure_is_the_tests(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(losses, "ours", lambda backend, loss: lambda *leaves: 2 * dense(*leaves))
    with pytest.raises(AssertionError, match="fastclip_triton: check failed"):
        run_case(Pretended(), ["open_clip", "fastclip_triton"], tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = {row["provider"]: row for row in csv.DictReader(file)}
    assert rows["open_clip"]["median_ms"] and rows["fastclip_triton"]["status"].startswith("check failed")


def test_floor_is_the_products_at_the_gemms_rate(monkeypatch) -> None:
    gpu = Pretended()
    case = Case("softmax", "both", N, D, "bfloat16")
    lined = gpu_case.line_up(case, ["open_clip"], gpu)
    seconds = iter([0.5, 0.25] * 3)
    gpu.clock = lambda step: next(seconds)
    timings = gpu_case.GuardedTimings(clock=gpu.clock, attempt=gpu.attempt)
    for provider in lined.providers * 3:
        timings.time(provider)
    gpu.copy_seconds[:] = [1e-9, 1e-9, 1.0]
    floor, theirs = gpu_case.gpu_rows(case, lined, timings, gpu, Clocks())
    share = 8 * N * N * D / (2 * 16**3)  # in units of the GEMM's operations
    assert floor["median_ms"] == round(500 * share, 3)
    assert theirs["median_ms"] == 250 and theirs["floor_percent"] == round(100 * 0.5 * share / 0.25, 1)
    assert theirs["copy_gbs"] == 128  # 64 bytes, read and written


def test_failure_in_a_round_is_a_status(tmp_path: Path, monkeypatch) -> None:
    calls = []

    def fails_later(image, text, scale):
        calls.append(1)
        if len(calls) > 5:
            raise torch.OutOfMemoryError("later")
        return dense(image, text, scale)

    set_peer(monkeypatch, "inf_cl", fails_later)
    rows = run_case(Pretended(), ["open_clip", "inf_cl"], tmp_path / "rows.csv")
    assert rows["inf_cl"]["status"] == "error: OutOfMemoryError: later" and rows["inf_cl"]["median_ms"] == ""
    assert rows["open_clip"]["status"] == "" and rows["open_clip"]["median_ms"]


def test_lost_gpu_leaves_a_row_and_ends_the_process(tmp_path: Path, monkeypatch) -> None:
    gpu = Pretended()

    def breaks(*leaves):
        gpu.lost = True
        raise RuntimeError("CUDA error")

    set_peer(monkeypatch, "inf_cl", breaks)
    path = tmp_path / "rows.csv"
    with pytest.raises(DeviceLost) as caught:
        gpu_case.line_up(Case("softmax", "both", N, D, "bfloat16"), ["open_clip", "inf_cl"], gpu)
    assert caught.value.args == ("inf_cl", "device lost: error: RuntimeError: CUDA error")
    gpu.lost = False
    with pytest.raises(pytest.exit.Exception, match="inf_cl: device lost"):
        run_case(gpu, ["open_clip", "inf_cl"], path)
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["status"].startswith("device lost") and row["median_ms"] == "" and row["provider"] == "inf_cl"
    gpu.lost = False
    run_case(gpu, ["open_clip"], path)  # the columns agree, or `append` would raise


def test_inputs_rotate_past_the_cache() -> None:
    case = Case("softmax", "both", N, D, "bfloat16")
    seen = []

    def loss(image, text, scale):
        seen.append(image)
        return dense(image, text, scale)

    gpu = Pretended(l2=5 * 2 * N * D)  # a set has two matrices of 2 N D bytes, and the scale
    assert gpu.sets(4 * N * D) == 5 and gpu.sets(100 * N * D) == 1
    sets = [losses.leaves_of(case, seed=seed) for seed in range(3)]
    prepare = gpu_case._rotating(case, loss, sets)
    for _ in range(4):
        prepare()()
    assert [id(x) for x in seen] == [id(sets[k][0]) for k in (0, 1, 2, 0)]
    assert not torch.equal(sets[0][0], sets[1][0])


def test_clocks_are_medians_of_what_was_read(monkeypatch) -> None:
    answers = iter([["1980", "2619"], ["1900", "2619"], ["[N/A]", "2619"], [], ["1755", "1593"]])
    monkeypatch.setattr(gpu, "nvidia_smi", lambda fields: next(answers, ["1000", "1000"]))
    clocks = Clocks()
    for _ in range(5):
        clocks.read()
    assert (clocks.sm_mhz, clocks.memory_mhz) == (1900, 2619)
    with Clocks(seconds=0.001) as clocks:
        end = time.monotonic() + 20
        while len(clocks.samples) < 3 and time.monotonic() < end:
            time.sleep(0.01)
    assert len(clocks.samples) >= 3 and clocks.sm_mhz == 1000 and not clocks._thread.is_alive()
    monkeypatch.setattr(gpu, "nvidia_smi", lambda fields: [])  # no nvidia-smi
    with Clocks() as clocks:
        pass
    assert (clocks.sm_mhz, clocks.memory_mhz) == ("", "")


def test_cpu_rows_keep_their_columns(tmp_path: Path) -> None:
    stored = (ROOT / "benchmarks" / "results" / "cpu.csv").read_text().splitlines()[0].split(",")
    assert stored[6:14] == FIGURES and stored[14:] == list(machine())
    with pytest.raises(ValueError, match="has other columns"):  # rows of a GPU do not belong there
        copy = tmp_path / "cpu.csv"
        copy.write_text(",".join(stored) + "\n")
        append(copy, [gpu_case.status_row(Case("softmax", "both", N, D, "bfloat16"), "memeff", "x")], {"gpu": "y"})


def test_table_and_figure_of_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "cuda.csv"
    about = {**Pretended().about(), "date": "", "driver": "575.1", "cuda": "13.0", "triton": "3.8.0"}
    about |= {"torch": "2.14.1", "fastclip": "0.1.0", "open_clip": "3.3.0"}
    for N, D, name, ms, percent in (
        (8192, 512, "floor", 0.5, 100),
        (8192, 512, "fastclip_triton", 0.66, 75.7),
        (131072, 1024, "fastclip_triton", 1234.5, 80.4),
        (131072, 1024, "memeff", 2000, 50),
    ):
        row = gpu_case.status_row(Case("softmax", "both", N, D, "bfloat16"), name, "")
        append(path, [{**row, "median_ms": ms, "floor_percent": percent, "speedup_over_open_clip": 2.0}], about)
    append(
        path, [gpu_case.status_row(Case("softmax", "both", 8192, 512, "bfloat16"), "inf_cl", "not installed")], about
    )
    rows = plot.read(path)
    assert plot.gpu_table(rows).splitlines() == [
        "| N | D | `fastclip_triton`, ms | `inf_cl`, ms | `memeff`, ms | `floor`, ms |",
        "|---:|---:|---:|---:|---:|---:|",
        "| 8,192 | 512 | 0.66 (76 %) |  |  | 0.50 |",
        "| 131,072 | 1,024 | 1,234.50 (80 %) |  | 2,000.00 |  |",
    ]
    assert "dry run, driver 575.1, CUDA 13.0, triton 3.8.0" in plot._about(rows)
    assert plot._all(rows, "D") == "512 / 1024"
    needs("train")
    plot.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
