"""``fastclip plan``: predict the memory and the speed of a training run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastclip.cli.help import add_training_option, describe
from fastclip.cli.printing import say

if TYPE_CHECKING:
    from fastclip.models import DualEncoder
    from fastclip.training import Plan
    from fastclip.training.planning.teachers import TeachersPlan

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Predict the memory that each process of a training run needs, the largest micro-batch with which it fits, "
        "what fastclip train chooses for --micro-batch auto and --keep-graphs auto, and the seconds of a step. The "
        "options describe that run; no model is trained, none is loaded except a teacher given by its path, and no GPU "
        "is needed. --optimizer defaults to adamw for every model, while fastclip train uses lamb for ALIGN models. "
        "Its update takes more memory on a GPU, which matters if micro-batches are small. The exit status is 1 if the "
        "run does not fit.",
        "fastclip plan --model ViT-B-32 --batch-size 32768",
        "fastclip plan --model ViT-L-14 --batch-size 65536 --world-size 8 --memory 79 --precision bf16",
        "fastclip plan --model ViT-B-32 --batch-size 32768 --memory 140 --precision bf16 --tflops 790 --tokens 20",
    )
    add_training_option(parser, "model", required=True)
    add_training_option(parser, "batch_size", type=int, required=True)
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="processes, each with its own device")
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GIB",
        help="memory of each process in GiB; a GPU sold as 80 GB reports about 79 GiB (default: the memory of the "
        "first GPU, or of this machine with --device cpu)",
    )
    for name in ("micro_batch", "keep_graphs"):
        add_training_option(parser, name, type=_auto_or_number, default="auto", default_words="auto")
    add_training_option(parser, "precision", choices=("fp32", "bf16"), default="fp32")
    add_training_option(parser, "grad_checkpointing", action="store_true")
    add_training_option(parser, "optimizer", choices=("adamw", "lamb"), default="adamw")
    add_training_option(parser, "parallel", choices=("ddp", "fsdp"), default="ddp")
    add_training_option(parser, "comm", choices=("gather", "ring"), default="gather")
    parser.add_argument(
        "--ema",
        action="store_true",
        help="include the memory of a moving average of the weights (--ema of fastclip train)",
    )
    add_training_option(parser, "lock_image", action="store_true")
    add_training_option(parser, "lock_text", action="store_true")
    add_training_option(parser, "patch_dropout", type=float, default=0.0)
    add_training_option(parser, "image_size", type=int, default_words="the model's")
    add_training_option(parser, "context_length", type=int, default_words="the model's")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="device of the planned run")
    add_training_option(parser, "distill", nargs="+", action="extend", default_words="no teacher")
    add_training_option(parser, "prefixes", nargs="+", type=int, metavar="N", default_words="the whole features alone")
    parser.add_argument(
        "--samples",
        type=int,
        default=0,
        metavar="N",
        help="samples of the dataset of a run with --loss global, which holds running means of each",
    )
    _add_speed_options(parser)
    parser.set_defaults(run=_plan)


def _add_speed_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tflops",
        type=float,
        metavar="RATE",
        help="rate of large matrix products on the device of a process, in TFLOP/s (default: measured if this machine "
        "has a device of the planned kind)",
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        metavar="SHARE",
        help="share of that rate that a step reaches (default: a measured one, which is printed)",
    )
    parser.add_argument(
        "--tokens",
        type=float,
        metavar="N",
        help="tokens of a text on average, for the seconds of a step (default: the context length)",
    )


def _auto_or_number(text: str) -> str | int:
    if text != "auto" and not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number or auto, got {text!r}")
    return text if text == "auto" else int(text)


def _choice(p: Plan) -> str:
    """Return what fastclip train chooses."""
    from fastclip.training.planning.choose import SHARE

    kept = f" and keeps {p.kept_graphs:,} of {p.micro_batches:,} graphs" if p.kept_graphs else ""
    twice = max(0.0, 1 - p.kept_graphs * p.micro_batch / p.pairs)
    return (
        f"fastclip train chooses {p.micro_batch:,}{kept}: {twice:.0%} of the pairs are embedded twice. It uses at most "
        f"{SHARE[p.device]:.0%} of the memory where that is enough"
    )


def _model(args: argparse.Namespace) -> DualEncoder:
    """Return the model without weights, after a check of the other options."""
    from fastclip.models.factory import create_model
    from fastclip.training.from_options import Towers

    if args.memory is not None and not 0 < args.memory < 2**30:
        raise ValueError(f"--memory must be above 0 GiB and below 2**30, got {args.memory}")
    for option, value, most in (("tflops", args.tflops, 1e9), ("utilisation", args.utilisation, 1.0)):
        if value is not None and not 0 < value <= most:
            raise ValueError(f"--{option} must be above 0 and at most {most:g}, got {value:g}")
    if args.lock_image and args.lock_text:
        raise ValueError("--lock-image and --lock-text together leave nothing to train: leave one of them out")
    model = create_model(args.model, device="meta", image_size=args.image_size, context_length=args.context_length)
    Towers.of(args).prepare(model)
    return model


def _teachers(args: argparse.Namespace, student: DualEncoder) -> TeachersPlan:
    """Return the plan of the teachers, each of which may be the name of a model, too."""
    from fastclip.models.embedder import load_model
    from fastclip.models.loading import named_config
    from fastclip.training.planning.teachers import plan_teachers
    from fastclip.training.teachers import check_context, split_teacher

    assert student.config is not None
    configs = []
    for spec in args.distill or ():
        name, path = split_teacher(spec)
        config = load_model(path)[0].config if name is None and Path(path).exists() else named_config(name or path)
        assert config is not None
        check_context(spec, config, student.config)
        configs.append(config)
    length = student.config.text_cfg.context_length
    return plan_teachers(configs, context_length=length, precision=args.precision, device=args.device)


def _plan(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from fastclip.training import plan as predict
    from fastclip.training.planning.choose import SHARE, choose, has_statistics
    from fastclip.training.planning.report import machine_memory, readable, remedies, table
    from fastclip.training.planning.speed import machine_rate, sentences

    model = _model(args)
    memory = machine_memory(args.device) if args.memory is None else int(args.memory * 2**30)
    names = ["batch_size", "world_size", "precision", "optimizer", "parallel", "comm", "ema", "device"]
    names += ["prefixes", "samples"]
    given = {
        name: None if (value := getattr(args, name)) == "auto" else value for name in ("micro_batch", "keep_graphs")
    }
    teachers = _teachers(args, model)
    least: dict[str, Any] = {
        "teachers": teachers,
        "micro_batch": given["micro_batch"],
        "keep_graphs": given["keep_graphs"] or 0,
    }
    plan = predict(model, **{name: getattr(args, name) for name in names}, **least)
    largest, statistics = plan.largest_micro_batch(memory), has_statistics(model)
    limits = (SHARE[args.device] * memory, memory)

    def chosen(**values: Any) -> Plan | None:
        return next(filter(None, (choose(plan, limit, largest=statistics, **values) for limit in limits)), None)

    if args.tokens is not None and not 1 <= args.tokens <= plan.context_length:
        raise ValueError(f"--tokens must be from 1 to the context length {plan.context_length}, got {args.tokens:g}")
    auto = chosen(keep_graphs=given["keep_graphs"])
    plan = chosen(**given) or (plan if given["micro_batch"] else replace(plan, micro_batch=1))

    say(f"{args.model}, {table(plan)}\n")
    if auto is not None and not auto.cached:
        print(f"all {largest:,} pairs of a process fit into {readable(memory)} at once; no gradient caching is needed")
    elif largest:
        share = f"{largest:,} of a process's {plan.pairs:,} pairs"
        print(f"largest micro-batch in {readable(memory)}: {share}")
        if auto is not None:
            print(_choice(auto))
    else:
        helps = ", ".join(remedies(plan, grad_checkpointing=args.grad_checkpointing))
        one = readable(replace(plan, micro_batch=1, keep_graphs=0).total)
        print(f"not even one pair at a time fits into {readable(memory)}: it takes {one}. To save memory: {helps}")
    print(
        f"on the host, each process needs {readable(plan.host)} for the images and texts of a step, and the same again "
        "for the next step"
    )
    if largest:
        rate = machine_rate(plan) if args.tflops is None else args.tflops * 1e12
        print(sentences(plan, rate, utilisation=args.utilisation, tokens=args.tokens))
    return int(not largest or plan.total > memory)
