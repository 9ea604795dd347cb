"""`fastclip parity` as a user runs it: every available combination is compared, and a wrong loss is reported."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastclip
from fastclip import parity
from fastclip.cli import main
from fastclip.parity import promised
from fastclip.parity.truth import direction
from support import ROOT

SMALL = ("--batch", "6", "--dim", "8", "--device", "cpu")
FORMS = ("gather", "ring", "gather, equal_shards", "ring, equal_shards")
CASES = {
    "plain",
    "labels, M != N",
    "label_smoothing, image_weight",
    "exclude_self",
    "reduction=sum",
    "reduction=none",
    "normalize=False",
    "sigmoid",
}
UNEQUAL = {"unequal shards", "labels, unequal shards", "sigmoid, unequal shards"}
BROKEN = """
import glob, sys
from fastclip.parity import compare

real = compare.contrastive_loss


def broken(image, text, scale, **options):
    if options["comm"] == "ring":  # every text's gradient twice
        return real(image, text + (text - text.detach()), scale, **options)
    loss = real(image, text, scale, **options)
    return loss / 2 if options.get("reduction") != "none" else loss  # the share of a rank, not W times it


compare.contrastive_loss = broken
if __name__ == "__main__":
    from fastclip.cli import main

    status = main(sys.argv[1:])
    threads = [open(path).read().strip() for path in glob.glob("/proc/self/task/*/comm")]
    # in one piece, because another process writes too
    sys.stderr.write(f"{threads.count('pt_gloo_runloop')} threads of gloo are left\\n")
    sys.exit(status)
"""


def command(*args: str) -> subprocess.CompletedProcess[str]:
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    kept = {k: v for k, v in os.environ.items() if k not in {"TRITON_INTERPRET", "FASTCLIP_BACKEND", *launcher}}
    return subprocess.run([sys.executable, *args], env=kept, capture_output=True, text=True, timeout=300)


def rows(printed: str) -> list[list[str]]:
    """Return the cells of the table's lines: form, backend, dtype, case, error/promised of each column, ok or FAIL."""
    lines = [re.split(r"\s{2,}", line) for line in printed.splitlines()]
    return [line for line in lines if len(line) > 8 and line[0] != "form"]


def test_parity_compares_everything_that_runs_here() -> None:
    done = command(str(Path(sys.executable).with_name("fastclip")), "parity", "--nproc", "2", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    table = rows(done.stdout)
    assert done.stdout.endswith(f"\n{len(table)} comparisons, 0 failed\n")
    assert all(row[-1] == "ok" for row in table)
    found = {tuple(row[:4]) for row in table}
    assert len(found) == len(table)

    served = {"reference": ("float64", "float32", "bfloat16", "float16"), "cpu": ("float32", "bfloat16", "float16")}
    if fastclip.backends()["cpu"] != "available":
        del served["cpu"]
    expected = {
        (form, backend, dtype, case)
        for form in FORMS
        for backend, dtypes in served.items()
        for dtype in dtypes
        for case in CASES | (UNEQUAL if "equal_shards" not in form else set())
    }
    assert expected <= found
    others = {row[0] for row in found - expected}
    assert others == {"ClipLoss"} | ({"open_clip's ClipLoss"} if importlib.util.find_spec("open_clip") else set())
    columns = {row[3]: len(row) for row in table}  # the sigmoid losses also have a bias
    assert {case for case, count in columns.items() if count == 10} == {case for case in columns if "sigmoid" in case}


def test_parity_finds_a_broken_loss_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script))
    done = command(*launch, "parity", "--backend", "reference", *SMALL)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"\n{done.stderr}".count("\n0 threads of gloo are left") == 2  # open_clip's ClipLoss was compared
    table = {tuple(row[:4]): row for row in rows(done.stdout)}
    assert len(table) > 100  # one rank prints the whole table
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        *_, loss, d_image, d_text, d_scale, verdict = table["gather", "reference", dtype, "plain"]
        assert [float(cell.split("/")[0]) for cell in (loss, d_image, d_text, d_scale)] == pytest.approx(
            [0.5] * 4, 0.01
        )
        assert verdict == "FAIL"
        *_, loss, d_image, d_text, d_scale, verdict = table["ring", "reference", dtype, "plain"]
        exceeds = [
            float(error) > float(promised) for error, promised in (x.split("/") for x in (loss, d_image, d_text))
        ]
        assert exceeds == [False, False, True] and verdict == "FAIL"
        assert table["gather", "reference", dtype, "sigmoid"][-1] == "ok"
        assert table["gather", "reference", dtype, "reduction=none"][-1] == "ok"


@pytest.mark.parametrize(("error", "raised", "status"), [(0.5, "", 0), (2.0, "", 1), (float("nan"), "E: why", 1)])
def test_status_is_whether_a_row_failed(
    error: float, raised: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = parity.Row(
        "ring", "cpu", "float32", "plain", {"loss": error, "d_image": 0.0}, {"loss": 1.0, "d_image": 1.0}, raised
    )
    monkeypatch.setattr(parity, "run", lambda **options: parity.Report("about", [row]))
    assert main(["parity"]) == status
    printed = capsys.readouterr().out
    assert ("FAIL" in printed) == bool(status) and raised in printed and f"1 comparisons, {status} failed" in printed


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--batch 1", "--batch must be at least 4, got 1"),
        ("--dim 1", "--dim must be at least 2, got 1"),
        ("--nproc 0", "--nproc must be at least 1, got 0"),
        ("--nproc -1", "--nproc must be at least 1, got -1"),
        ("--backend fast", "backend='fast' is unknown"),
        ("--nproc 1000 --device cuda", f"a GPU for each of 1000 processes, torch sees {torch.cuda.device_count()}"),
    ],
)
def test_what_the_user_can_mend_is_said(args: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", *args.split()]) == 1
    told = capsys.readouterr()
    assert told.err.startswith("fastclip parity: ") and message in told.err and not told.out


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "--nproc is 3, but the launcher started 2 processes"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK must be a number, got 'first'"),
    ],
)
def test_launcher_that_does_not_fit_is_said(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["parity", "--nproc", "3"]) == 1
    assert message in capsys.readouterr().err


def test_truth_is_apart_from_the_losses() -> None:
    folder = ROOT / "fastclip" / "parity"
    assert "from fastclip" not in (folder / "promised.py").read_text()
    lines = re.findall(r"^ *(?:from|import) fastclip.*", (folder / "truth.py").read_text(), re.MULTILINE)
    assert lines == ["from fastclip.parity import promised"]


def test_promised_errors_are_those_of_the_documentation() -> None:
    page = (ROOT / "docs" / "promises.md").read_text()
    match = re.search(r"The loss is within (\S+) of float64, gradients within (\S+) ", page)
    assert match is not None
    assert (float(match[1]), float(match[2])) == (promised.LOSS, promised.FP32_GRADIENT)


def test_truth_keeps_the_digits_of_float64() -> None:
    """The truth keeps its digits for a row whose negatives are 30 above its positive; torch's softplus is linear from
    20 on.
    """
    z = torch.tensor([[0.0, 30.0], [-1.0, 0.0]], dtype=torch.float64)
    rows = direction(z, torch.eye(2, dtype=torch.bool), 0.0, torch.zeros(2, 2, dtype=torch.bool))
    assert rows.tolist() == pytest.approx([30 + math.log1p(math.exp(-30)), math.log1p(math.exp(-1))], rel=1e-15, abs=0)
