"""The HTML report of a run shows the run's numbers, loads no other file, and escapes all text of the data."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from support import needs
from support.once import once

needs("train")
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fastclip.cli import main
from fastclip.data.spec import open_source
from fastclip.embedding.features import FeatureStore
from fastclip.evaluation.results import result, write_results
from fastclip.models.embedder import Embedder, load_embedder
from fastclip.report import examples
from fastclip.report.examples import examine
from fastclip.report.page import write_report
from fastclip.report.pictures import heat_map, thumbnail
from fastclip.report.run import read_run
from fastclip.report.view import read_results
from fastclip.training import TrainOptions, train

SECTIONS = ("figures", "curves", "validation", "confusion", "text-to-image", "image-to-text", "options")
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """A parser that fails if a tag is not closed, or if another tag is closed than the open one."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: dict[str, list[str]] = {}  # by the section that contains them, "" outside
        self.section = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "section":
            self.section = self.tags[-1][1]["id"]
            self.words[self.section] = []
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else, at {self.getpos()}"
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.setdefault(self.section, []).append(data.strip())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTCLIP_CACHE", str(folder))
        yield folder


def train_and_report(folder: Path) -> None:
    options: dict[str, Any] = {"model": "ViT-tiny", "context_length": 16, "loss": "unicl", "lr": 1e-3, "ema": 0.8}
    lengths: dict[str, Any] = {"batch_size": 64, "max_steps": 45, "val_every": 15}
    run = str(folder / "digits")
    train(TrainOptions("digits", output=run, val_data="digits", device="cpu", workers=0, **options, **lengths))
    write_report(run, device="cpu")


@pytest.fixture(scope="module")
def run() -> Path:
    return once("reported run", train_and_report) / "digits"


@pytest.fixture(scope="module")
def report(run: Path) -> Path:
    return run / "report.html"


@pytest.fixture(scope="module")
def embedder(run: Path) -> Embedder:
    return load_embedder(run, device="cpu", precision="fp32")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Folder of images and captions whose every text is hostile."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for k in range(9):
        stem = f'{k}"><img src=x onerror=alert(3)>'
        pixels = np.random.default_rng(k).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{stem}.png")
        (folder / f"{stem}.txt").write_text(f"{HOSTILE} {k} " + 200 * "x")
    return folder


@pytest.fixture
def hostile(run: Path, pairs: Path, tmp_path: Path) -> Path:
    """Page of a run whose data and results contain only hostile text."""
    folder = tmp_path / 'run"><img src=x onerror=alert(4)>'
    shutil.copytree(run, folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 45, HOSTILE: 1.0}) + "\n")
    results = tmp_path / "results.json"
    write_results(results, result(dataset=HOSTILE, task="t", model=HOSTILE, pretrained="p", metrics={HOSTILE: 0.5}))
    return write_report(folder, tmp_path / "x.html", data=str(pairs), results=[results], device="cpu")


