"""The losses timed on this machine: what `fastclip bench` prints."""

from fastclip.bench.run import Measured, columns, measure, table

__all__ = ["Measured", "columns", "measure", "table"]
