"""Batches have the same bits however they are read, and failing samples and workers are reported."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support import needs
from support.processes import ended, forked, in_session, wait_for

needs("models")

from PIL import Image
from torchvision.transforms import Compose, RandomHorizontalFlip, RandomResizedCrop, ToTensor

from fastclip.data import Batch, Record, evaluation_batches, open_source, training_batches
from fastclip.system import env, parent

forked_workers = pytest.mark.skipif(sys.platform != "linux", reason="workers are not forked")
CROP = Compose([RandomResizedCrop(6), RandomHorizontalFlip(), ToTensor()])


class Gradients:
    """Images of 8 x 8 distinct pixels; sample k has the label k % 3, or none, and k % 3 + 1 captions."""

    spec = "gradients"
    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __init__(self, size: int = 13, *, labels: bool = False) -> None:
        self.size, self.labels = size, labels

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:
        pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) + index
        image = Image.fromarray(pixels).convert("RGB")
        return Record(image, self.captions(index), self.key(index), index % 3 if self.labels else None)

    def captions(self, index: int) -> tuple[str, ...]:
        return tuple(f"{index} {k}" for k in range(index % 3 + 1))

    def key(self, index: int) -> str:
        return f"gradient {index}"


def tokenize(texts: list[str]) -> Tensor:
    """Return the two numbers in each caption of `Gradients`."""
    return torch.tensor([[int(word) for word in text.split()] for text in texts])


def plain(image: Image.Image) -> Tensor:
    return ToTensor()(image)


def global_batches(**options: Any) -> list[Batch]:
    """Return the micro-batches of every step, joined over all ranks."""
    ranks = options.pop("ranks", 1)
    options = {"batch_size": 5, "last_step": 7, "seed": 3} | options
    source = options.pop("source", Gradients())
    shares = [list(training_batches(source, CROP, tokenize, rank=r, ranks=ranks, **options)) for r in range(ranks)]
    return [join([batch for share in shares for batch in share[step]]) for step in range(len(shares[0]))]


def join(batches: list[Batch]) -> Batch:
    images, ids, labels, keys, skipped, samples = zip(*batches, strict=True)
    tensors = map(torch.cat, (images, ids, labels))
    return Batch(*tensors, sum(keys, ()), sum(skipped, ()), torch.cat(samples))


def assert_equal(got: list[Batch], expected: list[Batch]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a[:3], b[:3], strict=True))
        assert a.keys == b.keys and a.skipped == b.skipped and torch.equal(a.samples, b.samples)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # torch warns on two cores
@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"workers": 1}, True),
        ({"workers": 3, "micro_batch": 2}, True),
        ({"micro_batch": 1}, True),
        ({"micro_batch": 100}, True),
        ({"ranks": 2}, True),  # 2 and 3 samples
        ({"ranks": 3, "micro_batch": 1, "workers": 1}, True),
        ({"ranks": 5}, True),
        ({"seed": 4}, False),
    ],
    ids=str,
)
def test_batches_are_the_same_bits_however_read(options: dict[str, int], same: bool) -> None:
    expected = global_batches()
    assert [tuple(batch.images.shape) for batch in expected] == [(5, 3, 6, 6)] * 7
    if same:
        assert_equal(global_batches(**options), expected)
    else:
        with pytest.raises(AssertionError):
            assert_equal(global_batches(**options), expected)


@pytest.mark.parametrize("batch_size", [5, 30])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_on_in_the_middle_of_an_epoch(batch_size: int, workers: int) -> None:
    whole = global_batches(batch_size=batch_size)
    assert_equal(global_batches(batch_size=batch_size, first_step=3, workers=workers, micro_batch=4), whole[3:])
    assert global_batches(batch_size=batch_size, first_step=7) == []


def test_batches_are_the_orders_samples_with_their_captions() -> None:
    from fastclip.data.loading.order import Order

    order = Order(13, 5, seed=3)
    for step, batch in enumerate(global_batches()):
        drawn = [draw.sample for draw in order.draws(step, 0, 5)]
        assert batch.keys == tuple(f"gradient {k}" for k in drawn)
        assert batch.ids[:, 0].tolist() == batch.samples.tolist() == drawn
        assert batch.images.dtype == torch.float32 and batch.labels.dtype == batch.ids.dtype == torch.int64


def test_batches_are_cut_into_micro_batches() -> None:
    def sizes(**options: int) -> list[int]:
        (step,) = training_batches(Gradients(), CROP, tokenize, batch_size=11, last_step=1, **options)
        return [len(batch.keys) for batch in step]

    assert sizes() == [11]
    assert sizes(micro_batch=4) == [4, 4, 3]
    assert [sizes(micro_batch=2, rank=r, ranks=3) for r in range(3)] == [[2, 1], [2, 2], [2, 2]]


def test_captions_and_crops_change_with_the_epoch() -> None:
    batches = global_batches(source=Gradients(6), batch_size=6, last_step=60)
    captions, crops = [set() for _ in range(6)], [set() for _ in range(6)]
    for batch in batches:
        for (sample, caption), image in zip(batch.ids.tolist(), batch.images, strict=True):
            captions[sample].add(caption)
            crops[sample].add(image.numpy().tobytes())
    assert [len(found) for found in captions] == [1, 2, 3, 1, 2, 3]  # every caption was drawn
    assert min(map(len, crops)) > 30  # an image this small has few different crops


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_differ_between_samples(workers: int) -> None:
    class Same(Gradients):
        def __getitem__(self, index: int) -> Record:
            return super().__getitem__(0)

    (batch,) = global_batches(source=Same(8), batch_size=8, last_step=1, micro_batch=2, workers=workers)
    assert len({image.numpy().tobytes() for image in batch.images}) == 8


def test_any_global_generator_of_a_transform_is_seeded() -> None:
    def draw(image: Image.Image) -> Tensor:
        numbers = [torch.rand(()).item(), np.random.rand(), random.random()]
        return torch.tensor(numbers).view(3, 1, 1)

    def run(workers: int) -> Tensor:
        steps = training_batches(
            Gradients(), draw, tokenize, batch_size=13, last_step=2, micro_batch=3, workers=workers
        )
        return torch.cat([batch.images.flatten(1) for step in steps for batch in step])

    drawn = run(0)
    assert torch.equal(run(2), drawn)
    assert [len(set(column.tolist())) for column in drawn.T] == [26, 26, 26]  # both the epoch and the sample matter


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_callers_random_numbers_are_left_alone(workers: int, kind: str) -> None:
    def states() -> tuple[list[int], bytes, object]:
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tobytes(), random.getstate()

    before = states()
    batches: Iterator[Any]
    if kind == "training":
        batches = training_batches(Gradients(), CROP, tokenize, batch_size=4, last_step=3, workers=workers)
    else:
        batches = evaluation_batches(Gradients(), CROP, batch_size=4, workers=workers)
    for _ in batches:
        assert states() == before
    assert states() == before


def test_labels_are_classes() -> None:
    for batch in global_batches(source=Gradients(labels=True)):
        assert batch.labels.tolist() == [k % 3 for k in batch.ids[:, 0].tolist()]


def test_labels_without_classes_tell_first_captions_apart() -> None:
    class Repeated(Gradients):
        def captions(self, index: int) -> tuple[str, ...]:
            return (f"{index // 2} 0", f"{index} 1")  # two samples share the first caption

    by_caption: dict[int, set[int]] = {}
    for batch in global_batches(source=Repeated(10), batch_size=25, last_step=4):  # includes repeats of a sample
        for key, label in zip(batch.keys, batch.labels.tolist(), strict=True):
            by_caption.setdefault(int(key.split()[1]) // 2, set()).add(label)
    assert sorted(by_caption) == list(range(5)) and all(len(labels) == 1 for labels in by_caption.values())
    labels = set().union(*by_caption.values())
    assert len(labels) == 5 and min(labels) >= 0 and max(labels) > 2**32
    assert by_caption[0] == {3679321338066202065}  # the same on every machine and in every version


def test_evaluation_takes_every_sample_once_and_ranks_stay_in_step() -> None:
    cases = ((13, 1, 4, 0), (13, 2, 4, 2), (13, 5, 2, 0), (2, 3, 5, 0), (12, 3, 4, 0))
    for size, ranks, batch_size, workers in cases:
        source = Gradients(size, labels=True)
        found, shapes = [], []
        for rank in range(ranks):
            batches = list(
                evaluation_batches(source, plain, batch_size=batch_size, rank=rank, ranks=ranks, workers=workers)
            )
            shapes.append([tuple(images.shape) for images, _, _ in batches])
            indices = torch.cat([found for _, found, _ in batches])
            assert indices[indices >= 0].tolist() == list(range(rank, size, ranks))
            labels = torch.cat([labels for _, _, labels in batches])
            assert labels.dtype == indices.dtype == torch.int64
            for image, index, label in zip(torch.cat([x for x, _, _ in batches]), indices.tolist(), labels.tolist()):
                assert torch.equal(image, plain(source[max(index, 0)].image))
                assert label == (index % 3 if index >= 0 else -1)
            found += indices[indices >= 0].tolist()
        assert sorted(found) == list(range(size))
        assert all(shape == shapes[0] for shape in shapes)


def test_evaluation_labels_are_minus_one_without_classes() -> None:
    ((_, indices, labels),) = evaluation_batches(Gradients(3), plain, batch_size=5)
    assert indices.tolist() == [0, 1, 2] and labels.tolist() == [-1, -1, -1]


@pytest.fixture
def broken_shards(tmp_path: Path) -> Path:
    """Write shards of four images, the third of which is damaged."""
    with tarfile.open(tmp_path / "00001.tar", "w") as tar:
        for k in range(4):
            picture, text = tmp_path / f"{k:04d}.png", tmp_path / f"{k:04d}.txt"
            Image.new("RGB", (8, 8)).save(picture)
            if k == 2:
                picture.write_bytes(b"<html>")
            text.write_text(f"{k} 0")
            tar.add(picture, picture.name)
            tar.add(text, text.name)
    return tmp_path / "00001.tar"


@pytest.mark.fault("A worker meets a damaged image", "One line names it, without tracebacks")
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_picture_is_named_in_one_line(broken_shards: Path, workers: int) -> None:
    needs("train")
    source = open_source(str(broken_shards))
    message = f"{broken_shards}: 0002: not a readable image: its format is not recognised"
    read = 0
    with pytest.raises(ValueError) as error:
        for _ in evaluation_batches(source, plain, batch_size=1, workers=workers):
            read += 1
    assert str(error.value) == message
    assert read == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_missing_shard_is_an_os_error(broken_shards: Path, workers: int) -> None:
    needs("train")
    source = open_source(str(broken_shards))
    broken_shards.unlink()
    batches = training_batches(source, CROP, tokenize, batch_size=1, last_step=1, workers=workers)
    with pytest.raises(OSError, match=r"00001\.tar: .*: No such file"):
        next(batches)


@pytest.mark.fault("A transform fails in an evaluation that skips no samples", "An error names the sample")
@pytest.mark.parametrize("workers", [0, 1])
def test_failing_transform_names_the_sample(workers: int) -> None:
    def fail(image: Image.Image) -> Tensor:
        raise ZeroDivisionError("by nothing")

    with pytest.raises(ValueError, match=r"^gradient 0: the transform failed: ZeroDivisionError: by nothing$"):
        next(evaluation_batches(Gradients(), fail, batch_size=2, workers=workers))


@pytest.mark.fault("kill -9 of a data worker", "An error names the worker and what it was reading; nothing hangs")
def test_killed_worker_is_named_with_what_it_read() -> None:
    def die(image: Image.Image) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    said = r"^data worker 0 \(pid \d+\) was killed by the system \(Killed\), reading gradient 0 for \d+ s, probably for"
    with pytest.raises(ChildProcessError, match=said):
        next(evaluation_batches(Gradients(), die, batch_size=2, workers=1))


@pytest.mark.fault("Ctrl-C while workers read", "Only the trainer receives it and decides when the run ends")
def test_workers_are_outside_the_callers_process_group() -> None:
    def group(image: Image.Image) -> Tensor:
        return torch.full((3, 1, 1), float(os.getpgrp()))

    ((images, _, _),) = evaluation_batches(Gradients(1), group, batch_size=1, workers=1)
    assert images[0, 0].item() != os.getpgrp()


class Wordy(Gradients):
    """A source with keys so long that workers fill the pipe to the caller, which takes 64 KiB."""

    def key(self, index: int) -> str:
        return f"{index} " * 20_000


@forked_workers
@pytest.mark.fault("kill -9 of a program whose workers read", "The workers end too, and a pipe from it is closed")
@pytest.mark.parametrize("stuck", [False, True], ids=["workers ahead of it", "workers that are stuck"])
def test_workers_end_with_a_killed_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stuck: bool) -> None:
    """Workers end with a killed program, although forked siblings hold both ends of their pipes."""
    monkeypatch.setattr(parent, "_PAUSE", 0.1)
    reading, writing = os.pipe()

    def transform(image: Image.Image) -> Tensor:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(1000 * stuck)
        return plain(image)

    def program() -> None:
        os.dup2(writing, 1)
        os.close(writing)
        options = {"batch_size": 8, "micro_batch": 1, "last_step": 100, "workers": 2}
        steps = training_batches(Wordy(), transform, tokenize, **options)
        next(steps)
        time.sleep(1000)

    pid = forked(program, tmp_path / "said")
    os.close(writing)
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2, 20)
    if not stuck:
        time.sleep(0.2)  # lets the pipes fill
    assert len(in_session(pid)) == 3
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL
    wait_for(lambda: not in_session(pid), 5)
    assert os.read(reading, 1) == b""  # no other process holds the output open
    os.close(reading)


@forked_workers
def test_stuck_workers_are_not_waited_for(tmp_path: Path) -> None:
    read: list[int] = []

    def transform(image: Image.Image) -> Tensor:
        read.append(1)
        if len(read) > 8:  # of this worker
            (tmp_path / str(os.getpid())).touch()
            time.sleep(1000)
        return plain(image)

    steps = training_batches(Wordy(), transform, tokenize, batch_size=8, last_step=100, workers=2)
    next(steps)
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2, 20)
    begin = time.monotonic()
    del steps
    assert time.monotonic() - begin < 4  # torch waits 5 s for each


@forked_workers
@pytest.mark.fault("Ctrl-C or SIGTERM while workers start", "The program receives it, and no worker ends because of it")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_wait_while_workers_start(tmp_path: Path, number: signal.Signals) -> None:
    """Signals wait until all workers have started: an exception in the hooks of os.fork would be swallowed."""
    handled: list[int] = []

    def steps(transform: Any) -> list[Any]:
        return list(training_batches(Wordy(), transform, tokenize, batch_size=8, last_step=3, workers=2))

    def program() -> None:
        send = functools.partial(signal.raise_signal, number)
        os.register_at_fork(after_in_parent=send, after_in_child=send)
        signal.signal(number, lambda *args: handled.append(number))
        assert len(steps(plain)) == 3 and handled == [number]
        signal.signal(number, signal.default_int_handler)
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            steps(lambda image: time.sleep(1000))
        assert time.monotonic() - begin < 4  # torch waits 5 s for each

    assert ended(forked(program, tmp_path / "said")) == 0, (tmp_path / "said").read_text()


_LEFT_HALF_WAY = """
import sys
import torch
from torchvision.transforms import ToTensor
from fastclip.data.loading.batches import training_batches
from fastclip.data.spec import open_source

