"""Robustness: evaluate one zero-shot classifier on ImageNet and on shifted datasets with ImageNet's classes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastclip.data.classes import imagenet
from fastclip.data.classes.prompts import read_templates
from fastclip.data.sources.classes import ClassFolder
from fastclip.embedding.features import FeatureStore
from fastclip.evaluation.published import ZERO_SHOT
from fastclip.evaluation.zero_shot import class_embeddings, zero_shot
from fastclip.models.embedder import Embedder
from fastclip.system.durable import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SETS", "DataSet", "accuracies", "compared_sets", "mean_drop", "plot", "points_of", "robustness"]

_LEAST = 0.001  # lowest accuracy in the plot, as a logit axis has no 0


class DataSet(NamedTuple):
    """ImageNet or one of its variants."""

    title: str
    classes: str  # candidate classes, one of `fastclip.data.classes.imagenet.SETS`
    source: str


# Datasets under CLIP_benchmark's names: ImageNet first, then those with a distribution shift.
SETS = {
    "imagenet1k": DataSet("ImageNet", "imagenet", "Russakovsky et al. 2015, the validation images"),
    "imagenetv2": DataSet("ImageNet-V2", "imagenet", "Recht et al. 2019, matched frequency"),
    "imagenet-r": DataSet("ImageNet-R", "imagenet-r", "Hendrycks et al. 2021, renditions"),
    "imagenet-a": DataSet("ImageNet-A", "imagenet-a", "Hendrycks et al. 2021, natural adversarial examples"),
    "imagenet_sketch": DataSet("ImageNet-Sketch", "imagenet", "Wang et al. 2019"),
}


def robustness(
    embedder: Embedder,
    folders: Mapping[str, str],
    *,
    templates: Sequence[str] | None = None,
    pretrained: str = "",
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = False,
    stores: list[FeatureStore] | None = None,
) -> list[dict[str, Any]]:
    """Evaluate zero-shot classification on ImageNet and its variants.

    Each class is embedded once for all datasets.

    Args:
        embedder: model to evaluate.
        folders: mapping from names in `SETS` to folders with one subfolder per class. For ImageNet-R and ImageNet-A,
            only their 200 classes are candidates.
        templates: captions with ``{}`` in place of a class name (default: CLIP's 80 templates).
        pretrained, batch_size, workers, progress, stores: as in `zero_shot`.

    Returns:
        One result per dataset (`fastclip.evaluation.results.result`), in the order of `SETS`.

    Raises:
        ValueError: no folder is given, a folder contains a class that does not belong to its dataset, or a folder
            contains exactly the classes of ImageNet-R or -A but is given as another dataset. The message names the
            folder, before anything is computed.
    """
    if not folders:
        raise ValueError("no dataset is given: name the folder of at least one")
    sources = {name: ClassFolder(folders[name], classes=kind.classes) for name, kind in SETS.items() if name in folders}
    for name, source in sources.items():
        _check_set(name, source)
    templates = read_templates("openai") if templates is None else templates
    names = list(dict.fromkeys(name for source in sources.values() for name in source.class_names))
    classes = class_embeddings(embedder, names, templates, stores=stores, progress=progress)
    places = {name: place for place, name in enumerate(names)}
    return [
        zero_shot(
            embedder,
            source,
            templates=templates,
            classes=classes[[places[class_name] for class_name in source.class_names]],
            dataset=name,
            pretrained=pretrained,
            batch_size=batch_size,
            workers=workers,
            progress=progress,
            stores=stores,
        ).result
        for name, source in sources.items()
    ]


def _check_set(name: str, source: ClassFolder) -> None:
    """Raise a ValueError if a folder has exactly the 200 classes of ImageNet-R or -A but is given as another dataset.

    Other subsets of ImageNet's classes are accepted.
    """
    for other in ("imagenet-r", "imagenet-a"):
        if name != other and {*source.folders} == imagenet.folder_places(other).keys():
            raise ValueError(
                f"{source.spec}: the classes are those of {SETS[other].title}, but the folder is given as "
                f"{SETS[name].title}"
            )


def accuracies(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return a dictionary from the name of each dataset to its top-1 accuracy in per cent."""
    return {result["dataset"]: 100 * result["metrics"]["acc1"] for result in results}


def _mean(top1: Mapping[str, float], sets: Sequence[str]) -> float | None:
    """Return the mean accuracy over `sets`, or None if `sets` is empty or one of them is missing."""
    return sum(top1[name] for name in sets) / len(sets) if sets and all(name in top1 for name in sets) else None


def mean_drop(top1: Mapping[str, float], sets: Sequence[str]) -> float | None:
    """Return the drop from top-1 on ImageNet to the mean over `sets`, in percentage points; None if one is missing."""
    mean = _mean(top1, sets)
    return None if mean is None or "imagenet1k" not in top1 else top1["imagenet1k"] - mean


def compared_sets(top1: Mapping[str, float]) -> list[str]:
    """Return the evaluated datasets with a distribution shift for which there are published results.

    If none of them has published results, return all evaluated datasets with a distribution shift.
    """
    shifted = [name for name in SETS if name in top1 and name != "imagenet1k"]
    return [name for name in shifted if any(name in known for known in ZERO_SHOT.values())] or shifted


def plot(path: str | Path, top1: Mapping[str, float], *, name: str) -> None:
    """Plot top-1 on ImageNet against the mean over the datasets with a distribution shift, as a PNG.

    The plot shows the model and the published results. On its logit axes, the accuracies of models trained on ImageNet
    lie on a line (Taori et al. 2020), and a perfectly robust model lies on y = x. Values below 0.1 % or above 99.9 %
    are drawn at these limits.

    Args:
        path: output path.
        top1: mapping from names in `SETS` to top-1 accuracies in per cent.
        name: name of the model.

    Raises:
        ValueError: the accuracy on ImageNet is missing, or that on all other datasets.
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    sets = compared_sets(top1)
    if mean_drop(top1, sets) is None:
        raise ValueError("the plot needs ImageNet and at least one other dataset")
    figure = Figure(figsize=(6.4, 6.0), layout="constrained")
    axes = figure.subplots()
    points = points_of(top1, sets, name=name)
    _axes(axes, [_inside(value) for point in points.values() for value in point])
    for label, (x, y) in points.items():
        marker, size = ("*", 14) if label == name else ("o", 8)
        caption = f"{label}: {100 * x:.1f}, {100 * y:.1f}"
        axes.plot(_inside(x), _inside(y), marker, markersize=size, label=caption)
    titles = ", ".join(SETS[shifted].title for shifted in sets)
    axes.set_ylabel(f"mean zero-shot top-1 on {titles} (%)", wrap=True)
    axes.set_xlabel("zero-shot top-1 on ImageNet (%)")
    axes.legend(loc="upper left")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, png.getvalue())


def points_of(top1: Mapping[str, float], sets: Sequence[str], *, name: str) -> dict[str, tuple[float, float]]:
    """Return the points of the plot by model: (accuracy on ImageNet, mean over `sets`), each from 0 to 1.

    Published models are included if they have results on ImageNet and on all of `sets`.
    """
    points = {}
    published = {f"{system} (published)": by_set for system, by_set in ZERO_SHOT.items()}
    for label, by_set in {**published, name: top1}.items():
        mean = _mean(by_set, sets)
        if mean is not None and "imagenet1k" in by_set:
            points[label] = by_set["imagenet1k"] / 100, mean / 100
    return points


def _inside(share: float) -> float:
    return min(max(share, _LEAST), 1 - _LEAST)


def _axes(axes: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ticks = [0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999]
    lower = max((tick for tick in ticks if tick < min(values)), default=ticks[0])
    upper = min((tick for tick in ticks if tick > max(values)), default=ticks[-1])
    axes.set(xscale="logit", yscale="logit", xlim=(lower, upper), ylim=(lower, upper), aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    axes.plot([lower, upper], [lower, upper], "--", color="grey", label="no drop: y = x")
    axes.grid(alpha=0.3)
