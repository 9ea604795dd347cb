"""Faulty data: every fault in a real file, its cause by name, and the sample that replaces it."""

from __future__ import annotations

import io
import logging
import os
import pickle
import re
import struct
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from support import needs
from support.faulty import HTML, large_png, picture, write_folder, write_tar

needs("train")

from PIL import Image, ImageFile

from fastclip.data import Batch, Source, evaluation_batches, open_source, training_batches
from fastclip.data.faults import BadSample, Fault, Tally
from fastclip.data.loading.workers import naming_dead_workers
from fastclip.data.picture import read_picture


def fault(source: Source, index: int) -> Fault:
    with pytest.raises(BadSample) as caught:
        source[index]
    assert source.key(index) == caught.value.fault.key and str(caught.value).startswith(caught.value.fault.key)
    return caught.value.fault


def plain(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).float()


def tokenize(texts: list[str]) -> Tensor:
    return torch.tensor([[int(text.split()[1])] for text in texts])


# --- images


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.fault(
    "A truncated JPEG or PNG, HTML in place of an image, or an empty file",
    "The sample is replaced and counted by cause",
)
@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (cut(picture(9, "JPEG")), "truncated image"),
        (cut(picture(9, "PNG")), "truncated image"),
        (picture(9, "GIF")[:-20], "truncated image"),
        (cut(picture(9, "WEBP")), "damaged image"),
        (picture(9)[:41] + b"\0\0\0\0" + picture(9)[45:], "damaged image"),
        (HTML, "not an image"),
        (b"", "not an image"),
        # Pillow would start Ghostscript for it
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) print\n", "not an image"),
    ],
    ids=["jpeg", "png", "gif", "webp", "flipped", "html", "empty", "eps"],
)
@pytest.mark.parametrize("kind", ["table", "folder", "shards"])
def test_picture_fault_has_its_cause(tmp_path: Path, kind: str, data: bytes, cause: str) -> None:
    if kind == "shards":
        members = [("0.png", picture()), ("0.txt", b"x"), ("1.png", data), ("1.txt", b"x")]
        source = open_source(str(write_tar(tmp_path / "x.tar", members)))
    else:
        write_folder(tmp_path, 1, [(data, b"x")])
        (tmp_path / "t.csv").write_text("filepath,title\n000.png,x\n001.png,x\n")
        source = open_source(str(tmp_path / "t.csv" if kind == "table" else tmp_path))
    assert source[0].image.size == (16, 8)
    assert fault(source, 1).cause == cause


@pytest.mark.fault("A PNG of 20,000 x 20,000 pixels", "It is refused after reading its header, without decoding it")
@pytest.mark.parametrize("side", [20_000, 10_000])
def test_large_picture_is_refused_from_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int, recwarn: pytest.WarningsRecorder
) -> None:
    def load(self: ImageFile.ImageFile) -> None:
        raise AssertionError("decoded")

    source = open_source(str(write_folder(tmp_path, 0, [(large_png(side), b"x")])))
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    found = fault(source, 0)
    assert found.cause == "image too large" and f"{side * side} pixels" in found.reason
    assert not recwarn.list


