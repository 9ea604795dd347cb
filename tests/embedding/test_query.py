"""Queries: their terms, and arithmetic that equals rclip's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from support import needs

needs("models")
from fastclip.embedding.query import Term, combine, parse_query, parse_terms, parse_texts, reading, split_at
from fastclip.search.engine import SearchEngine
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
        ("16:9 screen", [(1, "16:9 screen")]),  # rclip gives "9 screen" a weight of 16
        ("10: a film", [(1, "10: a film")]),
        ('"16:9 - x" - 2:"3d - y"', [(1, "16:9 - x"), (-2, "3d - y")]),
        ('2:dog + 5" disk', [(2, "dog"), (1, '5" disk')]),
        ('say "a - b" - c', [(1, 'say "a - b"'), (-1, "c")]),
        ("köter + 犬", [(1, "köter"), (1, "犬")]),
        ('"  dog "', [(1, "dog")]),
        ("2:+ x", [(2, "+ x")]),
        ("a => b", [(1, "a => b")]),
    ],
)
def test_query_has_its_terms(query: str, terms: list[tuple[float, str]]) -> None:
    for read in (parse_query, parse_terms, parse_texts):
        assert [(term.weight, term.text) for term in read(query)] == terms


@pytest.mark.parametrize(
    ("query", "parts"),
    [
        ("a", [("", "a")]),
        ("a => b", [("", "a "), ("=>", " b")]),
        ("=>", [("", ""), ("=>", "")]),
        ('2:"a => b" => c=>d', [("", '2:"a => b" '), ("=>", " c=>d")]),
        ('5" => 3"', [("", '5" '), ("=>", ' 3"')]),
        ("a - b + c", [("", "a - b + c")]),
    ],
)
def test_operators_are_words_outside_of_quotes(query: str, parts: list[tuple[str, str]]) -> None:
    assert split_at(query, "=>") == parts


def test_added_and_subtracted_terms_are_taken_as_they_are() -> None:
    terms = parse_query("x - y", add=["2:a + b"], subtract=["3:c - d"])
    assert terms == [Term(1, "x"), Term(-1, "y"), Term(2, "a + b"), Term(-3, "c - d")]


def test_pictures_are_told_from_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("beach.jpg", "new york - city.png", "no suffix.png", "a b.png")
    for k, name in enumerate(names):
        draw(tmp_path / name, k)
    (tmp_path / "no suffix.png").rename(tmp_path / "plain")
    (tmp_path / "notes").write_text("not a picture")
    (tmp_path / "dog").mkdir()
    assert parse_query("2:dog + beach.jpg - night") == [
        Term(2, "dog"),
        Term(1, path=Path("beach.jpg")),
        Term(-1, "night"),
    ]
    draw(tmp_path / "001.png", 1)
    assert parse_query("2:001.png - 3:001.png") == [Term(2, path=Path("001.png")), Term(-3, path=Path("001.png"))]
    assert parse_query("3:./plain") == [Term(3, path=Path("plain"))]
    assert parse_query("0.5:./new york - city.png") == [Term(0.5, path=Path("new york - city.png"))]
    assert parse_query("x", subtract=["new york - city.png"])[1] == Term(-1, path=Path("new york - city.png"))
    for begin in (f"{tmp_path}/", f"file://{tmp_path}/", "~/", "./"):
        (term,) = parse_query(f"{begin}beach.jpg")
        assert term.path is not None and term.path.resolve() == tmp_path / "beach.jpg"
    (term,) = parse_query(f"file://{tmp_path}/a%20b.png")
    assert term.path == tmp_path / "a b.png"


def test_what_a_file_holds_decides_where_its_name_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "photos" / "x.png", 1).rename(tmp_path / "photos" / "x.jfif")
    draw(tmp_path / "y.png", 1).rename(tmp_path / "plain")
    (tmp_path / "notes").write_text("not a picture")
    (tmp_path / "dog").mkdir()
    assert parse_query("2:photos/x.jfif + plain") == [Term(2, path=Path("photos/x.jfif")), Term(1, path=Path("plain"))]
    assert parse_query('notes + dog - "plain"') == [Term(1, "notes"), Term(1, "dog"), Term(-1, "plain", quoted=True)]
    assert parse_query("photos/gone") == [Term(1, "photos/gone")]


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("a red car", ""),
        ("beach.jpg", ""),
        ("16:9 screen", '+ 1 * text "16:9 screen"'),
        ("2:dog + beach.jpg - night", '+ 2 * text "dog" + 1 * image beach.jpg - 1 * text "night"'),
        ("- night", '- 1 * text "night"'),
        ("plain", "+ 1 * image plain"),
        ('"plain"', '+ 1 * text "plain"'),
        ("photos/gone", '+ 1 * text "photos/gone"'),  # looks like a path, but no such file exists
    ],
)
def test_query_that_can_be_read_in_two_ways_is_told(
    query: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "beach.jpg", 1)
    draw(tmp_path / "y.png", 1).rename(tmp_path / "plain")
    assert reading(query, parse_query(query)) == told


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "empty term"),
        ("dog +", "empty term"),
        ("dog + - cat", "empty term"),
        ("+", "empty term"),
        ("./gone", "there is no image ./gone"),
        ("a + gone.jpg", "there is no image gone.jpg"),
        ("a + 2:photos/gone.jfif", "there is no image photos/gone.jfif"),
        ("~nobody-of-this-name/a.png", "there is no image ~nobody"),
        ("./" + 5000 * "a", "there is no image ./aaa"),
        ('a - ""', "empty term"),
        ('a - 2:" "', "empty term"),
        ('a + "b', "a quote that is not closed, or a word next to a quote, at '\"b'"),
        ('"a" b', "a quote that is not closed, or a word next to a quote"),
        ('2:"a" "b"', "a quote that is not closed, or a word next to a quote"),
        ('"a - b', "a quote that is not closed, or a word next to a quote, at '\"a'"),
        ("caf\udcc3", "neither UTF-8 nor the name of a file"),
        ("https://example.org/a.jpg", "must be a local file"),
    ],
)
def test_query_that_cannot_be_meant_is_refused(query: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_query(query)


def test_score_is_the_weighted_sum_of_cosines(tmp_path: Path) -> None:
    """The score is rclip's: the sum over added terms of multiplier times unit vector, less the same sum over subtracted
    terms, not scaled to length 1.
    """
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
    assert max(map(abs, scores.values())) > 1  # impossible with a unit vector


def test_sum_is_computed_in_double_precision() -> None:
    vectors = [np.float32([1, 0]), np.float32([1e-4, 1])]
    assert combine(vectors, [1e8, -1e8]).tolist() == pytest.approx([1e8 - 1e4, -1e8], rel=1e-7)
    assert combine(vectors, [1, 1]).dtype == np.float32


@pytest.mark.parametrize(
    ("words", "weights"), [("x", [0]), ("xx", [1, -1]), ("xyxy", [3, 1, -3, -1]), ("xx", [1e-9, -1e-9]), ("xx", [0, 0])]
)
def test_terms_that_cancel_are_refused(words: str, weights: list[float]) -> None:
    vectors = [text_vector(word) * np.float32(1 + 1e-7) ** k for k, word in enumerate(words)]
    with pytest.raises(ValueError, match="the terms of the query cancel each other"):
        combine(vectors, weights)
    combine([text_vector("x")], [1e-9])  # small, but not cancelled


@pytest.mark.parametrize(
    "weights", [[1e39], [1e-39], [1e200, -1e-200], [1e308, 1e308], [1e-200]], ids=lambda weights: str(weights)
)
def test_sum_that_float32_does_not_hold_is_refused(weights: list[float]) -> None:
    vectors = [np.float32([0.6, 0.8]), np.float32([0.8, 0.6])]
    with pytest.raises(ValueError, match="too short, too long or not finite: use weights closer to 1, or check"):
        combine(vectors, weights)
    assert combine(vectors, [1e38]).tolist() == pytest.approx([0.6e38, 0.8e38])


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weights must be finite numbers, got 1, "):
        combine([text_vector("x"), text_vector("y")], [1, weight])


def test_text_that_is_cut_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw(tmp_path / "photos" / "a.png", 1)
    engine = SearchEngine(Colours(), tmp_path / "photos", indices=tmp_path / "cache")
    engine.update()
    for text in ("red", "12345678", " "):  # the last has no tokens
        engine.find([Term(1, text)])
    assert not caplog.messages
    for _ in range(2):
        engine.find([Term(1, "123456789")])
    assert [message[:34] for message in caplog.messages] == ["the text is too long for the model"]
