"""The losses timed on this machine: what `fastclip bench` prints."""

from fastclip.bench.run import Measured, measure, table

__all__ = ["Measured", "measure", "table"]
