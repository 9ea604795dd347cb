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
    parser.add_argument("-h", "--help", action=_Help, nargs=0, help="show this help message and exit")
    parser.set_defaults(run=_finetune)


class _Help(argparse.Action):
    """Help on these options, and then on those of the training, which `parse_finetune` reads."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from fastclip.training.options import parse_finetune

        parser.print_help()
        try:
            parse_finetune(["--help"])
        except ModuleNotFoundError as error:  # outside of `main`, which would say so
            parser.exit(1, f"fastclip finetune: options of the training need {error.name}: pip install '.[train]'\n")


def _alpha(word: str) -> float | str:
    if word == "sweep":
        return word
    alpha = float(word)
    if not 0 <= alpha <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, or sweep, got {word}")
    return alpha


def _finetune(args: argparse.Namespace) -> None:
    from fastclip.training.options import parse_finetune

    options = parse_finetune(args.words)  # before the slow imports: who misspelt an option need not wait
    from fastclip.cli.embedding import embedder_of
    from fastclip.data.spec import open_labelled
    from fastclip.evaluation.published import top1, top1_dataset
    from fastclip.evaluation.zero_shot import templates_for
    from fastclip.training.finetune import finetune
    from fastclip.training.wise_ft import ensemble_accuracies

    if not args.val_data and (args.reference or args.wise_ft == "sweep"):
        option = "--reference" if args.reference else "--wise-ft sweep"
        raise ValueError(f"{option} needs --val-data, to evaluate on")
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
            accuracies = ensemble_accuracies(run, val, alphas, batch_size=size, workers=options.workers, progress=True)
            _report(args, accuracies, reference, published, saved)


def _report(
    args: argparse.Namespace,
    accuracies: dict[float, dict[str, Any]],  # by alpha
    reference: str | None,
    published: dict[str, float],
    saved: float,
) -> None:
    """Print the tables, and write results.json."""
    from pathlib import Path

    from fastclip.evaluation.published import MEAN_PER_CLASS
    from fastclip.evaluation.results import result, table, write_results
    from fastclip.training.wise_ft import forget_accuracies

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
        for alpha, metrics in accuracies.items()
    ]
    write_results(Path(args.output) / "results.json", results)
    forget_accuracies(args.output)
    labels = {0.0: "0 (zero-shot)", 1.0: "1 (fine-tuned)"}
    rows = [[labels.get(alpha, f"{alpha:g}"), *map(percent, one.values())] for alpha, one in accuracies.items()]
    say(table(["alpha", *accuracies[1.0]], rows))
    if reference is not None:
        metric = "mean_per_class_recall" if reference in MEAN_PER_CLASS else "acc1"
        ours = {"zero-shot": 100 * accuracies[0.0][metric], f"alpha {saved:g}": 100 * accuracies[saved][metric]}
        say("\n" + table([reference, metric], list({**ours, **published}.items())))
