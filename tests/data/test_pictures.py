"""Pillow's warnings while images are read, in one thread and in several."""

from __future__ import annotations

import io
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

from support import needs
from support.faulty import large_png, picture, write_folder

needs("train")

from PIL import Image

from fastclip.data import BadSample, open_source
from fastclip.data.check import check_source
from fastclip.data.pack import pack_source
from fastclip.data.picture import read_picture


def palette_png() -> bytes:
    """Return a palette image of 32 x 24 pixels in which every colour has its own transparency."""
    file = io.BytesIO()
    image = Image.linear_gradient("L").resize((32, 24)).convert("RGB").quantize()
    image.save(file, "PNG", transparency=bytes(range(0, 256, 2)))
    return file.getvalue()


@pytest.mark.fault(
    "A palette has a transparency for each colour", "It is dropped without a warning, and the pixels are unchanged"
)
@pytest.mark.filterwarnings("error")
def test_nothing_warns_of_a_picture(tmp_path: Path) -> None:
    needs("models")
    from fastclip.models.config import load_config
    from fastclip.models.transforms import image_transform

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(palette_png())) as image:
            colours = image.convert("RGB").tobytes()
            with pytest.raises(UserWarning), warnings.catch_warnings():
                warnings.simplefilter("error")
                image.convert("RGB")  # Pillow's conversion on its own
    source = open_source(str(write_folder(tmp_path / "f", 0, [(palette_png(), b"x")])))
    found = source[0].image
    assert found.mode == "P" and found.convert("RGB").tobytes() == colours
    for train in (False, True):
        transform = image_transform(load_config("ViT-tiny"), train=train)
        assert check_source(source, transform=transform).usable == 1
    for size in (None, 16):
        assert pack_source(source, tmp_path / f"to-{size}", image_size=size).samples == 1


def test_packed_lab_picture_does_not_hold_the_time_of_day(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("LAB", (8, 8), (100, 130, 140)).save(file, "TIFF")
    source = open_source(str(write_folder(tmp_path / "f", 0, [(file.getvalue(), b"x")])))
    pack_source(source, tmp_path / "s")
    packed = open_source(str(tmp_path / "s")).picture_bytes(0)
    with Image.open(io.BytesIO(packed)) as image:
        assert image.mode == "RGB" and "icc_profile" not in image.info


class _Slow(io.BytesIO):
    """A file whose first read waits for `go_on`."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.reached, self.go_on = threading.Event(), threading.Event()

    def read(self, *args: Any) -> bytes:
        self.reached.set()
        assert self.go_on.wait(60)
        return super().read(*args)


@pytest.mark.fault(
    "Several threads read images at the same time", "Every image that is too large is refused in every thread"
)
def test_threads_share_the_filters_of_warnings() -> None:
    filters, found = list(warnings.filters), dict[str, str]()

    def read(name: str, file: _Slow) -> None:
        try:
            found[name] = read_picture(file, name).mode
        except BadSample as bad:
            found[name] = bad.fault.cause

    files = {"first": _Slow(picture()), "second": _Slow(large_png(10_000))}
    threads = [threading.Thread(target=read, args=item) for item in files.items()]
    for thread, file in zip(threads, files.values(), strict=True):
        thread.start()
        assert file.reached.wait(60)
    for thread, file in zip(threads, files.values(), strict=True):  # in the order of their start
        file.go_on.set()
        thread.join(60)
    assert found == {"first": "RGB", "second": "image too large"}
    assert list(warnings.filters) == filters


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_child_that_is_forked_while_a_thread_reads_has_its_own_filters() -> None:
    filters, file = list(warnings.filters), _Slow(picture())
    thread = threading.Thread(target=read_picture, args=(file, "slow"))
    thread.start()
    assert file.reached.wait(60)
    if not (child := os.fork()):
        same = list(warnings.filters) == filters and read_picture(io.BytesIO(picture()), "a").mode == "RGB"
        os._exit(0 if same and list(warnings.filters) == filters else 1)
    _, status = os.waitpid(child, 0)
    file.go_on.set()
    thread.join(60)
    assert status == 0 and list(warnings.filters) == filters
