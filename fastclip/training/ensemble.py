"""Weight-space ensembles of a zero-shot and a fine-tuned model (WiSE-FT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastclip.data.source import Source
from fastclip.evaluation.classification import classifier_accuracies
from fastclip.evaluation.results import write_results
from fastclip.reading import read_json

if TYPE_CHECKING:
    from fastclip.training.finetune import Finetuned

__all__ = ["ensemble_accuracies", "forget_accuracies", "interpolate"]

_KEPT = "evaluations.json"


@torch.no_grad()
def interpolate(zero_shot: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) zero_shot + alpha tuned, name by name; 0 and 1 give either, bit for bit.

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


def ensemble_accuracies(
    run: Finetuned,
    source: Source,
    alphas: Sequence[float],
    *,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = False,
) -> dict[float, dict[str, float | None]]:
    """`classifier_accuracies` for each alpha; the classifier has the last one's weights then.

    They are kept in ``evaluations.json`` of the run's folder as they come: what a stopped call found is not computed
    again, until `forget_accuracies`. Raises as `classifier_accuracies` does.
    """
    assert run.complete
    file, asked = run.folder / _KEPT, {"data": source.spec, "pictures": len(source)}
    kept = read_json(file) if file.is_file() else {}
    found = kept.get("alphas", {}) if {**kept, **asked} == kept else {}
    if not isinstance(found, dict) or not all(isinstance(metrics, dict) for metrics in found.values()):
        raise ValueError(f"{file} is not what this command writes: remove it")
    for alpha in alphas:
        run.mix(alpha)
        if str(alpha) not in found:
            found[str(alpha)] = classifier_accuracies(
                *(run.classifier, run.embedder, source), batch_size=batch_size, workers=workers, progress=progress
            )
            write_results(file, {**asked, "alphas": found})
    return {alpha: found[str(alpha)] for alpha in alphas}


def forget_accuracies(folder: str | Path) -> None:
    """When the result is written: the next call looks at the data anew."""
    (Path(folder) / _KEPT).unlink(missing_ok=True)
