"""The samples that the members of a shard make, and what cannot be used of them."""

from __future__ import annotations

import re
from typing import NamedTuple

from fastclip.data.faults import Fault, Tally
from fastclip.data.picture import PICTURE_SUFFIXES
from fastclip.data.tar_index import BLOCK, Member, Members

__all__ = ["CLASS", "FAULTS", "JSON", "KINDS", "LARGE", "TEXT", "UNTOLD", "Sample", "shard_samples"]

# webdataset's: folders and all before the first dot of the name are the key. A name that begins with a dot has none.
_MEMBER = re.compile(r"^((?:.*/|)[^./]+)(\.[^/]*)$", re.DOTALL)

# The state of a sample: where it can be used the sum of what tells its caption, a text, JSON, or the number of a class;
# else why it cannot.
TEXT, JSON, CLASS = 1, 2, 4
UNTOLD, REPEATED, CUT, UNSEEN, LOST, LARGE = range(8, 14)
KINDS = {".txt": TEXT, ".json": JSON, ".cls": CLASS}  # of captions, in the order in which they are asked
_WANTED = "a .txt, a .json or a .cls of the same name must lie in the shard"
# Cause, and what is wrong
FAULTS = {
    UNTOLD: ("no caption", f"it has no caption: {_WANTED}"),
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


def shard_samples(found: Members, end: int) -> tuple[list[Sample], Tally]:
    """Every key with a picture, or with what stands for one, in order; then one more for each that has a member twice.

    Args:
        end: bytes of the file.

    Returns:
        The samples, and the members that belong to none, by their kinds.
    """
    groups: dict[str, dict[str, Member]] = {}
    repeated: dict[str, Sample] = {}
    passed = Tally()
    for member in found.members:
        if (match := _MEMBER.match(member.name)) is None:
            hidden = member.name.rpartition("/")[2].startswith(".")
            passed.add([Fault("hidden" if hidden else "without a suffix", member.name, "")])
            continue
        key, kind = match[1], match[2].lower()
        group = groups.setdefault(key, {})
        if kind not in group:
            group[kind] = member
            if kind in PICTURE_SUFFIXES:  # of a .jpg and the .png of its mask the one that comes first
                group.setdefault("picture", member)
        elif kind in PICTURE_SUFFIXES or kind in KINDS:
            repeated[key] = Sample(key, REPEATED)
            passed.add([Fault("repeated", member.name, "")])
        else:
            passed.add([Fault(kind, member.name, "")])
    lost: dict[str, set[str]] = {}
    for name, why in found.lost:
        passed.add([Fault(why, name, "")])
        if match := _MEMBER.match(name):
            lost.setdefault(match[1], set()).add(match[2].lower())
            groups.setdefault(match[1], {})
    samples = {}
    for key, group in groups.items():
        sample = _sample(key, group, lost.get(key, set()), end)
        used = {"picture", *KINDS} if sample is not None else set()
        passed.add(
            Fault(kind if sample or kind not in KINDS else f"{kind} without a picture", member.name, "")
            for kind, member in group.items()
            if kind not in used and member != group.get("picture")
        )
        if sample is not None:
            samples[key] = sample
    return [*samples.values(), *(sample for key, sample in repeated.items() if key in samples)], passed


def _sample(key: str, group: dict[str, Member], lost: set[str], end: int) -> Sample | None:
    """None where nothing in `group` asks for a picture."""
    picture, told = group.get("picture"), [group.get(kind) for kind in KINDS]
    if picture is None:
        if lost & PICTURE_SUFFIXES and (any(told) or lost & {*KINDS}):
            return Sample(key, LOST)
        compound = any(f".{kind.rpartition('.')[2]}" in PICTURE_SUFFIXES for kind in group)
        return Sample(key, UNSEEN) if compound and any(told) else None
    first = next((member for member in told if member is not None), None)
    if any(member.header + BLOCK + member.size > end for member in (picture, first) if member is not None):
        return Sample(key, CUT)
    if first is None:
        return Sample(key, LOST if lost & {*KINDS} else UNTOLD)
    if max(picture.size, first.size) > _LARGEST:
        return Sample(key, LARGE)
    told = [one if one and one.header + BLOCK + one.size <= end and one.size <= _LARGEST else None for one in told]
    return Sample(key, sum(state for state, one in zip(KINDS.values(), told, strict=True) if one), picture, *told)