def last_validation(run: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {name[4:]: value for row in rows if any(k.startswith("val/") for k in row) for name, value in row.items()}


def test_page_has_every_section_and_is_well_formed(report: Path) -> None:
    page = read(report)
    assert tuple(tag["id"] for tag in page.all("section")) == SECTIONS
    titles = ("Loss", "Zero-shot accuracy", "Text → image retrieval", "Logit scale", "Gradient norm", "Learning rate")
    assert {*titles, "Samples per second", "Image → text retrieval"} <= {*page.words["curves"]}
    assert "--context-length" in page.words["options"]
    assert report.stat().st_size < 1.5e6
    assert {"ended", "digits"} <= {*page.words[""]}


def test_page_needs_nothing_else(report: Path) -> None:
    page = read(report)
    urls = [
        value for _, tag in page.tags for name, value in tag.items() if name in ("src", "href", "srcset", "xlink:href")
    ]
    assert len(urls) > 50 and all(url.startswith("data:") for url in urls)
    text = report.read_text(encoding="utf-8")
    assert "url(" not in text and "@import" not in text and "http://" not in text and "https://" not in text
    assert "default-src 'none'" in page.all("meta")[1]["content"]


def test_numbers_are_those_of_the_last_validation(run: Path, report: Path, embedder: Embedder) -> None:
    last = last_validation(run)
    found = examine(embedder, open_source("digits", held_out=True))
    assert found.metrics == pytest.approx({name: last[name] for name in found.metrics}, abs=1e-9)
    words = read(report).words["validation"]
    assert words[words.index("zero-shot top-1") + 1 :][:2] == [f"{last['zero_shot_top1']:.4f}"] * 2
    assert "in the run, step 45" in words
    assert found.confusion is not None and found.confusion.counts is not None
    assert found.confusion.counts.trace() / 360 == pytest.approx(last["zero_shot_top1"], abs=1e-9)
    assert (
        found.confusion.counts.sum(1).tolist()
        == np.bincount([r.label for r in open_source("digits", held_out=True)]).tolist()
    )


def test_most_confused_are_those_of_loops() -> None:
    labels, predictions = torch.randint(0, 5, (2, 200))
    expected = np.zeros((5, 5), dtype=np.int64)
    for label, prediction in zip(labels.tolist(), predictions.tolist()):
        expected[label, prediction] += 1
    wrong = sorted(((expected[i, j], -i, -j) for i in range(5) for j in range(5) if i != j), reverse=True)
    found = examples._most_confused(predictions, labels)
    assert [(count, -i, -j) for i, j, count, _ in found] == wrong[:12]
    assert all(share == pytest.approx(count / expected[i].sum()) for i, _, count, share in found)


def test_best_and_worst_are_those_of_loops() -> None:
    items = F.normalize(torch.randn(40, 8), dim=1)
    queries = F.normalize(items[:30] + 0.35 * torch.randn(30, 8), dim=1)  # query i belongs to items i and i + 10
    pairs = torch.tensor([(i, i + shift) for i in range(30) for shift in (10, 0)])
    random.Random(0).shuffle(order := pairs.tolist())
    best, worst = examples._best_and_worst(queries, items, torch.tensor(order))
    cosines = queries @ items.T

    def place(i: int) -> int:
        others = [float(cosines[i, j]) for j in range(40) if j not in (i, i + 10)]
        return 1 + sum(score >= max(cosines[i, i], cosines[i, i + 10]) for score in others)

    expected = sorted(range(30), key=lambda i: (place(i), -float(max(cosines[i, i], cosines[i, i + 10]))))
    assert [one.query for one in best] == expected[:6]
    assert [one.query for one in worst] == expected[:-7:-1]
    assert worst[0].place > 6, "nothing to see"
    for one in (*best, *worst):
        assert one.place == place(one.query)
        first = cosines[one.query].topk(5).indices.tolist()
        assert [hit.item for hit in one.hits[:5]] == first
        assert [hit.right for hit in one.hits[:5]] == [item in (one.query, one.query + 10) for item in first]
        own = max((one.query, one.query + 10), key=lambda j: float(cosines[one.query, j]))
        rest = [(hit.item, hit.place, hit.right) for hit in one.hits[5:]]
        assert rest == ([] if one.place <= 5 else [(own, one.place, True)])


def test_text_of_data_is_no_markup(hostile: Path) -> None:
    page = read(hostile)
    scripts = [words for words in page.words[""] if "addEventListener" in words]
    assert len(page.all("script")) == len(scripts) == 1
    assert all(image["src"].startswith("data:image/") and "onerror" not in image for image in page.all("img"))
    assert 'run"><img src=x onerror=alert(4)>' in page.words[""]
    assert sum(HOSTILE in words for words in page.words["text-to-image"]) == 8
    for section in ("curves", "image-to-text", "results"):
        assert any(HOSTILE in words for words in page.words[section]), section


def test_names_that_are_no_text_are_written(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"run-\xff")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has no such names")
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(run / name, folder)
    assert "run-?" in read(write_report(folder)).words[""]


@pytest.fixture
def unfinished(run: Path, tmp_path: Path) -> Path:
    """Folder of a run that was killed while it wrote a line."""
    folder = tmp_path / "killed"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("model", "tensorboard"))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 46, "loss": NaN}\n{"step": 47, "loss": 1.5, "grad_norm": null}\n{"step": 48, "lo')
    return folder


def test_run_that_has_not_ended_has_its_curves(unfinished: Path) -> None:
    page = read(write_report(unfinished))
    assert [tag["id"] for tag in page.all("section")] == ["figures", "curves", "validation", "options"]
    assert "not ended" in page.words[""] and "1 line of metrics.jsonl cannot be read and is left out." in page.words[""]
    assert (
        "The run has not ended, so it has no final model yet. Name a checkpoint with --checkpoint."
        in page.words["validation"]
    )
    lines = [tag["d"] for tag in page.all("path") if tag["class"] == "line"]
    assert lines[0].count("M") == 2, "NaN is a gap"
    assert (found := read_run(unfinished)).steps == 47 and found.unread == 1


def test_checkpoint_of_a_run_is_looked_at_as_it_is_validated(run: Path, unfinished: Path) -> None:
    """A checkpoint is evaluated as the run would validate it, with the run's context length and averaged weights."""
    checkpoint = unfinished / "checkpoints" / "step-00000045"
    words = read(write_report(unfinished, checkpoint=checkpoint, device="cpu")).words["validation"]
    last = last_validation(run)
    assert words[words.index("text → image recall@1") + 1] == f"{last['image_retrieval_recall@1']:.4f}"
    assert words[words.index("zero-shot top-1") + 1] == f"{last['zero_shot_top1']:.4f}"
    assert "in the run, step 45" not in words


def test_data_that_are_not_there(run: Path, tmp_path: Path) -> None:
    """Missing data of the run are tolerated, because they may be on another machine. Data that the caller names must
    exist.
    """
    folder = tmp_path / "moved"
    shutil.copytree(run, folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("val_data: digits", "val_data: /nowhere/pairs.csv"))
    assert any("/nowhere/pairs.csv" in words for words in read(write_report(folder)).words["validation"])
    with pytest.raises((ValueError, OSError), match="nowhere"):
        write_report(folder, data="/nowhere/else")
    config.write_text(config.read_text().replace("val_data: /nowhere/pairs.csv", "val_data: null"))
    assert (
        "The run has no validation data. Name a dataset with --data." in read(write_report(folder)).words["validation"]
    )


def test_large_data_are_sampled_evenly_and_the_page_says_so(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    from fastclip.report import page

    monkeypatch.setattr(
        page, "examine", lambda e, source, **o: (seen.extend(source.indices), examine(e, source, **o))[1]
    )
    words = read(write_report(run, tmp_path / "x.html", max_samples=50, device="cpu")).words["validation"]
    assert seen == [i * 360 // 50 for i in range(50)]
    assert any("50 images of 360" in text for text in words)
    assert not any("in the run" in text for text in words), "those are of all"


def test_report_goes_on_where_it_was_stopped(embedder: Embedder, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("digits", held_out=True)
    expected = examine(embedder, source)
    assert not (cache / "features").exists() or not any((cache / "features").iterdir()), "nothing is kept unasked"
    stores: list[FeatureStore] = []

    def stop(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(examples, "text_features", stop)
        with pytest.raises(KeyboardInterrupt):
            examine(embedder, source, stores=stores)
    monkeypatch.setattr(type(embedder), "embed_images", stop)
    stores.clear()
    found = examine(embedder, source, stores=stores)
    assert found.metrics == expected.metrics and found.of_texts == expected.of_texts
    assert len(stores) == 2
    for store in stores:
        store.clear()
    assert not any((cache / "features").iterdir()), "nothing is left"


def test_what_is_embedded_is_kept_until_the_page_is_written(
    run: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastclip.report.page.write_bytes", stop)
        with pytest.raises(KeyboardInterrupt):
            write_report(run, tmp_path / "x.html", max_samples=40, device="cpu")
    assert len(list((cache / "features").iterdir())) == 2
    monkeypatch.setattr(Embedder, "embed_images", stop)
    write_report(run, tmp_path / "x.html", max_samples=40, device="cpu")
    assert not any((cache / "features").iterdir())


def test_results_stand_beside_each_other(tmp_path: Path) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    common = {"dataset": "digits", "task": "zeroshot_classification", "pretrained": "x"}
    write_results(files[0], result(model="m", metrics={"acc1": 0.5, "acc5": float("nan"), "per_class": [1]}, **common))
    write_results(files[1], [result(model=m, metrics={"acc1": v}, **common) for m, v in (("m", 0.25), ("n", 0.125))])
    found = read_results(files)
    assert [column[:2] for column in found["columns"]] == [
        (str(files[k]), m) for k, m in ((0, "m"), (1, "m"), (1, "n"))
    ]
    assert found["rows"] == [(("zeroshot_classification", "digits", "acc1"), [0.5, 0.25, 0.125])]
    files[0].write_text("{")
    with pytest.raises(ValueError, match=r"a\.json is not JSON"):
        read_results(files)
    for text in ("[1]", "[]", "{}", "null", '{"metrics": [1]}'):
        files[0].write_text(text)
        with pytest.raises(ValueError, match=r"a\.json is not a result file of fastclip eval"):
            read_results(files)
    files[0].write_text(100_000 * "[")
    with pytest.raises(ValueError, match=r"a\.json is not JSON: maximum recursion"):
        read_results(files)
    files[0].write_text('{"metrics": {"a": 1e999, "b": NaN, "c": true, "d": 1, "e": {}}, "task": [1], "model": null}')
    assert [row[0][2] for row in read_results(files[:1])["rows"]] == ["d"]


def test_results_that_differ_in_alpha_or_nothing_have_a_column_each(tmp_path: Path) -> None:
    common: dict[str, Any] = {"dataset": "digits", "task": "finetuned_classification", "model": "m", "pretrained": "x"}
    mixed = [result(metrics={"acc1": alpha / 2}, alpha=alpha, **common) for alpha in (0.0, 0.3, 1.0)]
    write_results(tmp_path / "a.json", [*mixed, *(result(metrics={"acc1": 0.25}, **common) for _ in range(3))])
    found = read_results([tmp_path / "a.json"])
    assert [column[2] for column in found["columns"]] == [
        *("x, alpha 0.0", "x, alpha 0.3", "x, alpha 1.0"),
        *("x", "x (2)", "x (3)"),
    ]
    assert [values for _, values in found["rows"]] == [[0.0, 0.15, 0.5, 0.25, 0.25, 0.25]]


def decoded(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_pictures_are_small_and_maps_exact() -> None:
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 600, 4), dtype=np.uint8))
    assert decoded(thumbnail(large)).size == (107, 160)
    assert decoded(thumbnail(Image.new("P", (32, 20)))).size == (32, 20)
    shares = np.array([[1, 0], [0.25, 0.75]])
    assert np.asarray(decoded(heat_map(shares)))[..., 3].tolist() == [[255, 0], [128, 221]]


def test_command_writes_the_page_and_says_where(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "page.html"
    assert main(["report", str(run), "--output", str(output), "--device", "cpu", "--workers", "0"]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert len(read(output).all("section")) == len(SECTIONS)
    assert main(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error == f"fastclip report: {tmp_path} is not a run of fastclip train: it holds no config.yaml\n"
    assert main(["report", str(run), "--max-samples", "0"]) == 1
    (tmp_path / "metrics.jsonl").touch()
    for text in ("model: [", 10_000 * "{", "a: !!python/object:os.system x"):
        (tmp_path / "config.yaml").write_text(text)
        assert main(["report", str(tmp_path)]) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert "config.yaml is not YAML" in said


def test_run_of_odd_values_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run with unusual values, written by another version or by hand, is reported."""
    lines = ['{"step": 1e999, "loss": 1}', f'{{"step": {10**400}}}', 10_000 * "[", "[]", "\udcff"]
    good = [
        f'{{"step": 1, "loss": {10**400}}}',
        '{"step": 2, "loss": NaN, "x\\ud800<b>": 1}',
        '{"step": 3, "lr": null}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines + good), errors="surrogateescape")
    for value in (None, [1], {"a": 1}, "x", -1):
        options = {"data": "x", "model": "x", "loss": value, "tags": value}
        (tmp_path / "config.yaml").write_text(json.dumps(options))
        assert main(["report", str(tmp_path)]) == 0
        assert "metrics.jsonl: 6 lines cannot be read" in caplog.text
        Page((tmp_path / "report.html").read_text())


def test_browser_loads_nothing_and_nothing_sticks_out(report: Path, hostile: Path) -> None:
    needs("playwright")
    import playwright.sync_api as sync_api

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for page, width in ((report, 400), (report, 1200), (hostile, 400)):
            view = browser.new_page(viewport={"width": width, "height": 800})
            told: list[str] = []
            view.on("console", lambda message, told=told: told.append(message.text))
            view.on("pageerror", lambda error, told=told: told.append(str(error)))
            view.on("request", lambda request, told=told: told.append(request.url))
            view.on("dialog", lambda dialog, told=told: (told.append(dialog.message), dialog.dismiss()))
            view.goto(page.as_uri())
            assert [url for url in told if not url.startswith("data:")] == [page.as_uri()]
            assert view.evaluate("document.documentElement.scrollWidth") <= width
            assert view.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
            view.locator("figure svg").first.hover()
            assert view.locator("figcaption").first.inner_text().startswith("step 2")
        browser.close()
