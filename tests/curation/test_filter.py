"""`fastclip filter` keeps the samples of its definition, in readable shards, even if it is stopped at any moment."""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import ROOT, needs

needs("search")
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastclip import cli
from fastclip.curation import near_duplicates as near
from fastclip.curation.embed import embed_source
from fastclip.curation.filter import filter_source
from fastclip.curation.near_duplicates import near_duplicates
from fastclip.data.pack import pack_source
from fastclip.data.picture import pixels_limited
from fastclip.data.source import Source
from fastclip.data.sources.subset import Subset
from fastclip.data.spec import open_source
from fastclip.models.embedder import Embedder
from support.faulty import write_folder
from support.interrupted_search import DEDUP
from support.pictures import real_pictures
from support.processes import start

BATCH = 16


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """60 of the held-out digits as shards, with five captions each."""
    folder = tmp_path_factory.mktemp("digits")
    pack_source(Subset(open_source("digits", held_out=True), range(60)), folder, samples_per_shard=25)
    return open_source(str(folder))


def similarities(embedder: Embedder, source: Source) -> list[list[float]]:
    """Return the similarities of each sample's captions, one pair at a time; an unusable sample has none."""
    found = []
    for index in range(len(source)):
        try:
            record = source[index]
        except ValueError:
            found.append([])
            continue
        image = embedder.embed_images(embedder.transform(record.image)[None])
        found.append([float((image * embedder.embed_texts([text])).sum()) for text in record.captions])
    return found


def between(values: list[float], share: float) -> float:
    """Return a threshold that about `share` of the values reach, midway between two values."""
    ordered = np.sort(values)
    return float(np.mean(ordered[int((1 - share) * len(ordered)) - 1 :][:2]))


