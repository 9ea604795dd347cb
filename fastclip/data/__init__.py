"""Data sets as batches of images, captions and labels."""

from fastclip.data.source import Record, Source
from fastclip.data.spec import open_source

__all__ = ["Record", "Source", "open_source"]
