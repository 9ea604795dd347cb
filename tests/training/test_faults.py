"""Training on faulty data: what is counted and shown, and when a run stops."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from support import needs
from support.faulty import HTML, picture, write_folder
from support.processes import join_group

needs("train")

from fastclip import cli
from fastclip.data.batch import Batch
from fastclip.data.faults import Fault
from fastclip.data.loading.order import Order
from fastclip.data.sources.folder import Folder
from fastclip.training import TrainOptions, train
from fastclip.training.ranks import World
from fastclip.training.run.skipped import Skipped, too_many

CPU = torch.device("cpu")
BAD = [(HTML, b"x"), (picture(), None), (HTML, b"y"), (picture(), b" ")]


def options(data: Path, folder: Path, **changed: Any) -> TrainOptions:
    values: dict[str, Any] = {
        "data": str(data),
        "model": "ViT-tiny",
        "output": str(folder),
        "context_length": 16,
        "batch_size": 6,
        "max_steps": 8,
        "workers": 0,
        "max_bad": 0.2,
    }
    return TrainOptions(**{**values, **changed})


def counts(folder: Path) -> list[int]:
    return [json.loads(line)["skipped"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.fault("Some samples cannot be used", "The log counts them by cause, and the metrics have their number")
def test_skipped_samples_are_counted_by_cause_and_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Skipped samples are counted by cause: 4 of 24 are bad, in two epochs of four steps."""
    data = write_folder(tmp_path / "data", 20, BAD)
    caplog.set_level(logging.INFO)
    run = train(options(data, tmp_path / "run"))
    found = counts(run.folder)
    assert found == sorted(found) and found[3] == 4 and found[7] == 8
    shown = [record.getMessage() for record in caplog.records if record.getMessage().startswith("skipped ")]
    assert sorted(re.sub(r" sample .* (\(.*\)): .*", r" \1", line) for line in shown) == [
        "skipped (empty caption)",
        "skipped (no caption)",
        "skipped (not an image)",
    ]
    missing = "it has no caption: 021.txt or 021.json must be in the same folder"
    assert f"{data}/021.png (no caption): {missing}" in caplog.text
    assert "8 of 48 samples drawn (16.67%) cannot be used: 4 not an image (" in caplog.text
    assert train(options(data, tmp_path / "again", workers=2)).losses == run.losses


def test_largest_picture_is_an_option(tmp_path: Path) -> None:
    """--max-pixels limits the size of images during the run and leaves Pillow's limit unchanged afterwards."""
    data = write_folder(tmp_path / "data", 8)
    before = PIL.Image.MAX_IMAGE_PIXELS
    with pytest.raises(ValueError, match=r"more than 10|larger than 10|too large"):
        train(options(data, tmp_path / "run", max_pixels=10))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        train(options(data, tmp_path / "other", max_pixels=0))
    assert before == PIL.Image.MAX_IMAGE_PIXELS


@pytest.mark.fault(
    "A validation fails",
    "The run ends with the error. The checkpoint of this step is kept, and a resume repeats the validation",
)
def test_failed_validation_loses_no_step(tmp_path: Path) -> None:
    data, unusable = write_folder(tmp_path / "data", 8), write_folder(tmp_path / "unusable", 0, [(HTML, b"x")] * 3)

    def run(name: str, **changed: Any) -> Any:
        common: dict[str, Any] = {"val_every": 2, "save_every": 4, "max_steps": 4, "val_data": str(data)}
        return train(options(data, tmp_path / name, **common | changed))

    whole = run("whole")
    for every, last in ((4, 4), (2, 2)):
        name = f"run {every}"
        with pytest.raises(ValueError, match="100 tries found no usable sample among 3 different samples"):
            run(name, val_data=str(unusable), val_every=every, save_every=every)
        names = sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir())
        assert names == [f"step-{last:08d}"]
        rest = run(name, val_every=every, resume="auto")
        assert rest.validation == whole.validation and rest.losses == whole.losses[last:]
        found = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in found if "loss" not in line] == list(range(every, 5, every))
        assert (tmp_path / name / "model").is_dir()


