"""``fastclip finetune``: fine-tune the image tower from the zero-shot classifier, with weight-space ensembles."""

from __future__ import annotations

import argparse
from typing import Any

from fastclip.cli.embedding import add_embedder_options
from fastclip.cli.evaluate.zeroshot import add_templates_option, percent
from fastclip.cli.help import HELP, OptionsHelp, describe
from fastclip.cli.outputs import add_force, owned_output
from fastclip.cli.pictures import add_labelled_data, add_max_pixels, add_reference
from fastclip.cli.printing import say
from fastclip.data.faults import shown
from fastclip.system.plural import counted

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Fine-tune the image tower and a linear head, which starts as the zero-shot classifier, in one process. The "
        "defaults are those of Wortsman et al. 2022 (WiSE-FT). Re-run the same command to resume.",
        "fastclip finetune --checkpoint runs/digits --data digits --val-data digits --output runs/tuned --epochs 5",
        "fastclip finetune --checkpoint runs/b32 --data food101/train --val-data food101/test --wise-ft sweep \\\n"
        "    --output runs/food --batch-size 256 --lr 1e-5",
    )
    # tyro reads the options of training, so that argparse does not know them
    parser.usage = "%(prog)s [-h] --checkpoint PATH --data SPEC --output DIR [OPTIONS] [TRAINING OPTIONS]"
    add_embedder_options(parser)
    add_labelled_data(parser)
    parser.add_argument(
        "--val-data",
        metavar="SPEC",
        help="images with the same classes to evaluate on at the end; `digits` means the fifth of the digits that "
        "--data digits leaves out (default: no evaluation)",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder of the run: checkpoints, model/ and results.json"
    )
    add_max_pixels(parser)
    add_force(parser)
    parser.add_argument(
        "--wise-ft",
        type=_alpha,
        metavar="ALPHA",
        help="factor alpha, from 0 to 1, of the saved model: alpha times the fine-tuned weights plus 1 - alpha times "
        "the zero-shot weights. `sweep` evaluates alpha = 0, 0.1, ..., 1 and saves the model of alpha = 1 (default: 1)",
    )
    add_templates_option(parser, default="the templates that come with the dataset, otherwise openai")
    add_reference(parser, "--val-data")
    parser.add_argument("-h", "--help", action=OptionsHelp, options_help=_options_help, help=HELP)
    parser.set_defaults(run=_finetune)


def _options_help() -> None:
    from fastclip.training.options import parse_finetune

    parse_finetune(["--help"])


def _alpha(word: str) -> float | str:
    if word == "sweep":
        return word
    alpha = float(word)
    if not 0 <= alpha <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, or sweep, got {word}")
    return alpha


def _finetune(args: argparse.Namespace) -> None:
    from fastclip.training.options import parse_finetune

    options = parse_finetune(args.words)  # before the slow imports, so that a misspelt option is reported at once
    from fastclip.cli.embedding import embedder_of
    from fastclip.data.spec import open_labelled
    from fastclip.evaluation.published import top1, top1_dataset
    from fastclip.evaluation.zero_shot import templates_for
    from fastclip.training.finetune import finetune
    from fastclip.training.wise_ft import ensemble_accuracies

    if not args.val_data and (args.reference or args.wise_ft == "sweep"):
        option = "--reference" if args.reference else "--wise-ft sweep"
        raise ValueError(f"{option} needs --val-data, the data to evaluate on")
    reference = args.reference or top1_dataset(args.val_data or "")
    published = top1(reference) if reference is not None else {}
    with owned_output(args):
        source = open_labelled(args.data, held_out=False)
        templates = templates_for(source, args.templates)
        val = open_labelled(args.val_data) if args.val_data else None
        if val is not None and val.class_names != source.class_names:
            odd = sorted({*source.class_names} ^ {*val.class_names})
            raise ValueError(
                f"--data {args.data} and --val-data {args.val_data} must have the same classes in the same order"
                + (f": only one of them has {shown(odd[0])}" if odd else "")
            )
        run = finetune(embedder_of(args), source, options, output=args.output, templates=templates)
        if not run.complete:
            say(f"{run.folder}: {counted(run.steps, 'step')} so far; re-run the same command to resume")
            return
        saved = 1.0 if args.wise_ft in (None, "sweep") else args.wise_ft
        run.mix(saved)
        steps = f"{counted(run.steps, 'step')} in all, {len(run.losses):,} of them in this run"
        say(f"{run.save()}: {steps}; alpha {saved:g}")
        if val is not None:
            alphas = [k / 10 for k in range(11)] if args.wise_ft == "sweep" else sorted({0.0, saved, 1.0})
            size = options.micro_batch or options.batch_size
            accuracies = ensemble_accuracies(run, val, alphas, batch_size=size, workers=options.workers, progress=True)
            _report(args, accuracies, reference, published, saved)


def _report(
    args: argparse.Namespace,
    accuracies: dict[float, dict[str, Any]],  # keys are alphas
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
