"""Group the members of a shard into samples, and name those that cannot be used."""

from __future__ import annotations

import posixpath
import re
from typing import NamedTuple

from fastclip.data.faults import Tally
from fastclip.data.files import is_hidden
from fastclip.data.picture import PICTURE_SUFFIXES
from fastclip.data.shards.tar_index import Member, Members

__all__ = ["CLASS", "FAULTS", "JSON", "KINDS", "LARGE", "TEXT", "UNTOLD", "WANTED", "Sample", "shard_samples"]

# webdataset's: folders and all before the first dot of the name are the key. A name that begins with a dot has none.
_MEMBER = re.compile(r"^((?:.*/|)[^./]+)(\.[^/]*)$", re.DOTALL)

# The state of a sample: where it can be used the sum of what tells its caption, a text, JSON, or the number of a class;
# else why it cannot.
TEXT, JSON, CLASS = 1, 2, 4
UNTOLD, REPEATED, CUT, UNSEEN, LOST, LARGE = range(8, 14)
KINDS = {".txt": TEXT, ".json": JSON, ".cls": CLASS}  # of captions, in the order in which they are asked
WANTED = "a .txt, a .json or a .cls of the same name must lie in the shard"
# Cause, and what is wrong
FAULTS = {
    UNTOLD: ("no caption", f"it has no caption: {WANTED}"),
    REPEATED: ("duplicate member", "the shard has this sample twice, of which the first counts"),
    CUT: ("cut shard", "the shard ends before it does"),
    UNSEEN: (
        "no image",
        "it has no picture: a .jpg, .png ... of the same name must lie in the shard",
    ),
    LOST: ("lost member", "its picture or its caption is a link to nothing, a device or a sparse file"),
    LARGE: ("large member", "its picture or its caption has 2 GiB or more"),
}
_LARGEST = 2**31 - 1


class Sample(NamedTuple):
    key: str
    state: int
    picture: Member | None = None  # it is there where the sample can be used, and so is one of the others
    text: Member | None = None
    json: Member | None = None
    number: Member | None = None  # of the class


def shard_samples(contents: Members, end: int) -> tuple[list[Sample], Tally]:
    """Return a sample for each key with a picture, or what stands for one; then one for each key with a member twice.

    Args:
        end: bytes of the file.

    Returns:
        The samples, and the members that belong to none, by their kinds.
    """
    groups: dict[str, dict[str, Member]] = {}
    repeated: dict[str, Sample] = {}
    passed = Tally()
    for member in contents.members:
        if (match := _MEMBER.match(member.name)) is None:
            hidden = is_hidden(posixpath.basename(member.name))
            passed.count("hidden" if hidden else "without a suffix", member.name)
            continue
        key, kind = match[1], match[2].lower()
        group = groups.setdefault(key, {})
        if kind not in group:
            group[kind] = member
            if kind in PICTURE_SUFFIXES:  # of a .jpg and the .png of its mask the one that comes first
                group.setdefault("picture", member)
        elif kind in PICTURE_SUFFIXES or kind in KINDS:
            repeated[key] = Sample(key, REPEATED)
            passed.count("repeated", member.name)
        else:
            passed.count(kind, member.name)
    lost: dict[str, set[str]] = {}
    for name, why in contents.lost:
        passed.count(why, name)
        if match := _MEMBER.match(name):
            lost.setdefault(match[1], set()).add(match[2].lower())
            groups.setdefault(match[1], {})
    samples = {}
    for key, group in groups.items():
        sample = _sample(key, group, lost.get(key, set()), end)
        if sample is not None:
            samples[key] = sample
        for kind, member in group.items():
            if member == group.get("picture"):
                continue
            if kind not in KINDS:
                passed.count(kind, member.name)
            elif sample is None:
                passed.count(f"{kind} without a picture", member.name)
    return [*samples.values(), *(sample for key, sample in repeated.items() if key in samples)], passed


def _sample(key: str, group: dict[str, Member], lost: set[str], end: int) -> Sample | None:
    """Return the sample of a key's members; None if they neither are nor promise a picture."""
    picture, captions = group.get("picture"), [group.get(kind) for kind in KINDS]
    if picture is None:
        if lost & PICTURE_SUFFIXES and (any(captions) or lost & {*KINDS}):
            return Sample(key, LOST)
        compound = any(f".{kind.rpartition('.')[2]}" in PICTURE_SUFFIXES for kind in group)
        return Sample(key, UNSEEN) if compound and any(captions) else None
    first = next((member for member in captions if member is not None), None)
    if any(member.end > end for member in (picture, first) if member is not None):
        return Sample(key, CUT)
    if first is None:
        return Sample(key, LOST if lost & {*KINDS} else UNTOLD)
    if max(picture.size, first.size) > _LARGEST:
        return Sample(key, LARGE)
    usable = [member if member and member.end <= end and member.size <= _LARGEST else None for member in captions]
    state = sum(bit for bit, member in zip(KINDS.values(), usable, strict=True) if member)
    return Sample(key, state, picture, *usable)
