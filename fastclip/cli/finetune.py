"""``fastclip finetune``: the whole image tower, from the zero-shot classifier, with weight-space ensembles."""

from __future__ import annotations

import argparse
from typing import Any

from fastclip.cli.embedding import add_embedder_options
from fastclip.cli.evaluate.zeroshot import add_templates_option, percent
from fastclip.cli.outputs import add_force, owned_output
from fastclip.cli.pictures import add_max_pixels
from fastclip.cli.printing import say

__all__ = ["add"]

# Of FinetuneOptions: name, type, help.
_NUMBERS = (
    ("epochs", float, "passes over the data (10)"),
    ("batch_size", int, "pictures a step (512)"),
    ("micro_batch", int, "pictures whose activations are kept at a time; default: all of a step"),
    ("lr", float, "learning rate at the end of the warm-up (3e-5)"),
    ("weight_decay", float, "of matrices; biases and norms have none (0.1)"),
    ("warmup", int, "steps; default: 500, or a tenth of all if that is less"),
    ("max_grad_norm", float, "a longer gradient is scaled down to it (1)"),
    ("seed", int, "of order, crops and dropout (0)"),
    ("workers", int, "processes that read pictures (2)"),
    ("log_every", int, "steps between lines of metrics.jsonl (1)"),
    ("save_every", int, "steps between checkpoints; default: those of an epoch"),
    ("keep", int, "checkpoints that stay (2)"),
    ("max_bad", float, "the largest share of pictures that cannot be used (0.01)"),
    ("stop_after", int, "steps of this call, which then ends with a checkpoint"),
)
_FLAGS = (
    ("freeze_image", "train the head alone"),
    ("grad_checkpointing", "keep the blocks' inputs only: less memory, a third more time"),
)


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Fine-tune the image tower and a linear head that begins as the zero-shot classifier, in one process. The same "
        "call again goes on where it was stopped. Defaults: Wortsman et al. 2022 (WiSE-FT)."
    )
    add_embedder_options(parser)
    parser.add_argument(
        "--data",
        required=True,
        metavar="SPEC",
        help="pictures with classes: class folders, digits, ...",
    )
    parser.add_argument("--val-data", metavar="SPEC", help="to evaluate on at the end; digits is the held-out fifth")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the run: model/, results.json, ...")
    add_max_pixels(parser)
    add_force(parser)
    parser.add_argument(
        "--wise-ft",
        type=_alpha,
        metavar="ALPHA",
        help="save (1 - ALPHA) zero-shot + ALPHA fine-tuned weights; `sweep` evaluates 0, 0.1 ... 1 and saves 1",
    )
    add_templates_option(parser, default="the data's own, else openai")
    parser.add_argument("--reference", metavar="NAME", help="published numbers to show: food101, cifar10, imagenet ...")
    for name, kind, told in _NUMBERS:
        parser.add_argument("--" + name.replace("_", "-"), type=kind, metavar="N", help=told)
    for name, told in _FLAGS:
        parser.add_argument("--" + name.replace("_", "-"), action="store_true", default=None, help=told)
    parser.set_defaults(run=_finetune)


def _alpha(word: str) -> float | str:
    if word == "sweep":
        return word
    alpha = float(word)
    if not 0 <= alpha <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, or sweep, got {word}")
    return alpha


def _finetune(args: argparse.Namespace) -> None:
    from fastclip.cli.embedding import embedder_of
    from fastclip.data.spec import open_labelled
    from fastclip.evaluation.published import top1, top1_dataset
    from fastclip.evaluation.zero_shot import templates_for
    from fastclip.training.ensemble import ensemble_accuracies
    from fastclip.training.finetune import FinetuneOptions, finetune

    if not args.val_data and (args.reference or args.wise_ft == "sweep"):
        told = "--reference" if args.reference else "--wise-ft sweep"
        raise ValueError(f"{told} needs --val-data, to evaluate on")
    names = [*(name for name, *_ in _NUMBERS), *(name for name, _ in _FLAGS)]
    options = FinetuneOptions(**{name: value for name in names if (value := getattr(args, name)) is not None})
    reference = args.reference or top1_dataset(args.val_data or "")
    published = top1(reference) if reference is not None else {}
    with owned_output(args):
        source = open_labelled(args.data, held_out=False)
        templates = templates_for(source, args.templates)
        val = open_labelled(args.val_data) if args.val_data else None
        if val is not None and val.class_names != source.class_names:
            raise ValueError(f"--data {args.data} and --val-data {args.val_data} differ in classes")
        run = finetune(embedder_of(args), source, options, output=args.output, templates=templates)
        if not run.complete:
            say(f"{run.folder}: {run.steps} steps; the same call goes on")
            return
        saved = 1.0 if args.wise_ft in (None, "sweep") else args.wise_ft
        run.mix(saved)
        say(f"{run.save()}: {run.steps} steps, of which {len(run.losses)} now; alpha {saved:g}")
        if val is not None:
            alphas = [k / 10 for k in range(11)] if args.wise_ft == "sweep" else sorted({0.0, saved, 1.0})
            size = options.micro_batch or options.batch_size
            found = ensemble_accuracies(run, val, alphas, batch_size=size, workers=options.workers, progress=True)
            _tell(args, found, reference, published, saved)


def _tell(
    args: argparse.Namespace,
    found: dict[float, dict[str, Any]],
    reference: str | None,
    published: dict[str, float],
    saved: float,
) -> None:
    """Tables, and results.json."""
    from pathlib import Path

    from fastclip.evaluation.published import MEAN_PER_CLASS
    from fastclip.evaluation.results import result, table, write_results
    from fastclip.training.ensemble import forget_accuracies

    results = [
        result(
            dataset=args.reference or args.val_data,
            task="finetuned_classification",
            model=args.model or str(args.checkpoint),
            pretrained=str(args.checkpoint),
            metrics=metrics,
            alpha=alpha,
            train=args.data,
            test=args.val_data,
        )
        for alpha, metrics in found.items()
    ]
    write_results(Path(args.output) / "results.json", results)
    forget_accuracies(args.output)
    told = {0.0: "0 (zero-shot)", 1.0: "1 (fine-tuned)"}
    rows = [[told.get(alpha, f"{alpha:g}"), *map(percent, metrics.values())] for alpha, metrics in found.items()]
    say(table(["alpha", *found[1.0]], rows))
    if reference is not None:
        metric = "mean_per_class_recall" if reference in MEAN_PER_CLASS else "acc1"
        ours = {"zero-shot": 100 * found[0.0][metric], f"alpha {saved:g}": 100 * found[saved][metric]}
        say("\n" + table([reference, metric], list({**ours, **published}.items())))
