"""The promised errors, for tests, `fastclip parity` and the documentation.

The errors are relative to the value, with Frobenius norms for tensors. The errors named SUM and MEAN are relative to
the sum of the absolute values of the terms of a gradient.
"""

LOSS = 1e-5  # for losses from 19 down to 1e-9 and below
FP32_GRADIENT = 3e-5
TF32_GRADIENT = 1e-4  # fp32 features on tensor cores
SCALE_GRADIENT = 1e-4  # also for the gradient of the bias
FP32_SUM = 2.0**-21  # a few roundings of a sum of products
FP32_MEAN = 2.0**-18  # a few roundings of label smoothing's means over all rows
FP64, FP64_SUM = 1e-12, 2.0**-50
TENSOR_CORES = 2.0**-27  # error of a logit per unit of scale and D: tensor cores truncate sums (2^-28 measured)
