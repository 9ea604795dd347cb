"""Options of training and of fine-tuning: dataclasses, filled by YAML files and by the command line.

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

__all__ = ["FinetuneOptions", "TrainOptions", "parse_finetune", "parse_options", "read_options", "write_options"]

Loss = Literal["clip", "unicl", "align", "convirt", "siglip"]


@dataclass(frozen=True)
class TrainOptions:
    """Train an image-text model."""

    data: str
    """Training pairs: `digits`, a .csv or .tsv of filepath and title, `dataset_coco.json:train+restval`, a folder of
    pictures with captions or with a folder a class, tar shards such as `shards/{0000..0099}.tar` or a URL of them,
    `hf:NAME`; or several of these, joined by `::`, with weights as in `2*A::0.5*B`."""
    model: str
    """A name of `fastclip models`, or the path of a configuration ending in .json."""
    output: str
    """Folder of the run: metrics.jsonl, TensorBoard events, config.yaml, checkpoints/ and at the end model/."""
    val_data: str | None = None
    """Pairs to validate on, as --data; `digits` holds a fifth of its images out."""
    pretrained: str | None = None
    """Checkpoint to start from: what `fastclip.create_model(pretrained=)` reads."""
    image_size: int | None = None
    """Pixels, in place of the model's."""
    context_length: int | None = None
    """Tokens a caption, in place of the model's."""

    loss: Loss | None = None
    """clip; unicl: pairs of one label are all positives; align: smoothed, both directions summed; convirt: weighted
    directions, fixed temperature; siglip: the pairwise sigmoid loss. The model's own where it is not given."""
    label_smoothing: float | None = None
    """0 to 1; the model's own, for align 0.1."""
    image_weight: float | None = None
    """Weight of image -> text, 0 to 1; 0.5, for convirt 0.75."""
    comm: Literal["gather", "ring"] = "gather"
    """How the loss meets the texts of other processes: all at once, or passed around."""
    backend: str | None = None
    """Of the loss, a name of `fastclip.backends()`; the best available."""

    batch_size: int = 256
    """Pairs a step over all processes. More than there are data: drawn from consecutive epochs."""
    micro_batch: int | None = None
    """Pairs of a process whose activations are kept at a time; fewer than its share of the batch: gradient caching, the
    same gradients for a second forward pass. All at once where it is not given."""
    epochs: int = 32
    """Passes over the data; --max-steps overrides it."""
    max_bad: float = 0.01
    """The largest share of samples that cannot be used, 0 to 1: others take their places, above it the run stops."""
    max_pixels: int | None = None
    """Pixels of the largest picture that is read (89478485); larger ones cannot be used."""
    max_steps: int | None = None
    """Length of the schedule."""
    stop_after: int | None = None
    """Steps of this call: ends early, with a checkpoint from which --resume goes on."""

    optimizer: Literal["adamw", "lamb"] | None = None
    """The model's own: ALIGN's is LAMB, all others' AdamW."""
    lr: float | None = None
    """Learning rate at the end of the warm-up; the model's own, for CLIP 5e-4."""
    warmup: int | None = None
    """Steps from 0 to --lr, a cosine to 0 follows; 2,000, or a tenth of the steps if that is less."""
    weight_decay: float | None = None
    """Of matrices; biases, norms and the scale have none. The model's own, for CLIP 0.2."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Of the moving averages of gradients and their squares."""
    eps: float = 1e-6
    """Added to the denominator of a step."""
    max_grad_norm: float | None = 1.0
    """A longer gradient is scaled down to this norm; None leaves it alone."""
    ema: float | None = None
    """Decay of a moving average of the weights, such as 0.9999, which is then what is validated and saved as model/."""
    lock_image: bool = False
    """Freeze the image tower (LiT)."""
    lock_text: bool = False
    """Freeze the text tower."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; weights, loss and optimiser stay fp32."""
    grad_checkpointing: bool = False
    """Keep the blocks' inputs only: less memory, a third more time."""
    compile: bool = False
    """torch.compile the model."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: every process holds the model, or a shard of it (FSDP2)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU for each process where there are enough."""
    features_on: Literal["device", "cpu"] = "device"
    """Where features wait for the loss under gradient caching; cpu also computes it there."""
    deterministic: bool = False
    """Only deterministic kernels on a GPU; a CPU repeats a run bit for bit without it."""

    seed: int = 0
    """Of weights, order of data, augmentation and dropout."""
    workers: int = 2
    """Processes that load data, for each training process."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    save_every: int | None = None
    """Steps between checkpoints; one is always written at the end."""
    keep: int | None = 3
    """Checkpoints that stay, the newest; the others are removed when the next one is written. None keeps all."""
    async_save: bool = True
    """Write checkpoints while training goes on, from a copy in memory."""
    val_every: int | None = None
    """Steps between validations; with --val-data one is always made at the end."""
    timeout: float = 600.0
    """Seconds that a process waits for the others: when one is lost or stands still, the rest ends after them."""
    wandb: str | None = None
    """Project of Weights & Biases to log to as well."""
    resume: str | None = None
    """`auto`: go on from the newest checkpoint of --output, or begin; or the path of a checkpoint or a run."""
    force: bool = False
    """Take --output over from a run on another host that has ended without giving it back."""

    def largest_share(self, ranks: int) -> int:
        """Return how many pairs of a step the process has that has most of them."""
        return ceil_div(self.batch_size, ranks)

    def is_cached(self, ranks: int) -> bool:
        """Return True if a step needs gradient caching: some process has more pairs than a micro-batch."""
        return self.micro_batch is not None and self.micro_batch < self.largest_share(ranks)

    def __post_init__(self) -> None:
        """Raise ValueError for a value that no run can have."""
        for option in fields(self):
            if getattr(self, option.name) == "":  # a shell's variable that is not set
                raise ValueError(f"{flag(option.name)} is empty")
        if self.epochs < 1:
            raise ValueError(f"--epochs must be at least 1, got {self.epochs}")
        _check_numbers(self)
        if self.timeout > _LONGEST:
            raise ValueError(f"--timeout must be at most {_LONGEST} seconds, got {self.timeout:g}")
        if self.ema is not None and not 0 <= self.ema < 1:  # with 1 the average would stay what the run begins with
            raise ValueError(f"--ema must be at least 0 and below 1, got {self.ema}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"--betas must be at least 0 and below 1, got {self.betas}")
        if self.lock_image and self.lock_text:
            raise ValueError("--lock-image and --lock-text together leave nothing to train")
        if self.val_every is not None and self.val_data is None:
            raise ValueError("--val-every needs --val-data")


@dataclass(frozen=True)
class FinetuneOptions:
    """Fine-tune an image tower; the defaults are those of Wortsman et al. 2022 on ImageNet."""

    epochs: float = 10
    """Passes over the data."""
    batch_size: int = 512
    """Pictures a step."""
    micro_batch: int | None = None
    """Pictures whose activations are kept at a time; all of a step where it is not given."""
    lr: float = 3e-5
    """Learning rate at the end of the warm-up."""
    weight_decay: float = 0.1
    """Of matrices; biases and norms have none."""
    warmup: int | None = None
    """Steps from 0 to --lr, a cosine to 0 follows; 500, or a tenth of the steps if that is less."""
    max_grad_norm: float = 1.0
    """A longer gradient is scaled down to this norm."""
    freeze_image: bool = False
    """Train the head alone."""
    grad_checkpointing: bool = False
    """Keep the blocks' inputs only: less memory, a third more time."""
    seed: int = 0
    """Of order, crops and dropout."""
    workers: int = 2
    """Processes that read pictures."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    save_every: int | None = None
    """Steps between checkpoints; those of an epoch where it is not given."""
    keep: int = 2
    """Checkpoints that stay."""
    max_bad: float = 0.01
    """The largest share of pictures that cannot be used, 0 to 1: others take their places, above it the run stops."""
    stop_after: int | None = None
    """Steps of this call: ends early, with a checkpoint from which the same call goes on."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value that no run can have."""
        _check_numbers(self)