@pytest.mark.fault("A file is missing or cannot be read", "The sample is replaced and counted by cause")
def test_files_that_cannot_be_read_have_their_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, 2)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "t.csv").write_text("filepath,title\n000.png,x\ngone.png,x\nfolder.png,x\n001.png,x\n002.png,\n")
    with (tmp_path / "t.csv").open("a") as file:
        file.write(f"{'x' * 5000}.png,x\n")  # too long for a file name
    source = open_source(str(tmp_path / "t.csv"))
    assert fault(source, 5).cause == "missing file"
    assert fault(source, 1).cause == "missing file" and fault(source, 2).cause == "unreadable file"
    assert fault(source, 4).cause == "empty caption"  # reported before its image is looked for
    opened = os.open

    def denied(path: str | Path, *args: int) -> int:  # root may read everything
        if Path(path).name == "001.png":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args)

    monkeypatch.setattr(os, "open", denied)
    found = fault(source, 3)
    assert (found.cause, found.reason) == ("unreadable file", "Permission denied")
    assert source[0].captions == ("x",)

    class BadDisk(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    for file in (BadDisk(), Path("/a\0b.png")):
        with pytest.raises(BadSample, match=r"^a: (.*Input/output error|.*null)") as caught:
            read_picture(file, "a")
        assert caught.value.fault.cause == "unreadable file"


@pytest.mark.fault("An image has the wrong extension", "It is read according to its content")
def test_kind_of_a_picture_is_not_its_name(tmp_path: Path) -> None:
    source = open_source(str(write_folder(tmp_path, 0, [(picture(40, "JPEG"), b"x"), (picture(90, "BMP"), b"x")])))
    assert [abs(float(plain(source[k].image).mean()) - shade) < 8 for k, shade in enumerate((40, 90))] == [True, True]


@pytest.mark.fault("An image is not RGB", "It is converted. More than 8 bits are scaled, transparency is dropped")
@pytest.mark.parametrize(
    ("mode", "kind", "pixel", "expected"),
    [
        ("1", "PNG", 1, (255, 255, 255)),
        ("L", "PNG", 77, (77, 77, 77)),
        ("LA", "PNG", (77, 0), (77, 77, 77)),  # transparency is dropped, as open_clip drops it
        ("P", "GIF", None, (10, 20, 30)),
        ("RGBA", "PNG", (10, 20, 30, 0), (10, 20, 30)),
        ("CMYK", "TIFF", (255, 0, 255, 0), (0, 255, 0)),
        ("YCbCr", "TIFF", (128, 128, 128), (128, 128, 128)),
        ("LAB", "TIFF", (255, 128, 128), (255, 255, 255)),
        ("I;16", "PNG", 0x8000, (128, 128, 128)),
        ("I;16", "TIFF", 0x00FF, (1, 1, 1)),
        ("I", "TIFF", 2**30, (128, 128, 128)),
        ("I", "TIFF", 200, (200, 200, 200)),
        ("F", "TIFF", 0.5, (128, 128, 128)),
        ("F", "TIFF", 200.0, (200, 200, 200)),
        ("F", "TIFF", float("nan"), (0, 0, 0)),
        ("F", "TIFF", -3.0, (0, 0, 0)),
    ],
)
def test_every_mode_becomes_colours(
    tmp_path: Path, mode: str, kind: str, pixel: object, expected: tuple[int, int, int]
) -> None:
    image = Image.new(mode, (4, 4), pixel) if mode != "P" else Image.new("RGB", (4, 4), (10, 20, 30)).quantize()
    options = {"transparency": 0} if mode == "P" else {}
    image.save(tmp_path / "a.png", kind, **options)
    (tmp_path / "a.txt").write_text("x")
    found = open_source(str(tmp_path))[0].image
    assert found.mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB")
    assert found.convert("RGB").getpixel((1, 2)) == pytest.approx(expected, abs=1)


def test_colours_of_hsv_are_those_of_pillow() -> None:
    """Images in HSV, which no file format has but a source may return, are converted as by Pillow."""
    assert Image.new("HSV", (4, 4), (85, 255, 255)).convert("RGB").getpixel((0, 0)) == pytest.approx((0, 255, 0), abs=2)


def test_first_frame_of_an_animation_counts(tmp_path: Path) -> None:
    for kind in ("GIF", "WEBP"):
        frames = [Image.new("RGB", (8, 8), shade) for shade in ("red", "blue")]
        frames[0].save(tmp_path / f"{kind}.png", kind, save_all=True, append_images=frames[1:], lossless=True)
        (tmp_path / f"{kind}.txt").write_text("x")
    source = open_source(str(tmp_path))
    assert [source[k].image.convert("RGB").getpixel((3, 3)) for k in range(2)] == [(255, 0, 0)] * 2


@pytest.mark.fault("EXIF data are damaged", "The image is used as it is")
def test_damaged_exif_is_passed_over_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    data = [picture(50, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05" + tail) for tail in (b"", b"\xff" * 30)]
    data.append(picture(50, "JPEG", exif=b"Exif\0\0nothing of the kind"))
    turned = Image.Exif()
    turned[0x0112] = 6  # rotates by 90 degrees
    data.append(picture(50, "JPEG", exif=turned))
    source = open_source(str(write_folder(tmp_path, 0, [(image, b"x") for image in data])))

    def fail(self: Image.Exif) -> bytes:  # Pillow does so for a value that does not fit its type
        raise struct.error("ushort format requires 0 <= number <= 65535")

    monkeypatch.setattr(Image.Exif, "tobytes", fail)
    assert [source[k].image.size for k in range(4)] == [(16, 8)] * 3 + [(8, 16)]
    assert not recwarn.list


# --- captions


@pytest.mark.fault("A caption is missing, empty or damaged", "The sample is replaced and counted by cause")
@pytest.mark.parametrize(
    ("name", "data", "cause"),
    [
        (None, b"", "no caption"),
        (".txt", b" \n", "empty caption"),
        (".json", b'{"url": "x"}', "no caption"),
        (".json", b'["a cat"]', "damaged caption"),
        (".json", b'{"caption": "\\ud800"}', "damaged caption"),
        (".json", b'{"caption": {"en": "a cat"}}', "damaged caption"),
        (".json", b'{"caption": ' + b"[" * 100_000, "damaged caption"),
        (".json", b'{"caption": ' + b"9" * 5000 + b"}", "damaged caption"),
        (".json", b'{"caption": NaN}', "damaged caption"),
        (".txt", b"\xff\xfe", "damaged caption"),
        (".json", b"{", "damaged caption"),
        (".json", b'{"caption": 3}', "damaged caption"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_caption_fault_has_its_cause(tmp_path: Path, kind: str, name: str | None, data: bytes, cause: str) -> None:
    members = [("0.png", picture()), ("0.txt", b"x"), ("1.png", picture())]
    members += [] if name is None else [(f"1{name}", data)]
    if kind == "shards":
        source = open_source(str(write_tar(tmp_path / "x.tar", members)))
    else:
        for file, content in members:
            (tmp_path / file).write_bytes(content)
        source = open_source(str(tmp_path))
    assert len(source) == 2 and source[0].captions == ("x",)
    assert fault(source, 1).cause == cause
    with pytest.raises(BadSample, match=re.escape(source.key(1))):
        source.captions(1)


# --- shards


def pairs(*names: str) -> list[tuple[str, bytes]]:
    return [member for k, name in enumerate(names) for member in ((f"{name}.png", picture(k)), (f"{name}.txt", b"x"))]


@pytest.mark.fault("A shard contains a member twice", "The first is used, the second is counted as a fault")
def test_first_of_a_repeated_member_counts(tmp_path: Path) -> None:
    members = [*pairs("a", "b", "a"), ("b.txt", b"another"), ("a.png", picture(200))]
    source = open_source(str(write_tar(tmp_path / "x.tar", members)))
    assert len(source) == 4 and [source.captions(k) for k in range(2)] == [("x",)] * 2
    assert [float(plain(source[k].image).mean()) < 16 for k in range(2)] == [True, True]
    for k, key in ((2, "a"), (3, "b")):
        assert fault(source, k) == Fault(
            "duplicate member",
            f"{tmp_path}/x.tar: {key}",
            "the shard contains this sample twice, and the first is used",
        )


@pytest.mark.fault("A tar file is cut in half", "Its complete samples are used, and the log names it at each start")
def test_shard_cut_in_half_is_used_as_far_as_it_goes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "x.tar", pairs(*map(str, range(10))))
    whole = path.read_bytes()
    per_member = 1024  # a header and an image or caption, each of one block
    for size, expected, bad in (
        (8 * per_member + 600, 4, ["cut shard"]),  # in the data of an image
        (8 * per_member + 100, 4, []),  # in the header of an image
        (9 * per_member, 4, ["no caption"]),  # between two members: the caption of an image is missing
        (9 * per_member + 300, 4, ["no caption"]),  # in the header of a caption
        (9 * per_member + 600, 5, []),  # in the padding after a caption's data
    ):
        caplog.clear()
        path.write_bytes(whole[:size])
        source = open_source(str(path))
        assert [source.captions(k) for k in range(expected)] == [("x",)] * expected
        assert [fault(source, k).cause for k in range(expected, len(source))] == bad, size
        told = f"{path}: cut off or damaged after {expected} samples, which are used"
        assert (told in caplog.text) == (size != 9 * per_member), size  # a shard may end between two members
    path.write_bytes(whole[:4096] + HTML + whole[4096 + len(HTML) :])
    assert len(open_source(str(path))) == 2 and "x.tar: cut off or damaged after 2 samples" in caplog.text


@pytest.mark.fault("A tar file is empty or garbage", "The run does not start, and an error names the file")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a tar file"),
        (bytes(10240), "the shard holds no images"),
        (os.urandom(5000), "not a tar file"),
        (HTML * 200, "not a tar file"),
    ],
    ids=["empty file", "empty tar", "garbage", "html"],
)
def test_shard_that_holds_nothing_stops_by_name(tmp_path: Path, data: bytes, message: str) -> None:
    write_tar(tmp_path / "0.tar", pairs("a"))
    (tmp_path / "1.tar").write_bytes(data)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / '1.tar'))}: {message}"):
        open_source(str(tmp_path))


