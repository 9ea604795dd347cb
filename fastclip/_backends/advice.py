"""Advice on a missing backend, for the warning about a slow loss and for `fastclip doctor`."""

from __future__ import annotations

from fastclip._backends.native import bare_clone

__all__ = ["mending"]

_ANOTHER_BUILD = "rebuild fastclip in the folder of its source code: pip install --force-reinstall --no-deps ."
_TOOLS = {"cpu": "a C++ compiler", "cuda": "nvcc (on the PATH)"}


def mending(name: str, reason: str) -> str:
    """Return advice on how to make backend `name` available, given the `reason` why it is missing, or "" for none."""
    if (clone := bare_clone()) is not None and (str(clone) in reason or "fastclip.triton_kernels" in reason):
        return f"start Python in another folder, to import the installed package, or run pip install --editable {clone}"
    if "FASTCLIP_CPU_ISA" in reason:
        return "unset FASTCLIP_CPU_ISA"
    if name == "triton":
        return "pip install triton" if "not installed" in reason else ""
    if "driver supports" in reason:
        return "install a newer NVIDIA driver"
    return f"install {_TOOLS[name]}, then {_ANOTHER_BUILD}" if "native module" in reason else ""