def told(folder: Path) -> list[dict[str, Any]]:
    """Return the .json of every sample, with the bytes of its image."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name, data in members.items():
            if name.endswith(".json"):
                key = name.removesuffix(".json")
                picture = next(members[f"{key}{x}"] for x in (".jpg", ".png", ".webp") if f"{key}{x}" in members)
                found.append({**json.loads(data), "picture": picture, "text": members.get(f"{key}.txt")})
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_filter_keeps_what_the_definition_does(embedder: Embedder, digits: Source, tmp_path: Path) -> None:
    expected = similarities(embedder, digits)
    threshold = between([max(values) for values in expected], 0.5)
    summary = filter_source(embedder, digits, tmp_path, threshold=threshold, samples_per_shard=8, batch_size=BATCH)
    kept = [k for k, values in enumerate(expected) if max(values) >= threshold]
    found = told(tmp_path)
    assert 20 < len(kept) < 40 and [sample["original"] for sample in found] == [digits.key(k) for k in kept]
    for k, sample in zip(kept, found):
        pairs = [(text, value) for text, value in zip(digits.captions(k), expected[k]) if value >= threshold]
        captions = sample["caption"] if isinstance(sample["caption"], list) else [sample["caption"]]
        assert captions == [text for text, _ in pairs]
        assert sample["similarity"] == pytest.approx(max(value for _, value in pairs), abs=1e-6)
        assert sample.get("similarities", [sample["similarity"]]) == pytest.approx([v for _, v in pairs], abs=1e-6)
    assert summary["counts"] == {"below threshold": 60 - len(kept), "kept": len(kept)}
    again = open_source(str(tmp_path))  # includes histogram.png beside the shards
    assert len(again) == len(kept) and again.captions(0) == tuple(np.atleast_1d(found[0]["caption"]))
    assert len(list(tmp_path.glob("*.tar"))) == -(-len(kept) // 8)


def test_threshold_is_inclusive(embedder: Embedder, digits: Source, tmp_path: Path) -> None:
    filter_source(embedder, digits, tmp_path / "scored", batch_size=BATCH)
    best = pq.read_table(tmp_path / "scored" / "similarities.parquet")["similarity"].to_numpy()
    threshold = float(np.sort(best)[30])
    options = {"scores": tmp_path / "scored" / "scores", "batch_size": BATCH}
    filter_source(embedder, digits, tmp_path / "edge", threshold=threshold, **options)
    assert len(told(tmp_path / "edge")) == (best >= np.float32(threshold)).sum()
    assert min(sample["similarity"] for sample in told(tmp_path / "edge")) == threshold


def test_similarities_are_computed_once_for_all_thresholds(
    embedder: Embedder, digits: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = filter_source(embedder, digits, tmp_path / "a", batch_size=BATCH)
    assert not list((tmp_path / "a").glob("*.tar")) and summary["counts"] == {"scored": 60}
    monkeypatch.setattr(embedder.model, "encode_image", None)
    for threshold in (-0.5, 0.2):
        output = tmp_path / f"{threshold}"
        filter_source(embedder, digits, output, threshold=threshold, scores=tmp_path / "a" / "scores")
        assert len(told(output)) == json.loads((output / "summary.json").read_text())["counts"]["kept"] > 0
    with pytest.raises(TypeError):  # refused with other names
        filter_source(embedder, Subset(digits, range(1, 60)), tmp_path / "b", scores=tmp_path / "a" / "scores")


def test_scores_are_those_of_the_captions_and_the_place(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, shade in (("a", 40), ("b", 200)):
        (tmp_path / place).mkdir()
        picture = np.random.default_rng(shade).integers(0, shade, (40, 40, 3), np.uint8)
        Image.fromarray(picture).save(tmp_path / place / "x.png")
    options: dict[str, Any] = {"scores": tmp_path / "scores", "batch_size": BATCH}
    found = []
    for place, caption in (("a", "a red car"), ("a", "the sea at night"), ("b", "a red car")):
        monkeypatch.chdir(tmp_path / place)
        Path("t.csv").write_text(f"filepath,title\nx.png,{caption}\n")
        source = open_source("t.csv")
        summary = filter_source(embedder, source, tmp_path / f"{len(found)}", **options)
        assert summary["similarity"]["mean"] == pytest.approx(similarities(embedder, source)[0][0], abs=1e-6)
        found.append(summary["similarity"]["mean"])
    assert len(set(found)) == 3
    options |= {"threshold": -1}
    for place in "ab":
        (tmp_path / place / "t.csv").write_text("filepath,title\nx.png,a red car\n")
    monkeypatch.chdir(tmp_path / "a")
    filter_source(embedder, open_source("t.csv"), tmp_path / "out", **options)
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(
        ValueError, match=r"source was \S+/a/t.csv, is now \S+/b/t.csv, pictures and captions was \w+, is now "
    ):
        filter_source(embedder, open_source("t.csv"), tmp_path / "out", **options)


def test_another_working_directory_is_no_other_call(
    embedder: Embedder, digits: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        filter_source(embedder, digits, tmp_path / "filtered", threshold=0.1, batch_size=BATCH)
        kept = embed_source(embedder, digits, tmp_path / "embedded").kept
    assert kept == 1


def test_spelling_of_a_place_is_no_other_call(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_folder(tmp_path / "a" / "d", 3)
    for place, spec in ((tmp_path / "a", "d"), (tmp_path, "a/d"), (tmp_path, f"{data}/"), (data, ".")):
        monkeypatch.chdir(place)
        for scores in (None, tmp_path / "scores"):
            output = tmp_path / f"filtered {scores is None}"
            filter_source(embedder, open_source(spec), output, threshold=-1, scores=scores, batch_size=BATCH)
        assert len(list((tmp_path / "scores" / "similarities").iterdir())) == 1


def test_real_pictures_keep_their_bytes_and_what_is_known_of_them(embedder: Embedder, tmp_path: Path) -> None:
    source = open_source(str(real_pictures(tmp_path / "data")))
    pack_source(source, tmp_path / "packed")
    summary = filter_source(embedder, source, tmp_path / "out", threshold=-1, workers=1, batch_size=4)
    assert summary["counts"] == {"unusable": 4, "kept": 5}
    assert {cause: of["count"] for cause, of in summary["causes"].items()} == {
        "not an image": 1,
        "truncated image": 1,
        "no caption": 1,
        "empty caption": 1,
    }
    assert summary["causes"]["no caption"]["first"] == [str(tmp_path / "data" / "mute.png")]
    found = {Path(sample["original"]).name: sample for sample in told(tmp_path / "out")}
    for name, sample in found.items():
        assert sample["picture"] == (tmp_path / "data" / name).read_bytes()
    assert found["hopper.jpg"]["url"] == "https://example.org/hopper.jpg" and found["hopper.jpg"]["key"] != "h1"
    assert found["hopper.jpg"]["text"] == b"an officer in uniform"
    assert found["flower.jpg"]["caption"] == ["a red flower", "a car"] and found["flower.jpg"]["text"] is None
    shards = open_source(str(tmp_path / "packed"))  # a .txt and a .json
    filter_source(embedder, shards, tmp_path / "again", threshold=-1, batch_size=4)
    again = {len(sample["picture"]): sample for sample in told(tmp_path / "again")}
    assert again[len(found["hopper.jpg"]["picture"])]["url"] == "https://example.org/hopper.jpg"
    with Image.open(tmp_path / "out" / "histogram.png") as image:
        assert image.size[0] > 500


def test_similarity_that_is_not_finite_is_dropped_and_counted(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(real_pictures(tmp_path / "data")))
    real = Embedder.embed_texts

    def embed(self: Embedder, texts: list[str], **options: Any) -> Tensor:
        bad = torch.tensor([text in ("a logo", "a car") for text in texts])
        return torch.where(bad[:, None], torch.nan, real(self, texts, **options))

    monkeypatch.setattr(Embedder, "embed_texts", embed)
    summary = filter_source(embedder, source, tmp_path / "out", threshold=-1, dedup=1, batch_size=4)
    assert summary["counts"] == {"unusable": 4, "similarity is not finite": 1, "kept": 4}
    assert summary["similarity"]["captions"] == 4 and np.isfinite(summary["similarity"]["mean"])
    found = {Path(sample["original"]).name: sample for sample in told(tmp_path / "out")}
    assert found["flower.jpg"]["caption"] == "a red flower" and "logo.png" not in found
    table = pq.read_table(tmp_path / "out" / "similarities.parquet").to_pylist()
    states = {Path(row["key"]).name: (row["state"], row["similarity"] is None) for row in table}
    assert states["logo.png"] == ("similarity is not finite", True) and states["html.png"] == ("unusable", True)
    assert states["flower.jpg"] == ("kept", False)


def greedy(vectors: Tensor, threshold: float) -> list[int]:
    kept: list[int] = []
    found = []
    for k, vector in enumerate(vectors):
        first = next((j for j in kept if float(vectors[j] @ vector) >= threshold), -1)
        found.append(first)
        kept += [k] if first < 0 else []
    return found


@pytest.mark.parametrize(("rows", "chunk"), [(2048, 16384), (7, 16384), (7, 20), (300, 64)])
def test_near_duplicates_are_those_of_comparing_all(monkeypatch: pytest.MonkeyPatch, rows: int, chunk: int) -> None:
    monkeypatch.setattr(near, "_ROWS", rows)
    monkeypatch.setattr(near, "_CHUNK", chunk)
    centres = F.normalize(torch.randn(40, 16), dim=1)
    vectors = F.normalize(centres[torch.randint(40, (300,))] + 0.1 * torch.randn(300, 16), dim=1)
    expected = greedy(vectors, 0.9)
    assert 50 < expected.count(-1) < 200
    assert near_duplicates(vectors.split(130), 0.9).tolist() == expected
    assert near_duplicates([vectors[:1], vectors[:1] * 0.5, vectors[:1]], 0.9).tolist() == [-1, -1, 0]
    assert near_duplicates([], 0.9).tolist() == []


def test_equal_vectors_are_duplicates_at_1() -> None:
    vectors = F.normalize(torch.randn(200, 512), dim=1)
    assert not all(float(vector @ vector) >= 1 for vector in vectors)
    assert near_duplicates([vectors, vectors], 1.0).tolist() == [-1] * 200 + list(range(200))
    other = F.normalize(vectors + 2e-3 * F.normalize(torch.randn(200, 512), dim=1), dim=1)  # cosines of 0.999998
    assert near_duplicates([vectors, other], 1.0).tolist() == [-1] * 400


def test_first_of_near_duplicates_stays(embedder: Embedder, digits: Source, tmp_path: Path) -> None:
    expected = similarities(embedder, digits)
    threshold = between([max(values) for values in expected], 0.7)
    options = {"threshold": threshold, "dedup": DEDUP, "batch_size": BATCH}
    summary = filter_source(embedder, digits, tmp_path, **options)
    above = [k for k, values in enumerate(expected) if max(values) >= threshold]
    images = torch.cat([embedder.embed_images(embedder.transform(digits[k].image)[None]) for k in above])
    first = greedy(images, DEDUP)
    kept = [k for k, of in zip(above, first) if of < 0]
    assert 2 < len(kept) < len(above) - 2
    assert [sample["original"] for sample in told(tmp_path)] == [digits.key(k) for k in kept]
    assert summary["counts"]["near duplicate"] == len(above) - len(kept)
    table = pq.read_table(tmp_path / "similarities.parquet").to_pylist()
    assert [row["duplicate_of"] for row in table if row["duplicate_of"]] == [
        digits.key(above[of]) for of in first if of >= 0
    ]


@pytest.mark.fault(
    "`fastclip filter` or `embed` is killed at any point",
    "Re-running the same command resumes; the output is byte-identical",
)
def test_killed_search_commands_go_on_to_the_same_bytes(tmp_path: Path) -> None:
    pack_source(Subset(open_source("digits", held_out=True), range(36)), tmp_path / "data", samples_per_shard=30)
    script = ROOT / "tests/support/interrupted_search.py"
    process = start([sys.executable, script, tmp_path])
    told, said = process.communicate()
    assert process.returncode == 0, said
    kills = {line.split()[0]: int(line.split()[1]) for line in told.splitlines()}
    assert kills["filter"] >= 10 and kills["embed"] >= 8, kills
    for task in kills:
        found, expected = files(tmp_path / f"{task}-killed"), files(tmp_path / f"{task}-whole")
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []


def test_filter_touches_no_other_call(embedder: Embedder, digits: Source, tmp_path: Path) -> None:
    filter_source(embedder, digits, tmp_path / "a", threshold=0.1, batch_size=BATCH)
    before = files(tmp_path / "a")
    with pytest.raises(ValueError, match=r"belongs to another call: threshold was 0\.1, is now 0\.2; choose another"):
        filter_source(embedder, digits, tmp_path / "a", threshold=0.2)
    assert files(tmp_path / "a") == before
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "00000.tar", tmp_path / "b")
    with pytest.raises(ValueError, match=r"00000\.tar was not written by this command"):
        filter_source(embedder, digits, tmp_path / "b", threshold=0.1)
    assert list(files(tmp_path / "b")) == ["00000.tar"]
    with pytest.raises(ValueError, match=r"no sample has a similarity of 1\.0 or more"):
        filter_source(embedder, digits, tmp_path / "c", threshold=1.0, scores=tmp_path / "a" / "scores")
    for name, value in (("threshold", 1.5), ("dedup", 0.0), ("samples_per_shard", 0), ("threshold", float("nan"))):
        with pytest.raises(ValueError, match=f"{name} must be"):
            filter_source(embedder, digits, tmp_path / "d", **{name: value})


def test_output_is_no_part_of_the_data(embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "data", 3)
    filter_source(embedder, open_source(str(folder)), tmp_path / "kept", threshold=-1)
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    cases = [("data", "data"), ("data", "data/new"), (".", "scored"), ("kept", "link"), ("kept/*.tar", "kept")]
    (folder / "000.json").write_text('{"text": "x"}')
    cases += [("data#caption=text", "data/new"), ("kept::2*data", "data/new")]
    for spec, output in cases:
        monkeypatch.chdir(tmp_path)
        source = open_source(spec)
        before = files(tmp_path)
        with pytest.raises(ValueError, match=f"{output} contains the data, or is inside the data's folder"):
            filter_source(embedder, source, Path(output))
        with pytest.raises(ValueError, match="contains the data, or is inside the data's folder"):
            filter_source(embedder, source, tmp_path.parent / "fine", scores=output)
        assert files(tmp_path) == before


def test_pictures_that_were_replaced_are_other_data(embedder: Embedder, tmp_path: Path) -> None:
    source = open_source(str(real_pictures(tmp_path / "data")))
    options: dict[str, Any] = {"batch_size": BATCH, "scores": tmp_path / "scores"}
    filter_source(embedder, source, tmp_path / "scored", **options)
    filter_source(embedder, source, tmp_path / "kept", threshold=-1, **options)
    before = files(tmp_path / "kept")
    (tmp_path / "data" / "logo.png").write_bytes((tmp_path / "data" / "china.jpg").read_bytes())
    found = filter_source(embedder, source, tmp_path / "scored", **options)["similarity"]["mean"]
    true = [value for values in similarities(embedder, source) for value in values]
    assert found == pytest.approx(np.mean(true), abs=1e-6)
    with pytest.raises(ValueError, match=r"another call: pictures and captions was \w+, is now \w+; choose another"):
        filter_source(embedder, source, tmp_path / "kept", threshold=-1, **options)
    assert files(tmp_path / "kept") == before


def test_largest_picture_is_part_of_the_call(embedder: Embedder, digits: Source, tmp_path: Path) -> None:
    """The limit on image size is part of the call's identity, also for similarities that calls share."""
    found = filter_source(embedder, digits, tmp_path / "all", threshold=None, scores=tmp_path / "scores")
    with pixels_limited(1), pytest.raises(ValueError, match="no sample has a similarity"):
        filter_source(embedder, digits, tmp_path / "none", threshold=-1.0, scores=tmp_path / "scores")
    again = filter_source(embedder, digits, tmp_path / "again", threshold=-1.0, scores=tmp_path / "scores")
    assert again["causes"] == found["causes"] and again["counts"]["kept"] == len(digits)
    with (
        pixels_limited(10**8),
        pytest.raises(ValueError, match="another call: max_pixels was 89478485, is now 100000000"),
    ):
        filter_source(embedder, digits, tmp_path / "again", threshold=-1.0, scores=tmp_path / "scores")


