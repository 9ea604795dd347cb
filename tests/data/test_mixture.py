"""Weighted mixtures of sources, and the draws of an epoch over a changing number of ranks."""

from __future__ import annotations

import io
import re
import tarfile
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from support import needs
from support.faulty import HTML, picture, write_folder

needs("train")

from PIL import Image
from torchvision.transforms import ToTensor

from fastclip.data import Record, evaluation_batches, open_source, training_batches
from fastclip.data.faults import Tally
from fastclip.data.loading.order import Order
from fastclip.data.loading.watchdog import Watch
from fastclip.data.sources.mixture import Mixture, sample_count, sample_position


class Numbers:
    """A source whose sample k has the caption "NAME k" and the label k % 3."""

    templates: tuple[str, ...] = ("a {}",)

    def __init__(self, spec: str, size: int, class_names: tuple[str, ...] = ("x", "y", "z")) -> None:
        self.spec, self.size, self.class_names = spec, size, class_names

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:
        return Record(Image.new("RGB", (4, 4)), self.captions(index), f"{self.spec} {index}", index % 3)

    def captions(self, index: int) -> tuple[str, ...]:
        assert 0 <= index < self.size
        return (f"{self.spec} {index}",)

    def key(self, index: int) -> str:
        return f"{self.spec} {index}"


def mixture(**weights: tuple[int, str]) -> Mixture:
    """Return a mixture of `Numbers`: a=(5, "0.5") is half of five samples."""
    sources = [Numbers(name, size) for name, (size, _) in weights.items()]
    return Mixture("spec", sources, [Fraction(weight) for _, weight in weights.values()])


def drawn(source: Mixture, epoch: int) -> Counter[str]:
    return Counter(source.read(index, epoch=epoch).key for index in range(len(source)))


def test_mixture_of_whole_weights_draws_every_sample_so_often() -> None:
    source = mixture(a=(5, "1"), b=(3, "2"), c=(1, "4"))
    assert len(source) == 5 + 6 + 4
    expected = Counter({f"a {k}": 1 for k in range(5)} | {f"b {k}": 2 for k in range(3)} | {"c 0": 4})
    for epoch in range(3):
        assert drawn(source, epoch) == expected
    assert [source[k].key for k in range(5)] == [f"a {k}" for k in range(5)]  # in order


@pytest.mark.parametrize(("size", "weight", "draws"), [(10, "0.5", 5), (7, "0.3", 2), (97, "2.4", 233), (6, "1.5", 9)])
def test_mixture_of_fractions_goes_through_all_before_it_repeats(size: int, weight: str, draws: int) -> None:
    source = mixture(b=(3, "1"), a=(size, weight))
    assert len(source) == 3 + draws
    seen: Counter[str] = Counter({f"a {k}": 0 for k in range(size)})
    for epoch in range(20):
        seen += Counter({key: count for key, count in drawn(source, epoch).items() if key[0] == "a"})
        counts = [seen[f"a {k}"] for k in range(size)]
        assert sum(counts) == (epoch + 1) * draws
        assert max(counts) - min(counts) <= 1


