"""Every form of the sharded losses on this machine against one float64 process: what `fastclip parity` prints.

The truth stores the logits: N^2 numbers on every process, N = nproc x batch.
"""

from fastclip.parity.compare import Row, table
from fastclip.parity.processes import Report, run

__all__ = ["Report", "Row", "run", "table"]