def test_scores_that_are_computed_anew_meet_no_result_of_before(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastclip.curation.filter.contents_of", lambda source: "what another machine makes of them")
    source = open_source(str(real_pictures(tmp_path / "data")))
    scored = [value for values in similarities(embedder, source) for value in values]
    options: dict[str, Any] = {"threshold": between(scored, 0.5), "batch_size": BATCH, "scores": tmp_path / "scores"}
    filter_source(embedder, source, tmp_path / "out", **options)
    assert filter_source(embedder, source, tmp_path / "out", **options)["counts"]["kept"] > 0
    before = files(tmp_path / "out")
    names = [path for path in (tmp_path / "data").iterdir() if path.name in ("hopper.jpg", "flower.jpg", "logo.png")]
    for path, data in zip(names, [path.read_bytes() for path in (*names[1:], names[0])]):
        path.write_bytes(data)
    shutil.rmtree(tmp_path / "scores")
    with pytest.raises(
        ValueError, match=r"_stats\.json was written from other similarities than those now computed: remove "
    ):
        filter_source(embedder, source, tmp_path / "out", **options)
    assert files(tmp_path / "out") == before
    for path in (*(tmp_path / "out").glob("*.tar"), *(tmp_path / "out").glob("*_stats.json")):
        path.unlink()  # a remaining table does not count
    filter_source(embedder, source, tmp_path / "out", **options)
    filter_source(embedder, source, tmp_path / "new", **options)
    assert files(tmp_path / "out") == files(tmp_path / "new")


def test_result_is_left_alone_by_a_call_without_a_threshold(embedder: Embedder, digits: Source, tmp_path: Path) -> None:
    filter_source(embedder, digits, tmp_path, threshold=0.1, batch_size=BATCH)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"belongs to another call: threshold was 0\.1, is now None; choose another"):
        filter_source(embedder, digits, tmp_path, batch_size=BATCH)
    assert files(tmp_path) == before


