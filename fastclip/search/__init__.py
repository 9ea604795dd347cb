"""Search the images of a folder or a disk by text and by image."""

from typing import TYPE_CHECKING

from fastclip.system.lazy import lazy_names

if TYPE_CHECKING:
    from fastclip.embedding.query import parse_query
    from fastclip.search.engine import SearchEngine
    from fastclip.search.model import CheckpointModel

__all__ = ["CheckpointModel", "SearchEngine", "parse_query"]

_LAZY = {
    "CheckpointModel": "fastclip.search.model",
    "SearchEngine": "fastclip.search.engine",
    "parse_query": "fastclip.embedding.query",
}
__getattr__ = lazy_names(globals(), _LAZY)


def __dir__() -> list[str]:
    return __all__