@pytest.mark.fault("Names of tar members contain `..` or are absolute", "Nothing is written to the disk")
def test_names_that_lead_elsewhere_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    path = write_tar(inside / "x.tar", pairs("../../evil", "/evil", "..", "c/../../d"))
    monkeypatch.chdir(inside)
    before = sorted(tmp_path.rglob("*"))
    source = open_source("x.tar")
    assert [source[k].key for k in range(len(source))] == ["x.tar: ../../evil", "x.tar: /evil", "x.tar: c/../../d"]
    for step in training_batches(source, plain, lambda texts: torch.zeros(len(texts), 1), batch_size=3, last_step=2):
        assert len(step[0].keys) == 3
    after = [*before, inside / "x.tar.fastclip-index"]
    assert sorted(tmp_path.rglob("*")) == after and path.is_file() and not Path("/evil.png").exists()


@pytest.mark.fault("Data are given as a `pipe:` URL", "It is refused and never run")
def test_pipe_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "x.tar", pairs("a"))
    for spec in ("pipe:touch ran; cat x.tar", "pipe:touch ran; cat {x..x}.tar", "pipe:touch ran"):
        with pytest.raises(ValueError, match="pipe:touch ran"):
            open_source(spec)
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


# --- batches

BAD = [(HTML, b"x 0"), (picture(), None), (cut(picture(9, "JPEG")), b"x 0"), (picture(), b" ")]
CAUSES = {"not an image": 1, "no caption": 1, "truncated image": 1, "empty caption": 1}


