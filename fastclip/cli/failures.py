"""Messages of a command that fails: one line where the user can mend the cause, a traceback where we must."""

from __future__ import annotations

__all__ = ["said_of"]

_OF_USERS = (ValueError, OSError, ImportError, FloatingPointError)
# Of files that are not what they are called, where a library says so in an error of its own. By name: none is loaded.
_OF_FILES = {
    *("zipfile.BadZipFile", "tarfile.TarError", "zlib.error", "lzma.LZMAError", "_lzma.LZMAError", "_csv.Error"),
    *("sqlite3.DatabaseError", "yaml.error.YAMLError", "pickle.UnpicklingError", "_pickle.UnpicklingError"),
    *("safetensors.SafetensorError", "safetensors_rust.SafetensorError", "PIL.Image.DecompressionBombError"),
    *("pyarrow.lib.ArrowException"),
}
_OF_PROGRAMS = {"sqlite3.ProgrammingError", "sqlite3.InterfaceError"}
_NO_MEMORY = {"builtins.MemoryError", "torch.OutOfMemoryError", "torch.cuda.OutOfMemoryError"}
_LESS = {
    "train": "fewer pairs of --micro-batch at a time take less, as `fastclip plan` tells",
    "finetune": "a smaller --micro-batch takes less",
    "plan": "a smaller model takes less",
    "bench": "a smaller batch takes less",
    "parity": "a smaller --batch takes less",
}


def said_of(error: Exception, command: str) -> str | None:
    """The line, without the command's name; None where the error is a fault of the program, and its traceback helps."""
    kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__]
    first = next(iter(str(error).strip().splitlines()), "")
    if not _NO_MEMORY.isdisjoint(kinds) or (type(error) is RuntimeError and "can't allocate memory" in str(error)):
        where = "the GPU's memory" if "CUDA" in first or "HIP" in first else "memory"
        return f"out of {where}: {_LESS.get(command, 'a smaller --batch-size, or fewer --workers, take less')}"
    if isinstance(error, _OF_USERS):
        return str(error)
    if "http.client.HTTPException" in kinds:
        return f"a server's answer ended early ({type(error).__name__}: {first})"
    if not _OF_FILES.isdisjoint(kinds) and _OF_PROGRAMS.isdisjoint(kinds):
        return f"a file is damaged, or not what it is called ({type(error).__name__}: {first})"
    return None
