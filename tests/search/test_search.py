"""`fastclip search` returns the results of brute force, fast, and without a model where none is needed."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import needs

needs("train")
import torch
from PIL import Image, ImageDraw, ImageFont

from fastclip.cli import main
from fastclip.embedding.query import Term
from fastclip.models import create_model
from fastclip.models.embedder import load_embedder
from fastclip.search import engine as engines
from fastclip.search import scan
from fastclip.search.contact_sheet import contact_sheet, most_tiles, terminal_picture
from fastclip.search.engine import Match, SearchEngine
from fastclip.search.index import Index, Pictures
from fastclip.search.model import CheckpointModel
from fastclip.search.rank import top
from fastclip.system import env
from support.colours import Colours, draw

EMOJI = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    create_model("ViT-tiny").save_pretrained(folder)
    return folder


def emoji(folder: Path) -> list[Path]:
    """Draw Debian's coloured emoji, no two of which are equal."""
    font, files = ImageFont.truetype(str(EMOJI), 109), []
    for code in range(0x1F300, 0x1F5FF, 5):
        picture = Image.new("RGB", (136, 128), "white")
        ImageDraw.Draw(picture).text((0, 0), chr(code), font=font, embedded_color=True)
        if picture.getcolors(1) is None:  # the font has this glyph
            files.append(folder / f"{chr(code)} {code:x}.png")
            picture.save(files[-1])
    return files


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos").resolve()
    if EMOJI.is_file():
        return emoji(folder)
    return [draw(folder / f"ü {k}.png", k) for k in range(60)]


@pytest.fixture(autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test its own empty cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FASTCLIP_CACHE", str(folder))
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, list[str], str]:
    """Run `fastclip search`, and return its exit status, the lines on stdout, and stderr."""
    level = logging.getLogger("fastclip").level
    try:
        status = main(["search", *map(str, words)])
    finally:
        logging.getLogger("fastclip").setLevel(level)
    told = capsys.readouterr()
    return status, told.out.splitlines(), told.err


def brute_force(checkpoint: Path, photos: list[Path], query: dict[str | Path, float]) -> list[tuple[str, float]]:
    """Return the scores, computed one image at a time in double precision, in descending order."""
    embedder = load_embedder(checkpoint, device="cpu")

    def vector(what: str | Path) -> Any:
        if isinstance(what, str):
            return embedder.embed_texts([what])[0].double()
        return embedder.embed_images(embedder.transform(Image.open(what)).unsqueeze(0))[0].double()

    features = sum(weight * vector(what) for what, weight in query.items())
    scores = {str(photo): float(features @ vector(photo)) for photo in photos if photo not in query}
    return sorted(scores.items(), key=lambda item: -item[1])