def batches(source: Source, **options: int) -> list[Batch]:
    """Return the micro-batches of every step, joined over all ranks."""
    ranks = options.pop("ranks", 1)
    shares = [
        list(training_batches(source, plain, tokenize, batch_size=6, last_step=8, rank=r, ranks=ranks, **options))
        for r in range(ranks)
    ]
    steps = []
    for step in range(len(shares[0])):
        images, ids, labels, keys, skipped, _ = zip(*(batch for share in shares for batch in share[step]), strict=True)
        steps.append(Batch(torch.cat(images), torch.cat(ids), torch.cat(labels), sum(keys, ()), sum(skipped, ())))
    return steps


@pytest.mark.fault("Samples cannot be used", "Other samples take their places, and batches keep their sizes")
def test_bad_samples_are_replaced_and_batches_keep_their_size(tmp_path: Path) -> None:
    source = open_source(str(write_folder(tmp_path, 20, BAD)))
    good = [source.key(k) for k in range(20)]
    steps = batches(source)
    for step in steps:
        assert step.images.shape == (6, 3, 8, 16) and step.ids.shape == (6, 1)
        for key, image, number in zip(step.keys, step.images, step.ids[:, 0].tolist(), strict=True):
            assert key == good[number] and torch.equal(image, plain(source[number].image))
    for epoch in (steps[:4], steps[4:]):
        assert Tally(fault for step in epoch for fault in step.skipped).counts == CAUSES  # each once per epoch
        keys = [key for step in epoch for key in step.keys]
        assert set(keys) == set(good)  # the places of the other samples are unchanged
    replaced = [{key for key in good if sum(step.keys.count(key) for step in e) > 1} for e in (steps[:4], steps[4:])]
    assert replaced[0] != replaced[1]


@pytest.mark.parametrize(
    "options", [{"workers": 2}, {"ranks": 3}, {"micro_batch": 1, "workers": 1}, {"first_step": 3}], ids=str
)
def test_replacements_are_the_same_however_read(tmp_path: Path, options: dict[str, int]) -> None:
    source = open_source(str(write_folder(tmp_path, 20, BAD)))
    expected = batches(source)[options.get("first_step", 0) :]
    for got, step in zip(batches(source, **options), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got[:3], step[:3], strict=True))
        assert got[3:] == step[3:]


@pytest.mark.fault("No sample of the data can be used", "The run ends after 100 attempts, with causes and files")
@pytest.mark.parametrize("workers", [0, 1])
def test_source_that_gives_nothing_stops_with_causes_and_names(tmp_path: Path, workers: int) -> None:
    source = open_source(str(write_folder(tmp_path, 0, [(HTML, b"x"), (picture(), b" ")])))
    message = rf"^{re.escape(str(tmp_path))}: 100 tries found no usable sample among 2 different samples "
    message += r"\(see `fastclip data check`\): 1 not an image \(.*000\.png\), 1 em"
    with pytest.raises(ValueError, match=message):
        next(training_batches(source, plain, tokenize, batch_size=2, last_step=1, workers=workers))


