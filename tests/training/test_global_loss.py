"""Runs with --loss global: the running means of every sample, their checkpoints and the schedule of gamma."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support import needs

needs("train")

from fastclip.data.loading.order import Order
from fastclip.parity.promised import LOSS
from fastclip.system.reading import read_tensors
from fastclip.training import Run, TrainOptions, train, trainer
from fastclip.training.options import read_options
from fastclip.training.step.losses import NamedLoss, cosine_gamma
from support.digits_run import digits_run
from support.faulty import HTML, picture, write_folder

SAMPLES, B = 30, 8  # three steps an epoch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_folder(tmp_path_factory.mktemp("data"), SAMPLES))


def options(folder: Path, data: str, **changed: Any) -> TrainOptions:
    return digits_run(folder, **{"data": data, "loss": "global", "batch_size": B, "max_steps": 11, **changed})


def state(run: Run) -> dict[str, Tensor]:
    return read_tensors(run.folder / "checkpoints" / f"step-{run.steps:08d}" / "loss.safetensors")


def visited(*steps: int) -> set[int]:
    order = Order(SAMPLES, B, seed=0)
    return {draw.sample for step in steps for draw in order.draws(step, 0, B)}


@pytest.mark.fault(
    "A run with --loss global is stopped and resumed",
    "The running means come from the checkpoint, and the losses are those of a run that never stopped, bit for bit",
)
def test_resumed_run_is_the_run_that_never_stopped(tmp_path: Path, data: str) -> None:
    whole = train(options(tmp_path / "a", data))
    begun = train(options(tmp_path / "b", data, stop_after=5))
    assert set((state(begun)["log_u_image"] > -torch.inf).nonzero()[:, 0].tolist()) == visited(*range(5))
    rest = train(options(tmp_path / "b", data, resume="auto"))
    assert begun.losses + rest.losses == whole.losses
    assert all(torch.equal(x, state(rest)[name]) for name, x in state(whole).items())
    model = [read_tensors(run.folder / "checkpoints" / "step-00000011" / "model.safetensors") for run in (whole, rest)]
    assert all(torch.equal(x, model[1][name]) for name, x in model[0].items())


@pytest.mark.parametrize("how", [{"micro_batch": 3}, {"micro_batch": 3, "keep_graphs": 1}, {"features_on": "cpu"}])
def test_gradient_caching_updates_the_means_once(tmp_path: Path, data: str, how: dict[str, Any]) -> None:
    plain = train(options(tmp_path / "a", data))
    other = train(options(tmp_path / "b", data, **{"micro_batch": 3, **how}))
    assert other.losses == pytest.approx(plain.losses, rel=LOSS)
    for name, x in state(plain).items():
        torch.testing.assert_close(state(other)[name], x, rtol=1e-4, atol=1e-4)


def test_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, data: str) -> None:
    train(options(tmp_path / "clip", data, loss="clip", stop_after=2))
    with pytest.raises(ValueError, match="written without --loss global"):
        train(options(tmp_path / "a", data, resume=str(tmp_path / "clip")))
    begun = train(options(tmp_path / "b", data, stop_after=2))
    assert (begun.folder / "checkpoints" / "step-00000002" / "loss.safetensors").is_file()
    more = str(write_folder(tmp_path / "more", SAMPLES + 1))
    with pytest.raises(ValueError, match="another dataset: 30 where --data has 31 samples"):
        train(options(tmp_path / "c", more, resume=str(begun.folder)))
    clip = train(options(tmp_path / "d", data, loss="clip", resume=str(begun.folder)))  # needs no means
    assert clip.steps == 11


def test_schedule_of_gamma(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gamma falls from 1 with each epoch along a cosine, up to half of the epochs, or is constant. It changes the loss
    from the second visit of a sample on.
    """
    assert [cosine_gamma(epoch, 2.0, 0.2) for epoch in range(4)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert cosine_gamma(0, 0.5, 0.2) == 1.0
    used: list[float] = []
    real = trainer.build_loss

    def watched(*args: Any, **kwargs: Any) -> NamedLoss:
        loss = real(*args, **kwargs)
        return loss._replace(function=lambda *x: (used.append(loss.module.gamma), loss.function(*x))[1])

    monkeypatch.setattr(trainer, "build_loss", watched)
    cosine = train(options(tmp_path / "a", data, max_steps=None, epochs=4))
    assert used == pytest.approx([1.0] * 3 + [0.6] * 3 + [0.2] * 6)
    used.clear()
    constant = train(options(tmp_path / "b", data, max_steps=None, epochs=4, gamma=0.7, gamma_schedule="constant"))
    assert used == [0.7] * 12
    assert cosine.losses[:3] == constant.losses[:3] and cosine.losses[3] != constant.losses[3]


def test_defaults_and_temperatures(tmp_path: Path, data: str) -> None:
    """The temperature is learned with FastCLIP-v3's rho by default, and fixed by --temperature."""
    learned, fixed = (train(options(tmp_path / str(t), data, temperature=t)) for t in (None, 0.1))
    found = [read_options(run.folder / "config.yaml") for run in (learned, fixed)]
    assert [(x.gamma, x.gamma_schedule, x.rho) for x in found] == [(0.2, "cosine", 6.5), (0.2, "cosine", None)]
    scales = [
        [json.loads(line)["logit_scale"] for line in (r.folder / "metrics.jsonl").open()] for r in (learned, fixed)
    ]
    assert scales[1] == pytest.approx([10.0] * 11) and len(set(scales[0])) == 11


def test_options_of_other_losses_are_refused(tmp_path: Path, data: str) -> None:
    for changed, message in (
        ({"loss": "clip", "gamma": 0.5}, "--gamma belongs to --loss global"),
        ({"loss": None, "temperature": 0.5}, "--temperature belongs to --loss global"),
        ({"rho": 6.5, "temperature": 0.1}, "--rho has no effect on a fixed --temperature"),
        ({"batch_size": 1}, "--loss global needs a --batch-size of at least 2"),
        ({"label_smoothing": 0.1}, "the global loss has no label smoothing"),
        ({"image_weight": 0.5}, "the global loss has no image_weight"),
    ):
        with pytest.raises(ValueError, match=message):
            train(options(tmp_path / "a", data, **changed))


def test_replaced_samples_update_the_means_of_their_replacements(tmp_path: Path) -> None:
    """A sample that cannot be used has no running mean. Its replacement, which may be in the batch already, has one."""
    folder = write_folder(tmp_path / "data", 10, [(HTML, b"x 0"), (picture(), None)])
    run = train(options(tmp_path / "a", str(folder), batch_size=6, max_steps=8, max_bad=1.0))
    means = state(run)["log_u_text"]
    assert means[:10].isfinite().all() and means[10:].tolist() == [-torch.inf] * 2


def test_batch_larger_than_the_data_has_no_repeat_as_a_negative(
    tmp_path: Path, data: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(options(tmp_path / "a", data, batch_size=SAMPLES + 6, max_steps=3))
    assert state(run)["log_u_image"].isfinite().all() and "repeats some" not in caplog.text