def tokenize(texts):
    return torch.zeros(len(texts), 4)

steps = training_batches(open_source(sys.argv[1]), ToTensor(), tokenize, batch_size=4, last_step=200, workers=1)
print(len(next(iter(steps))))
"""


@pytest.mark.fault("A program ends in the middle of its batches", "It ends normally, together with its workers")
def test_program_ends_that_left_its_batches_half_way(tmp_path: Path) -> None:
    for k in range(8):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text("a caption\n")
    command = [sys.executable, "-c", _LEFT_HALF_WAY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_batches_hold_no_file_open() -> None:
    """Batches hold no file open: a step keeps all micro-batches, and a process may be limited to 1,024 open files."""
    before = len(os.listdir("/proc/self/fd"))
    steps = training_batches(Gradients(64), plain, tokenize, batch_size=64, micro_batch=1, last_step=2, workers=1)
    step = next(steps)
    assert len(step) == 64
    assert len(os.listdir("/proc/self/fd")) < before + 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "ranks": 2}, "rank must be from 0 to ranks - 1, got rank 2 of 2"),
        ({"rank": -1}, "rank must be"),
        ({"ranks": 6}, r"batch_size must be at least the number of ranks \(6\), got 5"),
        ({"micro_batch": 0}, "micro_batch must be positive, got 0"),
        ({"workers": -1}, "workers must not be negative, got -1"),
        ({"first_step": 4}, "first_step 4 and last_step 3"),
        ({"first_step": -1}, "first_step -1"),
        ({"batch_size": 0}, r"batch_size must be at least the number of ranks \(1\), got 0"),
    ],
)
def test_training_options_out_of_range_are_refused_at_once(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_batches(Gradients(), CROP, tokenize, **({"batch_size": 5, "last_step": 3} | options))


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"rank": 1}, {"workers": -1}, {"source": Gradients(0)}])
def test_evaluation_options_out_of_range_are_refused_at_once(options: dict[str, Any]) -> None:
    options = {"source": Gradients(), "batch_size": 2} | options
    with pytest.raises(ValueError, match=r"batch_size must be|rank must be|workers must not"):
        evaluation_batches(options.pop("source"), plain, **options)


_WITH_TOKENIZERS = """
import os, sys
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torchvision.transforms import ToTensor
from fastclip.data import open_source, training_batches

bpe = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
bpe.pre_tokenizer = pre_tokenizers.Whitespace()
bpe.enable_padding(length=16)

def tokenize(texts):
    return torch.tensor([encoding.ids for encoding in bpe.encode_batch(texts)])

tokenize(["a text"] * 1000)  # the library has started its threads, which a fork does not copy
before = dict(os.environ)
for step in training_batches(open_source(sys.argv[1]), ToTensor(), tokenize, batch_size=64, last_step=2, workers=2):
    assert os.environ == before
"""


def test_tokenizers_neither_warn_nor_hang_in_workers(tmp_path: Path) -> None:
    needs("models")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a caption\n")
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-c", _WITH_TOKENIZERS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "tokenizers" not in done.stdout + done.stderr


@pytest.mark.parametrize("setting", [None, "true"])
def test_setting_of_tokenizers_is_put_back(monkeypatch: pytest.MonkeyPatch, setting: str | None) -> None:
    name = "TOKENIZERS_PARALLELISM"
    monkeypatch.delenv(name, raising=False)
    if setting is not None:
        monkeypatch.setenv(name, setting)
    with pytest.raises(KeyError), env.tokenizers_without_threads():
        assert os.environ[name] == "false"
        raise KeyError
    assert os.environ.get(name) == setting
