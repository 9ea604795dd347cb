"""`fastclip plan`: its numbers against measured steps, and the relations between them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from support import ROOT, needs

needs("models")

import fastclip.training.planning.footprint as traced
from fastclip import GlobalContrastiveLoss, create_model, matryoshka_loss
from fastclip.cli import main
from fastclip.models import DualEncoder
from fastclip.training import Plan, plan
from fastclip.training.planning.choose import choose
from fastclip.training.planning.report import table

MIB, GIB = 2**20, 2**30
# A model whose parameters and activations have similar sizes, so that memory peaks at another point of the step than in
# the small models.
WIDE = {
    "embed_dim": 512,
    "vision_cfg": {"tower": "vit", "image_size": 32, "layers": 6, "width": 512, "patch_size": 8},
    "text_cfg": {"tower": "clip", "context_length": 16, "width": 256, "heads": 4, "layers": 4},
}


def planned(name: str, *, checkpointing: bool = False, lock: bool = False, **options: Any) -> Plan:
    model = create_model(name, device="meta")
    model.set_grad_checkpointing(checkpointing)
    if lock:
        model.lock_image_tower()
    return plan(model, **{"batch_size": 1024, "device": "cpu", **options})


@pytest.fixture(scope="module")
def small() -> Plan:
    return planned("ViT-tiny", batch_size=4096, world_size=4, micro_batch=64)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux only")
@pytest.mark.parametrize(
    ("model", "pairs", "micro_batch", "ranks", "options"),
    [
        ("align-tiny", 128, 128, 1, {}),  # BatchNorm, dropout, attention that the CPU stores
        ("RN-tiny", 512, 256, 1, {"grad_checkpointing": True}),  # gradient caching
        ("ViT-tiny", 512, 512, 1, {"precision": "bf16"}),
        ("wide", 16, 16, 1, {}),  # gradients are allocated while activations are freed
        ("wide", 32, 16, 2, {}),  # DDP's buckets and the gathered texts
        ("ViT-tiny", 1024, 128, 1, {"keep_graphs": 5}),  # graphs beside the loss and beside passes without a graph
        ("ViT-tiny", 512, 128, 1, {"keep_graphs": 4, "precision": "bf16"}),  # all graphs, each with casts of weights
    ],
)
def test_plan_is_what_a_step_takes(
    tmp_path: Path, model: str, pairs: int, micro_batch: int, ranks: int, options: dict[str, Any]
) -> None:
    """The plan is within the promised 15 % of the memory that fresh processes take on a CPU."""
    needs("models")
    if model == "wide":
        path = tmp_path / "wide.json"
        path.write_text(json.dumps(WIDE))
        model = str(path)
    words = {"model": model, "pairs": pairs, "micro_batch": micro_batch, **options}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, str(ROOT / "tests/support/measured_step.py"), json.dumps(words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found = planned(
        model,
        batch_size=pairs * ranks,
        world_size=ranks,
        micro_batch=micro_batch,
        checkpointing=options.get("grad_checkpointing", False),
        precision=options.get("precision", "fp32"),
        keep_graphs=options.get("keep_graphs", 0),
    )
    assert found.tensors / MIB == pytest.approx(float(done.stdout.split()[-1]), rel=0.15)


@pytest.mark.parametrize("lock", [False, True])
def test_states_are_of_the_models_parameters(lock: bool) -> None:
    model = create_model("RN-tiny", device="meta")
    if lock:
        model.lock_image_tower()
    found = plan(model, batch_size=64, micro_batch=32, ema=True, device="cpu")
    numbers = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (trained < numbers) == lock
    assert found.parameters == 4 * numbers + sum(x.numel() * x.element_size() for x in model.buffers())
    assert (found.gradients, found.optimizer_states, found.average) == (4 * trained, 8 * trained, 4 * trained)
    assert replace(found, optimizer="lamb").optimizer_states == 8 * trained
    gpu = plan(model, batch_size=2, ema=True, device="cuda", optimizer="lamb")  # the update takes more than two pairs
    assert gpu.tensors - gpu.held == 4 * trained + 8 * trained
    assert replace(gpu, optimizer="adamw").update == replace(found, optimizer="lamb").update == 0
    assert found.total - replace(found, ema=False).total == pytest.approx(4 * trained * 1.05, abs=1)


def test_fsdp_holds_a_share(small: Plan) -> None:
    whole, shards = replace(small, micro_batch=1024), replace(small, micro_batch=1024, parallel="fsdp")
    for part in ("parameters", "gradients", "optimizer_states"):
        assert getattr(shards, part) == pytest.approx(getattr(whole, part) / 4, abs=4)
    model = create_model("ViT-tiny", device="meta")
    block = sum(p.numel() for p in model.visual.blocks[0].parameters())
    texts = sum(p.numel() for p in model.text.token_embedding.parameters())
    assert 4 * (3 * block + 2 * texts) < shards.gathered < 4 * (3 * block + 2 * texts) + MIB
    # gradients stay whole until the last micro-batch
    assert replace(shards, micro_batch=64).gradients == whole.gradients
    assert replace(shards, world_size=1).parameters == whole.parameters


def test_ddp_has_buckets_beside_cached_gradients(small: Plan) -> None:
    assert small.buckets == small.gradients
    assert replace(small, micro_batch=1024).buckets == replace(small, world_size=1).buckets == 0


@pytest.mark.parametrize("name", ["ViT-tiny", "align-tiny"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_footprint_is_exact_for_other_batches(name: str, checkpointing: bool) -> None:
    """The footprint is exact for other batch sizes, whose memory peaks in other operations."""
    model = create_model(name, device="meta")
    model.set_grad_checkpointing(checkpointing)
    found = plan(model, batch_size=64, device="cpu").footprint
    assert model.config is not None
    for pairs in (2, 7, 300, 4096):
        run = traced._run(model, pairs, 32, model.config.text_cfg.context_length, "fp32", "cpu")
        assert found.peak(pairs) == max(live for live, _ in run.history)
        assert found.peak(pairs, 0.5) == max(live + arrived // 2 for live, arrived in run.history)
        assert found.kept(pairs) == run.between[0]
        run = traced._run(model, pairs, 32, model.config.text_cfg.context_length, "fp32", "cpu", grad=False)
        assert found.embedding_peak(pairs) == max(live for live, _ in run.history)


def test_moments_that_may_be_highest_are_kept() -> None:
    drawn = torch.randint(0, 100, (200, 3)) % torch.tensor([100, 100, 3])
    moments = [traced.Moment(*row) for row in drawn.tolist()]
    kept = traced._highest(moments)
    assert 3 < len(kept) < 60
    every, few = (traced.Footprint(tuple(m), moments[0], tuple, 1, 4) for m in (moments, kept))
    for pairs in (0.01, 0.3, 1, 5, 100):
        for share in (0, 1, 50):
            assert few.peak(pairs, share) == every.peak(pairs, share)


def test_footprint_of_one_layer_is_counted_by_hand() -> None:
    """The footprint of linear, ReLU, linear equals a count by hand: 4 bytes per element, including new gradients of
    weights but not the parameters.
    """

    class Tower(torch.nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.flatten(1).float())

    def tower(inputs: int) -> torch.nn.Module:
        return Tower(torch.nn.Linear(inputs, 10, bias=False), torch.nn.ReLU(), torch.nn.Linear(10, 5, bias=False))

    model = DualEncoder(tower(3 * 4 * 4), tower(7).requires_grad_(False))
    found = traced.footprint(model, image_size=4, context_length=7, device="cpu")
    assert (found.dim, found.feature_size) == (5, 4)
    # The result of ReLU for the images, and both features
    assert found.kept(1000) == 1000 * 4 * (10 + 5 + 5)
    # The result of ReLU, the gradients of its result and input, and one zero in place of the features' gradients
    assert found.peak(1000) == 1000 * 4 * ((5 + 5) + (10 + 10 + 10)) + 4
    assert found.peak(1) == 4 * (10 + 10 + 480) + 4  # the first weight's gradient, with that of its output
    assert found.peak(1, 1.0) == found.peak(1) + 4 * 50  # while the second weight's gradient exists


@pytest.mark.parametrize("options", [{}, {"parallel": "fsdp"}, {"comm": "ring"}, {"device": "cuda"}, {"world_size": 1}])
def test_largest_micro_batch_is_the_largest(small: Plan, options: dict[str, Any]) -> None:
    p = replace(small, **options)
    totals = [replace(p, micro_batch=k).total for k in range(1, p.pairs)]
    assert totals == sorted(totals)
    for memory in (totals[0], totals[1] - 1, totals[100] + 1, (totals[-1] + totals[-2]) // 2):
        largest = p.largest_micro_batch(memory)
        if largest == p.pairs:
            assert replace(p, micro_batch=largest).total <= memory
            continue
        assert totals[largest - 1] <= memory < totals[largest]
    assert p.largest_micro_batch(totals[0] - 1) == 0
    assert p.largest_micro_batch(totals[-1] * 2) == p.pairs


def test_largest_number_of_graphs_is_the_largest(small: Plan) -> None:
    alone = replace(small, batch_size=1024, world_size=1)  # 16 micro-batches of 64
    totals = [replace(alone, keep_graphs=k).total for k in range(17)]
    assert totals == sorted(totals) and totals[16] > totals[15] > totals[0]
    for graphs in (1, 7, 16):
        assert alone.largest_keep_graphs(totals[graphs]) == graphs
        assert alone.largest_keep_graphs(totals[graphs] - 1) < graphs
    assert alone.largest_keep_graphs(totals[0] - 1) == 0
    assert replace(alone, keep_graphs=99).total == totals[16]
    assert "of 7 of 16 micro-batches" in table(replace(alone, keep_graphs=7)) and "graphs" not in table(alone)
    assert small.micro_batches == 16 and small.largest_keep_graphs(1 << 50) == 15  # the last exchanges gradients
    assert replace(small, micro_batch=1024).largest_keep_graphs(1 << 50) == 0  # no gradient caching


def test_kept_graphs_are_beside_each_phase(small: Plan) -> None:
    def taken(graphs: int, *, forward: int, backward: int) -> float:
        """Return the MiB per pair if a graph takes 10 of them. The loss takes less than one."""
        peak, kept, embedding = (traced.Moment(0, size * MIB, 0) for size in (backward, 10, forward))
        found = traced.Footprint((peak,), kept, lambda: (embedding,), 256, 4)
        p = replace(small, batch_size=1024, world_size=1, footprint=found, keep_graphs=graphs)
        return (p.tensors - p.held) / (64 * MIB)

    assert taken(0, forward=9, backward=12) == 12
    assert taken(5, forward=9, backward=12) == 50 + 9  # a forward pass without a graph
    assert taken(5, forward=1, backward=12) == 40 + 12  # the pass backward of the first graph
    assert taken(16, forward=9, backward=12) == 150 + 12  # no micro-batch is embedded without a graph
    assert 50 < taken(5, forward=0, backward=10) < 51  # the loss


def test_loss_comes_before_a_second_pass_and_on_top_of_an_only_one(small: Plan) -> None:
    p = replace(small, batch_size=2**18, workspace_limit=8 * GIB, device="cuda")
    assert p.loss > p.activations and p.tensors - p.held == p.loss
    more = replace(p, micro_batch=2**15)
    assert more.activations > more.loss and more.tensors - more.held == more.activations
    whole = replace(p, micro_batch=p.pairs)
    assert whole.tensors - whole.held == whole.footprint.kept(p.pairs) + whole.loss > whole.activations


def test_pairs_are_those_of_the_largest_process(small: Plan) -> None:
    p = replace(small, batch_size=4097)
    assert p.pairs == 1025 and p.host == 1025 * (3 * 32 * 32 + 77 * 8)
    assert not replace(p, micro_batch=2000).cached and replace(p, micro_batch=2000).activations == p.footprint.peak(
        1025
    )


@pytest.mark.parametrize("comm", ["gather", "ring"])
def test_loss_is_that_of_the_scaling_model(comm: str) -> None:
    needs("train")
    from benchmarks.ranks import scaling_model

    p = planned("ViT-tiny", world_size=8, comm=comm, precision="bf16", device="cuda")
    for batch in (2**10, 2**17, 2**22):
        expected = scaling_model.memory(f"fastclip_{comm}", 8, batch, 64)
        assert replace(p, batch_size=batch).loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("prefixes", [(256,), (64, 256, 512), (512, 128, 32)])
def test_loss_of_prefixes_is_what_it_takes(prefixes: tuple[int, ...]) -> None:
    """The plan is within 10 % of the bytes that torch allocates for the loss beside the features' gradients."""
    N, D = 1024, 512
    for _ in range(2):  # the first time allocates the workspace
        leaves = [x.requires_grad_() for x in (torch.randn(N, D), torch.randn(N, D), torch.tensor(10.0))]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            torch.autograd.backward(matryoshka_loss(*leaves, prefixes=prefixes))
    live = list(accumulate(x.nbytes() for x in profile.profiler.kineto_results.events() if x.name() == "[memory]"))
    p = replace(planned("ViT-tiny", batch_size=N), footprint=traced.Footprint((), traced.Moment(0, 0, 0), tuple, D, 4))
    assert replace(p, prefixes=prefixes).loss == pytest.approx(max(live) - 2 * N * D * 4, rel=0.1)


