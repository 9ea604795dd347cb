"""Queries: which terms they have, and that their arithmetic is rclip's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from support import needs

needs("models")
from fastclip.search.engine import SearchEngine
from fastclip.search.query import Term, combine, parse_query
from support.colours import Colours, draw, picture_vector, text_vector


@pytest.mark.parametrize(
    ("query", "terms"),
    [
        ("a red car", [(1, "a red car")]),
        ("  horse  +  stripes ", [(1, "horse"), (1, "stripes")]),
        ("apple - fruit", [(1, "apple"), (-1, "fruit")]),
        ("2:golden retriever + .5:pool - 1.5:cat", [(2, "golden retriever"), (0.5, "pool"), (-1.5, "cat")]),
        ("semi-trailer c++ 3-4 +1", [(1, "semi-trailer c++ 3-4 +1")]),
        ("- night", [(-1, "night")]),
        ("a:b", [(1, "a:b")]),
        ("3.:x", [(3, "x")]),
        ("16:9 screen", [(16, "9 screen")]),  # as rclip
        ("köter + 犬", [(1, "köter"), (1, "犬")]),
    ],
)
def test_query_has_its_terms(query: str, terms: list[tuple[float, str]]) -> None:
    assert parse_query(query) == [Term(weight, text) for weight, text in terms]


def test_added_and_subtracted_terms_are_taken_as_they_are() -> None:
    terms = parse_query("x - y", add=["2:a + b"], subtract=["3:c - d"])
    assert terms == [Term(1, "x"), Term(-1, "y"), Term(2, "a + b"), Term(-3, "c - d")]


def test_pictures_are_told_from_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("beach.jpg", "new york - city.png", "no suffix.png")
    for k, name in enumerate(names):
        draw(tmp_path / name, k)
    (tmp_path / "no suffix.png").rename(tmp_path / "plain")
    assert parse_query("2:dog + beach.jpg - night") == [
        Term(2, "dog"),
        Term(1, path=Path("beach.jpg")),
        Term(-1, "night"),
    ]
    assert parse_query("3:./plain") == [Term(3, path=Path("plain"))]
    assert parse_query("0.5:./new york - city.png") == [Term(0.5, path=Path("new york - city.png"))]
    assert parse_query("x", subtract=["new york - city.png"])[1] == Term(-1, path=Path("new york - city.png"))
    for begin in (f"{tmp_path}/", f"file://{tmp_path}/", "~/", "./"):
        (term,) = parse_query(f"{begin}beach.jpg")
        assert term.path is not None and term.path.resolve() == tmp_path / "beach.jpg"
    assert parse_query("plain") == [Term(1, "plain")]  # as rclip: a bare word is a text


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "empty term"),
        ("dog +", "empty term"),
        ("dog + - cat", "empty term"),
        ("+", "empty term"),
        ("./gone", "there is no picture ./gone"),
        ("a + gone.jpg", "there is no picture gone.jpg"),
        ("https://example.org/a.jpg", "must be a file"),
    ],
)
def test_query_that_cannot_be_meant_is_refused(query: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_query(query)


def test_score_is_the_weighted_sum_of_cosines(tmp_path: Path) -> None:
    """rclip's formula: multiplier times unit vector, summed over what is added, less the sum over what is subtracted,
    and not scaled to length 1."""
    photos = [draw(tmp_path / "photos" / f"{k}.png", k) for k in range(12)]
    asked = [draw(tmp_path / f"{k}.png", 100 + k) for k in range(2)]
    engine = SearchEngine(Colours(), tmp_path / "photos", indices=tmp_path / "cache")
    engine.update()
    query = f"2:golden retriever + 0.25:{asked[0]} - 1.5:fruit + horse - {asked[1]}"
    found = engine.find(parse_query(query), count=100)

    positive = 2 * text_vector("golden retriever") + text_vector("horse") + 0.25 * picture_vector(asked[0])
    negative = 1.5 * text_vector("fruit") + picture_vector(asked[1])
    features = positive.astype(np.float64) - negative
    scores = {str(photo): float(features @ picture_vector(photo)) for photo in photos}
    assert [one.path for one in found] == sorted(scores, key=lambda path: -scores[path])
    assert [one.score for one in found] == pytest.approx(sorted(scores.values(), reverse=True), abs=1e-5)
    assert max(map(abs, scores.values())) > 1  # it would not be, of a unit vector


def test_sum_is_computed_in_double_precision() -> None:
    vectors = [np.float32([1, 0]), np.float32([1e-4, 1])]
    assert combine(vectors, [1e8, -1e8]).tolist() == pytest.approx([1e8 - 1e4, -1e8], rel=1e-7)
    assert combine(vectors, [1, 1]).dtype == np.float32
