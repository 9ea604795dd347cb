"""Retrieval compared with its definition in plain loops, and the validation of training runs on one and several
processes.
"""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import needs

needs("models")
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import fastclip
from fastclip.data.faults import BadSample
from fastclip.data.identity import one_a_picture
from fastclip.data.source import Record
from fastclip.data.spec import open_source
from fastclip.evaluation import retrieval
from fastclip.evaluation.caption_retrieval import by_picture
from fastclip.evaluation.retrieval import retrieval_recalls
from fastclip.evaluation.validate import validate
from fastclip.models.embedder import Embedder
from support.faulty import picture, write_folder
from support.processes import join_group

KS = (1, 2, 5, 10, 100)


def by_loops(image: Tensor, text: Tensor, pairs: Sequence[Sequence[int]], ks: Sequence[int] = KS) -> dict[str, float]:
    cosines = F.normalize(image.double(), dim=1) @ F.normalize(text.double(), dim=1).T

    def hits(rows: list[list[float]], pairs: set[tuple[int, int]], k: int) -> float:
        found = []
        for i, row in enumerate(rows):
            own = [z for j, z in enumerate(row) if (i, j) in pairs]
            others = [z for j, z in enumerate(row) if (i, j) not in pairs]
            if own:
                found.append(sum(z >= max(own) - 1e-6 for z in others) < k)
        return sum(found) / len(found)

    both = {(i, j) for i, j in pairs}
    found = {}
    for k in ks:
        found[f"image_retrieval_recall@{k}"] = hits(cosines.T.tolist(), {(j, i) for i, j in both}, k)
        found[f"text_retrieval_recall@{k}"] = hits(cosines.tolist(), both, k)
    return found


def captioned(M: int = 23, captions: int = 3) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Return images, texts that resemble them somewhat (`captions` per image), and the pairs."""
    image = torch.randn(M, 8)
    text = image.repeat_interleave(captions, 0) + torch.randn(captions * M, 8)
    return image, text, [(j // captions, j) for j in range(captions * M)]


def scattered() -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Return an irregular set: texts of several images, images and texts without a pair, repeated features,
    repeated pairs, lengths other than 1.
    """
    image, text, pairs = captioned()
    image, text = 3 * image, text * torch.rand(len(text), 1)
    image[5], image[6], text[40:50] = image[4], 2 * image[4], 2 * text[30:40]
    pairs = [pair for pair in pairs if pair[0] != 9 and pair[1] % 7] + [(0, 20), (1, 20), (2, 20), (3, 10), (3, 10)]
    return image, text, random.Random(0).sample(pairs, len(pairs))


