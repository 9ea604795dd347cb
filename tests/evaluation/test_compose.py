"""`fastclip eval compose`: the grammar of its lines, and answers compared with brute force on real images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support import needs

needs("train")
import numpy as np
import torch
from PIL import Image

from fastclip.cli import main
from fastclip.data import Source, open_source
from fastclip.embedding.query import Term
from fastclip.evaluation.composed_retrieval import Query, compose, parse_query, read_queries, unit_sum
from fastclip.models.embedder import Embedder, load_embedder
from support.crops import sentences, split_file, write_crops


@pytest.fixture(scope="module")
def embedder(checkpoint: Path) -> Embedder:
    return load_embedder(checkpoint, device="cpu")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """Source with the temple's twelve crops and eleven of the flower's; the twelfth,
    flower11.jpg, is not part of the data.
    """
    monkeypatch.setenv("FASTCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    names = write_crops(tmp_path / "images")
    told = [{"filename": name, "split": "test", "sentences": texts} for name, texts in zip(names, sentences(names))]
    return open_source(f"{split_file(tmp_path / 'dataset_x.json', told[:-1])}:test")


@pytest.mark.parametrize(
    ("line", "terms", "target"),
    [
        ("a dog", [(1, "a dog", False)], None),
        ("2:dog + beach.jpg - night", [(2, "dog", False), (1, "beach.jpg", False), (-1, "night", False)], None),
        ('bus.jpg + "at night"', [(1, "bus.jpg", False), (1, "at night", True)], None),
        ('.5:"3:30 pm - late" -  1.5:x', [(0.5, "3:30 pm - late", True), (-1.5, "x", False)], None),
        ("- a + b", [(-1, "a", False), (1, "b", False)], None),
        ("black-and-white t-shirt + 50+", [(1, "black-and-white t-shirt", False), (1, "50+", False)], None),
        ("a.jpg + b => c d.jpg ", [(1, "a.jpg", False), (1, "b", False)], "c d.jpg"),
        ('"a => b"', [(1, "a => b", True)], None),
        ('"a => b" => c.jpg', [(1, "a => b", True)], "c.jpg"),
        ("10: 30", [(1, "10: 30", False)], None),
        ("2:01.jpg + .5:02 b.png", [(2, "01.jpg", False), (0.5, "02 b.png", False)], None),
        ("16:9 screen - 2:x", [(1, "16:9 screen", False), (-2, "x", False)], None),
        ('say "a - b" - c => d.jpg', [(1, 'say "a - b"', False), (-1, "c", False)], "d.jpg"),
    ],
)
def test_line_is_read(line: str, terms: list[tuple[float, str, bool]], target: str | None) -> None:
    expected = tuple(Term(weight, text, quoted=quoted) for weight, text, quoted in terms)
    assert parse_query(line) == Query(line.strip(), expected, target)


@pytest.mark.parametrize(
    "line", ["", "a +", "a + - b", "+", 'a + "b', '""', "a =>", "=> a.jpg", "a + + b", '"a" b', '" "', "a => b => c"]
)
def test_line_that_is_no_query_raises(line: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        parse_query(line)
    (tmp_path / "q.txt").write_text(f"# queries\n\na dog\n{line or '=>'}\n")
    with pytest.raises(ValueError, match=r"q\.txt, line 4: "):
        read_queries(tmp_path / "q.txt")


def test_file_of_queries(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("\ufeff# told\n\n  a dog\n- cat\n", encoding="utf-8")
    assert [query.line for query in read_queries(tmp_path / "q.txt")] == ["a dog", "- cat"]
    (tmp_path / "q.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="the file contains no query"):
        read_queries(tmp_path / "q.txt")
    (tmp_path / "q.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_queries(tmp_path / "q.txt")


def test_sum_is_of_unit_vectors() -> None:
    for scale in (1, 1e30, 1e-30):  # squares overflow or underflow float32
        found = unit_sum([torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8])], [2 * scale, -scale])
        assert found.dtype == torch.float32
        assert found.tolist() == pytest.approx([1.4 / 2.6**0.5, -0.8 / 2.6**0.5])
    for weights in ([1, -1], [1e9, -1e9], [0, 0]):
        with pytest.raises(ValueError, match="the terms of the query cancel each other"):
            unit_sum([torch.tensor([0.6, 0.8])] * 2, weights)


def vector(embedder: Embedder, name: str) -> np.ndarray:
    """Return the float64 embedding of an image in images/, or of a text."""
    if not name.endswith(".jpg"):
        return embedder.embed_texts([name])[0].double().numpy()
    with Image.open(f"images/{name}") as image:
        return embedder.embed_images(embedder.transform(image)[None])[0].double().numpy()


QUERIES = [
    ('china3.jpg + "at night" => china7.jpg', {"china3.jpg": 1, "at night": 1}, "china7.jpg"),
    (
        "images/flower2.jpg - flower + 0.5:a house => images/china0.jpg",
        {"flower2.jpg": 1, "flower": -1, "a house": 0.5},
        "china0.jpg",
    ),
    ("images/flower11.jpg + 3:china5.jpg - china6.jpg", {"flower11.jpg": 1, "china5.jpg": 3, "china6.jpg": -1}, None),
    ("a temple", {"a temple": 1}, None),
    ('"china3.jpg" => china3.jpg', {"china3": 0}, "china3.jpg"),
]


def test_answers_are_those_of_brute_force(embedder: Embedder, source: Source, tmp_path: Path) -> None:
    parsed = [parse_query(line) for line, _, _ in QUERIES]
    found = compose(embedder, source, parsed, top=5, batch_size=7, folder=tmp_path / "store")
    names = [Path(source.key(k)).name for k in range(len(source))]
    every = np.stack([vector(embedder, name) for name in names])
    ranks = []
    for (line, terms, target), answer in zip(QUERIES, found.answers):
        if line.startswith('"'):  # a quoted text, although an image has this name
            query = embedder.embed_texts(["china3.jpg"])[0].double().numpy()
        else:
            query = sum(weight * vector(embedder, name) for name, weight in terms.items())
        cosines = every @ query / np.linalg.norm(query)
        left = [k for k in np.argsort(-cosines) if names[k] not in terms]
        assert [place for place, _ in answer.pictures] == left[:5]
        assert [score for _, score in answer.pictures] == pytest.approx(cosines[left[:5]].tolist(), abs=1e-6)
        if target is None:
            assert answer.rank is None
        else:
            ranks.append(left.index(names.index(target)))
            assert answer.rank == ranks[-1]
    assert found.metrics == {f"composed_retrieval_recall@{k}": sum(rank < k for rank in ranks) / 3 for k in (1, 5, 10)}
    assert 0 < found.metrics["composed_retrieval_recall@10"] < 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("china99.jpg + x", 'there is no image china99.jpg to search by; if it is meant as a text, put it in "quotes"'),
        ("x + china99.ico", "there is no image china99.ico"),
        ("./china99 + x", "there is no image ./china99"),
        ("https://example.org/china + x", "must be a local file"),
        ('x => "china1.jpg"', 'the target "china1.jpg" is not an image of the dataset'),
        ("x => china99.jpg", "china99.jpg is not an image of the dataset"),
        ("x => images/flower11.jpg", "images/flower11.jpg is not an image of the dataset"),
        ("china1.jpg + x => images/china1.jpg", "the query must not name its target"),
        (f'{"9" * 50}:"dog" => china1.jpg', "the query's vector is too short, too long or not finite"),
        (f'0.{"0" * 50}1:"dog" => china1.jpg', "vector is too short, too long or not finite: use weights"),
        (f'{"9" * 400}:"dog"', "weights must be finite numbers, got inf"),
        ("x - x", "x - x: the terms of the query cancel"),
    ],
)
def test_query_that_cannot_be_answered_raises(
    embedder: Embedder, source: Source, tmp_path: Path, line: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compose(embedder, source, [parse_query(line)], folder=tmp_path / "store")


def test_names_of_several_pictures_and_of_unreadable_ones(embedder: Embedder, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("1.png", "2.png"):
            Image.new("RGB", (8, 8), "red" if folder == "a" else "blue").save(tmp_path / folder / name)
            (tmp_path / folder / name).with_suffix(".txt").write_text("one colour")
    (tmp_path / "b" / "2.png").write_bytes(b"no picture")
    source = open_source(str(tmp_path))

    def asked(line: str) -> list[str]:
        found = compose(embedder, source, [parse_query(line)], folder=tmp_path / "store")
        assert found.skipped == 1
        return [str(Path(found.source.key(place)).relative_to(tmp_path)) for place, _ in found.answers[0].pictures]

    with pytest.raises(ValueError, match=r"1\.png is the name of 2 images: give more of the path"):
        asked("1.png + x")
    with pytest.raises(ValueError, match=r"2\.png, which a query names, cannot be used"):
        asked("b/2.png + x")
    assert sorted(asked("a/1.png + x")) == ["a/2.png", "b/1.png"]
    assert len(asked("x")) == 3


def test_command_writes_results_and_a_sheet(
    checkpoint: Path, source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("q.txt").write_text("# told\n" + "\n".join(line for line, _, _ in QUERIES))
    line = ["eval", "compose", "--checkpoint", str(checkpoint), "--device", "cpu", "--workers", "0", "--top", "6"]
    line += ["--data", source.spec, "--queries", "q.txt", "--output", "out/r.json", "--sheet", "out/s.png"]
    assert main(line) == 0
    told = capsys.readouterr().out
    found = json.loads(Path("out/r.json").read_text())
    assert found["task"] == "composed_retrieval" and list(found["metrics"]) == [
        f"composed_retrieval_recall@{k}" for k in (1, 5, 10)
    ]
    assert [query["query"] for query in found["queries"]] == [line for line, _, _ in QUERIES]
    for query in found["queries"]:
        assert len(query["pictures"]) == 6 and (query["rank"] is None) == ("=>" not in query["query"])
        for picture in query["pictures"]:
            assert f"  {picture['score']:.3f}  {picture['key']}\n" in told
    assert not list((tmp_path / "cache" / "features").iterdir())
    with Image.open("out/s.png") as sheet:
        assert sheet.size == (6 * 134 + 6, 5 * 156 + 6)
        first = found["queries"][0]["pictures"][0]["key"]
        with Image.open(first) as picture:
            tile = np.array(picture.resize((128, 112), Image.Resampling.BICUBIC)).astype(int)
        shown = np.array(sheet)[6 + 22 + 8 :, 6:][:112, :128].astype(int)
        assert abs(shown - tile)[4:-4, 4:-4].mean() < 2  # the frame differs
    assert main([*line[:-4], "--queries", "gone.txt"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
