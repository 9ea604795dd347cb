"""The options of `fastclip train`: command line, YAML, refused values."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest

from support import needs

needs("train")

from fastclip.training.options import TrainOptions, flag, parse_options, read_options, write_options

LEAST = ["--data", "digits", "--model", "ViT-tiny", "--output", "runs/x"]


def test_options_of_a_command_line() -> None:
    options = parse_options([*LEAST, "--batch-size", "1024", "--betas", "0.9", "0.95", "--compile", "--loss", "unicl"])
    assert parse_options([*LEAST, "--prefixes", "64", "128", "--seed", "3"]).prefixes == (64, 128)
    assert options == TrainOptions(
        data="digits",
        model="ViT-tiny",
        output="runs/x",
        batch_size=1024,
        betas=(0.9, 0.95),
        compile=True,
        loss="unicl",
    )
    assert parse_options([*LEAST, "--max-grad-norm", "None"]).max_grad_norm is None


def test_options_of_files_yield_to_later_files_and_to_the_command_line(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("data: digits\nmodel: RN-tiny\nbatch-size: 32\nlr: 1e-3\ncompile: true\nema: null\n")
    second.write_text("model: ViT-tiny\nbetas: [0.8, 0.9]\n")
    options = parse_options([f"--config={first}", "--output", "x", "--config", str(second), "--batch-size", "8"])
    assert (options.data, options.model, options.batch_size, options.lr) == ("digits", "ViT-tiny", 8, 1e-3)
    assert options.betas == (0.8, 0.9) and options.compile and options.ema is None
    assert not parse_options([*LEAST, "--config", str(first), "--no-compile"]).compile


def test_options_survive_their_file(tmp_path: Path) -> None:
    options = TrainOptions(
        data="a b/{00..03}.tar",
        model="ViT-tiny",
        output="x",
        val_data="null",
        max_grad_norm=None,
        keep=None,
        betas=(0.5, 0.75),
        eps=1e-12,
        prefixes=(64, 16),
        lock_text=True,
    )
    write_options(options, tmp_path / "config.yaml")
    assert read_options(tmp_path / "config.yaml") == options


def test_files_leave_out_what_is_of_one_call_and_epochs_replace_their_steps(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    write_options(TrainOptions(*LEAST[1::2], max_steps=70, warmup=7, resume="auto", stop_after=3), file)
    options = read_options(file)
    assert (options.max_steps, options.warmup, options.resume, options.stop_after) == (70, 7, None, None)
    options = parse_options(["--config", str(file), "--epochs", "5"])
    assert (options.epochs, options.max_steps, options.warmup) == (5, None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_sise: 3", "no option batch_sise: did you mean batch_size"),
        ("- batch_size", "must hold names and values"),
        ("batch_size: [", "is not YAML"),
        ("lr: 1e-3\nlr: 2e-3", "lr is given twice"),
        ("max-steps: 3\nmax_steps: 4", "max_steps is given twice"),
        ("compile: true\n'compile': false", "compile is given twice"),
        ("data: {a: b}", r"data must be a value or a list, got {'a': 'b'}"),
    ],
)
def test_file_that_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        parse_options([*LEAST, "--config", str(file)])
    assert str(file) in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        parse_options(["--config", str(tmp_path / "none.yaml")])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("batch_size", 0),
            ("micro_batch", 0),
            ("micro_batch", "all"),
            ("keep_graphs", "Auto"),
            ("epochs", -1),
            ("max_steps", 0),
            ("stop_after", 0),
        ),
        *(("log_every", 0), ("save_every", 0), ("workers", -1), ("warmup", -1), ("lr", 0.0), ("lr", float("nan"))),
        *(
            ("max_grad_norm", -1.0),
            ("ema", 1.5),
            ("keep", 0),
            ("timeout", 0.0),
            ("label_smoothing", -0.1),
            ("image_weight", 2.0),
            *(("gamma", 0.0), ("gamma", 1.5), ("rho", -1.0), ("rho", math.nan), ("temperature", 0.001)),
            ("betas", (0.9, 1.0)),
            *(("prefixes", ()), ("prefixes", (0, 8)), ("prefixes", (8, 8))),
            *(("ema", 1.0), ("lr", math.inf), ("weight_decay", math.inf), ("weight_decay", math.nan)),
            *(("timeout", math.inf), ("timeout", 1e30), ("timeout", math.nan)),
            ("seed", 2**63),
            *((name, "") for name in ("data", "output", "val_data", "pretrained", "resume", "wandb", "backend")),
        ),
    ],
)
def test_values_that_no_run_can_have_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=flag(name)):
        TrainOptions(**{"data": "digits", "model": "ViT-tiny", "output": "x", name: value})


def test_options_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        TrainOptions(data="digits", model="ViT-tiny", output="x", lock_image=True, lock_text=True)
    with pytest.raises(ValueError, match="--val-every needs --val-data"):
        TrainOptions(data="digits", model="ViT-tiny", output="x", val_every=10)


def test_help_names_every_option_and_loads_no_torch() -> None:
    code = (
        "import sys, fastclip.cli\n"
        "try: fastclip.cli.main(['train', '--help'])\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.strip() == "False", done.stderr
    for field in dataclasses.fields(TrainOptions):
        assert f"{flag(field.name)} " in done.stdout or f"{flag(field.name)}," in done.stdout, field.name
    documented = [line for line in done.stdout.split("│ --")[1:] if len(line.split()) < 4]
    assert not documented, documented  # every option has a help text


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--batch-sise", "3"], "--batch-size"), (["--loss", "bla"], "clip"), (["--batch-size", "x"], "batch-size")],
)
def test_command_line_that_is_wrong_ends_with_status_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_options([*LEAST, *words])
    assert ended.value.code == 2 and message in capsys.readouterr().err