CASES: dict[str, Callable[[], tuple[Tensor, Tensor, list[tuple[int, int]]]]] = {
    "one caption": lambda: captioned(captions=1),
    "three captions": captioned,
    "scattered": scattered,
    "collapsed": lambda: (torch.ones(7, 4), torch.ones(9, 4), [(i, i) for i in range(7)] + [(0, 7), (1, 8)]),
    "alike but for rounding": lambda: (torch.randn(9, 64) * 1e-6 + 1, torch.ones(9, 64), [(i, i) for i in range(9)]),
    "one": lambda: (torch.ones(1, 4), -torch.ones(1, 4), [(0, 0)]),
    "zero": lambda: (torch.zeros(3, 4), torch.randn(3, 4), [(i, i) for i in range(3)]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [None, 1, 5, 1000])
def test_recalls_are_those_of_the_definition(case: str, chunk: int | None) -> None:
    image, text, pairs = CASES[case]()
    found = retrieval_recalls(image, text, torch.tensor(pairs), ks=KS, chunk=chunk)
    assert found == by_loops(image, text, pairs)
    assert all(type(value) is float for value in found.values())


def test_recalls_equal_top_k_where_nothing_is_alike() -> None:
    """Recalls equal CLIP_benchmark's definition (a positive among topk's first K) if no features are equal."""
    image, text, pairs = captioned()
    own = torch.zeros(len(image), len(text), dtype=torch.bool)
    own[tuple(zip(*pairs))] = True
    cosines = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    found = retrieval_recalls(image, text, torch.tensor(pairs))
    for k in (1, 5, 10):
        of_images = own.gather(1, cosines.topk(k, dim=1).indices).any(1)
        of_texts = own.T.gather(1, cosines.T.topk(k, dim=1).indices).any(1)
        assert found[f"text_retrieval_recall@{k}"] == int(of_images.sum()) / len(of_images)
        assert found[f"image_retrieval_recall@{k}"] == int(of_texts.sum()) / len(of_texts)


def test_collapsed_model_has_no_hit() -> None:
    found = retrieval_recalls(torch.ones(50, 4), torch.ones(50, 4), torch.arange(50)[:, None].expand(-1, 2))
    assert set(found.values()) == {0.0}


@pytest.mark.parametrize("bad", ["image", "text", "both"])
def test_what_is_not_finite_is_no_hit(bad: str) -> None:
    image, text = torch.eye(12), torch.eye(12)
    for x in {"image": (image,), "text": (text,), "both": (image, text)}[bad]:
        x[:] = torch.nan
    assert set(retrieval_recalls(image, text, torch.arange(12)[:, None].expand(-1, 2)).values()) == {0.0}
    image, text = torch.eye(12), torch.eye(12)
    image[3] = torch.nan  # NaN is never a hit, and as a rival it outranks all others
    found = retrieval_recalls(image, text, torch.arange(12)[:, None].expand(-1, 2), ks=(1, 2))
    assert found["text_retrieval_recall@1"] == 11 / 12
    assert found["image_retrieval_recall@1"] == 0.0 and found["image_retrieval_recall@2"] == 11 / 12


def test_similarities_are_never_all_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = retrieval._Tile.similarities
    monkeypatch.setattr(retrieval._Tile, "similarities", lambda tile: sizes.append(real(tile).numel()) or real(tile))
    monkeypatch.setattr(retrieval, "_CPU_SIDE", 30)
    image, text, pairs = captioned(M=90)
    assert retrieval_recalls(image, text, torch.tensor(pairs), ks=KS) == by_loops(image, text, pairs)
    assert max(sizes) == 30 * 30 and len(sizes) == 9 + 3 * 9  # tiles that contain pairs, then all tiles


def test_autocast_does_not_reach_the_similarities() -> None:
    image, text, pairs = captioned(M=200)
    expected = retrieval_recalls(image, text, torch.tensor(pairs))
    with torch.autocast("cpu", torch.bfloat16):
        assert retrieval_recalls(image, text, torch.tensor(pairs)) == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ks": (1, 0)}, r"ks must be at least 1, got \(1, 0\)"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"pairs": torch.empty(0, 2, dtype=torch.int64)}, "no text belongs to an image"),
        ({"pairs": torch.tensor([[0, 3]])}, "indices in pairs must be at least 0, below 2 in column 0 and below 3 in"),
        ({"pairs": torch.tensor([[-1, 0]])}, "indices in pairs must be at least 0, below"),
        ({"pairs": torch.tensor([0, 1])}, r"pairs must be \(P, 2\) int64, got \(2,\) int64"),
        ({"text_features": torch.ones(3, 5)}, r"features must be \(M, D\) and \(N, D\), got"),
    ],
)
def test_recalls_of_what_does_not_fit_raise(changed: dict[str, Any], message: str) -> None:
    arguments = {"image_features": torch.ones(2, 4), "text_features": torch.ones(3, 4), "pairs": torch.tensor([[0, 2]])}
    with pytest.raises(ValueError, match=message):
        retrieval_recalls(**(arguments | changed))


