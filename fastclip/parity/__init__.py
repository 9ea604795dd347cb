"""Comparison of all forms of the sharded losses on this machine with one float64 computation: `fastclip parity`.

The float64 computation stores the logits, N^2 numbers on every process, with N = nproc x batch.
"""

from fastclip.parity.compare import Row, table
from fastclip.parity.processes import Report, run

__all__ = ["Report", "Row", "run", "table"]
