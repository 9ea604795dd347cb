"""The relative difference below which rounding alone decides which of two sums of products is larger."""

__all__ = ["TIE"]

# In units of the product of the two rows' norms, which is 1 for cosines. The last bits of the product of the same two
# rows may vary depending on its position in a matrix, on the processor and on the number of threads.
TIE = 2.0**-20
