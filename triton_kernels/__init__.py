"""The losses as Triton kernels for any recent GPU, behind `fastclip._backends.triton`.

Two tile kernels, statistics (`contrastive_fwd`) and weights (`contrastive_bwd`), and the sigmoid's on the same tile
code; the library multiplies the stored weights with the features. ``TRITON_INTERPRET=1`` runs all of it on a CPU.
"""

from triton import __version__ as TRITON

__all__ = ["OLDEST", "TRITON"]

OLDEST = "3.6"  # what the kernels are written for; the backend asks before it imports them
