"""The parts of `make gpu-ten`: wrong values, Nsight Compute's output, a step's timeline, other builds."""

from __future__ import annotations

import builtins
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from support import ROOT, needs
from support.rows import rows_of

needs("train")


from benchmarks import gpu_ten
from benchmarks.gpu import correct as gpu_correct
from benchmarks.gpu import counters as gpu_counters
from benchmarks.gpu import steps as gpu_steps
from benchmarks.gpu import timeline as gpu_timeline
from benchmarks.gpu.device import DeviceLost
from benchmarks.gpu.log import Log
from benchmarks.gpu.pretended import Pretended
from benchmarks.gpu.timeline import Event, group_of, groups
from benchmarks.losses.peers import PEERS, Peer
from benchmarks.losses.providers import OURS, CheckFailed


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    monkeypatch.setitem(OURS, "cuda", dict.fromkeys(OURS["cuda"], "reference"))
    return Log("correct", tmp_path, Pretended(), time.monotonic() + 100, tmp_path / "done", "code")


@pytest.mark.parametrize(("way", "function"), [("labels", "contrastive_loss"), ("sigmoid", "sigmoid_loss")])
def test_a_wrong_gradient_is_found(log: Log, monkeypatch: pytest.MonkeyPatch, way: str, function: str) -> None:
    gpu_correct.values(log, "fastclip_cuda")
    right = getattr(gpu_correct.fastclip, function)

    def wrong(image: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        # the right value with 9 tenths of d_image
        return right(image + 0.1 * (image.detach() - image), *rest, **options)

    monkeypatch.setattr(gpu_correct.fastclip, function, wrong)
    monkeypatch.setattr(gpu_correct, "WAYS", (way,))
    with pytest.raises(CheckFailed, match=r"fastclip_cuda, .*relative errors loss .*, d_image 1.0e-01"):
        gpu_correct.values(log, "fastclip_cuda")


def test_other_bits_are_found(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    right, turns = gpu_correct.fastclip.contrastive_loss, iter(range(10**6))

    def drifts(*inputs: Any, **options: Any) -> torch.Tensor:
        return right(*inputs, **options) * (1 + 1e-6 * next(turns))

    monkeypatch.setattr(gpu_correct.fastclip, "contrastive_loss", drifts)
    with pytest.raises(CheckFailed, match="a second call gives different bits"):
        gpu_correct.values(log, "fastclip_cuda")
    with pytest.raises(CheckFailed, match="a replay gives different bits"):
        gpu_correct.graphs(log, "fastclip_cuda")


def test_failed_tests_are_a_wrong_value(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = iter([None, 5, 1])
    monkeypatch.setattr(gpu_correct, "run_limited", lambda command, seconds: next(codes))
    gpu_correct.tests(log)
    gpu_correct.tests(log)
    with pytest.raises(CheckFailed, match="exit code 1"):
        gpu_correct.tests(log)
    assert [row["status"] for row in rows_of(log.rows)][::2] == [
        "cut: the tests before it passed",
        "failed with exit code 1",
    ]


def test_no_time_is_said_and_not_done(log: Log) -> None:
    log.end = time.monotonic()
    gpu_correct.values(log, "fastclip_cuda")
    (row,) = rows_of(log.rows)
    assert row["status"].startswith("no time was left for 40 of 40") and not log.complete


def test_pieces_are_done_on_their_code(log: Log) -> None:
    assert not log.done("softmax-8x8")
    log.mark_done("softmax-8x8")
    assert log.done("softmax-8x8") and not log.done("softmax-9x9")
    log.code = "other"
    assert not log.done("softmax-8x8")


# ---- Nsight Compute ----

NAMES = '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size"'
NAMES += ',"Device","CC"'
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
KERNEL = '"1","42","python3","host","void fastclip::tile_kernel<fastclip::<unnamed>::{}<(bool)0, (int)192{}>>(Params)"'
GMMA, HITS = f'"{STALL.format("gmma")}"', '"lts__t_sector_hit_rate.pct"'
PLACE = '"1","7","(384, 1, 1)","(132, 1, 1)","0","9.0"'
SAMPLE = f"""==PROF== Connected to process 42 (/usr/bin/python3.12)
==PROF== Profiling "tile_kernel": 0%....50%....100% - 12 passes
==PROF== Disconnected from process 42
{NAMES},"gpu__time_duration.sum","launch__registers_per_thread","sm__cycles_elapsed.avg.per_second",{GMMA},{HITS}
"","","","","","","","","","","","ns","register/thread","hz","inst","%"
{KERNEL.format("Statistics", ", (bool)0")},{PLACE},"1,403,968","168","1755000000.5","0.25","n/a"
{KERNEL.format("Weigh", ", (bool)0")},{PLACE},"2,000","168","1700000000","0.5","91.5"
{KERNEL.format("Weigh", ", (bool)0")},{PLACE},"9,999","168","1700000000","0.5","91.5"
{KERNEL.format("Repair", "")},{PLACE},"5,000","168","1700000000","0.5","91.5"
"""


def test_counters_are_parsed() -> None:
    """Counters are parsed from the first launches: the selected metrics, numbers with commas,
    no values that are not numbers.
    """
    assert list(gpu_counters.parse(SAMPLE)) == [
        (
            "statistics",
            [
                ("gpu__time_duration.sum", "ns", 1403968.0),
                ("sm__cycles_elapsed.avg.per_second", "hz", 1755000000.5),
                (STALL.format("gmma"), "inst", 0.25),
            ],
        ),
        (
            "weights",
            [
                ("gpu__time_duration.sum", "ns", 2000.0),
                ("sm__cycles_elapsed.avg.per_second", "hz", 1.7e9),
                (STALL.format("gmma"), "inst", 0.5),
                ("lts__t_sector_hit_rate.pct", "%", 91.5),
            ],
        ),
    ]
    assert list(gpu_counters.parse("==ERROR== nothing\n")) == []
    assert all(gpu_counters.KEPT.fullmatch(name) for name in gpu_counters.METRICS)


def test_kernels_are_those_of_the_sources() -> None:
    """Kernels are counted by their names in the sources, so that renaming one fails here."""
    sources = {name: (ROOT / "csrc" / "cuda" / name).read_text() for name in ("contrastive_fwd.cu", "loss_weights.cu")}
    sources["sigmoid_fwd.cu"] = (ROOT / "csrc" / "cuda" / "sigmoid_fwd.cu").read_text()
    for word, text in zip(gpu_counters.KERNELS.values(), sources.values(), strict=True):
        assert f"struct {word} {{" in text and f"launch<{word}, " in text


FAKE = """#!{python}
import sys
from pathlib import Path
words = sys.argv[1:]
if "--metrics" in words:
    raise SystemExit("==ERROR== Failed to find metric")
assert words[words.index("--clock-control") + 1] == "none" and "benchmarks.gpu.counters" in words
Path(words[words.index("--log-file") + 1]).write_text({text!r})
"""


@pytest.mark.parametrize("text", [SAMPLE, "==ERROR== ERR_NVGPUCTRPERM: no permission\n"], ids=["counters", "refused"])
def test_ncu_is_asked_again_without_names_that_it_does_not_know(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    ncu = tmp_path / "ncu"
    ncu.write_text(FAKE.format(python=sys.executable, text=text))
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    log.gpu.pretended = False
    gpu_counters.run(log)
    rows = rows_of(tmp_path)
    if text == SAMPLE:
        assert [row["case"] for row in rows] == [*["statistics 32768x512"] * 3, *["weights 32768x512"] * 4, "sigmoid"]
        assert rows[0]["value"] == "1403968.0" and rows[-1]["status"] == "ncu saw no launch of it"
    else:
        assert [row["status"] for row in rows] == ["ERR_NVGPUCTRPERM: no permission"] * 3


# ---- whole steps, and time and memory against the workspace ----


def test_a_peer_that_breaks_the_gpu_is_left_out_of_its_case(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that breaks the GPU is left out of its case, and the remaining cases are reported. The next process
    repeats neither completed cases nor that peer in that case.
    """
    calls: list[int] = []

    def breaks(image: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        calls.append(len(image))
        log.gpu.lost = True  # type: ignore[attr-defined]
        raise RuntimeError("CUDA error")

    providers = ("open_clip", "memeff", *OURS["cuda"])
    planned = [gpu_steps.Planned("sigmoid", (40, 32), ("open_clip", *OURS["cuda"]))]
    planned += [gpu_steps.Planned("softmax", (N, 32), providers) for N in (48, 56)]
    monkeypatch.setitem(gpu_steps.CASES, True, planned)
    monkeypatch.setitem(PEERS, "memeff", Peer("memeff", {"softmax": lambda: breaks}, gpu_only=True))
    for case, left in (("softmax-48x32", planned[1:]), ("softmax-56x32", planned[2:])):
        log.gpu = Pretended()  # a new process has a new context
        with pytest.raises(gpu_steps.PeerLost, match=f"memeff broke the GPU in {case}"):
            gpu_steps.run(log)
        told = [row["case"] for row in rows_of(log.rows) if row["status"] == f"left: memeff broke the GPU in {case}"]
        assert told == [one.name for one in left]
    log.gpu = Pretended()
    gpu_steps.run(log)
    assert calls == [48, 56] and log.complete and all(log.done(one.name) for one in planned)
    rows = [row for row in rows_of(log.rows, "cuda.csv") if row["provider"] != "floor"]
    assert [row["status"][:11] for row in rows if row["provider"] == "memeff"] == ["device lost"] * 2
    figures = [(row["N"], row["provider"]) for row in rows if row["median_ms"]]
    assert sorted(figures) == sorted((N, name) for N in ("40", "48", "56") for name in ("open_clip", *OURS["cuda"]))


def test_a_lost_gpu_that_is_no_peer_s_work_is_a_failure(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is lost without a peer is a failure: no provider can be left out, so another
    attempt would end the same way.
    """

    def lost(*_: Any) -> Any:
        raise DeviceLost("floor", "device lost: error")

    monkeypatch.setattr(gpu_steps, "measured", lost)
    with pytest.raises(DeviceLost):
        gpu_steps.run(log)


def test_steps_come_in_order_of_worth() -> None:
    """Steps are ordered by their worth. The part's time suffices for both losses at every shared
    size, and for the largest softmax.
    """
    part = next(part for part in gpu_ten.PARTS if part.name == "steps")
    planned = gpu_steps.CASES[False]
    left, sure = part.seconds - gpu_ten.RESERVE, []
    for one in planned:
        left -= one.seconds
        if left >= 0:
            sure.append(one.name)
    assert sure[:2] == ["softmax-32768x512", "sigmoid-32768x512"]
    sizes = {one.size for one in planned if one.loss == "sigmoid"}
    wanted = {f"{loss}-{N}x{D}" for N, D in sizes for loss in ("softmax", "sigmoid")} | {"softmax-65536x768"}
    assert len(sizes) == 3 and set(sure) >= wanted and planned[-1].name.endswith("cut_cross_entropy")


def test_a_workspace_for_which_no_time_is_left_is_said(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace for which no time is left is reported, and the environment variable keeps its value."""
    for before in (None, "77"):
        if before:
            monkeypatch.setenv(gpu_steps.VARIABLE, before)
        else:
            monkeypatch.delenv(gpu_steps.VARIABLE, raising=False)
        log.end, log.complete = time.monotonic(), True
        gpu_steps.workspace(log)
        assert not log.complete and os.environ.get(gpu_steps.VARIABLE) == before
    assert rows_of(log.rows)[0]["status"].startswith("no time was left")


# ---- the timeline of a training step ----


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute", "products"),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_s16816fprop>(int)", "products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>(Flash_fwd_params)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl()::{lambda(float)#1}>",
            "pointwise",
        ),
        (
            "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>",
            "copies",
        ),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>(int)", "reductions"),
        (
            "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>(at::native::ReduceOp<float>)",
            "reductions",
        ),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata>",
            "optimiser",
        ),
        ("Memcpy HtoD (Pinned -> Device)", "copies from the host"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("Memset (Device)", "copies"),
        ("triton_poi_fused__to_copy_addmm_gelu_3", "pointwise"),
        ("triton_per_fused_native_layer_norm_7", "reductions"),
        ("void fastclip::tile_kernel<fastclip::Statistics>(CUtensorMap)", "loss"),
        ("something_else", "other"),
    ],
)
def test_kernels_are_grouped_by_their_names(name: str, group: str) -> None:
    assert group_of(name) == group and group_of(name, "loss") == "loss"


def test_groups_sum_to_the_step() -> None:
    """Groups sum to the step: kernels inside a region belong to it whatever their names,
    overlap counts once, gaps are idle.
    """

    def mark(start: float) -> Event:
        return Event("at::cuda::spin_kernel(long)", start, 1)

    events = [
        Event("gemm before the step", 0, 5),
        mark(10),
        Event("gemm", 12, 8),  # until 20
        Event("Memcpy HtoD", 15, 10),  # 5 beyond the product
        *(mark(30), Event("gemm", 35, 5), mark(41), Event("norms", 43, 2), mark(46)),  # the loss: 7
        Event("gemm", 50, 4),
        *(mark(60), Event("elementwise", 61, 3), mark(65)),
        Event("reduce", 70, 5),
        mark(80),
    ]
    found = groups(events[::-1])  # in any order
    assert sum(found.values()) == 71 and list(found) == list(gpu_timeline.ORDER)
    found = {name: value for name, value in found.items() if value}
    assert found == {
        "products": 12,
        "copies from the host": 5,
        "loss": 7,
        "optimiser": 3,
        "accuracy": 5,
        "idle": 71 - 32,
    }
    with pytest.raises(RuntimeError, match="5 marks"):
        groups([mark(k) for k in range(5)])


# ---- training packages ----


def test_packages_of_training_that_are_missing_are_said(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing training packages are reported, but a module of this repository that does not load is a failure."""
    load, missing = builtins.__import__, "timm"

    def refusing(name: str, *rest: Any, **options: Any) -> Any:
        if name == "benchmarks.gpu" and "timeline" in (rest[2] or ()):
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return load(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", refusing)
    gpu_ten.training(log)
    assert [row["status"] for row in rows_of(log.rows)] == ["not installed: timm"]
    missing = "fastclip.models.towrs"
    with pytest.raises(ModuleNotFoundError):
        gpu_ten.training(log)
