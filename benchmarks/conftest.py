from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.losses.cases import DTYPES, SIZES, parse_sizes, size_name

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastclip benchmarks")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--device", choices=sorted(SIZES), default=default, help="default: cuda where there is a GPU")
    group.addoption("--rows", type=Path, help="CSV that rows are added to (default: results/DEVICE.csv)")
    group.addoption("--sizes", help="N or NxD, separated by commas")
    group.addoption("--providers", help="losses to run, separated by commas (default: all that can run here)")
    group.addoption("--no-peak", action="store_true", help="do not measure peak memory on a CPU")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU here")
    try:
        parse_sizes(config.getoption("sizes"), config.getoption("device"))
    except ValueError as error:
        raise pytest.UsageError(f"--sizes: {error}") from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = metafunc.config.getoption("device")
    if "size" in metafunc.fixturenames:
        sizes = parse_sizes(metafunc.config.getoption("sizes"), device)
        metafunc.parametrize("size", sizes, ids=size_name)
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES[device])


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("device")


@pytest.fixture
def path(request: pytest.FixtureRequest, device: str) -> Path:
    """File of the rows."""
    return request.config.getoption("rows") or RESULTS / f"{device}.csv"
