"""Pictures of a folder of which none has a caption: to be embedded, and nothing else."""

from __future__ import annotations

from pathlib import Path

from fastclip.data.files import log_links
from fastclip.data.folder import pictures
from fastclip.data.picture import read_picture
from fastclip.data.source import Record, Source
from fastclip.data.spec import holds_shards, open_source
from fastclip.data.strings import Strings

__all__ = ["Uncaptioned", "open_pictures"]


def open_pictures(spec: str) -> Source:
    """As `open_source`, but for a folder whose pictures have no captions: an `Uncaptioned`."""
    folder = Path(spec)
    if spec and spec != "digits" and folder.is_dir() and not holds_shards(folder):
        links: list[str] = []
        found = list(pictures(folder, links=links))
        if found and not any(one.told for one in found):
            log_links(str(folder), links)
            return Uncaptioned(spec, [one.name for one in found])
    return open_source(spec)


class Uncaptioned:
    """The pictures of these names in a folder; their captions are ()."""

    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __init__(self, spec: str, names: list[str]) -> None:
        self.spec, self._folder, self._names = spec, Path(spec), Strings(names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        return self.read(index)

    def read(self, index: int, *, min_side: int | None = None) -> Record:
        """As `fastclip.data.source.read_sample`."""
        key = self.key(index)
        return Record(read_picture(Path(key), key, min_side=min_side), (), key)

    def captions(self, index: int) -> tuple[str, ...]:
        return ()

    def key(self, index: int) -> str:
        return str(self._folder / self._names[index])

    def picture_place(self, index: int) -> tuple[str, str]:
        """As `fastclip.data.source.picture_place`."""
        return self.key(index), ""
