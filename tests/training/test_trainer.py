"""A run from its options to the saved model, in this process and from the command line."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastclip.parity.promised import LOSS
from support import needs
from support.processes import start

needs("train")
from fastclip.data.spec import open_source
from fastclip.models import create_model, load_image_transform
from fastclip.training import Run, TrainOptions, train
from fastclip.training.options import read_options
from fastclip.training.run.checkpoints import read_state
from support.digits_run import digits_run
from support.faulty import write_folder

B = 24
METRICS = {
    *("step", "loss", "lr", "logit_scale", "grad_norm", "image_top1", "text_top1"),
    *("skipped", "epoch", "samples_per_second", "data_wait"),
}


def options(folder: Path, **changed: Any) -> TrainOptions:
    return digits_run(folder, **{"batch_size": B, "max_steps": 4, **changed})


def lines(run: Run) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def saved(run: Run) -> dict[str, torch.Tensor]:
    return create_model(pretrained=run.folder / "model").state_dict()


def assert_same_model(one: Run, other: Run) -> None:
    ours, theirs = saved(one), saved(other)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert torch.equal(x, theirs[name]), name


def assert_near(ours: list[float], theirs: list[float], rel: float = LOSS) -> None:
    assert len(ours) == len(theirs) > 0
    for step, (a, b) in enumerate(zip(ours, theirs)):
        assert abs(a - b) <= rel * abs(b), f"loss of step {step}: {a} and {b}, {abs(a - b) / abs(b):.1e} apart"


def test_run_leaves_all_its_files(tmp_path: Path) -> None:
    run = train(options(tmp_path, val_data="digits", val_every=2, save_every=3))
    assert run.steps == len(run.losses) == 4 and run.folder == tmp_path and run.backend == "cpu"
    steps = [line for line in lines(run) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4] and [line["loss"] for line in steps] == run.losses
    assert all(line.keys() == METRICS for line in steps)
    validations = [line for line in lines(run) if "loss" not in line]
    assert [line["step"] for line in validations] == [2, 4]
    assert {f"val/{k}": v for k, v in run.validation.items()} == {
        k: v for k, v in validations[1].items() if k != "step"
    }
    assert 0 <= run.validation["zero_shot_top1"] <= 1
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]
    events = list((tmp_path / "tensorboard").iterdir())
    assert len(events) == 1 and b"train/loss" in events[0].read_bytes() and b"val/" in events[0].read_bytes()
    found = read_options(tmp_path / "config.yaml")
    assert (found.optimizer, found.lr, found.max_steps, found.warmup) == ("adamw", 5e-4, 4, 0)
    assert (found.micro_batch, found.keep_graphs) == (B, "auto")
    by_model = ("optimizer", "lr", "warmup", "weight_decay", "label_smoothing", "micro_batch")
    assert found == dataclasses.replace(
        options(tmp_path, val_data="digits", val_every=2, save_every=3),
        **{name: getattr(found, name) for name in by_model},
    )


def test_saved_model_is_the_one_that_was_validated(tmp_path: Path) -> None:
    from fastclip.evaluation.validate import validate
    from fastclip.models import get_tokenizer

    run = train(options(tmp_path, val_data="digits", max_steps=12, lr=1e-3, ema=0.9))
    model = create_model(pretrained=tmp_path / "model").eval()
    name = str(tmp_path / "model")
    again = validate(model, open_source("digits", held_out=True), load_image_transform(name), get_tokenizer(name))
    assert again == run.validation


def test_run_repeats_bit_by_bit(tmp_path: Path) -> None:
    """A run repeats bit by bit, including dropout. The order of samples and their augmentation do not depend on the
    workers.
    """
    small = {"model": "align-tiny", "context_length": None, "loss": None, "max_steps": 3}
    first = train(options(tmp_path / "a", **small))
    torch.randn(7)
    again = train(options(tmp_path / "b", workers=2, **small))
    assert first.losses == again.losses
    assert_same_model(first, again)
    assert train(options(tmp_path / "c", seed=1, **small)).losses != first.losses


@pytest.mark.parametrize("how", [{"micro_batch": 7}, {"grad_checkpointing": True}, {"micro_batch": 5, "workers": 1}])
def test_run_with_less_memory_has_the_same_losses(tmp_path: Path, how: dict[str, Any]) -> None:
    plain = train(options(tmp_path / "a", max_steps=6))
    assert_near(train(options(tmp_path / "b", max_steps=6, **how)).losses, plain.losses)


@pytest.mark.parametrize("loss", ["clip", "unicl", "align", "convirt", "siglip"])
def test_steps_agree_with_the_dense_loss(tmp_path: Path, loss: str) -> None:
    """Steps agree with the dense loss of the reference backend. test_hundred_steps.py has a hundred of them."""
    changed = {"loss": loss, "max_steps": 30, "lr": 3e-4, "batch_size": 16}
    fused, dense = (train(options(tmp_path / b, backend=b, **changed)) for b in ("cpu", "reference"))
    assert (fused.backend, dense.backend) == ("cpu", "reference")
    assert fused.losses[-1] < fused.losses[0]
    assert_near(fused.losses, dense.losses)


def test_prefixes_are_trained(tmp_path: Path) -> None:
    """The loss is the sum of the losses of both prefixes, and both change the weights."""
    chosen = {"a": (64,), "b": (8,), "c": (8, 64), "d": None}
    runs = {name: train(options(tmp_path / name, prefixes=prefixes, warmup=0)) for name, prefixes in chosen.items()}
    first = {name: run.losses[0] for name, run in runs.items()}
    assert first["c"] == pytest.approx(first["a"] + first["b"], rel=1e-6) and abs(first["a"] - first["b"]) > 0.01
    assert_near(runs["a"].losses, runs["d"].losses)  # all 64 features
    assert runs["c"].losses[-1] != pytest.approx(runs["a"].losses[-1] + runs["b"].losses[-1], rel=1e-4)
    assert read_options(tmp_path / "c" / "config.yaml").prefixes == (8, 64)


def test_models_have_their_authors_recipe(tmp_path: Path) -> None:
    run = train(options(tmp_path, model="align-tiny", loss=None, context_length=None, max_steps=2))
    found = read_options(tmp_path / "config.yaml")
    assert (found.loss, found.optimizer, found.label_smoothing, found.weight_decay) == ("align", "lamb", 0.1, 1e-5)
    assert found.lr == 1e-3 and len(run.losses) == 2


@pytest.mark.fault(
    "A run is stopped in the middle of an epoch and resumed with another number of workers",
    "Losses and metrics are those of a run that never stopped, bit for bit",
)
def test_resumed_run_is_the_run_that_never_stopped(tmp_path: Path) -> None:
    data = str(write_folder(tmp_path / "data", 72))  # three and a half batches, so that it stops in the second epoch
    changed = {
        "data": data,
        "batch_size": 20,
        "max_steps": 9,
        "ema": 0.9,
        "model": "align-tiny",
        "context_length": None,
    }
    whole = train(options(tmp_path / "a", **changed))
    begun = train(options(tmp_path / "b", stop_after=4, **changed))
    assert begun.steps == 4 and not (tmp_path / "b" / "model").exists()
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:  # as if it had died later
        file.write('{"step": 5, "loss": 1e9}\n{"step": 6, "lo')
    rest = train(options(tmp_path / "b", resume="auto", workers=1, log_every=1, **changed))
    assert rest.steps == 9 and begun.losses + rest.losses == whole.losses
    assert_same_model(rest, whole)
    timeless = [
        [{k: v for k, v in x.items() if k not in ("samples_per_second", "data_wait", "mfu")} for x in lines(r)]
        for r in (whole, rest)
    ]
    assert timeless[0] == timeless[1]
    elsewhere = train(options(tmp_path / "c", resume=str(tmp_path / "b" / "checkpoints" / "step-00000004"), **changed))
    assert elsewhere.losses == rest.losses


@pytest.mark.fault(
    "A run is resumed with other options", "The changed options are named first. Another model or optimiser is refused"
)
def test_resume_names_what_changed_and_what_does_not_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(options(tmp_path / "a", stop_after=2))
    with pytest.raises(ValueError, match="holds a run: --resume auto"):
        train(options(tmp_path / "a"))
    train(options(tmp_path / "a", resume="auto", lr=1e-3, stop_after=1))
    assert "--lr was 0.0005 and is now 0.001" in caplog.text and "--batch-size" not in caplog.text
    with pytest.raises(ValueError, match=r"belongs to another model: .*differ"):
        train(options(tmp_path / "b", resume=str(tmp_path / "a"), model="RN-tiny"))
    assert "--model was ViT-tiny and is now RN-tiny" in caplog.text  # reported before loading fails
    with pytest.raises(ValueError, match="optimiser"):
        train(options(tmp_path / "b", resume=str(tmp_path / "a"), optimizer="lamb"))
    with pytest.raises(ValueError, match="without --ema"):
        train(options(tmp_path / "b", resume=str(tmp_path / "a"), ema=0.9))
    with pytest.raises(ValueError, match="nothing is left"):
        train(options(tmp_path / "b", resume=str(tmp_path / "a"), max_steps=3))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        train(options(tmp_path / "b", resume=str(tmp_path / "nowhere")))
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        train(options(tmp_path / "b", resume=str(tmp_path)))
    # there is no run yet, so a new one starts
    assert len(train(options(tmp_path / "c", resume="auto", max_steps=1)).losses) == 1


@pytest.mark.fault(
    "A run resumes in a folder that contains another run",
    "Nothing is mixed or lost: the files of the other run are renamed to `aside-...`",
)
def test_run_that_goes_on_elsewhere_does_not_mix_with_what_is_there(tmp_path: Path) -> None:
    train(options(tmp_path / "a", stop_after=2))
    train(options(tmp_path / "b", seed=1, max_steps=3))
    there = (tmp_path / "b" / "metrics.jsonl").read_bytes()
    read_only = shutil.copytree(tmp_path / "a", tmp_path / "copy") / "checkpoints" / "step-00000002"
    for path in (*read_only.iterdir(), read_only):
        path.chmod(0o555 if path.is_dir() else 0o444)
    run = train(options(tmp_path / "b", resume=str(read_only), stop_after=1))
    assert run.steps == 3 and [line["step"] for line in lines(run)] == [3]
    left = {path.relative_to(tmp_path / "b").as_posix() for path in (tmp_path / "b").glob("**/aside-*")}
    assert left == {"aside-metrics.jsonl", "aside-tensorboard", "aside-model", "checkpoints/aside-step-00000003"}
    assert (tmp_path / "b" / "aside-metrics.jsonl").read_bytes() == there
    train(options(tmp_path / "b", resume=str(read_only), stop_after=2))
    assert (tmp_path / "b" / "aside-metrics.jsonl").read_bytes() == there  # later files get other names


def test_resumed_run_has_the_optimisers_options_it_is_given(tmp_path: Path) -> None:
    train(options(tmp_path, stop_after=1))
    train(options(tmp_path, resume="auto", stop_after=1, weight_decay=0.7, betas=(0.5, 0.75), eps=1e-3))
    groups = read_state(tmp_path / "checkpoints" / "step-00000002")["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.7, 0.0}
    assert all(group["betas"] == [0.5, 0.75] and group["eps"] == 1e-3 for group in groups)


def test_checkpoint_holds_no_pickle_and_says_what_it_is(tmp_path: Path) -> None:
    train(options(tmp_path, max_steps=1))
    path = tmp_path / "checkpoints" / "step-00000001"
    names = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert sorted(file.name for file in path.iterdir()) == names
    state = read_state(path)
    assert state["step"] == 1 and state["options"]["data"] == "digits" and state["param_groups"]


@pytest.mark.parametrize("tower", ["visual", "text"])
def test_locked_tower_stays_as_it_was(tmp_path: Path, tower: str) -> None:
    lock = {"visual": {"lock_image": True}, "text": {"lock_text": True}}[tower]
    torch.manual_seed(0)
    before = create_model("RN-tiny", context_length=16).state_dict()
    after = saved(train(options(tmp_path, model="RN-tiny", max_steps=2, micro_batch=8, **lock)))
    moved = {name for name, x in after.items() if not torch.equal(x, before[name])}
    assert moved and not any(name.startswith(tower + ".") for name in moved)


def test_average_is_what_is_saved(tmp_path: Path) -> None:
    averaged, plain = (train(options(tmp_path / str(ema), ema=ema)) for ema in (0.5, None))
    assert averaged.losses == plain.losses
    a, b = saved(averaged), saved(plain)
    name = "visual.head.weight"
    assert 0 < float((a[name] - b[name]).norm()) < 0.1 * float(b[name].norm())


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    plain, rounded = (train(options(tmp_path / p, precision=p, max_steps=8)) for p in ("fp32", "bf16"))
    assert_near(rounded.losses, plain.losses, 2e-2)
    assert rounded.losses != plain.losses


def test_batch_larger_than_the_data_warns_once_where_repeats_are_negatives(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = str(write_folder(tmp_path / "data", 25))
    changed = {"data": data, "batch_size": 30, "micro_batch": 10, "model": "align-tiny", "context_length": None}
    train(options(tmp_path / "a", max_steps=2, loss="clip", **changed))
    assert [r.levelno for r in caplog.records if "repeats some" in r.message] == [logging.WARNING]
    caplog.clear()
    run = train(options(tmp_path / "b", max_steps=1, **changed))
    assert "repeats some" not in caplog.text
    assert lines(run)[0]["epoch"] == 0


def test_options_that_fit_nothing_here_are_refused(tmp_path: Path) -> None:
    for changed, message in (
        ({"model": "ViT-tinny"}, "did you mean 'ViT-tiny'"),
        ({"data": "nowhere.csv"}, r"nowhere\.csv"),
        ({"backend": "abacus"}, "'abacus' is unknown"),
        ({"features_on": "cpu", "micro_batch": B}, "requires gradient caching: set --micro-batch"),
        ({"loss": "siglip", "label_smoothing": 0.1}, "no label smoothing"),
        ({"prefixes": (16, 65)}, "--prefixes must be at most 64, the length of the features of ViT-tiny, got 65"),
        ({"pretrained": "nowhere.pt"}, r"nowhere\.pt"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            train(options(tmp_path / "a", **changed))
    assert not (tmp_path / "a").exists()  # the folder is created only when the run can start
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda needs a GPU"):
            train(options(tmp_path / "a", device="cuda"))


def test_weights_and_biases_gets_the_metrics_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Process:
        def log(self, values: dict[str, float], step: int) -> None:
            told.append((step, values["loss"]))

        def finish(self) -> None:
            told.append("finished")

    def init(**settings: Any) -> Process:
        told.append((settings["project"], settings["name"], settings["config"]["batch_size"]))
        return Process()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    run = train(options(tmp_path / "mine", max_steps=2, wandb="our-project"))
    assert told == [("our-project", "mine", B), (1, run.losses[0]), (2, run.losses[1]), "finished"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        train(options(tmp_path / "other", wandb="our-project"))


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    call = "import sys; from fastclip.cli import main; sys.exit(main())"
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTCLIP_BACKEND")}
    return subprocess.run(
        [sys.executable, "-c", call, *words],
        env={**kept, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_command_trains_and_says_how_it_went(tmp_path: Path) -> None:
    words = ["--data", "digits", "--val-data", "digits", "--model", "ViT-tiny", "--context-length", "16"]
    done = command("train", *words, "--batch-size", "32", "--max-steps", "3", "--output", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "3 steps" in done.stdout and "zero_shot_top1" in done.stdout and "'cpu'" in done.stdout
    # whole lines, because stderr is not a terminal
    assert "step 3 of 3: loss" in done.stderr and "\r" not in done.stderr
    assert "Traceback" not in done.stderr
    again = command("train", "--config", str(tmp_path / "run" / "config.yaml"), "--output", str(tmp_path / "again"))
    assert again.returncode == 0, again.stderr
    metrics = [(tmp_path / name / "metrics.jsonl").read_text().splitlines()[2] for name in ("run", "again")]
    assert json.loads(metrics[0])["loss"] == json.loads(metrics[1])["loss"]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals")
def test_command_shows_a_bar_on_a_terminal(tmp_path: Path) -> None:
    import fcntl
    import struct
    import termios

    ours, its = os.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # rows, columns
    call = "import sys; from fastclip.cli import main; sys.exit(main())"
    words = ["train", "--data", "digits", "--model", "ViT-tiny", "--context-length", "16", "--workers", "0"]
    words += ["--batch-size", "16", "--max-steps", "2", "--output", str(tmp_path / "run")]
    process = start([sys.executable, "-c", call, *words], stdout=subprocess.DEVNULL, stderr=its)
    os.close(its)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # on Linux: the other end is closed
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 0, shown
    assert b"2/2" in shown and b"loss=" in shown and b"step 2 of 2" not in shown


def test_command_that_fails_says_why_in_a_line(tmp_path: Path) -> None:
    done = command("train", "--data", "nowhere", "--model", "ViT-tiny", "--output", str(tmp_path / "run"))
    assert done.returncode == 1
    assert done.stderr.startswith("fastclip train: ") and "nowhere" in done.stderr and "Traceback" not in done.stderr
    assert command("convert", "a", "b", "--to", "fastclip", "--tp", "3").returncode == 2
