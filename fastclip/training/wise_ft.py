"""Weight-space ensembles of a zero-shot and a fine-tuned model (WiSE-FT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastclip.data.source import Source
from fastclip.evaluation.classification import classifier_accuracies
from fastclip.evaluation.results import write_results
from fastclip.models.classifier import ImageClassifier, save_classifier
from fastclip.models.embedder import Embedder
from fastclip.system.durable import new_folder
from fastclip.system.reading import read_json

__all__ = ["Finetuned", "ensemble_accuracies", "forget_accuracies", "interpolate"]

_EVALUATIONS = "evaluations.json"


@torch.no_grad()
def interpolate(zero_shot: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Return (1 - alpha) zero_shot + alpha tuned for each tensor.

    Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", section 3. An alpha of 0 returns `zero_shot` and an
    alpha of 1 returns `tuned`, bit for bit. As in the authors' code, all floating-point tensors are averaged, including
    BatchNorm's running means and variances. Integers, such as BatchNorm's counters, are taken from `tuned` unless alpha
    is 0.

    Args:
        zero_shot, tuned: state dicts of the same model.
        alpha: weight of `tuned`, 0 to 1.

    Raises:
        ValueError: alpha is not between 0 and 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    if alpha in (0, 1):
        return dict(tuned if alpha else zero_shot)
    return {name: a.lerp(tuned[name], alpha) if a.is_floating_point() else tuned[name] for name, a in zero_shot.items()}


class Finetuned(NamedTuple):
    """Result of `finetune`. The classifier and the embedder share the image tower, which has the tuned weights."""

    folder: Path
    embedder: Embedder
    steps: int  # updates made, including those of earlier calls
    losses: list[float]  # loss of each step of this call
    classifier: ImageClassifier
    zero_shot: dict[str, Tensor]  # the classifier's state before the first step, on the host
    tuned: dict[str, Tensor]  # the classifier's state after the last step, on the host
    complete: bool  # all steps of the schedule were made

    def mix(self, alpha: float) -> None:
        """Set the classifier's weights to `interpolate` of the zero-shot and the tuned weights."""
        self.classifier.load_state_dict(interpolate(self.zero_shot, self.tuned, alpha))
        vars(self.embedder).pop("identity", None)  # cached, but the weights have changed

    def save(self) -> Path:
        """Write the classifier with its current weights to ``model/`` and return that folder."""
        with new_folder(self.folder / "model") as half:
            save_classifier(self.classifier, self.embedder.model, half)
        return self.folder / "model"


def ensemble_accuracies(
    run: Finetuned,
    source: Source,
    alphas: Sequence[float],
    *,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = False,
) -> dict[float, dict[str, float | None]]:
    """Return the result of `classifier_accuracies` for each alpha. The classifier keeps the weights of the last alpha.

    Each result is written to ``evaluations.json`` in the run's folder as soon as it is computed. A call after an
    interrupted one reads these results until `forget_accuracies` removes them.

    Raises:
        ValueError: ``evaluations.json`` holds something else, or `classifier_accuracies` raises it.
    """
    assert run.complete
    file, data = run.folder / _EVALUATIONS, {"data": source.spec, "pictures": len(source)}
    written = read_json(file) if file.is_file() else {}
    accuracies = written.get("alphas", {}) if written | data == written else {}  # results of other data are replaced
    if not isinstance(accuracies, dict) or not all(isinstance(metrics, dict) for metrics in accuracies.values()):
        raise ValueError(f"{file} was not written by this command: remove it")
    for alpha in alphas:
        run.mix(alpha)
        if str(alpha) not in accuracies:  # JSON's keys are strings
            accuracies[str(alpha)] = classifier_accuracies(
                *(run.classifier, run.embedder, source), batch_size=batch_size, workers=workers, progress=progress
            )
            write_results(file, {**data, "alphas": accuracies})
    return {alpha: accuracies[str(alpha)] for alpha in alphas}


def forget_accuracies(folder: str | Path) -> None:
    """Remove the stored accuracies of a run's folder, so that the next call evaluates the data again."""
    (Path(folder) / _EVALUATIONS).unlink(missing_ok=True)