def test_model_may_be_called_otherwise(
    embedder: Embedder, digits: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filter_source(embedder, digits, tmp_path / "a", threshold=0.1, batch_size=BATCH)
    embed_source(embedder, digits, tmp_path / "b")
    before = {**files(tmp_path / "a"), **files(tmp_path / "b")}
    monkeypatch.setattr(embedder, "name", "runs/../ViT-tiny")
    summary = filter_source(embedder, digits, tmp_path / "a", threshold=0.1, batch_size=BATCH)
    assert summary["model"] == "runs/../ViT-tiny" and embed_source(embedder, digits, tmp_path / "b").kept == 1
    after = {**files(tmp_path / "a"), **files(tmp_path / "b")}
    assert {name for name in before if before[name] != after[name]} == {"summary.json"}


def test_command_filters_and_goes_on(embedder: Embedder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embedder.model.save_pretrained(tmp_path / "model")
    real_pictures(tmp_path / "data")
    words = ["filter", "--data", str(tmp_path / "data"), "--checkpoint", str(tmp_path / "model"), "--device", "cpu"]
    words += ["--workers", "0", "--output", str(tmp_path / "out")]
    assert cli.main(words) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["samples", "number", "%"] and out[1].split() == ["read", "9", "100.0"]
    assert out[2].split() == ["unusable", "4", "44.4"] and "- not an image" in "\n".join(out[3:7])
    assert out[7].split() == ["scored", "5", "55.6"] and out[8].split()[:3] == ["similarity", "at", "least"]
    assert cli.main([*words, "--threshold", "-1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["kept", "5", "55.6"]
    assert cli.main([*words, "--threshold", "-0.9"]) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("fastclip filter: ") and "threshold was -1.0, is now -0.9" in err
