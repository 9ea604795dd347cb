"""The report as a single HTML file that contains its images, style and script."""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fastclip.data.identity import one_a_picture
from fastclip.data.source import Source
from fastclip.data.sources.subset import evenly
from fastclip.data.spec import open_source
from fastclip.embedding.features import FeatureStore
from fastclip.models.embedder import load_embedder
from fastclip.report import charts
from fastclip.report.examples import examine
from fastclip.report.run import RunRecord, read_run
from fastclip.report.view import about_run, of_examined, read_results
from fastclip.system.durable import write_bytes

__all__ = ["write_report"]

logger = logging.getLogger(__name__)
_PAGE = Path(__file__).parent / "page"


def write_report(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    data: str | None = None,
    checkpoint: str | Path | None = None,
    results: Sequence[str | Path] = (),
    max_samples: int = 5000,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = False,
    **embedder_options: Any,
) -> Path:
    """Write a self-contained HTML report of a run and return its path.

    The report has key figures, curves, confused classes, and the best and worst retrievals. Sections that need a model
    are replaced by the reason why they are missing if the run has not ended and no checkpoint is given, if it has no
    validation data, or if its data cannot be read here.

    Args:
        folder: folder of a run of ``fastclip train``.
        output: path of the report (default: report.html in `folder`).
        data: dataset to examine, in the form of ``--val-data`` (default: the run's validation data).
        checkpoint: checkpoint for `load_embedder` (default: the run's model/).
        results: JSON files of ``fastclip eval`` or CLIP_benchmark, which are shown side by side.
        max_samples: largest number of samples to examine. They are evenly spread over the dataset.
        batch_size: images, or texts, embedded at a time.
        workers: processes that read images; 0 reads them in this process.
        progress: show a progress bar on stderr.
        embedder_options: options of `load_embedder`: model, device, precision, vocabulary, image_size, context_length.
            The default precision is the run's.

    Raises:
        OSError: the folder holds no run, or a file cannot be read or written.
        ValueError: config.yaml, the data, the checkpoint or a result file is invalid, or max_samples is below 1.
    """
    if max_samples < 1:
        raise ValueError(f"max_samples must be at least 1, got {max_samples}")
    run = read_run(folder)
    context = about_run(run) | {"results": read_results([Path(path) for path in results])}
    source, reason = _source(run, data, checkpoint)
    stores: list[FeatureStore] = []
    if source is None:
        context |= {"seen": None, "reason": reason}
    else:
        whole = one_a_picture(source)
        source = evenly(whole, max_samples)
        embedder_options["precision"] = embedder_options.get("precision") or run.options.get("precision")
        embedder = load_embedder(run.folder / "model" if checkpoint is None else checkpoint, **embedder_options)
        examined = examine(embedder, source, batch_size=batch_size, workers=workers, stores=stores, progress=progress)
        seen = of_examined(source, examined, run, same=source is whole and data is None and checkpoint is None)
        context |= {"seen": seen | {"size": len(whole), "embedder": embedder}, "reason": ""}
    path = run.folder / "report.html" if output is None else Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, render(context).encode("utf-8", "replace"))  # file names may not be valid UTF-8
    for store in stores:
        store.clear()
    return path


def render(context: dict[str, Any]) -> str:
    """Return the HTML of a page with the values that `about_run` and `of_examined` return. All values are escaped.

    A Content-Security-Policy keeps the page from loading anything and from running any script except its own.
    """
    page = Environment(
        loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = (_PAGE / "script.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = Markup((_PAGE / "style.css").read_text(encoding="utf-8"))
    return page.get_template("report.html").render(
        context, frame=charts, script=Markup(script), script_digest=digest, style=style
    )


def _source(run: RunRecord, data: str | None, checkpoint: str | Path | None) -> tuple[Source | None, str]:
    """Return the dataset to examine and "", or None and the reason why there is none."""
    if checkpoint is None and not run.ended:
        return None, "The run has not ended, so it has no final model yet. Name a checkpoint with --checkpoint."
    if data is not None:
        return open_source(data, held_out=True), ""
    spec = run.options.get("val_data")
    if not isinstance(spec, str):
        return None, "The run has no validation data. Name a dataset with --data."
    try:
        return open_source(spec, held_out=True), ""
    except (OSError, ValueError, ImportError) as error:  # for example if the run was copied from another machine
        logger.warning("the validation data cannot be read: %s", error)
        reason = str(error).split("; a dataset can be given as:")[0]
        return None, f"The validation data cannot be read: {reason}. Name another dataset with --data."
