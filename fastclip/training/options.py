"""Options of training and of fine-tuning: dataclasses that YAML files and the command line fill.

Imports nothing heavy, so that ``--help`` answers at once.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fastclip.system.durable import write_text
from fastclip.system.reading import read_yaml
from fastclip.system.rounding import ceil_div
from fastclip.training.option_words import OptionWords, joined, parse_dataclass

__all__ = ["FinetuneOptions", "TrainOptions", "parse_finetune", "parse_options", "read_options", "write_options"]

Loss = Literal["clip", "unicl", "align", "convirt", "siglip", "global"]


@dataclass(frozen=True)
class TrainOptions:
    """Options of ``fastclip train``, whose help shows the docstrings of the fields."""

    data: str
    """Training data: `digits` (the built-in example dataset: scikit-learn's handwritten digits), a .csv or .tsv file
    with a column of image paths and one of captions, splits of Karpathy's file for COCO or Flickr30K such as
    `dataset_coco.json:train+restval` (images beside the file or in images/ beside it), a folder of images with captions
    or with one subfolder per class, tar shards such as `shards/{0000..0099}.tar` or their URL, `hf:NAME` or
    `hf:NAME:SPLIT` (a dataset of the Hugging Face Hub), or several of these joined by `::`, with weights as in
    `2*A::0.5*B`."""
    model: str
    """Name of a model, as `fastclip models` lists them, or path of a configuration file that ends in .json. The
    vocabulary of a BERT text tower is looked for beside the configuration file and in Hugging Face's cache."""
    output: str
    """Folder of the run: metrics.jsonl, TensorBoard events, config.yaml, checkpoints/ and, at the end, model/."""
    val_data: str | None = None
    """Validation data, in any form that --data takes; `digits` means the fifth of the digits that --data digits leaves
    out (default: no validation)."""
    pretrained: str | None = None
    """Checkpoint to start from: folder of a run, its model/, or a local file or folder in the format of OpenAI,
    open_clip or Hugging Face (default: random weights)."""
    image_size: int | None = None
    """Side of the input images in pixels; position embeddings that are loaded from a checkpoint of another size are
    interpolated (default: the model's)."""
    context_length: int | None = None
    """Tokens per text; position embeddings that are loaded from a checkpoint of another length are interpolated
    (default: the model's)."""

    loss: Loss | None = None
    """Training loss. `clip` is the softmax loss in both directions, `unicl` treats all pairs of one label as positives,
    `align` adds label smoothing and sums the directions, `convirt` weights the directions and fixes the temperature,
    `siglip` is the pairwise sigmoid loss, and `global` estimates the loss over the whole dataset with running means of
    each pair, for small batches (SogCLR, FastCLIP) (default: unicl for Florence models, align for ALIGN models, clip
    for all other listed models)."""
    label_smoothing: float | None = None
    """Label smoothing of the loss, from 0 to 1; siglip and global have none (default: 0.1 for align and 0 for the other
    losses, unless the train_cfg of a configuration file given as --model sets another value)."""
    image_weight: float | None = None
    """Weight of the image-to-text direction, from 0 to 1; siglip and global have none (default: 0.75 for convirt, 0.5
    for the other losses)."""
    prefixes: tuple[int, ...] | None = None
    """Lengths of prefixes of the features, such as 64 128 512. The loss is the sum of the losses of these prefixes, so
    that features can later be cut to any of these lengths; not for global (default: the loss of the whole features
    alone)."""
    gamma: float | None = None
    """Weight of the batch in the running means of the global loss, above 0 and at most 1 (default: 0.2)."""
    gamma_schedule: Literal["constant", "cosine"] | None = None
    """Course of --gamma: constant, or falling with each epoch from 1 to --gamma along a cosine, which it reaches after
    half of the epochs (default: cosine)."""
    rho: float | None = None
    """Margin of the global loss that keeps its learned temperature low, at least 0 (default: 6.5)."""
    temperature: float | None = None
    """Fixed temperature of the global loss, from 0.01 to 1, in place of a learned one with --rho (default: learned)."""
    distill: tuple[str, ...] | None = None
    """Checkpoints of frozen teachers: paths as --checkpoint of other commands takes them, or MODEL=PATH for a file
    without configuration. The distillation loss of their softmaxes is added to the loss (default: no teacher)."""
    distill_weight: float | None = None
    """Weight of the distillation loss, at least 0 (default: 1.0)."""
    comm: Literal["gather", "ring"] = "gather"
    """Exchange of features between processes for the loss: with gather, every process holds the text features of the
    whole batch; with ring, it holds the text features of two processes at a time, one in use and one in transfer, which
    needs less memory."""
    backend: str | None = None
    """Backend of the loss, a name that `fastclip doctor` lists (default: the best one available)."""

    batch_size: int = 256
    """Pairs per step, summed over all processes. If the dataset has fewer, a batch spans consecutive epochs."""
    micro_batch: int | Literal["auto"] = "auto"
    """Pairs per process whose activations are in memory at once. A value below the process's share of the batch enables
    gradient caching, which computes the same gradients in less memory, at the cost of a second forward pass. With auto,
    it is the whole share if memory is predicted to suffice, and otherwise the number with the least work."""
    keep_graphs: int | Literal["auto"] = "auto"
    """Number of micro-batches per process whose activations gradient caching keeps in memory. They need no second
    forward pass, and the gradients are the same bit for bit. With auto, as many are kept as memory is predicted to
    hold."""
    epochs: int = 32
    """Passes over the data."""
    max_bad: float = 0.01
    """Largest share of unusable samples that is tolerated, from 0 to 1. Unusable samples are replaced by others;
    above this share the run stops."""
    max_pixels: int | None = None
    """Largest number of pixels of an image (width times height); larger images are unusable (default: 89478485)."""
    max_steps: int | None = None
    """Length of the schedule in steps, in place of --epochs (default: --epochs passes over the data)."""
    stop_after: int | None = None
    """Number of steps after which this command ends early, counted from where it starts or resumes; it leaves a
    checkpoint to resume from (default: the end of the schedule)."""

    optimizer: Literal["adamw", "lamb"] | None = None
    """Optimiser (default: lamb for ALIGN models, adamw for all other listed models)."""
    lr: float | None = None
    """Learning rate at the end of the warm-up (default: 1e-3 for ALIGN models, 5e-4 for all other listed models)."""
    warmup: int | None = None
    """Steps in which the learning rate rises from 0 to --lr, before it falls to 0 along a cosine (default: 2000, or a
    tenth of the steps if that is less)."""
    weight_decay: float | None = None
    """Weight decay of matrices; biases, norms and the logit scale have none (default: 1e-5 for ALIGN models, 0.2 for
    all other listed models)."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of the moving averages of the gradients and of their squares."""
    eps: float = 1e-6
    """Constant added to the denominator of the optimiser's update."""
    max_grad_norm: float | None = 1.0
    """Largest norm of the gradients. Larger gradients are scaled down to it (default: 1.0; None disables
    clipping)."""
    ema: float | None = None
    """Decay of a moving average of the weights, such as 0.9999. If it is given, the average is validated and saved as
    model/ in place of the weights (default: no average)."""
    lock_image: bool = False
    """Freeze the image tower (LiT)."""
    lock_text: bool = False
    """Freeze the text tower."""
    patch_dropout: float = 0.0
    """Share of an image's patches that a ViT leaves out in training, drawn anew for each image (FLIP)."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the towers; bf16 uses autocast, and leaves the weights and everything else in fp32."""
    grad_checkpointing: bool = False
    """Keep only the inputs of each transformer block and recompute the rest, which saves memory at the cost of about a
    third more time."""
    compile: bool | None = None
    """Compile the blocks of both towers with torch.compile (default: on for GPUs, off for CPUs)."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Parallelism under torchrun: each process holds the whole model (ddp) or a shard of it (fsdp, FSDP2)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on (default: auto, which is a GPU for each process if there are enough, otherwise the CPU)."""
    features_on: Literal["device", "cpu"] = "device"
    """Memory in which gradient caching keeps the features. With cpu, the loss is computed on the CPU as well;
    this requires gradient caching and, on a GPU, a single process."""
    deterministic: bool = False
    """Use only deterministic kernels on a GPU; a CPU repeats a run bit for bit without this option."""

    seed: int = 0
    """Random seed for the weights, the order of the data, augmentation and dropout."""
    workers: int = 2
    """Processes that read images, for each training process."""
    log_every: int = 1
    """Steps between two lines of metrics.jsonl."""
    save_every: int | None = None
    """Steps between two checkpoints; the last step always has one (default: only the last step)."""
    keep: int | None = 3
    """Number of newest checkpoints that are kept. Older ones are removed when another is written (default: 3; None
    keeps all)."""
    async_save: bool = True
    """Write checkpoints in the background, from a copy in memory, while training continues."""
    val_every: int | None = None
    """Steps between two validations on --val-data; the last step always has one (default: only the last step)."""
    timeout: float = 600.0
    """Seconds that a process waits for the others. If they take longer, the run ends, because one of them must be
    lost or hanging."""
    wandb: str | None = None
    """Weights & Biases project to which the metrics are also sent (default: no project)."""
    resume: str | None = None
    """Checkpoint or run to resume from; `auto` means the newest checkpoint of --output, or a new run if there is none
    (default: a new run)."""
    force: bool = False
    """Use an output that is still locked by a command on another host; only safe if that command has ended."""

    def largest_share(self, ranks: int) -> int:
        """Return the number of pairs per step of the process that has the most."""
        return ceil_div(self.batch_size, ranks)

    def is_cached(self, ranks: int) -> bool:
        """Return True if a step needs gradient caching, because a process has more pairs than a micro-batch holds."""
        return isinstance(self.micro_batch, int) and self.micro_batch < self.largest_share(ranks)

    def __post_init__(self) -> None:
        """Raise ValueError if no run can have these values."""
        for option in fields(self):
            if getattr(self, option.name) == "":  # as from a shell variable that is not set
                raise ValueError(f"{flag(option.name)} is empty: give a value or leave it out")
        for name in ("micro_batch", "keep_graphs"):
            value = getattr(self, name)
            if isinstance(value, str) and value != "auto":
                raise ValueError(f"{flag(name)} must be a number or auto, got {value!r}")
        if self.epochs < 1:
            raise ValueError(f"--epochs must be at least 1, got {self.epochs}")
        _check_numbers(self)
        if self.timeout > _LONGEST:
            raise ValueError(f"--timeout must be at most {_LONGEST} seconds, got {self.timeout:g}")
        if self.ema is not None and not 0 <= self.ema < 1:  # at 1 the average would never leave the first weights
            raise ValueError(f"--ema must be at least 0 and below 1, got {self.ema}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"--betas must be at least 0 and below 1, got {self.betas}")
        lengths = (1,) if self.prefixes is None else self.prefixes
        if not lengths or min(lengths) < 1 or len(set(lengths)) < len(lengths):
            raise ValueError(f"--prefixes must be distinct numbers of at least 1, got {lengths}")
        of_global = ("gamma", "gamma_schedule", "rho", "temperature")
        if self.loss != "global" and (given := [name for name in of_global if getattr(self, name) is not None]):
            raise ValueError(f"{flag(given[0])} belongs to --loss global: leave it out, or choose that loss")
        if self.rho is not None and self.temperature is not None:
            raise ValueError("--rho has no effect on a fixed --temperature: leave one of them out")
        if self.loss == "global" and self.prefixes is not None:
            raise ValueError("--loss global has no --prefixes: leave them out, or choose another loss")
        if self.loss == "global" and self.batch_size == 1:
            raise ValueError("--loss global needs a --batch-size of at least 2: a single pair has no negative")
        if self.lock_image and self.lock_text:
            raise ValueError("--lock-image and --lock-text together leave nothing to train: leave one of them out")
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(f"--patch-dropout must be at least 0 and below 1, got {self.patch_dropout}")
        if self.patch_dropout and self.lock_image:
            raise ValueError("--patch-dropout has no effect on a frozen tower: leave it or --lock-image out")
        if self.val_every is not None and self.val_data is None:
            raise ValueError("--val-every needs --val-data, the data to validate on")


@dataclass(frozen=True)
class FinetuneOptions:
    """Options of fine-tuning an image tower; the defaults are those of Wortsman et al. 2022 on ImageNet."""

    epochs: float = 10
    """Passes over the data."""
    batch_size: int = 512
    """Images per step."""
    micro_batch: int | None = None
    """Images whose activations are in memory at once (default: all images of the step)."""
    lr: float = 3e-5
    """Learning rate at the end of the warm-up."""
    weight_decay: float = 0.1
    """Weight decay of matrices; biases, norms and the logit scale have none."""
    warmup: int | None = None
    """Steps in which the learning rate rises from 0 to --lr, before it falls to 0 along a cosine (default: 500, or a
    tenth of the steps if that is less)."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradients. Larger gradients are scaled down to it."""
    freeze_image: bool = False
    """Freeze the image tower and train only the head (--lock-image of fastclip train)."""
    grad_checkpointing: bool = False
    """Keep only the inputs of each transformer block and recompute the rest, which saves memory at the cost of about a
    third more time."""
    seed: int = 0
    """Random seed for the order of the data, crops and dropout."""
    workers: int = 2
    """Processes that read images."""
    log_every: int = 1
    """Steps between two lines of metrics.jsonl."""
    save_every: int | None = None
    """Steps between two checkpoints; the last step always has one (default: the steps of one epoch)."""
    keep: int = 2
    """Number of newest checkpoints that are kept. Older ones are removed when another is written."""
    max_bad: float = 0.01
    """Largest share of unusable samples that is tolerated, from 0 to 1. Unusable samples are replaced by others;
    above this share the run stops."""
    stop_after: int | None = None
    """Number of steps after which this command ends early, counted from where it starts or resumes; it leaves a
    checkpoint to resume from (default: the end of the schedule)."""

    def __post_init__(self) -> None:
        """Raise ValueError if no run can have these values."""
        _check_numbers(self)


_LONGEST = 86400 * 365  # seconds in a year; neither timedelta nor a process group takes arbitrarily large numbers
_AT_LEAST_ONE = (
    *("batch_size", "micro_batch", "max_steps", "stop_after"),
    *("log_every", "save_every", "keep", "val_every", "image_size", "context_length"),
)
_LIMITS: dict[str, tuple[tuple[str, ...], Callable[[float], bool]]] = {
    "at least 1": (_AT_LEAST_ONE, lambda value: value >= 1),
    "finite and not negative": (
        ("seed", "workers", "warmup", "weight_decay", "keep_graphs", "rho", "distill_weight"),
        lambda value: 0 <= value < math.inf,
    ),
    "below 2**63": (("seed",), lambda value: value < 2**63),
    "finite and above 0": (("epochs", "lr", "eps", "timeout"), lambda value: 0 < value < math.inf),
    "above 0": (("max_grad_norm",), lambda value: value > 0),  # infinity is allowed: it clips nothing
    "above 0 and at most 1": (("gamma",), lambda value: 0 < value <= 1),
    # The scale of the logits, 1 / temperature, stays between 1 and 100
    "between 0.01 and 1": (("temperature",), lambda value: 0.01 <= value <= 1),
    "between 0 and 1": (("label_smoothing", "image_weight", "max_bad"), lambda value: 0 <= value <= 1),
}


def _check_numbers(options: TrainOptions | FinetuneOptions) -> None:
    """Raise ValueError for a number outside its limits; None, which means the default, and "auto" pass."""
    for limit, (names, holds) in _LIMITS.items():
        for name in names:
            value = getattr(options, name, None)
            if value is not None and value != "auto" and not holds(value):
                raise ValueError(f"{flag(name)} must be {limit}, got {value}")


def flag(name: str) -> str:
    """Return the option of a field: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


_CONFIG = OptionWords(
    "YAML file with options, such as the config.yaml of another run; --config may be repeated, a later file takes "
    "precedence over an earlier one, and the command line over all files",
    "(default: no file)",
    "FILE",
)


def parse_options(argv: Sequence[str]) -> TrainOptions:
    """Read the options of a command line; each ``--config FILE`` gives values that later files and options replace.

    Ends the process as argparse does: with status 0 after ``--help``, and with status 2 for an unknown option or a
    wrong value.
    """
    given, files = [], []
    words = iter(argv)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            path = word.partition("=")[2] or next(words, "")
            if not path:
                raise ValueError("--config needs the path of a YAML file")
            files.append(Path(path))
        else:
            given.append(word)
    values = [read_yaml(path) for path in files]
    # config.yaml of a run contains max_steps, which was computed from --epochs and would take precedence over it
    if any(word.partition("=")[0] == "--epochs" for word in given):
        came = ("max_steps", "warmup", "max-steps")
        values = [{name: value for name, value in one.items() if name not in came} for one in values]
    from_files = [word for one, path in zip(values, files) for word in _as_words(one, path)]
    return parse_dataclass(
        TrainOptions,
        prog="fastclip train",
        description="Train an image-text model, in one process or as one of the processes that torchrun starts. "
        "Defaults that depend on the model are given for the models that `fastclip models` lists; the train_cfg of a "
        "configuration file given as --model may set others.",
        args=[*from_files, *joined("--distill", given)],
        also={"config": _CONFIG},
    )


def parse_finetune(argv: Sequence[str]) -> FinetuneOptions:
    """Read the options of a command line, and end the process as `parse_options` does."""
    return parse_dataclass(FinetuneOptions, prog="fastclip finetune", description="Training options:", args=argv)


def read_options(path: Path) -> TrainOptions:
    """Read the options from a YAML file that `write_options` wrote."""
    return parse_options(_as_words(read_yaml(path), path))


def write_options(options: TrainOptions, path: Path) -> None:
    """Write all options except ``resume``, ``force`` and ``stop_after``, which belong to one call."""
    import yaml

    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(options).items()}
    values = {name: value for name, value in values.items() if name not in ("resume", "force", "stop_after")}
    write_text(path, yaml.safe_dump(values, sort_keys=False))


def _as_words(values: dict[str, Any], path: Path) -> list[str]:
    """Return the words that a user would have typed for the values of a file; null means the default."""
    known = [f.name for f in fields(TrainOptions)]
    words: list[str] = []
    for written, value in values.items():
        name = str(written).replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {close[0]}?" if close else f"; options are {', '.join(known)}"
            raise ValueError(f"{path}: there is no option {written}{hint}")
        if flag(name) in words or flag(f"no_{name}") in words:
            raise ValueError(f"{path}: {name} is given twice: keep one of the two lines")
        if isinstance(value, dict):
            raise ValueError(f"{path}: {written} must be a value or a list, got {value}")
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        elif isinstance(value, list):
            words += [flag(name), *map(str, value)]
        elif value is not None or name in ("max_grad_norm", "keep"):
            words += [flag(name), str(value)]
    return words