_LONGEST = 86400 * 365  # seconds, a year: neither timedelta nor a process group takes a number of any size
_AT_LEAST_ONE = (
    *("batch_size", "micro_batch", "max_steps", "stop_after"),
    *("log_every", "save_every", "keep", "val_every", "image_size", "context_length"),
)
_LIMITS: dict[str, tuple[tuple[str, ...], Callable[[float], bool]]] = {
    "at least 1": (_AT_LEAST_ONE, lambda value: value >= 1),
    "finite and not negative": (("seed", "workers", "warmup", "weight_decay"), lambda value: 0 <= value < math.inf),
    "below 2**63": (("seed",), lambda value: value < 2**63),
    "finite and above 0": (("epochs", "lr", "eps", "timeout"), lambda value: 0 < value < math.inf),
    "above 0": (("max_grad_norm",), lambda value: value > 0),  # infinity clips nothing
    "between 0 and 1": (("label_smoothing", "image_weight", "max_bad"), lambda value: 0 <= value <= 1),
}


def _check_numbers(options: TrainOptions | FinetuneOptions) -> None:
    """Raise ValueError for a number that is outside of its limits; None is a default."""
    for limit, (names, holds) in _LIMITS.items():
        for name in names:
            if (value := getattr(options, name, None)) is not None and not holds(value):
                raise ValueError(f"{flag(name)} must be {limit}, got {value}")