class Pictures:
    """A source of `size` images of one colour each, in `classes` classes. A caption may belong to several images."""

    spec = "pictures"

    def __init__(self, size: int = 37, classes: int = 10, labelled: bool = True) -> None:
        self.size, self.labelled = size, labelled
        self.class_names = tuple(f"colour {c}" for c in range(classes))
        self.templates = ("a photo of {}", "{} all over") if classes else ()

    def __len__(self) -> int:
        return self.size

    def label(self, index: int) -> int:
        return 3 * index % max(1, len(self.class_names))

    def captions(self, index: int) -> tuple[str, ...]:
        if self.class_names and index % 2:
            return (self.templates[0].format(self.class_names[self.label(index)]),)
        return (f"number {index}", f"the same as {index // 3}", "a picture")[: 1 + index % 3]

    def __getitem__(self, index: int) -> Record:
        label = self.label(index) if self.labelled and self.class_names else None
        colour = tuple((index * p + 60 * self.label(index)) % 256 for p in (31, 57, 5))
        return Record(Image.new("RGB", (4, 4), colour), self.captions(index), self.key(index), label)

    def key(self, index: int) -> str:
        return str(index)


class Faulty(Pictures):
    """A source in which every fifth image and every seventh caption cannot be read."""

    def __getitem__(self, index: int) -> Record:
        if index % 5 == 0:
            raise BadSample("not an image", self.key(index), "it is none")
        return super().__getitem__(index)

    def captions(self, index: int) -> tuple[str, ...]:
        if index % 7 == 3:
            raise BadSample("no caption", self.key(index), "it has none")
        return super().captions(index)


class Part(Pictures):
    """The usable samples of `Faulty`."""

    def __init__(self) -> None:
        super().__init__()
        self.places = [k for k in range(self.size) if k % 5 and k % 7 != 3]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Record:
        return Pictures()[self.places[index]]

    def captions(self, index: int) -> tuple[str, ...]:
        return Pictures().captions(self.places[index])