def test_resumed_run_goes_on_counting(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_folder(tmp_path / "data", 20, BAD)
    whole = train(options(data, tmp_path / "whole"))
    begun = train(options(data, tmp_path / "run", stop_after=5))
    caplog.clear()
    rest = train(options(data, tmp_path / "run", resume="auto"))
    assert begun.losses + rest.losses == whole.losses
    assert counts(tmp_path / "run") == counts(tmp_path / "whole")
    assert "8 of 48 samples drawn" in caplog.text and "skipped " not in caplog.text


def test_run_stops_when_too_many_samples_are_bad(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", 20, BAD)
    with pytest.raises(ValueError, match=r"^more than --max-bad 0\.16: 4 of \d+ samples drawn .* not an image \(.*png"):
        train(options(data, tmp_path / "run", max_bad=0.16))
    assert len(counts(tmp_path / "run")) < 4  # the fourth bad sample makes it certain that there are too many
    train(options(data, tmp_path / "fine", max_bad=0.17, max_steps=4))
    first = next(step for step in range(4) if any(draw.sample >= 20 for draw in Order(24, 6, 0).draws(step, 0, 6)))
    with pytest.raises(ValueError, match=rf"more than --max-bad 0: \d of {6 * (first + 1)} samples"):
        train(options(data, tmp_path / "none", max_bad=0.0))
    with pytest.raises(ValueError, match="--max-bad must be between 0 and 1"):
        options(data, tmp_path / "x", max_bad=1.5)


def test_share_is_exact_at_the_end_of_an_epoch_and_beyond_chance_before() -> None:
    assert not too_many(10, 1000, 1000, 0.01) and too_many(11, 1000, 1000, 0.01)
    assert not too_many(20, 2000, 1000, 0.01) and too_many(21, 2000, 1000, 0.01)
    assert too_many(11, 20, 1000, 0.01)  # more than a whole epoch may have
    assert not too_many(20, 100, 10**6, 0.1) and too_many(28, 100, 10**6, 0.1)  # 10 are expected, give or take 3
    assert not too_many(5, 6, 5, 1.0) and not too_many(10**6, 10**6, 10**9, 1.0)
    assert too_many(1, 1, 10**6, 0.0)
    # An epoch of whole batches leaves samples out: 9 bad ones of 1,000 are below 1 %, even if all are among the 512
    # drawn.
    assert not too_many(9, 512, 512, 0.01, size=1000) and too_many(11, 512, 512, 0.01, size=1000)


def work(rank: int, folder: Path) -> None:
    join_group(rank, 2, folder)
    skipped, said = Skipped(Order(100, 10, 0), 0.04, World(rank, 2, CPU, dist.group.WORLD)), []
    nothing = torch.zeros(0)
    for step in range(9):
        faults = (Fault("no caption", f"{rank}.jpg", "x"),) if step in (2, 3 + rank, 5) else ()
        try:
            skipped.count([Batch(nothing, nothing, nothing, (), faults)], step)
        except ValueError as error:
            said.append([step, str(error)])
            break
    (folder / f"{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


@pytest.mark.fault("All ranks together have more unusable samples than `--max-bad`", "All ranks end at the same step")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked")
def test_all_ranks_count_together_and_stop_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    message = "more than --max-bad 0.04: 6 of 60 samples drawn (10.00%) cannot be used: 6 no caption (0.jpg, 1.jpg)"
    assert told == [[[5, message]]] * 2


@pytest.mark.fault(
    "More samples than `--max-bad` cannot be used",
    "The command ends with exit status 1 and one line with causes and files",
)
def test_command_stops_with_a_line_that_names_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    needs("train")
    data = write_folder(tmp_path / "data", 8, BAD)
    words = ["--data", str(data), "--model", "ViT-tiny", "--context-length", "16", "--output", str(tmp_path / "run")]
    try:
        assert cli.main(["train", *words, "--batch-size", "4", "--max-steps", "9", "--workers", "1"]) == 1
    finally:
        logging.getLogger("fastclip").setLevel(logging.NOTSET)
    told = capfd.readouterr().err  # includes the worker's output
    last = told.splitlines()[-1]
    assert last.startswith("fastclip train: more than --max-bad 0.01: ") and f"({data}/0" in last
    assert "Traceback" not in told


@pytest.mark.fault("The system kills a worker during a run", "One line reports it, without a traceback")
def test_killed_worker_ends_the_run_with_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Folder.read

    def killed(self: Folder, index: int, **options: Any) -> Any:
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index, **options)

    monkeypatch.setattr(Folder, "read", killed)
    data = write_folder(tmp_path / "data", 12)
    with pytest.raises(
        ChildProcessError, match=r"data worker.*killed by the system \(Killed\).*, probably for lack of mem"
    ):
        train(options(data, tmp_path / "run", workers=1))


def test_data_that_changed_since_the_checkpoint_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_folder(tmp_path / "data", 12)
    train(options(data, tmp_path / "run", stop_after=1))
    write_folder(data, 14)
    train(options(data, tmp_path / "run", resume="auto", stop_after=1))
    assert "the dataset had 12 samples and now has 14, so the order of the samples differs" in caplog.text


def test_as_many_data_in_another_order_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_folder(tmp_path / "data", 12)
    table = tmp_path / "pairs.csv"
    rows = [f"{data / f'{k:03}.png'},caption {k}" for k in range(12)]
    told = "the dataset has other names, another order or other captions"

    def go_on(rows: list[str]) -> str:
        table.write_text("\n".join(["filepath,title", *rows]))
        caplog.clear()
        train(options(table, tmp_path / "run", resume="auto", stop_after=1))
        return caplog.text

    go_on(rows)
    assert told not in go_on(rows)
    monkeypatch.chdir(tmp_path)
    caplog.clear()
    train(options(Path("pairs.csv"), tmp_path / "run", resume="auto", stop_after=1))
    assert "changed since" not in caplog.text
    assert told in go_on([*rows[1:], rows[0]])
    assert told in go_on([*rows[1:], rows[0].replace("caption", "another caption")])


def test_memory_that_is_missing_is_no_fault_of_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError

    data = write_folder(tmp_path / "data", 6)
    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(MemoryError):
        train(options(data, tmp_path / "run"))
