"""Linear probes: what a logistic regression makes of a model's image features."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from timm.models.byobnet import ByobNet
from torch import Tensor

from fastclip.data.classes.names import shown_names
from fastclip.data.identity import picture_places, picture_states
from fastclip.data.source import Source
from fastclip.embedding.features import FeatureStore, image_features, resumable
from fastclip.evaluation.classification import classification_metrics, labelled, score_ranks
from fastclip.models.embedder import Embedder
from fastclip.system.progress import Progress

__all__ = ["Probe", "TowerEmbedder", "linear_probe", "sweep"]

logger = logging.getLogger(__name__)
_PER_DECADE, _DECADES = 8, 6  # values of the penalty: 10 ** -6 to 10 ** 6
_ITERATIONS = 1000  # as the paper's
_FITS = 16  # at most: 7 of the coarse grid, 2 at each of 4 halvings, and the last


class Probe(NamedTuple):
    """Result of `linear_probe`."""

    metrics: dict[str, Any]  # by CLIP_benchmark's names (``metrics/linear_probe.py``)
    sweep: list[tuple[float, float]]  # lambda and its score on the validation split, in the order in which they came
    unconverged: int  # fits of the sweep that ended after 1,000 iterations
    converged: bool  # the last fit, which is what is reported


class TowerEmbedder(Embedder):
    """Embed pictures as the features that the image tower projects into the embedding space, not normalised.

    ViT's class token and CoSwin's mean before their projection ("I_f", Radford et al. 2021, figure 3). ResNet's
    attention pooling and ALIGN's EfficientNet have no projection: theirs are what `encode_image` returns.
    """

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) float32 -> (B, width) float32 on the CPU."""
        tower: Any = self.model.visual
        images = images.to(self.device, non_blocking=True)
        with self._autocast():
            if isinstance(tower, ByobNet):
                return tower(images).float().cpu()
            return tower.forward_head(tower.forward_features(images), pre_logits=True).float().cpu()


