"""Linear probes: logistic regression on a model's image features."""

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
from fastclip.system.plural import counted
from fastclip.system.progress import Progress

__all__ = ["Probe", "TowerEmbedder", "linear_probe", "sweep"]

logger = logging.getLogger(__name__)
_PER_DECADE, _DECADES = 8, 6  # lambda ranges from 1e-6 to 1e6, in steps of an eighth of a decade
_ITERATIONS = 1000  # as in the paper
_FITS = 16  # maximum: 7 on the coarse grid, 2 at each of 4 halvings, and the final fit


class Probe(NamedTuple):
    """Result of `linear_probe`."""

    metrics: dict[str, Any]  # under CLIP_benchmark's names (``metrics/linear_probe.py``); ``weight_decay`` is lambda
    sweep: list[tuple[float, float]]  # each lambda with its score on the validation split, in the order of the fits
    unconverged: int  # number of fits of the sweep that did not converge within 1,000 iterations
    converged: bool  # True if the final fit, whose metrics are reported, converged


class TowerEmbedder(Embedder):
    """Embedder that returns the unnormalised image features before the projection into the embedding space.

    For ViT these features are the class token and for CoSwin the mean over positions ("I_f" in Radford et al. 2021,
    figure 3). ResNet's attention pooling and ALIGN's EfficientNet have no separate projection, so their features are
    the outputs of `encode_image`.
    """

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Return the features of images, (B, 3, H, W) float32 -> (B, width) float32 on the CPU."""
        tower: Any = self.model.visual
        images = self.normalized(images)
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
    """Fit a logistic regression on image features and evaluate it (Radford et al. 2021, appendix A.3).

    scikit-learn's L-BFGS, with at most 1,000 iterations, minimises the summed cross entropy + lambda / 2 |W|^2, that is
    C = 1 / lambda. The bias is not penalised. `sweep` selects lambda on the validation split, and the reported
    classifier is then fitted on the training and validation splits together. Features are converted to float64, in
    which L-BFGS converges even for small lambdas.

    Args:
        embedder: model to evaluate.
        train: training split.
        test: test split, with the same classes.
        val: validation split (default: a fifth of `train`, stratified by class and drawn with `seed`).
        features: "tower" for the features before the projection, as in the paper, or "embedding" for the unit vectors,
            as in CLIP_benchmark.
        metric: metric that lambda is selected by.
        seed: seed of the default validation split, from 0 to 2^32 - 1.
        batch_size, workers, progress: as in `fastclip.embedding.features.image_features`.
        stores: list that receives the stores of embedded images and finished fits, with which an interrupted probe can
            be resumed. Clear them once the result is written. With None, nothing is stored.

    Raises:
        ValueError: a source has no classes, the classes of the sources differ, the training images have fewer than two
            classes, a class is too small to be split, features are not finite, or the seed is out of range.
        OSError: a file of a source cannot be read.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be between 0 and {2**32 - 1}, got {seed}")
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
        logger.warning("the final fit (lambda %g) did not converge within 1,000 iterations", penalty)
    metrics = {f"lp_{name}": value for name, value in _metrics(classifier, x_test, y_test, classes).items()}
    metrics |= {"weight_decay": penalty, "epochs": None, "seed": seed, "fewshot_k": -1}  # L-BFGS has no epochs
    return Probe(metrics | {"normalized": features == "embedding"}, scores, unconverged, converged)


def sweep(score: Callable[[float], float]) -> tuple[float, list[tuple[float, float]]]:
    """Search for the lambda with the highest score (Radford et al. 2021, appendix A.3).

    The search begins with 1e-6, 1e-4 ... 1e6 and then repeatedly halves the spacing around the best lambda, down to an
    eighth of a decade. Among equal scores the middle lambda is taken, because neither end of a plateau is better.

    Args:
        score: function from lambda to the score.

    Returns:
        The best lambda, and every lambda that was tried, with its score, in the order of the calls.
    """
    scores: dict[int, float] = {}  # score of lambda = 10 ** (k / 8), by the integer k, which has no rounding errors
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
    """Run `sweep` with a store of finished fits, which are not repeated.

    The store needs no lambdas, because the sweep always tries the same ones in the same order.

    Args:
        fit: function from lambda to the score and whether the fit converged.
        store: store of finished fits, or None.
        bar: progress bar, which moves once per fit.

    Returns:
        The best lambda, all lambdas with their scores, and the number of fits that did not converge.
    """
    done = store.parts() if store is not None else []
    if done:
        logger.info("%d fits of an earlier call are reused", len(done))
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
        logger.warning("%d of %d fits of the sweep did not converge within 1,000 iterations", unconverged, len(fits))
    return penalty, scores, unconverged


