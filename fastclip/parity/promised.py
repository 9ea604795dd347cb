"""The errors that are promised, for tests, `fastclip parity` and the documentation.

Relative to the value, by Frobenius norms for tensors; those named SUM and MEAN to the sum of the magnitudes that a
gradient is made of.
"""

LOSS = 1e-5  # from loss 19 to 1e-9 and below
FP32_GRADIENT = 3e-5
TF32_GRADIENT = 1e-4  # fp32 features on tensor cores
SCALE_GRADIENT = 1e-4  # of the bias, too
FP32_SUM = 2.0**-21  # a few roundings of a sum of products
FP32_MEAN = 2.0**-18  # likewise of label smoothing's means over all rows
FP64, FP64_SUM = 1e-12, 2.0**-50
TENSOR_CORES = 2.0**-27  # of a logit, times scale and D: their sums truncate (2^-28 was seen)
