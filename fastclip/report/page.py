"""The page: one HTML file that holds its pictures, style and script."""

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
    """Write one HTML file that needs no other, and return its path: key figures, curves, confused classes, retrievals.

    What needs a model is left out, and the page says why: for a run that has not ended, unless a checkpoint is named,
    and for one without validation data, or whose data cannot be read here.

    Args:
        folder: of a run of ``fastclip train``.
        output: default: report.html in it.
        data: as ``--val-data``; default: the run's own.
        checkpoint: as `load_embedder`'s; default: the run's model/.
        results: JSON files of ``fastclip eval`` or CLIP_benchmark, shown beside each other.
        max_samples: of the data, evenly spread.
        batch_size: pictures, or texts, at a time.
        workers: processes that read pictures; 0 reads in this one.
        progress: show how far it is, on stderr.
        embedder_options: model, device, precision, vocabulary, image_size, context_length, as `load_embedder`'s; the
            default precision is the run's.

    Raises:
        OSError, ValueError: the folder holds no run, or data, checkpoint or results are not in order; by name.
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
    write_bytes(path, render(context).encode("utf-8", "replace"))  # names of files may hold what UTF-8 cannot
    for store in stores:
        store.clear()
    return path


def render(context: dict[str, Any]) -> str:
    """The page of `about_run`'s and `of_examined`'s names. All that is put into it is escaped.

    A Content-Security-Policy keeps it from loading anything, and from running any script but its own.
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
    """The data to look at, or why there are none."""
    if checkpoint is None and not run.ended:
        return None, "The run has not ended, so there is no model to look at yet; --checkpoint names one."
    if data is not None:
        return open_source(data, held_out=True), ""
    spec = run.options.get("val_data")
    if not isinstance(spec, str):
        return None, "The run has no validation data; --data names some."
    try:
        return open_source(spec, held_out=True), ""
    except (OSError, ValueError, ImportError) as error:  # such as a run that was copied from another machine
        logger.warning("the validation data cannot be read: %s", error)
        reason = str(error).split("; what it may be:")[0]
        return None, f"The validation data cannot be read: {reason}. --data names others."
