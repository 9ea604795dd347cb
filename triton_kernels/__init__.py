"""The losses as Triton kernels for any recent GPU, called by `fastclip._backends.triton`.

The tile kernels share one matrix-product loop: statistics (`contrastive_fwd`), weights (`contrastive_bwd`), both of a
student and its teachers (`distill_fwd`, `distill_bwd`), and the sigmoid loss (`sigmoid_fwd`). cuBLAS or rocBLAS then
multiplies the stored weights by the features. ``TRITON_INTERPRET=1`` runs everything on a CPU.
"""

from triton import __version__ as TRITON

__all__ = ["OLDEST", "TRITON"]

OLDEST = "3.6"  # oldest supported Triton release; the backend checks it before it imports the kernels