def test_evaluation_counts_what_it_leaves_out(tmp_path: Path) -> None:
    source = open_source(str(write_folder(tmp_path, 3, BAD)))
    for ranks in (1, 2):
        skipped, found = Tally(), []
        for rank in range(ranks):
            for images, indices, labels in evaluation_batches(
                source, plain, batch_size=3, rank=rank, ranks=ranks, workers=rank, skipped=skipped
            ):
                assert len(images) == len(indices) == len(labels)
                found += indices.tolist()
        assert sorted(found) == [-1] * (len(found) - 3) + [0, 1, 2] and skipped.counts == CAUSES
    with pytest.raises(ValueError, match=r"003\.png: not a readable image"):
        list(evaluation_batches(source, plain, batch_size=3))


# --- workers


@pytest.mark.fault("A data worker hangs", "Every 60 s without a batch, the log names the worker and what it is reading")
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
@pytest.mark.parametrize("workers", [0, 2])
def test_stuck_worker_is_named_with_what_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    write_folder(tmp_path, 3)
    stuck = tmp_path / "001.png"
    stuck.unlink()
    os.mkfifo(stuck)
    source, lines = open_source(str(tmp_path)), []

    def waits(path: Path, key: str, **options: int | None) -> Image.Image:
        if path == stuck:
            path.open("rb").close()  # returns as soon as the FIFO has a writer
        return read_picture(path, key, **options)

    monkeypatch.setattr("fastclip.data.source.read_picture", waits)

    def release() -> None:
        with suppress(OSError):  # the FIFO has no reader any more
            os.close(os.open(stuck, os.O_WRONLY | os.O_NONBLOCK))

    class Release(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            if len(lines) > 1:  # the report is repeated
                release()

    over = threading.Event()

    def release_at_last() -> None:  # ends the test if nothing is reported
        while not over.wait(20):
            release()

    threading.Thread(target=release_at_last, daemon=True).start()
    logger, handler = logging.getLogger("fastclip.data.loading.watchdog"), Release()
    logger.addHandler(handler)
    try:
        options = {"batch_size": 3, "last_step": 1, "workers": workers, "patience": 0.3}
        (step,) = training_batches(source, plain, tokenize, **options)
    finally:
        logger.removeHandler(handler)
        over.set()
    assert len(step[0].keys) == 3 and len(lines) > 1
    who = r"data worker 0 \(pid \d+\)" if workers else rf"pid {os.getpid()}"
    for line in lines[:2]:
        assert re.match(rf"no batch for \d+ s: {who}, reading {re.escape(str(stuck))} for \d+ s$", line), line


def test_no_alarm_while_batches_come(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    source = open_source(str(write_folder(tmp_path, 3)))
    before = threading.active_count()
    steps = training_batches(source, plain, tokenize, batch_size=3, last_step=20, patience=1.0)
    for step, _ in enumerate(steps):
        threading.Event().wait(2.3 if step == 3 else 0)  # the caller's time does not count
    assert "no batch" not in caplog.text
    for _ in range(100):
        if threading.active_count() <= before:
            return
        threading.Event().wait(0.1)
    raise AssertionError("the alarm outlives its batches")


@pytest.mark.parametrize(
    ("torchs", "ours"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "(Killed), probably for lack of memory: use fewer"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It", "probably because /dev/shm is full: enlarge"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "a data worker ended"),
    ],
)
def test_death_of_a_worker_is_an_error_of_one_line(torchs: str, ours: str) -> None:
    with pytest.raises(ChildProcessError, match=re.escape(ours)), naming_dead_workers():
        raise RuntimeError(torchs)
    with pytest.raises(RuntimeError, match="of another kind"), naming_dead_workers():
        raise RuntimeError("of another kind")


# --- counting


def test_tally_shows_causes_with_their_first_keys() -> None:
    tally = Tally(Fault("no caption", f"{k}.jpg", "x") for k in (1, 1, 2, 3, 4))
    assert tally.add([Fault("not an image", "5.jpg", "y"), Fault("no caption", "9.jpg", "x")]) == [
        Fault("not an image", "5.jpg", "y")
    ]
    assert tally.total == 7 and str(tally) == "6 no caption (1.jpg, 2.jpg, 3.jpg ...), 1 not an image (5.jpg)"


def test_bad_sample_goes_through_a_pickle() -> None:
    bad = pickle.loads(pickle.dumps(BadSample("no caption", "a.jpg", "it has none")))
    assert bad.fault == Fault("no caption", "a.jpg", "it has none") and str(bad) == "a.jpg: it has none"
