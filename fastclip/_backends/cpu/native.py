"""The native module fastclip._cpu, or the reason why it is missing."""

from __future__ import annotations

from fastclip._backends.native import load
from fastclip.system import env

__all__ = ["build", "missing", "module"]

module, _missing = load("_cpu")
if module is not None:
    try:
        module.select_isa(env.cpu_isa())
    except ValueError:
        _missing = f"FASTCLIP_CPU_ISA={env.cpu_isa()!r} is not supported by this processor"


def missing() -> str | None:
    return _missing


def build() -> str:
    """Return the instruction set in use. The module must be loaded."""
    return str(module.isa())