@pytest.mark.parametrize("kind", ["text", "picture", "mixture"])
def test_results_are_those_of_brute_force(
    checkpoint: Path, photos: list[Path], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    query: dict[str | Path, float]
    words, query = {
        "text": ("a red car", {"a red car": 1.0}),
        "picture": (str(photos[3]), {photos[3]: 1.0}),
        "mixture": (f"2:dog + {photos[7]} - 0.5:night", {"dog": 2.0, photos[7]: 1.0, "night": -0.5}),
    }[kind]
    common = (photos[0].parent, "--checkpoint", checkpoint, "--device", "cpu", "-t", 20)
    status, lines, told = run(capsys, words, *common, "--json", "-b", 16)
    expected = brute_force(checkpoint, photos, query)[:20]
    found = json.loads("\n".join(lines))
    assert status == 0 and f"{len(photos)} embedded" in told
    assert [one["score"] for one in found] == pytest.approx([score for _, score in expected], abs=1e-5)
    # equal scores may be in another order
    assert len({one["path"] for one in found} & {path for path, _ in expected}) >= 19
    assert dict(expected)[found[0]["path"]] == pytest.approx(expected[0][1], abs=1e-5)
    _, lines, told = run(capsys, words, *common, "-n")
    assert [line.split("\t")[1] for line in lines] == [one["path"] for one in found]
    assert ("fastclip: the query is read as + 2 * text" in told) == bool(told) == (kind == "mixture")
    assert [float(line.split("\t")[0]) for line in lines] == pytest.approx([one["score"] for one in found], abs=1e-4)
    _, lines, _ = run(capsys, words, *common, "-f")
    assert lines == [one["path"] for one in found]


def test_what_is_known_needs_no_model_and_no_torch(
    checkpoint: Path, photos: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Images written a moment ago would be read again, by this process and by those that it starts
    monkeypatch.setattr(scan, "_SETTLED", 0)
    for photo in photos:  # as if written just now
        photo.touch()
    common = (str(photos[0].parent), "--checkpoint", str(checkpoint), "--device", "cpu")
    _, first, _ = run(capsys, "a red car", *common)
    code = "import sys; from fastclip.search import scan; scan._SETTLED = 0; from fastclip.cli import main; "
    code += "main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    for words in (
        ("a red car", "-n"),
        ("a red car",),
        (str(photos[2]),),
        (f"a red car - {photos[2]}", "--sheet", "x.png"),
    ):
        command = [sys.executable, "-c", code, "search", words[0], *common, *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True, cwd=os.environ["FASTCLIP_CACHE"])
        assert done.returncode == 0, done.stderr
        *told, modules = done.stderr.splitlines()
        assert len(told) == (" - " in words[0]) and not {"torch", "timm"} & set(modules.split())
        assert words[0] != "a red car" or done.stdout.splitlines() == first


def test_checkpoint_that_changed_is_another_model(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights"
    create_model("ViT-tiny", checkpoint).save_pretrained(weights)

    def model(**options: Any) -> CheckpointModel:
        return CheckpointModel(weights, device="cpu", **options)

    first = model().identity
    assert first == load_embedder(checkpoint, device="cpu").identity
    with monkeypatch.context() as patch:
        patch.setattr("fastclip.models.embedder.load_embedder", None)
        assert model().identity == first
    assert model(precision="bf16").identity != first
    os.utime(weights / "model.safetensors")
    assert model().identity == first  # read again, with the same result
    create_model("ViT-tiny").save_pretrained(weights)
    assert model().identity != first
    with pytest.raises(FileNotFoundError, match="there is no checkpoint nowhere"):
        CheckpointModel("nowhere")


def test_weights_behind_a_link_are_noticed(tmp_path: Path) -> None:
    create_model("ViT-tiny").save_pretrained(tmp_path / "weights")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "model").symlink_to(tmp_path / "weights")
    (tmp_path / "run" / "latest").symlink_to(tmp_path / "run")  # a cycle of links
    first = CheckpointModel(tmp_path / "run", device="cpu").identity
    create_model("ViT-tiny").save_pretrained(tmp_path / "weights")
    assert CheckpointModel(tmp_path / "run", device="cpu").identity != first


def test_default_precision_of_another_machine_is_refused(
    checkpoint: Path, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index is refused if the default precision has changed since, because the default depends on the GPU."""
    first = CheckpointModel(checkpoint).identity
    (memory,) = (caches / "search" / "checkpoints").iterdir()
    memory.write_text(json.dumps({"identity": first, "precision": "bf16"}))
    if torch.cuda.is_available():
        memory.write_text(json.dumps({"identity": first, "precision": "fp32"}))
    with pytest.raises(ValueError, match=r"now computes in .*, but its index was built in"):
        _ = CheckpointModel(checkpoint).embedder
    assert CheckpointModel(checkpoint).identity == first


def test_query_over_100_000_answers_in_50_ms() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((100_000, 512), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pictures = Pictures([b"%06d" % k for k in range(100_000)], np.arange(100_000), np.arange(100_000), vectors)
    seconds, exact = [], vectors.astype(np.float64)
    for k in range(7):
        query = vectors[k] + 0.1 * vectors[k + 1]
        start = time.process_time()  # CPU time, because the machine may be busy
        found = top(pictures, query, 10)
        seconds.append(time.process_time() - start)
        scores = exact @ query
        assert [path for path, _, _ in found] == [b"%06d" % k for k in np.argsort(-scores)[:10]]
        assert [score for _, score, _ in found] == pytest.approx(np.sort(scores)[:-11:-1].tolist(), abs=1e-5)
    assert min(seconds) < 0.05


def test_equal_scores_are_ordered_by_path() -> None:
    vectors = np.float32([[1, 0], [0, 1]])
    rows = np.array([0, 1, 1, 0, 1, 1, 0])
    pictures = Pictures([b"%d" % k for k in range(7)], rows, np.arange(2), vectors)
    for count, order in ((1, b"1"), (3, b"124"), (5, b"12450"), (7, b"1245036"), (99, b"1245036"), (0, b"")):
        assert b"".join(path for path, _, _ in top(pictures, np.float32([0, 2]), count)) == order
    assert top(pictures._replace(paths=[]), np.float32([0, 2]), 3) == []


def test_scores_that_rounding_alone_tells_apart_are_equal() -> None:
    """Scores that differ by rounding alone are equal. Equal pixels can be in different files, and the last bits of a
    score depend on the place of its vector.
    """
    rng = np.random.default_rng(0)
    query = rng.standard_normal(64, np.float32)
    unit = query.astype(np.float64) / np.linalg.norm(query)
    roundings = [2, -1, 3, 0, -3, 1, -2]
    rows = [unit * (1 + 2.0**-24 * k) for k in roundings] + [unit * (1 + 1e-5), unit * (1 - 1e-5)]
    vectors = np.stack(rows).astype(np.float32)
    assert len(set((vectors @ query).tolist())) > 4
    pictures = Pictures([b"%d" % k for k in range(9)], np.arange(9), np.arange(9), vectors)
    for count in range(10):
        found = top(pictures, query, count)
        assert b"".join(path for path, _, _ in found) == b"701234568"[:count]
        assert len({score for _, score, _ in found}) == (count > 0) + (count > 1) + (count > 8)
        assert [content for _, _, content in found] == [int(path) for path, _, _ in found]


def many(folder: Path, count: int) -> tuple[SearchEngine, Any]:
    """Return an engine whose folder's index contains random vectors."""
    from fastclip.search.index import Seen

    (folder / "photos").mkdir()
    generator = np.random.default_rng(1)
    vectors = generator.standard_normal((count, 32), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    searched = SearchEngine(Colours(), folder / "photos", indices=folder, exact_limit=100)
    inside = os.fsencode(searched.folder)
    add = [Seen(inside + b"/%06d.png" % k, "", b"%020d" % k, vectors[k]) for k in range(count)]
    searched._index.add(add[: count // 2])
    add += [Seen(os.fsencode(folder) + b"/beside/%d.png" % k, "", b"-%d" % k, vectors[k % count]) for k in range(300)]
    searched._index.add(add[count // 2 :])
    return searched, vectors


def test_many_pictures_are_searched_through_a_graph_whose_recall_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    needs("search")
    searched, vectors = many(tmp_path, 4000)
    hits = 0
    for k in range(50):
        query = vectors[k] + 0.5 * vectors[-k]
        found = searched.find_vector(query, 10)
        scores = vectors.astype(np.float64) @ query
        best = np.argsort(-scores)[:10]
        hits += len({Path(one.path).stem for one in found} & {f"{place:06d}" for place in best})
        assert len(found) == 10 and all("/photos/" in one.path for one in found)
        assert [one.score for one in found] == pytest.approx(
            [scores[int(Path(one.path).stem)] for one in found], abs=1e-5
        )
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    (told,) = (record.message for record in caplog.records if "approximate" in record.message)
    recall = float(told.split("finds ")[1].split(" %")[0])
    assert 90 <= recall <= 100 and hits / 500 > 0.9
    assert searched._approximate is not None and len(searched._approximate) == 4300


def test_graph_is_kept_grows_and_is_made_anew_where_it_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    needs("search")
    from fastclip.search.approximate import Approximate
    from fastclip.search.index import Seen

    searched, vectors = many(tmp_path, 500)
    index = searched._index
    first = Approximate(index)
    graph, told = (next((tmp_path / "search").glob(f"*{suffix}")) for suffix in (".usearch", ".json"))
    times = graph.stat().st_mtime_ns
    assert len(Approximate(index)) == len(first) == 800 and graph.stat().st_mtime_ns == times
    index.add([Seen(b"/new.png", "", b"new", -vectors[0])])
    grown = Approximate(index)
    assert len(grown) == 801 and np.array_equal(index.vector_of(grown.nearest(-vectors[0], 1)[0]), -vectors[0])
    told.write_text(told.read_text().replace("801", "800"))
    assert len(Approximate(index)) == 801 and "rebuilt" in caplog.text
    caplog.clear()
    graph.write_bytes(graph.read_bytes()[:1000])
    assert len(Approximate(index)) == 801 and "rebuilt" in caplog.text
    for text in (200_000 * "[", "[]", '{"last": null}'):
        caplog.clear()
        told.write_text(text)
        assert len(Approximate(index)) == 801 and "rebuilt" in caplog.text
    caplog.clear()
    (other := tmp_path / "other").mkdir()  # as if the index was rebuilt, with the same contents in another order
    for file in (graph, told):
        (other / "search").mkdir(exist_ok=True)
        (other / "search" / file.name).write_bytes(file.read_bytes())
    reordered = Index(other / "search" / index.file.name)
    add = [Seen(b"/%d.png" % k, "", b"%d" % k, vectors[k % 500]) for k in range(801)]
    reordered.add(add[::-1])
    found = Approximate(reordered)
    assert "rebuilt" in caplog.text and np.array_equal(reordered.vector_of(found.nearest(vectors[3], 1)[0]), vectors[3])
    assert not list((tmp_path / "search").glob("*.tmp*"))


def test_without_usearch_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched, vectors = many(tmp_path, 200)
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    with pytest.raises(ImportError, match="usearch, which is not installed"):
        searched.find_vector(vectors[0])
    assert len(SearchEngine(Colours(), searched.folder, indices=tmp_path).find_vector(vectors[0], 3)) == 3


def test_sheet_shows_every_picture_in_order(tmp_path: Path) -> None:
    found = []
    for k, colour in enumerate(("red", "lime", "blue", "black", "yellow", "aqua", "navy")):
        Image.new("RGB", (300 - 40 * k, 200), colour).save(tmp_path / f"{k}.png")
        found.append(Match(str(tmp_path / f"{k}.png"), 1 - k / 10))
    (tmp_path / "5.png").unlink()
    sheet = contact_sheet(found)
    assert sheet.size == (5 * 240, 2 * 272)
    middles = [sheet.getpixel((240 * (k % 5) + 120, 272 * (k // 5) + 120)) for k in range(7)]
    assert middles[:5] == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 0)]
    assert middles[5:] == [(211, 211, 211), (0, 0, 128)]
    assert contact_sheet(found[:2]).width == 480


@pytest.mark.parametrize(("suffix", "tiles"), [(".jpg", 1200), (".JPEG", 1200), (".webp", 300)])
def test_sheet_has_as_many_pictures_as_its_format_can_hold(tmp_path: Path, suffix: str, tiles: int) -> None:
    assert most_tiles(suffix) == tiles
    for rows, fits in ((tiles // 5, True), (tiles // 5 + 1, False)):
        with nullcontext() if fits else pytest.raises((OSError, ValueError)):
            Image.new("RGB", (1, 272 * rows)).save(tmp_path / f"sheet{suffix}")
    assert most_tiles(".png") > 10**6


def test_picture_is_shown_as_the_terminal_can(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.new("RGB", (400, 200), (10, 20, 30))
    picture.paste((200, 100, 50), (0, 0, 400, 100))
    lines = terminal_picture(picture, protocol="", columns=20).splitlines()
    assert len(lines) == 5 and all(line.count("\u2580") == 20 for line in lines)
    assert "38;2;200;100;50m" in lines[0] and "48;2;10;20;30m" in lines[-1]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    iterm = terminal_picture(noise, protocol="iterm", columns=80)
    assert iterm.startswith("\x1b]1337;File=inline=1;") and iterm.endswith("\a\n")
    kitty = terminal_picture(noise, protocol="kitty", columns=80)
    parts = [part.removeprefix("\x1b_G").split(";", 1) for part in kitty.strip().split("\x1b\\")[:-1]]
    assert [keys[-1] for keys, _ in parts] == ["1"] * (len(parts) - 1) + ["0"] and len(parts) > 2
    for data in (iterm.split(":")[1].rstrip("\a\n"), "".join(data for _, data in parts)):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), np.asarray(noise))
    names = ("TERM", "TERM_PROGRAM", "KITTY_WINDOW_ID", "KONSOLE_VERSION")
    for values, protocol in (
        (("xterm-kitty", "", "", ""), "kitty"),
        (("xterm", "", "1", ""), "kitty"),
        (("xterm", "iTerm.app", "", ""), "iterm"),
        (("xterm", "", "", "220401"), "iterm"),
        (("tmux-256color", "iTerm.app", "", ""), ""),
        (("xterm-256color", "", "", ""), ""),
    ):
        for name, value in zip(names, values):
            monkeypatch.setenv(name, value)
        assert env.terminal_protocol() == protocol


def test_sheet_and_preview_of_the_command(
    checkpoint: Path,
    photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = (photos[0].parent, "--checkpoint", checkpoint, "--device", "cpu", "-t", 3)
    status, lines, _ = run(capsys, "cat", *common, "--sheet", tmp_path / "sheet.png")
    assert status == 0 and len(lines) == 3 and Image.open(tmp_path / "sheet.png").size == (720, 272)
    status, lines, told = run(capsys, "cat", *common, "--preview")
    assert status == 1 and not lines and "--preview needs a terminal" in told
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "tmux")
    status, lines, told = run(capsys, "cat", *common, "--preview", "-n")
    assert status == 0 and len(lines) == 3 and told.count("\u2580") > 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("cat", "nowhere"), "there is no folder nowhere"),
        (("./gone.jpg", "."), "there is no image ./gone.jpg"),
        (("cat", ".", "-t", "0"), "--top must be positive"),
        (("cat", ".", "-b", "0"), "batch_size and workers must be positive"),
        (("cat", ".", "--checkpoint", "nowhere"), "there is no checkpoint nowhere"),
    ],
)
def test_mistake_is_one_line_on_stderr(
    checkpoint: Path,
    tmp_path: Path,
    words: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, lines, told = run(capsys, "--checkpoint", checkpoint, "--device", "cpu", *words)
    assert status == 1 and not lines
    assert told.splitlines()[-1].startswith("fastclip search: ") and message in told


def test_nothing_found_prints_nothing(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines, told = run(capsys, "cat", tmp_path, "--checkpoint", checkpoint, "--device", "cpu")
    assert status == 0 and not lines and "no images" in told
    assert run(capsys, "cat", tmp_path, "--checkpoint", checkpoint, "--device", "cpu", "--json")[1] == ["[]"]


def test_interrupted_command_says_what_is_kept(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engines, "update_index", stop)
    status, lines, told = run(capsys, "cat", tmp_path, "--checkpoint", checkpoint, "--device", "cpu")
    assert status == 130 and not lines and "images that are already indexed are kept" in told


def test_query_that_is_a_large_picture_is_refused_from_its_header(tmp_path: Path) -> None:
    Image.new("L", (20_000, 10_000)).save(tmp_path / "huge.png", compress_level=1)
    searched = SearchEngine(Colours(), tmp_path, indices=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"huge\.png: the image is too large"):
        searched.find([Term(1.0, path=tmp_path / "huge.png")])
    with pytest.raises(ValueError, match=r"gone\.png: No such file"):
        searched.find([Term(1.0, path=tmp_path / "gone.png")])


@pytest.mark.skipif(find_spec("pillow_heif") is None, reason="pillow-heif, which reads HEIC, is not installed")
def test_heic_is_indexed(tmp_path: Path) -> None:
    import pillow_heif

    folder = tmp_path / "photos"
    draw(folder / "a.png", 1)
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), "red")).save(folder / "b.HEIC")
    searched = SearchEngine(Colours(), folder, indices=tmp_path / "cache")
    done = searched.update()
    assert (done.files, done.embedded, done.skipped) == (2, 2, [])
    Image.new("RGB", (64, 48), "red").save(folder / "c.png")
    assert Path(searched.find([Term(1.0, path=folder / "c.png")])[0].path).name == "b.HEIC"