def test_gathered_prefixes_are_kept(small: Plan) -> None:
    """Until the backward pass, all prefixes of the texts of all processes are in memory, and their statistics."""
    small = replace(small, world_size=4)
    one, two = (replace(small, prefixes=prefixes) for prefixes in ((64, 32), (64, 32, 16)))
    assert two.loss - one.loss == small.batch_size * (16 * 4 + 80)
    one, two = (replace(p, comm="ring") for p in (one, two))
    assert two.loss - one.loss == small.batch_size * 80  # a ring keeps none
    assert replace(one, prefixes=(32, 16)).loss < one.loss


def test_running_means_are_held(small: Plan) -> None:
    loss = GlobalContrastiveLoss(1000)
    taken = sum(x.nbytes for x in loss.state_dict().values())
    p = replace(small, samples=1000)
    assert p.means == taken == p.held - small.held and "running means" in table(p)
    assert small.means == 0 and "running means" not in table(small)


def test_workspace_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned("ViT-tiny", batch_size=16384).workspace == 64 * MIB
    assert planned("ViT-tiny", batch_size=16384, device="cuda").loss > 1024 * MIB
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "8")
    assert planned("ViT-tiny", batch_size=16384).workspace == 8 * MIB


def test_bf16_and_checkpointing_make_activations_smaller() -> None:
    plain, bf16 = planned("ViT-tiny"), planned("ViT-tiny", precision="bf16")
    assert 0.5 < bf16.activations / plain.activations < 0.65  # layer norms stay in fp32
    assert (bf16.footprint.feature_size, plain.footprint.feature_size) == (2, 4)
    assert planned("ViT-tiny", checkpointing=True).activations < 0.4 * plain.activations