def _fit(x: Any, y: Any, penalty: float) -> tuple[LogisticRegression, bool]:
    """Fit a classifier, and return the classifier and whether L-BFGS converged."""
    classifier = LogisticRegression(C=1 / penalty, max_iter=_ITERATIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # by default, Python shows a repeated warning only once
        classifier.fit(x, y)
    others = [warning for warning in caught if not issubclass(warning.category, ConvergenceWarning)]
    for warning in others:
        logger.warning("scikit-learn: %s", warning.message)
    return classifier, len(others) == len(caught)


def _metrics(classifier: LogisticRegression, x: Any, y: Any, classes: int) -> dict[str, Any]:
    """Return the `classification_metrics`; classes without training images score below all others."""
    decision = torch.from_numpy(classifier.decision_function(x))
    if decision.dim() == 1:  # for two classes, scikit-learn returns only the scores of the second
        decision = torch.stack([-decision, decision], dim=1)
    scores = torch.full((len(decision), classes), -math.inf, dtype=decision.dtype)
    scores[:, torch.from_numpy(classifier.classes_)] = decision
    labels = torch.from_numpy(y)
    return classification_metrics(score_ranks(scores, labels), labels, classes)


def _split(source: Source, x: Any, y: Any, seed: int) -> tuple[Any, Any, Any, Any]:
    """Split x and y into four fifths for training and one fifth for validation, stratified by class."""
    try:
        x, x_val, y, y_val = train_test_split(x, y, test_size=0.2, stratify=y, random_state=seed)
        return x, x_val, y, y_val
    except ValueError as error:
        raise ValueError(
            f"{source.spec} cannot be split for validation ({error}): give a validation split (--val-data)"
        ) from error


def _inputs(
    embedder: Embedder, stores: list[FeatureStore] | None, source: Source, keys: Sequence[str], **options: Any
) -> tuple[Any, Any]:
    """Return features (K, D) float64 and labels (K,) int64 of all usable images that have a class."""
    images = image_features(embedder, source, store=resumable(stores, embedder, keys), **options)
    features, labels, _ = labelled(images, source.spec)
    if not bool(features.isfinite().all()):  # scikit-learn would refuse them without naming the dataset
        raise ValueError(f"{source.spec}: the model's features are not finite")
    return features.double().numpy(), labels.numpy()


def _check_sources(sources: Sequence[Source]) -> None:
    """Check that all splits have the same classes, and warn if images of the test split are also in another split.

    Args:
        sources: training split, test split and, optionally, validation split.

    Raises:
        ValueError: a split has no classes, or the classes differ.
    """
    train, test = sources[:2]
    for source in sources:
        if not source.class_names:
            raise ValueError(f"{source.spec} has no classes")
        if other := sorted(set(source.class_names) ^ set(train.class_names)):
            raise ValueError(
                f"{train.spec} and {source.spec} must have the same classes, but only one of them has "
                f"{', '.join(other[:5])}"
            )
        if source.class_names != train.class_names:
            raise ValueError(f"{train.spec} and {source.spec} have the same classes in another order")
    tested = set(picture_places(test))
    for source in (train, *sources[2:]):
        if shared := len(tested.intersection(picture_places(source))):
            logger.warning("%d images of %s are also in %s", shared, test.spec, source.spec)


def _check_labels(train: Source, y: Any, test: Source, y_test: Any) -> None:
    known = np.unique(y)
    if len(known) < 2:
        raise ValueError(f"{train.spec}: the usable images must have at least two classes, got {len(known)}")
    if len(unknown := np.setdiff1d(y_test, known)):
        names = shown_names([train.class_names[k] for k in unknown])
        number = counted(len(unknown), "class", "classes")
        logger.warning("%s of %s without images in %s: %s", number, test.spec, train.spec, names)
