"""Read the tensors of a TorchScript archive without torch's loader, which would run the code in the archive.

An archive is a zip file. Its ``data.pkl`` describes the modules, attributes and tensors, and ``data/KEY`` contains the
bytes of the tensors. The program in ``code/`` is not read. The pickle is interpreted here opcode by opcode. Names of
classes and functions are treated as plain strings, and nothing is ever called. Sizes are checked against the contents
of the file before any memory is allocated for them.
"""

from __future__ import annotations

import math
import pickletools
import struct
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["is_torchscript", "read_torchscript"]

_DTYPES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
_VALUES = ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PUT, _GET = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MOST, _LONGEST_NAME = 100_000, 1000  # limits: number of modules and of tensors, characters of a name
# Exceptions that zipfile, pickletools and the functions below raise for a file that torch did not write
_DAMAGED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    EOFError,
    StopIteration,
    struct.error,
    zipfile.BadZipFile,
)


class _Global(NamedTuple):
    name: str  # "module name" of a class or function, which is never imported


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str  # data/KEY
    size: int  # elements


class _Strided(NamedTuple):
    storage: _Storage
    offset: int  # in elements, like shape and strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass
class _Module:
    attributes: dict[str, Any] = field(default_factory=dict)


def is_torchscript(file: Path) -> bool:
    """Return True if ``torch.jit.save`` wrote the file; it contains constants, unlike the files of ``torch.save``."""
    if not zipfile.is_zipfile(file):
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except _DAMAGED:
        return False


def read_torchscript(file: Path) -> dict[str, Tensor]:
    """Read the tensors of an archive: parameters, buffers and other tensor attributes of its modules, by dotted name.

    Raises:
        OSError: the file cannot be read.
        ValueError: the archive is damaged, or its contents can only be determined by running its program. The message
            names the file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = _entries(archive, file.stat().st_size)
            root = next(name for name in entries if name.endswith("/constants.pkl")).removesuffix("constants.pkl")
            order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in entries else "little"
            if order != sys.byteorder:
                raise ValueError(f"its numbers are {order}-endian, unlike this machine's")
            tensors = _named(_unpickle(archive.read(f"{root}data.pkl")))
            storages = dict.fromkeys(tensor.storage for tensor in tensors.values())
            numbers = {s: _numbers(s, archive.read(f"{root}data/{s.key}")) for s in storages}
        return {name: _tensor(name, tensor, numbers[tensor.storage]) for name, tensor in tensors.items()}
    except _DAMAGED as error:
        raise ValueError(f"{file} is not a readable TorchScript archive: {error}") from error


def _entries(archive: zipfile.ZipFile, size: int) -> set[str]:
    """Return the names of all entries, after checking the ones that will be read.

    Raises:
        ValueError: a name occurs twice, or the entries to read are compressed or claim more bytes than the file has.
    """
    infos = archive.infolist()
    names = {info.filename for info in infos}
    if len(names) < len(infos):
        raise ValueError("it contains two entries with the same name")
    read = [info for info in infos if "/data/" in info.filename or info.filename.endswith(("/data.pkl", "/byteorder"))]
    for info in read:
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{info.filename} is compressed, which torch never does")
    if (total := sum(info.file_size for info in read)) > size:
        raise ValueError(f"its entries claim {total:,} bytes, but the file has only {size:,}")
    return names


def _unpickle(data: bytes) -> _Module:
    """Interpret a pickle and return the outermost module.

    Lists and the results of functions are replaced by placeholders, since they contain no parameters.
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _PUT:
            memo[argument] = stack[-1]
        elif name in _GET:
            stack.append(memo[argument])
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name == "GLOBAL":
            stack.append(_Global(argument))
        elif name == "MARK":
            marks.append(stack)
            stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, stack = stack, marks.pop()
            if name == "TUPLE":
                stack.append(tuple(items))
            elif name == "SETITEMS":
                _set_items(stack[-1], items)
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name in ("BINPERSID", "APPEND", "REDUCE", "NEWOBJ", "BUILD", "SETITEM"):
            _combine(name, stack)
        elif name == "STOP":
            break
        elif name != "PROTO":
            raise ValueError(f"its pickle has the opcode {name}, which torch never writes")
    if len(stack) != 1 or not isinstance(stack[0], _Module):
        raise ValueError("it contains no module")
    return stack[0]


