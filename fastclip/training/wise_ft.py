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
    """Return (1 - alpha) zero_shot + alpha tuned, name by name; 0 and 1 give either, bit for bit.

    Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", section 3. All that is a number is averaged,
    BatchNorm's running means and variances too, as their code does; integers (its counters) are `tuned`'s unless alpha
    is 0.

    Args:
        zero_shot, tuned: state dicts of one model.
        alpha: 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    if alpha in (0, 1):
        return dict(tuned if alpha else zero_shot)
    return {name: a.lerp(tuned[name], alpha) if a.is_floating_point() else tuned[name] for name, a in zero_shot.items()}


class Finetuned(NamedTuple):
    """What `finetune` made; the classifier, and the embedder's image tower with it, has the tuned weights."""

    folder: Path
    embedder: Embedder
    steps: int  # made, those of earlier calls included
    losses: list[float]  # of this call's steps
    classifier: ImageClassifier
    zero_shot: dict[str, Tensor]  # the classifier's state before the first step, on the host
    tuned: dict[str, Tensor]  # and after the last
    complete: bool  # the schedule is at its end

    def mix(self, alpha: float) -> None:
        """Give the classifier the weights that `interpolate` makes of the two."""
        self.classifier.load_state_dict(interpolate(self.zero_shot, self.tuned, alpha))
        vars(self.embedder).pop("identity", None)  # it is another model now

    def save(self) -> Path:
        """Write ``model/`` with the weights that the classifier has."""
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
    """Return `classifier_accuracies` for each alpha; the classifier keeps the weights of the last one.

    They are kept in ``evaluations.json`` of the run's folder as they come: what a stopped call found is not computed
    again, until `forget_accuracies`. Raises as `classifier_accuracies` does.
    """
    assert run.complete
    file, data = run.folder / _EVALUATIONS, {"data": source.spec, "pictures": len(source)}
    written = read_json(file) if file.is_file() else {}
    accuracies = written.get("alphas", {}) if written | data == written else {}  # those of other data are replaced
    if not isinstance(accuracies, dict) or not all(isinstance(metrics, dict) for metrics in accuracies.values()):
        raise ValueError(f"{file} is not what this command writes: remove it")
    for alpha in alphas:
        run.mix(alpha)
        if str(alpha) not in accuracies:  # JSON's keys are strings
            accuracies[str(alpha)] = classifier_accuracies(
                *(run.classifier, run.embedder, source), batch_size=batch_size, workers=workers, progress=progress
            )
            write_results(file, {**data, "alphas": accuracies})
    return {alpha: accuracies[str(alpha)] for alpha in alphas}


def forget_accuracies(folder: str | Path) -> None:
    """Remove the accuracies once the result is written: the next call evaluates the data anew."""
    (Path(folder) / _EVALUATIONS).unlink(missing_ok=True)