def flag(name: str) -> str:
    """Return the option of a field: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def parse_options(argv: Sequence[str]) -> TrainOptions:
    """Read the options of a command line; ``--config FILE``, once or more, gives values that later ones replace.

    Ends the process, as argparse does, for ``--help`` and with status 2 for what is not an option.
    """
    import tyro

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
    if any(word.partition("=")[0] == "--epochs" for word in given):  # a run's file has what came of its epochs
        came = ("max_steps", "warmup", "max-steps")
        values = [{name: value for name, value in one.items() if name not in came} for one in values]
    from_files = [word for one, path in zip(values, files) for word in _as_words(one, path)]
    return tyro.cli(
        TrainOptions,
        prog="fastclip train",
        description="Train an image-text model, alone or as one of torchrun's processes. --config FILE.yaml reads "
        "options from a file, such as the config.yaml of another run; those of the command line come first.",
        args=[*from_files, *given],
    )


def parse_finetune(argv: Sequence[str]) -> FinetuneOptions:
    """Read the options of a command line, and end the process as `parse_options` does."""
    import tyro

    return tyro.cli(FinetuneOptions, prog="fastclip finetune", description="Options of the training.", args=argv)


def read_options(path: Path) -> TrainOptions:
    """Read the options of a YAML file that `write_options` wrote."""
    return parse_options(_as_words(read_yaml(path), path))


def write_options(options: TrainOptions, path: Path) -> None:
    """Write all options but those of one call: ``resume``, ``force`` and ``stop_after``."""
    import yaml

    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(options).items()}
    values = {name: value for name, value in values.items() if name not in ("resume", "force", "stop_after")}
    write_text(path, yaml.safe_dump(values, sort_keys=False))


def _as_words(values: dict[str, Any], path: Path) -> list[str]:
    """Return the words that a user would have typed; null is the default."""
    known = [f.name for f in fields(TrainOptions)]
    words: list[str] = []
    for written, value in values.items():
        name = str(written).replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {close[0]}?" if close else f"; options are {', '.join(known)}"
            raise ValueError(f"{path}: there is no option {written}{hint}")
        if flag(name) in words or flag(f"no_{name}") in words:
            raise ValueError(f"{path}: {name} is given twice")
        if isinstance(value, dict):
            raise ValueError(f"{path}: {written} must be a value or a list, got {value}")
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        elif isinstance(value, list):
            words += [flag(name), *map(str, value)]
        elif value is not None or name in ("max_grad_norm", "keep"):
            words += [flag(name), str(value)]
    return words