def test_frozen_tower_keeps_nothing() -> None:
    """A frozen tower keeps no activations; ViT-tiny's text tower is about as large as its image tower."""
    both, one = planned("ViT-tiny"), planned("ViT-tiny", lock=True)
    assert 0.3 < one.footprint.kept(1024) / both.footprint.kept(1024) < 0.6


def test_gpu_stores_no_matrix_of_attention() -> None:
    """A GPU's kernels store no matrix of attention. The CPU stores it for BERT's dropout, in
    fp32 and with a mask of its size.
    """

    def kept(length: int, device: str) -> int:
        model = create_model("align-tiny", device="meta", context_length=length)
        return plan(model, batch_size=1024, device=device).footprint.kept(1024)

    for device, quadratic in (("cpu", True), ("cuda", False)):
        first, second, third = (kept(length, device) for length in (16, 40, 64))
        assert ((third - second) > 1.1 * (second - first)) == quadratic


def test_model_is_left_as_it_was() -> None:
    model = create_model("RN-tiny").eval()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    plan(model, batch_size=8)
    assert not model.training and all(p.grad is None for p in model.parameters())
    for name, x in model.state_dict().items():
        assert torch.equal(x, state[name]), name


def test_forked_process_can_train_after_a_plan() -> None:
    """A plan starts no thread of autograd, which a forked process could not use. The test runs in a new process, so
    that the plan's backward pass is the first.
    """
    code = """
import multiprocessing, torch
from fastclip import create_model
from fastclip.training import plan
plan(create_model("ViT-tiny", device="meta"), batch_size=8)
backward = torch.ones(1, requires_grad=True).sum().backward
child = multiprocessing.get_context("fork").Process(target=backward)
child.start()
child.join()
raise SystemExit(child.exitcode)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_model_of_other_operations_is_refused() -> None:
    model = create_model("ViT-tiny", device="meta")
    encode = model.text.forward
    model.text.forward = lambda ids: encode(ids) * 2 if len(ids) > 20 else encode(ids)
    with pytest.raises(ValueError, match="other operations for 32 pairs than for 16"):
        plan(model, batch_size=64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"keep_graphs": -1}, "keep_graphs must be at least 0, got -1"),
        ({"world_size": 100}, "a batch of 64 is too small for 100 processes"),
        ({"prefixes": (16, 65)}, r"prefixes must be distinct numbers from 1 to 64.*got \(16, 65\)"),
        ({"prefixes": (16, 16)}, "prefixes must be distinct"),
        ({"samples": -1}, "samples must be at least 0"),
        ({"precision": "fp16"}, "precision must be one of fp32, bf16, got 'fp16'"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, lamb"),
    ],
)
def test_options_that_no_run_can_have_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned("ViT-tiny", **{"batch_size": 64, **options})


def test_model_without_configuration_is_refused() -> None:
    model = create_model("ViT-tiny", device="meta")
    with pytest.raises(ValueError, match="the model has no configuration"):
        plan(DualEncoder(model.visual, model.text), batch_size=8)


def parts(printed: str) -> dict[str, float]:
    """Return GiB by the first words of the table's lines."""
    found = {}
    for line in printed.splitlines():
        name, size, unit, *_ = [*line.split(), "", "", ""]
        if unit in ("GiB", "MiB"):
            found[name] = float(size.replace(",", "")) / (1 if unit == "GiB" else 1024)
    return found


