"""Copy shards from URLs to a cache folder, once, so that they can be read as files."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import fsspec
from filelock import FileLock

from fastclip.data.faults import in_threads
from fastclip.data.files import is_hidden
from fastclip.data.shards.braces import brace_names
from fastclip.system import env
from fastclip.system.durable import mend_files, new_file, write_text

__all__ = ["local_copies", "shard_urls"]

logger = logging.getLogger(__name__)

# Metadata fields of a file on a server that change when the file changes. The first that the server provides is used.
_MARKS = ("Content-MD5", "md5Hash", "ETag", "etag", "LastModified", "Last-Modified", "updated", "mtime")


def shard_urls(pattern: str) -> list[str]:
    """Return the URLs that a pattern with braces (``s3://bucket/{00000..00009}.tar``) or ``*`` stands for.

    ``*`` requires a storage service that can list its files. As in a shell, it matches no hidden names. Folders are
    left out.

    Raises:
        ValueError: a URL is not that of a .tar, an https pattern contains ``*``, or a pattern matches no files or more
            than a million names.
        ImportError: a library that fsspec needs for this kind of URL is not installed.
        OSError: the storage service cannot list its files.
    """
    urls: list[str] = []
    for name in brace_names(pattern):
        if not urlsplit(name).path.endswith(".tar"):
            raise ValueError(f"{name}: only tar shards, whose names end in .tar, can be read from URLs")
        urls += _listed(name) if "*" in name else [name]
    return list(dict.fromkeys(urls))


def _listed(pattern: str) -> list[str]:
    if urlsplit(pattern).scheme in ("http", "https"):
        raise ValueError(f"{pattern}: a web server does not list its files: name them, as in {{00000..00009}}.tar")
    system, path = _file_system(pattern)
    try:
        listed = system.glob(path, detail=True)
    except Exception as error:  # every storage service raises different errors
        raise OSError(f"{pattern}: cannot be listed: {_reason(error)}") from error
    names = [name for name, info in listed.items() if info.get("type") != "directory"]
    urls = sorted(system.unstrip_protocol(name) for name in names if _in_hidden(path) or not _in_hidden(name))
    if not urls:
        raise ValueError(f"no such shards: {pattern}")
    return urls


def _in_hidden(path: str) -> bool:
    return any(map(is_hidden, PurePosixPath(path).parts))


def local_copies(urls: list[str], problems: list[str] | None = None) -> dict[str, str]:
    """Copy URLs to `env.cache_folder()`, unless copies exist, and return the path of the copy by URL, in order.

    A copy is made under a temporary name and renamed once it has the size that the server declares. If
    several processes need a file at the same time, one copies it and the others wait. If the size, checksum, tag or
    time of the server's file has changed, the file is copied again. If the server does not answer, an existing copy is
    used. Files of ``file://`` are not copied.

    Args:
        problems: a list that receives the messages about URLs that cannot be copied, which are left out. Without a list
            the first is raised.

    Raises:
        OSError: a URL cannot be read, or the disk is full; the message names the URL.
        ImportError: a library that fsspec needs for this kind of URL is not installed.
    """
    return in_threads(_local_copy, urls, problems)


def _local_copy(url: str) -> str:
    system, path = _file_system(url)
    if "file" in _protocols(system):
        return str(path)
    digest = hashlib.blake2b(url.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    copy = env.cache_folder() / "shards" / digest / PurePosixPath(urlsplit(url).path).name
    copy.parent.mkdir(parents=True, exist_ok=True)
    # The ranks of a run start at the same time. The lock makes one of them copy while the others wait.
    with FileLock(copy.with_name(f"{copy.name}.lock")):
        have = copy.stat().st_size if copy.exists() else None
        try:
            info = system.info(path)
            size = info.get("size")
            if have is None or size not in (None, have) or _mark(info) != _copied(copy):
                _copy(system, path, copy, info)
        except Exception as error:  # every storage service raises different errors
            if have is None or isinstance(error, _Short):
                raise OSError(f"{url}: cannot be copied: {_reason(error)}") from error
            logger.warning("%s cannot be reached (%s): the existing copy %s is used", url, _reason(error), copy)
    return str(copy)


def _reason(error: BaseException) -> str:
    """Return the type and text of an error.

    fsspec raises FileNotFoundError even if a server cannot be reached or refuses access. The error's ``__cause__`` then
    has the true reason.
    """
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return _reason(error.__cause__)
    return f"{type(error).__name__.lstrip('_')}: {error}"


class _Short(Exception):
    """Raised if the size of a copy is not the size that the server declared."""


def _copy(system: Any, path: str, copy: Path, info: Mapping[str, Any]) -> None:
    size = info.get("size")
    logger.info("copying %s, %s bytes, to %s", path, "?" if size is None else f"{size:,}", copy)
    mend_files(copy.parent)
    with new_file(copy) as half:
        system.get_file(path, str(half))
        if size is not None and half.stat().st_size != size:
            raise _Short(f"{half.stat().st_size} of {size} bytes were received")
        # The stored checksum, tag or time of the old copy must not be taken for that of the new copy.
        _marks(copy).unlink(missing_ok=True)
    write_text(_marks(copy), _mark(info))


def _mark(info: Mapping[str, Any]) -> str:
    return next((f"{name} {info[name]}" for name in _MARKS if info.get(name)), "")


def _marks(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}.version")


def _copied(copy: Path) -> str:
    """Return the checksum, tag or time of the server's file when it was copied, or "" if it is unknown."""
    return _marks(copy).read_text("utf-8") if _marks(copy).is_file() else ""


def _file_system(url: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ImportError(f"{url}: {error}", name=error.name) from error
    except Exception as error:
        raise ValueError(f"{url}: {error}") from error


def _protocols(system: Any) -> tuple[str, ...]:
    # In fsspec `protocol` is one name or several.
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)
