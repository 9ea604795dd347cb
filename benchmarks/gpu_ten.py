"""Measurements for a Hopper GPU that is available for ten minutes, in one command that ends within that time.

    python -m benchmarks.gpu_ten                                  everything, in order of worth
    python -m benchmarks.gpu_ten --list                           the parts, their measurements, their seconds
    python -m benchmarks.gpu_ten --only host,counters             these parts, even if they are done
    python -m benchmarks.gpu_ten --variant before=../before       compare another build with this one
    python -m benchmarks.gpu_ten --dry-run                        the same code on a CPU with tiny sizes

Each part is a process that is ended at its limit. Later parts may use the time that earlier ones left, up to twice
their limit. Rows are written as they are measured: steps to cuda.csv, all others to gpu_ten.csv. A part, or a case of
the part `steps`, that is done on the same code is not run again. A wrong value ends the run, because wrong results are
not timed.
Exit code 0: all parts are done. Exit code 1: a value was wrong, or a part failed. Exit code 3: parts are left.

Steps are checked at their full size, including 65,536 x 768: the truth is computed in float32 on the GPU, about 4e13
operations or a second or two. Most of the remaining time is compilation.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.gpu import checklist as checks
from benchmarks.gpu import variants as gpu_variants
from benchmarks.gpu.checklist import ROOT, Checklist, code_state
from benchmarks.gpu.log import STEPS, Log
from benchmarks.gpu.variants import parse
from fastclip.cli.ending import sigterm_raises
from fastclip.system.parent import end_with_parent

RESULTS = ROOT / "benchmarks" / "results"
SECONDS = 550.0  # without the seconds before the clock starts, in which torch is imported
# Exit codes of a part: a wrong value; no time for some of its pieces; a peer broke the GPU. Code 5 is NO_TESTS
WRONG, INCOMPLETE, PEER_LOST = 4, 3, 6
RESERVE = 2.0  # seconds before its limit at which a part ends on its own
EXITS = {
    f"failed with exit code {WRONG}": "a value is wrong: nothing more is run",
    f"failed with exit code {INCOMPLETE}": "no time was left for all of it",
    f"failed with exit code {PEER_LOST}": "a peer broke the GPU: the rest goes on without it",
}


@dataclass(frozen=True)
class Part(checks.Part):
    """A child process: what it measures, its seconds, and its command-line arguments."""

    tells: str = ""
    seconds: float = 0.0
    words: tuple[str, ...] = ()
    takes_the_rest: bool = False

    def command(self, rows: Path, providers: list[str]) -> list[str]:
        return [sys.executable, "-m", "benchmarks.gpu_ten", "--part", self.name, *self.words]


PARTS = (
    Part("correct", tells="tests of the kernels; values and gradients against float64; CUDA graphs", seconds=110),
    Part("host", tells="microseconds of the host in a step of 256 rows", seconds=45),
    Part("counters", tells="stalls, throughputs and clock of the three tile kernels, by ncu", seconds=75),
    Part("steps", tells="whole steps at 1,024 to 65,536 pairs beside the peers", seconds=140),
    Part("training", tells="time of a training step by groups of kernels, eager and compiled", seconds=100),
    Part("workspace", tells="time and memory of a step against FASTCLIP_WORKSPACE_MB", seconds=45),
    Part("variants", tells="other builds or settings (--variant) beside this build", seconds=35, takes_the_rest=True),
)


def run_part(name: str, arguments: argparse.Namespace) -> int:
    """Run a part in its own process, and return 0, INCOMPLETE, PEER_LOST or WRONG."""
    end_with_parent()
    from benchmarks.gpu import correct as gpu_correct
    from benchmarks.gpu import counters as gpu_counters
    from benchmarks.gpu import host as gpu_host
    from benchmarks.gpu import steps as gpu_steps
    from benchmarks.gpu.device import Gpu
    from benchmarks.gpu.pretended import Pretended
    from benchmarks.losses import peers
    from benchmarks.losses import providers as losses

    if arguments.dry_run:
        losses.OURS["cuda"].update(dict.fromkeys(losses.OURS["cuda"], stand_in()))
        peers.COMPILER = "eager"
    runs: dict[str, Callable[[Log], None]] = {
        "correct": gpu_correct.run,
        "host": gpu_host.run,
        "counters": gpu_counters.run,
        "steps": gpu_steps.run,
        "training": training,
        "workspace": gpu_steps.workspace,
        "variants": functools.partial(gpu_variants.run, variants=arguments.variant),
    }
    gpu = Pretended() if arguments.dry_run else Gpu()
    log = Log(name, arguments.rows, gpu, arguments.until - RESERVE, arguments.markers, code_state())
    try:
        runs[name](log)
    except losses.CheckFailed as error:
        log.status("", "", f"wrong: {error}")
        return WRONG
    except gpu_steps.PeerLost:
        return PEER_LOST
    return 0 if log.complete else INCOMPLETE


def training(log: Log) -> None:
    """Run `gpu_timeline`, or write a row that names a missing training package."""
    try:
        from benchmarks.gpu import timeline as gpu_timeline
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("benchmarks", "fastclip")):
            raise
        log.status("", "fastclip", f"not installed: {error.name}")
        return
    gpu_timeline.run(log)


def stand_in() -> str:
    """Return the backend that replaces the GPU's in a dry run."""
    import fastclip

    return "cpu" if fastclip.backends()["cpu"] == "available" else "reference"