def test_command_plans_a_large_model(capsys: pytest.CaptureFixture[str]) -> None:
    words = "plan --model ViT-L-14 --batch-size 65536 --world-size 8 --memory 80"
    assert main(words.split()) == 0
    printed = capsys.readouterr().out
    found = parts(printed)
    assert "427.6 M" in printed and "micro-batch of 128," in printed
    assert "fastclip train chooses 128 and keeps 1 of 64 graphs: 98% of the pairs are" in printed
    assert found["parameters"] == found["gradients"] == pytest.approx(427.6e6 * 4 / GIB, abs=0.01)
    assert found["optimiser"] == pytest.approx(2 * found["parameters"], abs=0.01)
    assert 50 < found["activations"] < 60  # 0.43 GiB per pair without checkpointing
    assert found["total"] < 80
    assert len({line.index("GiB") for line in printed.splitlines()[2:9] if "GiB" in line}) == 1, "not aligned"


def test_command_says_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    words = "plan --model ViT-L-14 --batch-size 65536 --world-size 8 --memory 6"
    assert main(words.split()) == 1
    printed = capsys.readouterr().out
    assert "not even one pair at a time fits into 6.00 GiB" in printed
    assert "--parallel fsdp (" in printed and "--comm ring (" in printed
    assert main([*words.split(), "--parallel", "fsdp", "--comm", "ring", "--lock-image"]) == 0
    assert "To save memory" not in capsys.readouterr().out


