from __future__ import annotations

from pathlib import Path

import pytest

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastclip benchmarks")
    group.addoption("--rows", type=Path, default=RESULTS / "cpu.csv", help="CSV that rows are added to")
    group.addoption("--sizes", default="1024,2048,4096,8192,16384", help="batch sizes N")
    group.addoption("--providers", help="losses to run, separated by commas (default: all that can run here)")
    group.addoption("--no-peak", action="store_true", help="do not measure peak memory")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "N" in metafunc.fixturenames:
        metafunc.parametrize("N", [int(size) for size in metafunc.config.getoption("sizes").split(",")])