def _combine(opcode: str, stack: list[Any]) -> None:
    """Execute an opcode that combines the topmost values of the stack into one."""
    last = stack.pop()
    if opcode == "BINPERSID":
        stack.append(_storage(last))
    elif opcode == "SETITEM":
        key = stack.pop()
        _set_items(stack[-1], [key, last])
    elif opcode == "REDUCE":
        function = stack.pop()
        stack.append(_strided(last) if function == _Global("torch._utils _rebuild_tensor_v2") else None)
    elif opcode == "NEWOBJ":
        made_class = stack.pop()
        is_module = isinstance(made_class, _Global) and made_class.name.startswith("__torch__")
        stack.append(_Module() if is_module else None)
    elif opcode == "BUILD" and isinstance(stack[-1], _Module):
        if not isinstance(last, dict):
            raise ValueError("a module stores its state in a custom form, which only its code (__setstate__) can read")
        stack[-1].attributes = last


def _set_items(target: Any, items: list[Any]) -> None:
    """Fill a dictionary; keys other than strings are skipped, since they belong to no parameter."""
    if isinstance(target, dict):
        target.update((key, value) for key, value in zip(items[::2], items[1::2]) if isinstance(key, str))


def _storage(arguments: Any) -> _Storage:
    kind, storage_class, key, _, size = arguments  # the fourth is a device
    if kind != "storage" or not isinstance(storage_class, _Global) or not isinstance(key, str) or not _is_size(size):
        raise ValueError("a tensor's storage is not described as torch describes it")
    if storage_class.name not in _DTYPES:
        raise ValueError(f"a tensor's storage must be one of {', '.join(_DTYPES)}, got {storage_class.name}")
    return _Storage(_DTYPES[storage_class.name], key, size)


def _strided(arguments: Any) -> _Strided:
    storage, offset, shape, strides = arguments[:4]  # requires_grad and hooks follow
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(map(_is_size, numbers)) or len(shape) != len(strides):
        raise ValueError("a tensor is not described as torch describes it")
    return _Strided(storage, offset, tuple(shape), tuple(strides))


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _named(root: _Module) -> dict[str, _Strided]:
    """Return all tensors by dotted name; a module that is an attribute of several modules appears under each name."""
    tensors: dict[str, _Strided] = {}
    waiting, count = [("", root)], 0
    while waiting:
        prefix, module = waiting.pop()
        count += 1
        if count > _MOST or len(tensors) > _MOST or len(prefix) > _LONGEST_NAME:
            raise ValueError("its modules contain each other endlessly")
        for name, value in module.attributes.items():
            if isinstance(value, _Module):
                waiting.append((f"{prefix}{name}.", value))
            elif isinstance(value, _Strided):
                tensors[prefix + name] = value
    return tensors


def _numbers(storage: _Storage, data: bytes) -> Tensor:
    """Return the elements of a storage as a tensor (size,)."""
    wanted = storage.size * storage.dtype.itemsize
    if len(data) != wanted:
        raise ValueError(f"data/{storage.key} has {len(data):,} bytes for {storage.size:,} elements of {storage.dtype}")
    return torch.frombuffer(bytearray(data), dtype=storage.dtype) if data else torch.empty(0, dtype=storage.dtype)


def _tensor(name: str, strided: _Strided, numbers: Tensor) -> Tensor:
    """Return a tensor as a view of its storage.

    Raises:
        ValueError: the view exceeds the storage, or has more elements than the storage, as is possible with strides of
            0. Copying such a view could exhaust the memory.
    """
    _, offset, shape, strides = strided
    count = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
    if count > len(numbers) or (count and last >= len(numbers)):
        raise ValueError(f"{name} of shape {shape} exceeds its storage of {len(numbers):,} elements")
    return numbers.as_strided(shape, strides, offset) if count else numbers.new_empty(shape)