def test_command_takes_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    words = "plan --model RN-tiny --batch-size 4096 --device cpu --optimizer lamb --ema --lock-text --precision bf16"
    words += " --grad-checkpointing --image-size 64 --context-length 20 --micro-batch 512 --memory 8"
    words += " --samples 30000 --prefixes 16 64"
    assert main(words.split()) == 0
    printed = capsys.readouterr().out
    told = ["LAMB: 2", "moving average", "64 x 64", "20 ids", "micro-batch of 512", "bf16 autocast", "a CPU"]
    assert all(words in printed for words in [*told, "of 30,000 samples"])
    assert main([*words.split(), "--memory", "0.8"]) == 1  # the largest micro-batch fits, the requested one does not
    assert "largest micro-batch in 819.2 MiB" in capsys.readouterr().out


def test_command_shows_what_a_run_chooses(capsys: pytest.CaptureFixture[str]) -> None:
    """The table is that of the choice, with and without given values; `choose` makes it for the run, too."""
    words = ["plan", "--model", "ViT-tiny", "--batch-size", "8192", "--device", "cpu", "--memory", "6"]
    p = planned("ViT-tiny", batch_size=8192)
    best = choose(p, 3 * GIB)
    large = choose(p, 3 * GIB, micro_batch=1024)
    assert best is not None and 0 < best.kept_graphs < best.micro_batches and large is not None
    for given, micro_batch, kept in (
        ("", best.micro_batch, f"of {best.kept_graphs} of {best.micro_batches} micro-batches"),
        ("--micro-batch 1024 --keep-graphs auto", 1024, f"of {large.kept_graphs} of 8 micro-batches"),
        ("--micro-batch 256 --keep-graphs 3", 256, "of 3 of 32 micro-batches"),
        ("--micro-batch 256 --keep-graphs 0", 256, None),
    ):
        assert main([*words, *given.split()]) == 0
        printed = capsys.readouterr().out
        assert f"of a micro-batch of {micro_batch:,}," in printed
        assert kept in printed if kept else "kept graphs" not in printed
        assert given.endswith(("3", "0")) or f"chooses {best.micro_batch} and keeps {best.kept_graphs} of" in printed
    with pytest.raises(SystemExit):
        main([*words, "--keep-graphs", "all"])
    assert "argument --keep-graphs: must be a number or auto, got 'all'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model ViT-tiny --batch-size 64 --memory 8 --keep-graphs -1", "keep_graphs must be at least 0, got -1"),
        ("--model ViT-tiny --batch-size 64 --memory 8 --tflops 0", "--tflops must be above 0 and at most 1e+09, got 0"),
        ("--model ViT-tiny --batch-size 64 --memory 8 --utilisation 29", "--utilisation must be above 0 and at most 1"),
        ("--model ViT-tiny --batch-size 64 --memory 8 --tokens 78", "--tokens must be from 1 to the context length 77"),
        ("--model ViT-L-41 --batch-size 64 --memory 8", "no model is called 'ViT-L-41': did you mean"),
        ("--model ViT-tiny --batch-size 64 --memory 0", "--memory must be above 0 GiB"),
        ("--model ViT-tiny --batch-size 64 --memory inf", "--memory must be above 0 GiB"),
        ("--model ViT-tiny --batch-size 64 --memory 8 --lock-image --lock-text", "leave nothing to train"),
        ("--model ViT-tiny --batch-size 4 --world-size 8 --memory 8", "a batch of 4 is too small for 8 processes"),
    ],
)
def test_command_says_what_is_wrong(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words.split()]) == 1
    assert message in capsys.readouterr().err


def test_memory_is_the_machines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["plan", "--model", "ViT-tiny", "--batch-size", "64"]) == 1
    assert "torch sees no GPU here" in capsys.readouterr().err
    assert main(["plan", "--model", "ViT-tiny", "--batch-size", "64", "--device", "cpu"]) == 0
    assert "no gradient caching" in capsys.readouterr().out
