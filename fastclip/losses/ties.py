"""The relative difference below which rounding alone decides which of two sums of products is larger."""

__all__ = ["TIE"]

# In units of the product of the two rows' norms, which is 1 for cosines. The product of the same two rows may differ
# in its last bits with its position in a matrix, with the processor and with the number of threads.
TIE = 2.0**-20
