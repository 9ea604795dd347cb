"""A processor on which the rounding of a product depends on where it is in its matrix, as some have."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "bmm", "addmm", "mv", "addmv", "dot")}


class RoundsByPlace(TorchDispatchMode):
    """``with RoundsByPlace():`` float32 products are up to two roundings off, by their place in the result.

    So products of equal rows are not equal, as they are not with MKL's kernels for AVX2.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and found.dtype == torch.float32:
            places = torch.randint(-2, 3, found.shape, generator=torch.Generator().manual_seed(found.numel()))
            found = found * (1 + 2.0**-23 * places)
        return found