def linear_probe(
    embedder: Embedder,
    train: Source,
    test: Source,
    *,
    val: Source | None = None,
    features: Literal["tower", "embedding"] = "tower",
    metric: Literal["acc1", "mean_per_class_recall"] = "acc1",
    seed: int = 0,
    batch_size: int = 256,
    workers: int = 0,
    stores: list[FeatureStore] | None = None,
    progress: bool = False,
) -> Probe:
    """Logistic regression on image features, as Radford et al. 2021, appendix A.3, do it.

    scikit-learn's L-BFGS with at most 1,000 iterations minimises the summed cross entropy + lambda / 2 |W|^2, so
    C = 1 / lambda; the bias is not penalised. `sweep` finds lambda on the validation split; the reported classifier is
    fitted on train and validation together. Features enter as float64, in which L-BFGS converges for small lambdas.

    Args:
        val: default: a fifth of `train`, every class's share alike, drawn by `seed`.
        features: "tower", as the paper's; or "embedding", the unit vectors, as CLIP_benchmark's.
        metric: that lambda is chosen by.
        batch_size, workers, progress: as `fastclip.embedding.features.image_features`'s.
        stores: gets what is kept to go on after a stop, pictures and fits; clear them when the result is written.

    Raises:
        ValueError: sources without classes or with different ones, pictures of less than two, a class too small to
            split, features that are not finite, a seed out of range.
        OSError, ValueError: what the samples are read from cannot be.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {seed}")
    sources = [source for source in (train, test, val) if source is not None]
    _check_sources(sources)
    if features == "tower":
        taken: Any = {"transform": embedder.transform, "precision": embedder.precision, "name": embedder.name}
        embedder = TowerEmbedder(embedder.model, embedder.tokenize, **taken)
    keys = [[features, *picture_states(source)] for source in sources]
    read = partial(_inputs, embedder, stores, batch_size=batch_size, workers=workers, progress=progress)
    (x, y), (x_test, y_test), *rest = map(read, sources, keys)
    _check_labels(train, y, test, y_test)
    x, x_val, y, y_val = _split(train, x, y, seed) if val is None else (x, rest[0][0], y, rest[0][1])
    classes = len(train.class_names)

    def fit(penalty: float) -> tuple[float, bool]:
        classifier, converged = _fit(x, y, penalty)
        return _metrics(classifier, x_val, y_val, classes)[metric], converged

    store = resumable(stores, embedder, [f"fits {metric} {seed}", *chain(*keys)])
    with Progress("L-BFGS fits", _FITS, unit="fit", shown=progress) as bar:
        penalty, scores, unconverged = _resumed_sweep(fit, store, bar)
        classifier, converged = _fit(np.concatenate([x, x_val]), np.concatenate([y, y_val]), penalty)
        bar.moved()
    if not converged:
        logger.warning("the probe itself (lambda %g) ended after 1,000 iterations", penalty)
    metrics = {f"lp_{name}": value for name, value in _metrics(classifier, x_test, y_test, classes).items()}
    metrics |= {"weight_decay": penalty, "epochs": None, "seed": seed, "fewshot_k": -1}  # L-BFGS has no epochs
    return Probe(metrics | {"normalized": features == "embedding"}, scores, unconverged, converged)


def sweep(score: Callable[[float], float]) -> tuple[float, list[tuple[float, float]]]:
    """The lambda of the highest `score`, and all that were tried, each with its score.

    Radford et al. 2021, appendix A.3: from 1e-6, 1e-4 ... 1e6, then the interval around the peak is halved until its
    values are eighths of a decade. Of equal scores the middle one's lambda counts: on a plateau neither end is better.
    """
    scores: dict[int, float] = {}  # of lambda = 10 ** (k / 8) by k, which is exact where lambda is not
    last = _PER_DECADE * _DECADES  # k is from -last to last

    def peak(candidates: Sequence[int]) -> int:
        for k in candidates:
            if k not in scores:
                scores[k] = score(10 ** (k / _PER_DECADE))
        highest = [k for k in candidates if scores[k] == max(scores[k] for k in candidates)]
        return highest[len(highest) // 2]

    width = 2 * _PER_DECADE
    best = peak(range(-last, last + 1, width))
    while width := width // 2:
        best = peak([k for k in (best - width, best, best + width) if abs(k) <= last])
    return 10 ** (best / _PER_DECADE), [(10 ** (k / _PER_DECADE), value) for k, value in scores.items()]


def _resumed_sweep(
    fit: Callable[[float], tuple[float, bool]], store: FeatureStore | None, bar: Progress
) -> tuple[float, list[tuple[float, float]], int]:
    """`sweep` by a `fit` that also tells whether it converged, and how many did not.

    What `store` holds is not fitted again. It has no lambdas: the sweep tries the same ones in the same order.
    """
    done = store.parts() if store is not None else []
    if done:
        logger.info("%d fits are there already", len(done))
    fits: list[dict[str, Tensor]] = []

    def score(penalty: float) -> float:
        if len(fits) < len(done):
            part = done[len(fits)]
        else:
            value, converged = fit(penalty)
            part = {"score": torch.tensor(value, dtype=torch.float64), "converged": torch.tensor(converged)}
            if store is not None:
                store.add(len(fits), part)
        fits.append(part)
        bar.moved()
        return float(part["score"])

    penalty, scores = sweep(score)
    unconverged = sum(not part["converged"] for part in fits)
    if unconverged:
        logger.warning("%d of %d fits of the sweep ended after 1,000 iterations", unconverged, len(fits))
    return penalty, scores, unconverged


def _fit(x: Any, y: Any, penalty: float) -> tuple[LogisticRegression, bool]:
    """The classifier, and whether L-BFGS converged."""
    classifier = LogisticRegression(C=1 / penalty, max_iter=_ITERATIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # else a warning that an earlier fit gave is not given again
        classifier.fit(x, y)
    others = [warning for warning in caught if not issubclass(warning.category, ConvergenceWarning)]
    for warning in others:
        logger.warning("scikit-learn: %s", warning.message)
    return classifier, len(others) == len(caught)


def _metrics(classifier: LogisticRegression, x: Any, y: Any, classes: int) -> dict[str, Any]:
    """`classification_metrics`; a class that the classifier has not met scores below all others."""
    decision = torch.from_numpy(classifier.decision_function(x))
    if decision.dim() == 1:  # of two classes scikit-learn gives one column, the second's
        decision = torch.stack([-decision, decision], dim=1)
    scores = torch.full((len(decision), classes), -math.inf, dtype=decision.dtype)
    scores[:, torch.from_numpy(classifier.classes_)] = decision
    labels = torch.from_numpy(y)
    return classification_metrics(score_ranks(scores, labels), labels, classes)


def _split(source: Source, x: Any, y: Any, seed: int) -> tuple[Any, Any, Any, Any]:
    """Four fifths and one fifth of x and of y."""
    try:
        x, x_val, y, y_val = train_test_split(x, y, test_size=0.2, stratify=y, random_state=seed)
        return x, x_val, y, y_val
    except ValueError as error:
        raise ValueError(f"{source.spec}: no validation split can be made, give one: {error}") from error


def _inputs(
    embedder: Embedder, stores: list[FeatureStore] | None, source: Source, keys: Sequence[str], **options: Any
) -> tuple[Any, Any]:
    """What a classifier is fitted to, of the pictures that have a class: (K, D) float64 and (K,) int64."""
    images = image_features(embedder, source, store=resumable(stores, embedder, keys), **options)
    features, labels, _ = labelled(images, source.spec)
    if not bool(features.isfinite().all()):  # which scikit-learn refuses without naming the data
        raise ValueError(f"{source.spec}: the model's features are not finite")
    return features.double().numpy(), labels.numpy()


def _check_sources(sources: Sequence[Source]) -> None:
    """Train, test and perhaps validation must have the same classes; of pictures that test shares the log warns."""
    train, test = sources[:2]
    for source in sources:
        if not source.class_names:
            raise ValueError(f"{source.spec} has no classes")
        if other := sorted(set(source.class_names) ^ set(train.class_names)):
            raise ValueError(f"{train.spec} and {source.spec} differ in classes: {', '.join(other[:5])}")
        if source.class_names != train.class_names:
            raise ValueError(f"{train.spec} and {source.spec} have the same classes in another order")
    tested = set(picture_places(test))
    for source in (train, *sources[2:]):
        if shared := len(tested.intersection(picture_places(source))):
            logger.warning("%d pictures of %s are in %s, too", shared, test.spec, source.spec)


def _check_labels(train: Source, y: Any, test: Source, y_test: Any) -> None:
    known = np.unique(y)
    if len(known) < 2:
        raise ValueError(f"{train.spec}: what can be used of it has {len(known)} classes: nothing to tell apart")
    if len(unknown := np.setdiff1d(y_test, known)):
        names = shown_names([train.class_names[k] for k in unknown])
        logger.warning("%s: of %d classes %s has no picture: %s", test.spec, len(unknown), train.spec, names)