def transform(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def tokenize(texts: list[str]) -> Tensor:
    return torch.tensor([list(text.encode().ljust(24))[:24] for text in texts])


class Pair(nn.Module):
    """Two encoders with different results in training mode."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.image = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 6))
        self.text = nn.Sequential(nn.Embedding(128, 6), nn.Flatten(), nn.BatchNorm1d(144), nn.Linear(144, 6))
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        with torch.no_grad():
            for p in self.parameters():
                if p.dim():
                    p.copy_(torch.randn(p.shape, generator=generator))

    def encode_image(self, images: Tensor) -> Tensor:
        return self.image(images)

    def encode_text(self, ids: Tensor) -> Tensor:
        return self.text(ids)


@torch.no_grad()
def expected(model: Pair, source: Any, indices: Sequence[int]) -> dict[str, float]:
    """Compute the metrics of all images and texts at once, by loops."""
    model.eval()
    records = [source[i] for i in indices]
    texts = sorted({text for record in records for text in record.captions})
    image = F.normalize(model.encode_image(torch.stack([transform(record.image) for record in records])), dim=1)
    text = model.encode_text(tokenize(texts))
    pairs = [(i, texts.index(caption)) for i, record in enumerate(records) for caption in record.captions]
    found = by_loops(image, text, pairs, (1, 5, 10))
    if not source.class_names or not source.labelled:
        return found
    prompts = [template.format(name) for name in source.class_names for template in source.templates]
    classes = F.normalize(model.encode_text(tokenize(prompts)), dim=1).view(len(source.class_names), 2, -1).mean(1)
    top = (image @ F.normalize(classes, dim=1).T).topk(min(5, len(classes)), dim=1).indices.tolist()
    for k in (1, 5) if len(classes) >= 10 else (1,):
        hits = [record.label in row[:k] for record, row in zip(records, top)]
        found[f"zero_shot_top{k}"] = sum(hits) / len(hits)
    return found


@pytest.mark.parametrize("batch_size", [1, 8, 100])
@pytest.mark.parametrize(
    "source",
    [Pictures(), Pictures(classes=4), Pictures(classes=0), Pictures(labelled=False), Pictures(1), Pictures(1, 0)],
    ids=["ten classes", "four classes", "no classes", "no labels", "one sample", "one sample, no classes"],
)
def test_validation_is_that_of_the_definition(source: Pictures, batch_size: int) -> None:
    found = validate(Pair(), source, transform, tokenize, batch_size=batch_size)
    assert found == expected(Pair(), source, range(len(source)))
    assert ("zero_shot_top1" in found) == bool(source.class_names and source.labelled)
    assert ("zero_shot_top5" in found) == ("zero_shot_top1" in found and len(source.class_names) >= 10)
    assert all(type(value) is float for value in found.values())


def test_validation_tells_models_apart() -> None:
    """The checks above compare numbers between the extremes."""
    found = validate(Pair(), Pictures(), transform, tokenize)
    assert sum(0 < value < 1 for value in found.values()) >= 6


def test_zero_shot_is_that_of_class_embeddings() -> None:
    """Zero-shot accuracy of a `DualEncoder` equals that of its class embeddings."""
    needs("models")
    from fastclip.evaluation.zero_shot import zero_shot
    from fastclip.models.embedder import Embedder

    model, source = fastclip.create_model("ViT-tiny").eval(), Pictures()

    def large(image: Image.Image) -> Tensor:
        return transform(image.resize((32, 32)))

    tokenize = fastclip.get_tokenizer("ViT-tiny")
    found = validate(model, source, large, tokenize, batch_size=16)
    alone = zero_shot(Embedder(model, tokenize, transform=large), source, templates=source.templates)
    names = {"zero_shot_top1": "acc1", "zero_shot_top5": "acc5"}
    assert {name: found[name] for name in names} == {name: alone.result["metrics"][key] for name, key in names.items()}


def test_rows_of_one_picture_are_one_sample(tmp_path: Path, embedder: Embedder) -> None:
    """Rows of one image are one sample, as if each image were in a folder with one file of captions."""
    rows = []
    for k in range(7):
        (tmp_path / f"{k}.png").write_bytes(picture(30 * k))
        texts = [f"text {k}", f"a shade of {k}", "grey"][: 1 + k % 3]
        (tmp_path / f"{k}.txt").write_text("\n".join(texts))
        rows += [(f"{tmp_path}/{'./' * i}{k}.png", text) for i, text in enumerate(["", *texts, texts[0]])]
    random.Random(0).shuffle(rows)
    (tmp_path / "t.csv").write_text("filepath,title\n" + "".join(f"{path},{text}\n" for path, text in rows))
    table, folder = one_a_picture(open_source(str(tmp_path / "t.csv"))), open_source(str(tmp_path))
    assert len(table) == 7 and one_a_picture(folder) is folder
    found = {Path(table.key(k)).name: (sorted(table.captions(k)), sorted(table[k].captions)) for k in range(7)}
    for k in range(7):
        assert found[f"{k}.png"] == (sorted(folder.captions(k)), sorted(folder.captions(k)))
    with_model = embedder.model, embedder.transform, embedder.tokenize
    reports = [validate(with_model[0], one, *with_model[1:], batch_size=3) for one in (folder, table)]
    reports.append(validate(with_model[0], open_source(str(tmp_path / "t.csv")), *with_model[1:], batch_size=3))
    assert reports[0] == reports[1] == reports[2]


def test_validation_and_retrieval_have_the_same_pictures(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", 2)
    (tmp_path / "link").symlink_to("data")
    names = [f"{place}/00{k}.png" for place in ("data", "link", tmp_path / "data", "data/.") for k in range(2)]
    rows = "".join(f"{name},text {k}\n" for k, name in enumerate(names))
    (tmp_path / "t.csv").write_text(f"filepath,title\n{rows},no path\n,none either\ngone.png,a\n./gone.png,b\n")
    table = open_source(str(tmp_path / "t.csv"))
    found = one_a_picture(table)
    assert len(found) == len(by_picture(table).source) + 2  # damaged rows
    assert [found.captions(k) for k in range(2)] == [tuple(f"text {k}" for k in range(first, 8, 2)) for first in (0, 1)]


def test_samples_are_spread_over_the_source() -> None:
    found = validate(Pair(), Pictures(), transform, tokenize, max_samples=10)
    assert found == expected(Pair(), Pictures(), [0, 3, 7, 11, 14, 18, 22, 25, 29, 33])
    assert validate(Pair(), Pictures(), transform, tokenize, max_samples=100) == expected(Pair(), Pictures(), range(37))


class Unreadable(Pictures):
    def __getitem__(self, index: int) -> Record:
        if index == 5:
            raise OSError("5: cannot be read")
        return super().__getitem__(index)


@pytest.mark.parametrize("source", [Pictures(), Unreadable()], ids=["read", "unreadable"])
def test_validation_leaves_no_trace(source: Pictures) -> None:
    """Validation restores the modes (also of a part frozen in eval mode), statistics, gradients and random numbers."""
    model = Pair().train()
    model.text.eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    model.image.register_forward_hook(lambda *x: seen.append((x[0].training, x[2].requires_grad)))
    torch.manual_seed(7)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    if isinstance(source, Unreadable):
        with pytest.raises(OSError, match=r"^5: cannot be read$"):
            validate(model, source, transform, tokenize, batch_size=2)
    else:
        validate(model, source, transform, tokenize, batch_size=2)
    assert torch.equal(torch.rand(1), drawn)
    assert [module.training for module in model.modules()] == modes and model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert seen and set(seen) == {(False, False)} and torch.is_grad_enabled()


def test_validation_computes_in_the_caller_autocast() -> None:
    model, dtypes = Pair(), set()
    model.image.register_forward_hook(lambda *x: dtypes.add(x[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found = validate(model, Pictures(), transform, tokenize)
    assert dtypes == {torch.bfloat16}
    for name, value in validate(model, Pictures(), transform, tokenize).items():
        assert found[name] == pytest.approx(value, abs=0.15)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (Pictures(0), {}, "pictures: no samples to validate on"),
        (Pictures(), {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (Pictures(), {"max_samples": 0}, "max_samples must be at least 1, got 0"),
    ],
)
def test_validation_of_nothing_raises(source: Pictures, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(Pair(), source, transform, tokenize, **options)


SOURCES = (Pictures(), Pictures(2), Pictures(1, 0), Pictures(classes=4), Faulty())


def work(rank: int, W: int, folder: Path) -> None:
    torch.set_num_threads(1)
    join_group(rank, W, folder)
    calls = 0

    def encoded(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model = Pair()
    for tower in (model.image, model.text):
        tower.register_forward_hook(encoded)
    found = [validate(model, x, transform, tokenize, batch_size=4, group=dist.group.WORLD) for x in SOURCES]
    torch.save((found, calls), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_samples_that_cannot_be_used_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    part = Part()
    assert validate(Pair(), Faulty(), transform, tokenize) == validate(Pair(), part, transform, tokenize)
    left = 37 - len(part)
    told = f"pictures: {left} of 37 samples cannot be used and are left out; causes seen by this process: "
    told += "8 not an image (0, 5"
    assert [record.getMessage()[: len(told)] for record in caplog.records] == [told]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked")
@pytest.mark.parametrize("W", [2, 3])
def test_ranks_have_the_single_process_metrics(W: int, tmp_path: Path) -> None:
    """Ranks report the metrics of a single process, even with fewer samples than ranks. Every rank calls the model
    equally often, because the ranks of a sharded model wait for each other.
    """
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, W, tmp_path)) for rank in range(W)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * W
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(W)]
    single = [validate(Pair(), source, transform, tokenize) for source in SOURCES]
    assert all(metrics == single for metrics, _ in found)
    assert len({calls for _, calls in found}) == 1
