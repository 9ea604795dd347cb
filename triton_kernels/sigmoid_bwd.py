"""Backward of the sigmoid loss: the gradients that the forward has computed, times the upstream gradient.

This is one kernel rather than four torch operations, because with few rows a step waits for the host to start each.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["sigmoid_bwd_kernel"]


@triton.jit
def _multiply(kept_ptr, out_ptr, upstream, block, size, BLOCK: tl.constexpr):
    k = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    product = tl.load(kept_ptr + k, mask=k < size, other=0.0).to(tl.float32) * upstream
    tl.store(out_ptr + k, product.to(out_ptr.dtype.element_ty), mask=k < size)


@triton.jit(do_not_specialize=["scale_ptr", "bias_ptr", "upstream_ptr", "scale_out_ptr", "bias_out_ptr"])
def sigmoid_bwd_kernel(
    image_ptr,  # (image_size,): d_image of the forward
    text_ptr,  # (text_size,): d_text of the forward
    scale_ptr,  # (): d_scale of the forward; read with SCALE
    bias_ptr,  # (): d_bias of the forward; read with BIAS
    upstream_ptr,  # () fp32: the upstream gradient
    image_out_ptr,
    text_out_ptr,
    scale_out_ptr,  # ()
    bias_out_ptr,  # ()
    image_size,
    text_size,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Saved gradients times the upstream gradient.

    Math      out = upstream * kept, kept being the gradient that the forward computed
    Program   BLOCK elements of d_image, and after them BLOCK elements of d_text
              with SCALE or BIAS one more program, the last, multiplies the scalars
    Traffic   reads and writes every element once
    Precision fp32 with one rounding to the dtype of the features, so a loss scaler's factor prevents flushing
    Ragged    elements beyond the last are not written
    Order     one program per element, no sums: bitwise repeatable
    """
    upstream = tl.load(upstream_ptr)
    block, image_blocks, text_blocks = tl.program_id(0), tl.cdiv(image_size, BLOCK), tl.cdiv(text_size, BLOCK)
    if block < image_blocks:
        _multiply(image_ptr, image_out_ptr, upstream, block, image_size, BLOCK)
    elif block < image_blocks + text_blocks:
        _multiply(text_ptr, text_out_ptr, upstream, block - image_blocks, text_size, BLOCK)
    else:
        if SCALE:
            tl.store(scale_out_ptr, tl.load(scale_ptr) * upstream)
        if BIAS:
            tl.store(bias_out_ptr, tl.load(bias_ptr) * upstream)
