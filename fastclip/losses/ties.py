"""How near two sums of products may come before rounding alone tells which is larger."""

__all__ = ["TIE"]

# In units of the product of the two rows' lengths, 1 for cosines: the product of the same two rows has other bits in
# another place of a matrix, on another processor and with other threads.
TIE = 2.0**-20
