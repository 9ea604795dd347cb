"""Group the members of a shard into samples, and mark the samples that cannot be used."""

from __future__ import annotations

import posixpath
import re
from typing import NamedTuple

from fastclip.data.faults import Tally
from fastclip.data.files import is_hidden
from fastclip.data.picture import PICTURE_SUFFIXES
from fastclip.data.shards.tar_index import Member, Members

__all__ = ["CLASS", "FAULTS", "JSON", "KINDS", "LARGE", "TEXT", "UNTOLD", "WANTED", "Sample", "shard_samples"]

# webdataset's rule: the key is the path up to the first dot of the file name. A name that begins with a dot has no key.
_MEMBER = re.compile(r"^((?:.*/|)[^./]+)(\.[^/]*)$", re.DOTALL)

# The state of a sample. For a usable sample it is a set of bit flags, one for each member that may hold its caption: a
# .txt, a .json and a .cls with the number of its class. For other samples it is the reason why they cannot be used.
TEXT, JSON, CLASS = 1, 2, 4
UNTOLD, REPEATED, CUT, UNSEEN, LOST, LARGE = range(8, 14)
KINDS = {".txt": TEXT, ".json": JSON, ".cls": CLASS}  # sources of captions, in order of precedence
WANTED = "a .txt, a .json or a .cls of the same name must be in the shard"
# Each state of unusable samples, with the cause under which they are counted and the reason that messages give
FAULTS = {
    UNTOLD: ("no caption", f"it has no caption: {WANTED}"),
    REPEATED: ("duplicate member", "the shard contains this sample twice, and the first is used"),
    CUT: ("cut shard", "the shard ends before the sample does"),
    UNSEEN: (
        "no image",
        "it has no image: a .jpg, .png ... of the same name must be in the shard",
    ),
    LOST: ("lost member", "its image or its caption is a broken link, a device or a sparse file"),
    LARGE: ("large member", "its image or its caption has 2 GiB or more"),
}
_LARGEST = 2**31 - 1  # the largest size in bytes of a member that is read into memory


class Sample(NamedTuple):
    """The members of one sample. A usable sample has an image and at least one of the other members."""

    key: str
    state: int
    picture: Member | None = None
    text: Member | None = None
    json: Member | None = None
    number: Member | None = None  # of the class


def shard_samples(contents: Members, end: int) -> tuple[list[Sample], Tally]:
    """Return a sample for each key that has or should have an image, and the unused members by kind.

    A key with a caption should have an image if an image's member cannot be read (a broken link, for example), or if an
    image has a compound suffix such as .seg.png.

    A key with repeated members has a second sample at the end, which is marked as unusable, so that the repetition is
    counted.

    Args:
        contents: the members of the shard.
        end: size of the shard in bytes.
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
            if kind in PICTURE_SUFFIXES:  # of several images, such as a .jpg and a mask's .png, the first is used
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
    """Return the sample of a key's members, or None if the key neither has nor should have an image."""
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
