"""The table of promises: what users rely on, the tests that check it, and changes that break it.

Each module contains the promises of one part of the package. docs/promises.md is generated from them, and `python
tests/breaks.py` applies the changes again.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

# The sections of docs/promises.md
NUMBERS = "Are the numbers right?"
COST = "How much memory and work does it take?"
TORCH = "Does it work with torch.compile, autocast and autograd?"
PROCESSES = "Do several processes train as one?"
KEEP = "Can I keep my code, my models and my checkpoints?"
MACHINE = "Does it run on my machine?"
DATA = "Which data can I use, and what if some are damaged?"
TRAINING = "Is training what I asked for, and the same each time?"
STOPS = "What if a run is interrupted or killed?"
EVALUATION = "Can I compare results with those of other tools?"
SEARCH = "Do search and filters find what they should?"
SAFETY = "Is it safe with files that I did not make?"
DOCUMENTS = "Can I trust the documentation and the benchmarks?"
QUESTIONS = (
    NUMBERS,
    COST,
    TORCH,
    PROCESSES,
    KEEP,
    MACHINE,
    DATA,
    TRAINING,
    STOPS,
    EVALUATION,
    SEARCH,
    SAFETY,
    DOCUMENTS,
)

# The modules of this folder, in the order of the page
PARTS = [
    "numbers",
    "engine",
    "limits",
    "work",
    "prefixes",
    "mining",
    "few_rows",
    "distillation",
    "interface",
    "modes",
    "layers",
    "triton",
    "cuda",
    "cuda_tile",
    "cuda_pairs",
    "distributed",
    "global_loss",
    "integrations",
    "models",
    "model_files",
    "data",
    "data_faults",
    "data_check",
    "data_files",
    "data_shards",
    "data_sources",
    "training_step",
    "training",
    "teachers",
    "interrupted",
    "ending",
    "outputs",
    "plan",
    "evaluation",
    "zeroshot",
    "retrieval",
    "probe",
    "report",
    "search",
    "search_index",
    "filter",
    "doctor",
    "documents",
]


class Break(NamedTuple):
    """A change of one file, after which one of the promise's tests must fail."""

    what: str
    file: str  # relative to the repository
    old: str  # occurs exactly once in the file
    new: str  # replaces `old`; "" removes it


class Promise(NamedTuple):
    """A row of docs/promises.md, which shows the file of its first test."""

    question: str
    text: str
    tests: list[str]  # file::function, relative to tests/
    breaks: list[Break]


def promises() -> list[Promise]:
    """Return the promises of all parts."""
    return [promise for part in PARTS for promise in importlib.import_module(f"{__name__}.{part}").PROMISES]