def test_mixture_spreads_an_epochs_part_over_the_source() -> None:
    source = mixture(a=(1000, "0.1"))
    for epoch in range(3):
        tenths = Counter(int(key.split()[1]) // 100 for key in drawn(source, epoch))
        assert len(tenths) == 10 and max(tenths.values()) <= 13


def test_mixture_reads_and_tells_the_same_sample() -> None:
    source = mixture(a=(10, "0.5"), b=(4, "1"))
    for index in range(len(source)):
        assert source[index].captions == source.captions(index) == (source[index].key,)
        assert source[index].key == source.key(index)
        assert source[index].label == int(source[index].key.split()[1]) % 3
    for index in (-1, len(source)):
        with pytest.raises(IndexError):
            source.captions(index)


def test_position_of_a_sample_is_the_same_in_every_epoch() -> None:
    source = mixture(a=(10, "0.5"), b=(4, "2"), c=(3, "1"))
    assert sample_count(source) == source.samples == 17 and sample_count(Numbers("a", 5)) == 5
    positions = {}
    for epoch in range(3):
        for index in range(len(source)):
            position = sample_position(source, index, epoch)
            assert positions.setdefault(source.key(index, epoch=epoch), position) == position
    assert sorted(positions.values()) == [*range(17)] and sample_position(Numbers("a", 5), 3, epoch=2) == 3
    twice = Numbers("a", 5)  # one source, joined with itself
    source = Mixture("spec", [twice, twice], [Fraction(1), Fraction(1)])
    assert source.samples == 5 and source.position(7) == 2


def test_batches_of_a_mixture_have_the_positions_of_their_samples() -> None:
    source = mixture(a=(10, "0.5"), b=(4, "2"))
    batches = training_batches(source, ToTensor(), lambda texts: torch.zeros(len(texts), 1), batch_size=13, last_step=3)
    for epoch, (batch,) in enumerate(batches):
        names = [key.split() for key in batch.keys]
        assert batch.samples.tolist() == [int(k) + 10 * (name == "b") for name, k in names], epoch


def test_reader_of_a_mixture_is_named_with_what_its_epoch_drew() -> None:
    source = mixture(a=(10, "0.5"), b=(4, "1"))
    watch = Watch(source, 0)
    assert watch.read(3, epoch=1).key == source.key(3, epoch=1) != source.key(3)
    assert watch.reading(0).startswith(f", reading {source.key(3, epoch=1)} for ")


@pytest.mark.fault("Samples of weighted data cannot be used", "Samples of the same epoch take their places")
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_of_a_mixture_are_replaced_by_those_of_the_epoch(tmp_path: Path, workers: int) -> None:
    write_folder(tmp_path / "good", 40)
    write_folder(tmp_path / "bad", 2, [(HTML, b"x 0"), (picture(), None), (HTML, b"x 0"), (picture(), b" ")])
    source = open_source(f"0.25*{tmp_path / 'good'}::{tmp_path / 'bad'}")
    assert len(source) == 16
    steps = list(
        training_batches(
            source, ToTensor(), lambda texts: torch.zeros(len(texts), 1), batch_size=8, last_step=8, workers=workers
        )
    )
    for epoch in range(4):
        batches = [batch for step in steps[2 * epoch : 2 * epoch + 2] for batch in step]
        drawn = {source.key(index, epoch=epoch) for index in range(len(source))}
        assert {key for batch in batches for key in batch.keys} == {key for key in drawn if "bad/00" not in key} | {
            str(tmp_path / "bad" / f"00{k}.png") for k in range(2)
        }
        skipped = Tally(fault for batch in batches for fault in batch.skipped)
        assert skipped.counts == {"not an image": 2, "no caption": 1, "empty caption": 1}


def test_mixture_has_classes_where_all_agree() -> None:
    one = [Fraction(1)] * 2
    same = Mixture("s", [Numbers("a", 3), Numbers("b", 3)], one)
    assert same.class_names == ("x", "y", "z") and same.templates == ("a {}",) and same[4].label == 1
    for names in ((), ("x", "y"), ("y", "x", "z")):
        other = Mixture("s", [Numbers("a", 3), Numbers("b", 3, names)], one)
        assert (other.class_names, other.templates, other[1].label, other[4].label) == ((), (), None, None)


def write_shards(folder: Path, *sizes: int) -> None:
    """Write shards in which sample J of shard I has the caption "I J", and an image whose red
    and green have the same values.
    """
    folder.mkdir(exist_ok=True)
    for i, size in enumerate(sizes):
        with tarfile.open(folder / f"{i}.tar", "w") as tar:
            for j in range(size):
                file = io.BytesIO()
                Image.new("RGB", (4, 4), (i, j, 0)).save(file, "png")
                for suffix, data in (("png", file.getvalue()), ("txt", f"{i} {j}".encode())):
                    info = tarfile.TarInfo(f"{j:03d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    ("spec", "draws"),
    [
        ("a::b", 9),
        ("2*a/*.tar::b/0.tar", 15),
        ("0.5*a", 3),
        (".5*b::a", 8),
        ("2.*b", 6),
        ("a/{0,1}.tar", 6),
        ("1000000*a", 6_000_000),
        ("0*.tar", 1),  # a glob that matches 00.tar
        ("0*.tar::3*x.tar", 4),
    ],
)
def test_spec_joins_and_weighs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, draws: int) -> None:
    write_shards(tmp_path / "a", 2, 4)
    write_shards(tmp_path / "b", 3)
    write_shards(tmp_path, 1, 1)
    (tmp_path / "0.tar").rename(tmp_path / "00.tar")
    (tmp_path / "1.tar").rename(tmp_path / "x.tar")
    monkeypatch.chdir(tmp_path)
    source = open_source(spec)
    assert len(source) == draws and source.spec == spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a::none", "'none' is not a dataset"),
        ("a::", "'' is not a dataset"),
        ("99999999999999999999*a", "a: the weight must be at most 1,000,000, got 1e+20"),
        ("a::1000000.5*a", "a: the weight must be at most 1,000,000, got 1e+06"),
        ("9" * 5000 + "*a", "*a: the weight has more than 100 digits"),
        ("0*a", "0*a: the weight must be above 0"),
        ("0.01*a::a", "a: the weight 0.01 is too small: it draws none of 6 samples"),
    ],
)
def test_spec_that_joins_wrongly_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str
) -> None:
    write_shards(tmp_path / "a", 2, 4)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        open_source(spec)


