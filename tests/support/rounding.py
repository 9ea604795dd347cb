"""A processor whose rounding of a product depends on the place in the result, as on some real ones."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "bmm", "addmm", "mv", "addmv", "dot")}


class RoundsByPlace(TorchDispatchMode):
    """A mode in which float32 products are off by up to two roundings, depending on their place in the result.

    Products of equal rows therefore differ, as they do with MKL's kernels for AVX2.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and found.dtype == torch.float32:
            places = torch.randint(-2, 3, found.shape, generator=torch.Generator().manual_seed(found.numel()))
            found = found * (1 + 2.0**-23 * places)
        return found
