"""Run `filter_source` and `embed_source` in processes that are killed at every step, each resuming where the last died.

python interrupted_search.py FOLDER: FOLDER/data is the source, FOLDER/TASK-whole the result of one uninterrupted run,
FOLDER/TASK-killed that of many killed runs. Prints the number of kills of each task.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import torch

from fastclip.curation.embed import embed_source
from fastclip.curation.filter import filter_source
from fastclip.data.spec import open_source
from fastclip.embedding import pairs
from fastclip.models import create_model
from fastclip.models.embedder import Embedder
from fastclip.models.tokenizers.clip import ClipTokenizer

THRESHOLD, DEDUP = 0.0, 0.999


def dying_at_the_second(real: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap os.replace so that one new file appears and the process is killed before the next."""
    count = 0

    def rename(half: Any, target: Any) -> Any:
        nonlocal count
        count += not os.path.exists(target)
        if count == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(half, target)

    return rename


def run(task: str, embedder: Embedder, source: Any, output: Path) -> None:
    if task == "filter":
        options = {"threshold": THRESHOLD, "dedup": DEDUP, "samples_per_shard": 10}
        filter_source(embedder, source, output, batch_size=8, **options)
    else:
        embed_source(embedder, source, output, samples_per_file=22, batch_size=8)


def child(work: Callable[[], None]) -> int:
    """Run `work` in a child process and return its exit status."""
    if pid := os.fork():
        return os.waitpid(pid, 0)[1]
    try:
        work()
    except BaseException as error:
        print(error, file=sys.stderr)
        os._exit(1)
    os._exit(0)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    pairs.PART = 16
    source = open_source(str(folder / "data"))
    torch.manual_seed(0)
    embedder = Embedder(create_model("ViT-tiny"), ClipTokenizer(), name="ViT-tiny")
    # loads once what every child would load: Pillow's formats, and pandas, which pyarrow looks for
    source[0].image.load()
    pyarrow.Table.from_pylist([{"key": 0}])
    for task in ("filter", "embed"):

        def killed(task: str = task) -> None:
            os.replace = os.rename = dying_at_the_second(os.replace)
            Path.replace = lambda self, target: os.replace(self, target)
            run(task, embedder, source, folder / f"{task}-killed")

        kills = 0
        while (status := child(killed)) and kills < 100:
            assert os.WTERMSIG(status) == signal.SIGKILL, status
            kills += 1
        assert child(lambda task=task: run(task, embedder, source, folder / f"{task}-whole")) == 0
        print(task, kills)


if __name__ == "__main__":
    main()