def tokenize(texts: list[str]) -> Tensor:
    return torch.tensor([[int(word) for word in text.split()] for text in texts])


def read(
    source: object, first: int, last: int, *, ranks: int = 1, workers: int = 0, batch_size: int = 6
) -> list[list[tuple[str, ...]]]:
    """Return the keys of every step, joined over all ranks."""
    options = {"batch_size": batch_size, "seed": 5, "first_step": first, "last_step": last, "ranks": ranks}
    shares = []
    for rank in range(ranks):
        steps = training_batches(source, ToTensor(), tokenize, rank=rank, workers=workers, **options)
        shares.append([sum((batch.keys for batch in step), ()) for step in steps])
    return [[share[step] for share in shares] for step in range(last - first)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_order_of_fewer_shards_than_workers_does_not_depend_on_them(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", 7, 8)
    source = open_source(str(tmp_path / "s"))
    expected = read(source, 0, 6)
    for ranks, workers in ((1, 5), (3, 0), (6, 0), (2, 3)):
        found = read(source, 0, 6, ranks=ranks, workers=workers)
        assert [[sum(step, ())] for step in found] == expected
        assert {len(keys) for step in found for keys in step} == {6 // ranks}


@pytest.mark.parametrize("kind", ["shards", "mixture"])
def test_run_that_goes_on_with_other_ranks_loses_and_repeats_nothing(tmp_path: Path, kind: str) -> None:
    write_shards(tmp_path / "s", 11, 20, 1)
    write_shards(tmp_path / "t", 10)
    spec = str(tmp_path / "s") + (f"::0.5*{tmp_path / 't'}" if kind == "mixture" else "")
    source = open_source(spec)
    batch_size = 4
    order = Order(len(source), batch_size, 5)
    epoch = order.epoch_length // batch_size
    calls = [(0, 3, 2, 0), (3, 5, 4, 1), (5, epoch + 2, 1, 0), (epoch + 2, 2 * epoch, 3, 0)]
    found = [
        sum(step, ())
        for first, last, ranks, workers in calls
        for step in read(source, first, last, ranks=ranks, workers=workers, batch_size=batch_size)
    ]
    for number in range(2):
        keys = sum(found[number * epoch : (number + 1) * epoch], ())
        assert len(set(keys)) == len(keys) == order.epoch_length  # fewer samples than a batch are left out
    assert len(source) - order.epoch_length < batch_size
    if kind == "mixture":  # two epochs of a half draw each sample once, less those left out
        halves = Counter(key for step in found for key in step if str(tmp_path / "t") in key)
        assert set(halves.values()) == {1} and 10 - 2 * (batch_size - 1) <= len(halves)


def test_evaluation_on_a_part_is_spread_and_fixed(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", 10, 10)
    source = open_source(f"0.5*{tmp_path / 's'}")
    batches = list(evaluation_batches(source, ToTensor(), batch_size=4))
    images = torch.cat([images for images, _, _ in batches])
    assert images.shape[0] == 10 and torch.cat([index for _, index, _ in batches]).tolist() == list(range(10))
    shards = Counter((images[:, 0, 0, 0] * 255).round().int().tolist())
    assert sorted(shards) == [0, 1] and max(shards.values()) <= 6
