"""``fastclip plan``"""

from __future__ import annotations

import argparse

from fastclip.cli.printing import say

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Predict the memory that each process of a training run needs, and of how many pairs it can hold the "
        "activations at a time: the run's --micro-batch. Nothing is computed or allocated. Exit status 1 when it does "
        "not fit."
    )
    parser.add_argument("--model", required=True, help="a name of fastclip models, or a configuration ending in .json")
    parser.add_argument("--batch-size", type=int, required=True, help="pairs of all processes")
    parser.add_argument("--world-size", type=int, default=1, help="processes, each with a device (1)")
    parser.add_argument("--memory", type=float, help="GiB a process has; default: this GPU's, or the machine's")
    parser.add_argument(
        "--micro-batch", type=int, help="pairs at a time; default: an even part of the largest that fits"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast (fp32)")
    parser.add_argument("--grad-checkpointing", action="store_true", help="keep the blocks' inputs only")
    parser.add_argument("--optimizer", choices=("adamw", "lamb"), default="adamw", help="(adamw)")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="whole models, or shards (ddp)")
    parser.add_argument("--comm", choices=("gather", "ring"), default="gather", help="of the loss (gather)")
    parser.add_argument("--ema", action="store_true", help="with a moving average of the weights")
    parser.add_argument("--lock-image", action="store_true", help="the image tower is frozen")
    parser.add_argument("--lock-text", action="store_true", help="the text tower is frozen")
    parser.add_argument("--image-size", type=int, help="pixels, in place of the model's")
    parser.add_argument("--context-length", type=int, help="tokens, in place of the model's")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where the run will be (cuda)")
    parser.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from fastclip.models.factory import create_model
    from fastclip.training import plan as predict
    from fastclip.training.planning.report import machine_memory, readable, remedies, table

    if args.memory is not None and not 0 < args.memory < 2**30:
        raise ValueError(f"--memory must be above 0 GiB and below 2**30, got {args.memory}")
    if args.lock_image and args.lock_text:
        raise ValueError("--lock-image and --lock-text together leave nothing to train")
    memory = machine_memory(args.device) if args.memory is None else int(args.memory * 2**30)
    model = create_model(args.model, device="meta", image_size=args.image_size, context_length=args.context_length)
    model.set_grad_checkpointing(args.grad_checkpointing)
    if args.lock_image:
        model.lock_image_tower()
    if args.lock_text:
        model.lock_text_tower()
    names = ("batch_size", "world_size", "micro_batch", "precision", "optimizer", "parallel", "comm", "ema", "device")
    plan = predict(model, **{name: getattr(args, name) for name in names})
    largest, even = plan.largest_micro_batch(memory), plan.even_micro_batch(memory)
    if args.micro_batch is None:
        plan = replace(plan, micro_batch=even or 1)

    say(f"{args.model}, {table(plan)}\n")
    if largest == plan.pairs:
        print(f"all {largest:,} pairs of a process fit into {readable(memory)} at once: no gradient caching is needed")
    elif largest:
        print(
            f"largest micro-batch in {readable(memory)}: {largest:,} of a process's {plan.pairs:,} pairs; use {even:,}"
        )
    else:
        helps = ", ".join(remedies(plan, grad_checkpointing=args.grad_checkpointing))
        one = readable(replace(plan, micro_batch=1).total)
        print(f"not even one pair at a time fits into {readable(memory)}: it takes {one}; what helps: {helps}")
    print(f"on the host: {readable(plan.host)} of images and texts a step and process, as much again for the next step")
    return int(not largest or plan.total > memory)