def limit(part: Part, later: list[Part], left: float) -> float:
    """Return the seconds that a part may take: its own, or up to twice as many if the later parts keep theirs."""
    spare = left - sum(other.seconds for other in later)
    most = spare if part.takes_the_rest else min(spare, 2 * part.seconds)
    return max(0.0, min(max(part.seconds, most), left))


def outcome(checklist: Checklist, part: Part, until: float) -> str:
    """Run a part until `until`, and return how it ended. After a peer has broken the GPU, a new process continues at
    once.
    """
    result = "no time was left"
    timed = replace(part, words=(*part.words, "--until", f"{until:.1f}"))  # the same clock in every process
    while (seconds := until - time.monotonic()) > 2 * RESERVE:
        result = checklist.do(timed, seconds)
        result = EXITS.get(result, result)
        if result != EXITS[f"failed with exit code {PEER_LOST}"]:
            break
    return result


def check(checklist: Checklist, chosen: list[Part], end: float) -> int:
    """Run the parts until time is up. Return 0 if all are done, 1 if one was wrong or failed, 3 if some are left."""
    failed = left = 0
    todo = [part for part in chosen if checklist.todo(part)]
    for part in chosen:
        if part not in todo:
            print(f"{part.name:12s} done", flush=True)
            continue
        seconds = limit(part, todo[todo.index(part) + 1 :], end - time.monotonic())
        result = outcome(checklist, part, time.monotonic() + seconds)
        print(f"{part.name:12s} {result}", flush=True)
        if result == EXITS[f"failed with exit code {WRONG}"]:
            return 1
        left += result.startswith(("took more", "no time", "a peer broke"))
        failed += result.startswith("failed")
    return 1 if failed else 3 if left else 0


def forget(markers: Path, names: list[str]) -> None:
    """Forget that the named parts and their pieces are done, so that they run again."""
    for name in names:
        for path in [markers / name, *markers.glob(f"{name}-*")]:
            path.unlink(missing_ok=True)


def words_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """List the command-line words that every part receives."""
    words = ["--rows", str(arguments.rows), "--markers", str(arguments.markers)]
    words += ["--dry-run"] if arguments.dry_run else []
    return (*words, *(word for variant in arguments.variant for word in ("--variant", str(variant))))


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--list", action="store_true", help="list what each part measures and how long it takes, and run nothing"
    )
    parser.add_argument(
        "--only", help="names of the parts to run, separated by commas (default: all that are not done)"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="seconds after which everything ends (default: %(default)s)"
    )
    parser.add_argument(
        "--rows",
        type=Path,
        help="folder for the rows (default: benchmarks/results, or a temporary folder with --dry-run)",
    )
    parser.add_argument(
        "--markers",
        type=Path,
        help="folder that records the parts that are done (default: runs/gpu_ten, or done in --rows with --dry-run)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="run on the CPU to test the program; its rows are not results"
    )
    parser.add_argument(
        "--variant",
        dest="variants",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="folder with another build of the whole package, including native modules and triton_kernels, such as "
        "`pip install --target FOLDER --no-deps .` creates from another commit; or NAME=VARIABLE:VALUE, to set a "
        "variable of the environment; may be repeated (default: none)",
    )
    parser.add_argument("--part", choices=[part.name for part in PARTS], help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # by time.monotonic()
    return parser


def main(words: list[str] | None = None) -> int:
    end = time.monotonic()
    parser = options()
    arguments = parser.parse_args(words)
    end += arguments.seconds
    chosen = list(PARTS)
    if arguments.only:
        names = arguments.only.split(",")
        if unknown := sorted(set(names) - {part.name for part in PARTS}):
            parser.error(
                f"--only: no part {', '.join(unknown)}; the parts are {', '.join(part.name for part in PARTS)}"
            )
        chosen = [part for part in PARTS if part.name in names]
    if arguments.list:
        for part in chosen:
            print(f"{part.name:12s} {part.seconds:4.0f} s  {part.tells}")
        return 0
    try:
        arguments.variant = [parse(text) for text in arguments.variants]
    except ValueError as error:
        parser.error(f"--variant: {error}")
    folders(arguments)
    if arguments.dry_run and arguments.rows == RESULTS:
        parser.error("--rows: a dry run must not write to the folder of results")
    if arguments.part:
        return run_part(arguments.part, arguments)
    import torch

    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --dry-run runs on a CPU")
    if arguments.only:
        forget(arguments.markers, names)
    if not arguments.variant:
        if any(part.name == "variants" for part in chosen):
            print("variants     skipped: needs --variant NAME=FOLDER")
        chosen = [part for part in chosen if part.name != "variants"]
    else:  # the variants differ from those of the last call
        forget(arguments.markers, ["variants"])
    chosen = [replace(part, words=words_of(arguments)) for part in chosen]
    checklist = Checklist(arguments.rows / STEPS, arguments.markers)
    print(f"rows go to {arguments.rows}", flush=True)
    with sigterm_raises():  # ends the running part as well
        return check(checklist, chosen, end)


def folders(arguments: argparse.Namespace) -> None:
    """Set the folders of rows and markers. A dry run's are never those of results."""
    if arguments.rows is None:
        dry = arguments.dry_run
        arguments.rows = Path(tempfile.mkdtemp(prefix="dry-run-")) if dry else RESULTS
    arguments.rows = arguments.rows.absolute()
    if arguments.markers is None:
        arguments.markers = arguments.rows / "done" if arguments.dry_run else ROOT / "runs" / "gpu_ten"
    arguments.markers = arguments.markers.absolute()


if __name__ == "__main__":
    sys.exit(main())
