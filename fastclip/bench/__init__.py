"""Benchmark of the losses on this machine: `fastclip bench`."""

from fastclip.bench.run import Measured, columns, measure, table

__all__ = ["Measured", "columns", "measure", "table"]
