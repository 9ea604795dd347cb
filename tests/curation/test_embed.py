"""`fastclip embed` writes clip-retrieval's layout, in which row i of every file belongs to the same sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import needs

needs("search")
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from fastclip import cli
from fastclip.curation.embed import embed_source
from fastclip.data.picture import pixels_limited
from fastclip.data.source import Source
from fastclip.data.sources.subset import Subset
from fastclip.data.spec import open_source
from fastclip.embedding import pairs
from fastclip.models.embedder import Embedder
from support.faulty import HTML, write_folder
from support.pictures import FILES, real_pictures


@pytest.fixture(scope="module")
def digits() -> Source:
    return Subset(open_source("digits", held_out=True), range(55))


def read(folder: Path, name: str) -> tuple[Any, Any, list[dict[str, str]]]:
    """Return the vectors of images and texts, and the rows of the table."""
    vectors = [np.load(folder / f"{kind}_emb" / f"{kind}_emb_{name}.npy") for kind in ("img", "text")]
    return *vectors, pq.read_table(folder / "metadata" / f"metadata_{name}.parquet").to_pylist()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_are_the_vectors_of_every_sample(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Source, dtype: str
) -> None:
    monkeypatch.setattr(pairs, "PART", 16)
    done = embed_source(embedder, digits, tmp_path, dtype=dtype, samples_per_file=20, batch_size=8)
    assert done[:2] == (3, 55) and done.faults.total == done.kept == 0
    assert not (tmp_path / ".parts").exists()
    row = 0
    for name, size in (("0", 20), ("1", 20), ("2", 15)):
        images, texts, table = read(tmp_path, name)
        assert images.shape == texts.shape == (size, embedder.dim) and len(table) == size
        assert images.dtype == texts.dtype == np.dtype(dtype)
        for image, text, about in zip(images, texts, table):
            record = digits[row]
            assert about == {"image_path": record.key, "caption": record.captions[0]}  # the first caption
            expected = embedder.embed_images(embedder.transform(record.image)[None])[0].numpy()
            near = {"atol": 1e-6 if dtype == "float32" else 3e-4, "rtol": 0}
            np.testing.assert_allclose(image.astype(np.float32), expected, **near)
            np.testing.assert_allclose(text, embedder.embed_texts(record.captions[:1])[0].numpy(), **near)
            row += 1


def test_file_numbers_have_clip_retrievals_zeros(embedder: Embedder, digits: Source, tmp_path: Path) -> None:
    for size, first, last in ((5, "00", "10"), (6, "00", "09"), (7, "0", "7")):  # int(log10(count)) + 1 digits
        output = tmp_path / f"{size}"
        embed_source(embedder, digits, output, samples_per_file=size, batch_size=64)
        names = sorted(path.name for path in (output / "metadata").iterdir())
        assert (names[0], names[-1]) == (f"metadata_{first}.parquet", f"metadata_{last}.parquet")


def test_samples_that_cannot_be_used_are_in_none_of_the_files(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "PART", 4)
    source = open_source(str(real_pictures(tmp_path / "data")))
    done = embed_source(embedder, source, tmp_path / "out", batch_size=2, workers=1)
    assert (done.files, done.samples, done.faults.total) == (1, 5, 4)
    assert done.faults.keys["truncated image"] == [str(tmp_path / "data" / "cut.png")]
    images, texts, table = read(tmp_path / "out", "0")
    assert len(images) == len(texts) == 5
    assert {Path(row["image_path"]).name: row["caption"] for row in table} == {k: v[2] for k, v in FILES.items()}
    assert embed_source(embedder, source, tmp_path / "out", batch_size=2)[:2] == (1, 5)


def test_file_of_which_nothing_can_be_used_is_not_written(embedder: Embedder, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", 2, [(HTML, b"x")] * 2)
    done = embed_source(embedder, open_source(str(folder)), tmp_path / "out", samples_per_file=2)
    assert (done.files, done.samples, done.faults.counts) == (1, 2, {"not an image": 2})
    assert [path.name for path in (tmp_path / "out" / "img_emb").iterdir()] == ["img_emb_0.npy"]
    bad = open_source(str(write_folder(tmp_path / "bad", 0, [(HTML, b"x")] * 2)))
    with pytest.raises(ValueError, match=r"none of 2 samples can be used: 2 not an image"):
        embed_source(embedder, bad, tmp_path / "none")


def test_vectors_that_are_not_finite_are_left_out(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(write_folder(tmp_path / "data", 6, [(HTML, b"x")])))
    images, texts = embedder.embed_images, embedder.embed_texts

    def broken(inputs: torch.Tensor) -> torch.Tensor:
        return images(inputs).index_fill(0, torch.tensor([1]), torch.nan)  # the second of each batch

    def overflowing(inputs: list[str], **options: Any) -> torch.Tensor:
        return torch.where(torch.tensor([text == "caption 5" for text in inputs])[:, None], torch.inf, texts(inputs))

    monkeypatch.setattr(embedder, "embed_images", broken)
    monkeypatch.setattr(embedder, "embed_texts", overflowing)
    done = embed_source(embedder, source, tmp_path / "out", batch_size=3)
    assert (done.samples, done.faults.counts) == (3, {"vector is not finite": 3, "not an image": 1})
    assert done.faults.keys["vector is not finite"] == [source.key(k) for k in (1, 4, 5)]
    found = read(tmp_path / "out", "0")
    assert [row["caption"] for row in found[2]] == ["caption 0", "caption 2", "caption 3"]
    assert np.isfinite(found[0]).all() and np.isfinite(found[1]).all() and len(found[0]) == len(found[1]) == 3


def test_embedding_reader_reads_the_folder(embedder: Embedder, digits: Source, tmp_path: Path) -> None:
    needs("embedding_reader")
    import embedding_reader as reader

    embed_source(embedder, digits, tmp_path, samples_per_file=20)
    columns = {"metadata_folder": str(tmp_path / "metadata"), "meta_columns": ["image_path", "caption"]}
    found = reader.EmbeddingReader(embeddings_folder=str(tmp_path / "img_emb"), file_format="parquet_npy", **columns)
    assert (found.count, found.dimension) == (55, embedder.dim)
    ((vectors, table),) = found(batch_size=55, start=0, end=55)
    assert table["image_path"].tolist() == [digits.key(k) for k in range(55)]
    np.testing.assert_array_equal(vectors, np.concatenate([read(tmp_path, name)[0] for name in "012"]))


def test_embed_touches_no_other_call(embedder: Embedder, digits: Source, tmp_path: Path) -> None:
    embed_source(embedder, digits, tmp_path / "a", samples_per_file=30)
    with pytest.raises(ValueError, match=r"belongs to another call: dtype was float16, is now float32; choose another"):
        embed_source(embedder, digits, tmp_path / "a", samples_per_file=30, dtype="float32")
    (tmp_path / "a" / "options.json").unlink()
    with pytest.raises(ValueError, match=r"_emb_\d\.npy was not written by this command"):
        embed_source(embedder, digits, tmp_path / "a")
    for options in ({"dtype": "int8"}, {"samples_per_file": 0}):
        with pytest.raises(ValueError, match=r"dtype must be float16 or float32 and samples_per_file at least 1"):
            embed_source(embedder, digits, tmp_path / "b", **options)


def test_changed_captions_and_pictures_are_embedded_again(
    embedder: Embedder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, names = real_pictures(tmp_path / "data"), ("hopper.jpg", "flower.jpg", "logo.png")

    def embedded(text: str) -> Any:
        (data / "t.csv").write_text("\n".join(["filepath,title", *(f"{data}/{name},{text}" for name in names)]) + "\n")
        source = open_source(str(data / "t.csv"))
        done = embed_source(embedder, source, tmp_path / "out", samples_per_file=2, dtype="float32")
        rows = [read(tmp_path / "out", name) for name in "01"]
        for number, (images, texts, table) in enumerate(rows):
            for row, record in enumerate(source[k] for k in range(2 * number, min(3, 2 * number + 2))):
                image = embedder.embed_images(embedder.transform(record.image)[None])[0]
                np.testing.assert_allclose(images[row], image, atol=1e-6)
                np.testing.assert_allclose(texts[row], embedder.embed_texts([text])[0], atol=1e-6)
                assert table[row] == {"image_path": record.key, "caption": text}
        return done.kept

    assert embedded("a picture") == 0 and embedded("a picture") == 2
    assert embedded("an image") == 0 and "2 files written again, because images, captions" in caplog.text
    (data / "logo.png").write_bytes((data / "china.jpg").read_bytes())  # an image of the second file
    assert embedded("an image") == 1 and "1 file written again" in caplog.text
    (data / "logo.png").unlink()
    (data / "logo.png").symlink_to(data / "cards.png")
    assert embedded("an image") == 1 and embedded("an image") == 2


@pytest.mark.fault(
    "An image was too large, and the command runs again with a larger `--max-pixels`", "The image is embedded"
)
def test_largest_picture_is_part_of_the_call(embedder: Embedder, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", 3)
    Image.new("RGB", (500, 500)).save(data / "001.png")
    source = open_source(str(data))
    for limit, samples in ((200_000, 2), (250_000, 3), (200_000, 2), (None, 3)):
        with pixels_limited(limit):
            assert embed_source(embedder, source, tmp_path / "out").samples == samples


def test_file_of_which_nothing_is_left_is_removed(embedder: Embedder, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", 3)
    source = open_source(str(folder))
    assert embed_source(embedder, source, tmp_path / "out", samples_per_file=2).samples == 3
    Path(source.key(2)).write_bytes(HTML)
    assert embed_source(embedder, source, tmp_path / "out", samples_per_file=2)[:2] == (1, 2)
    assert [path.name for path in sorted((tmp_path / "out").glob("*/*"))] == [
        *("img_emb_0.npy", "metadata_0.parquet", "text_emb_0.npy")
    ]


def test_same_name_in_another_folder_is_another_call(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        write_folder(tmp_path / name / "data", 2)
        monkeypatch.chdir(tmp_path / name)
        if name == "a":
            embed_source(embedder, open_source("data"), tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"another call: source was .*/a/data, is now .*/b/data; choose another folder"
    ):
        embed_source(embedder, open_source("data"), tmp_path / "out")


def test_every_part_of_a_mixture_has_its_place(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_folder(tmp_path / "first", 1)
    for name in "ab":
        write_folder(tmp_path / name / "data", 2)
        monkeypatch.chdir(tmp_path / name)
        if name == "a":
            embed_source(embedder, open_source(f"{first}::2*data"), tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"another call: source was .*2\*\S+/a/data, is now .*2\*\S+/b/data; choose another"
    ):
        embed_source(embedder, open_source(f"{first}::2*data"), tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert embed_source(embedder, open_source("./first/::2*a/data"), tmp_path / "out").kept == 1


@pytest.mark.fault(
    "A file of vectors was removed from the output of `fastclip embed`", "The same command writes it again"
)
def test_vectors_that_were_removed_are_written_again(embedder: Embedder, digits: Source, tmp_path: Path) -> None:
    part = Subset(digits, range(8))
    assert embed_source(embedder, part, tmp_path, batch_size=8).kept == 0
    file = tmp_path / "img_emb" / "img_emb_0.npy"
    whole = file.read_bytes()
    file.unlink()
    assert embed_source(embedder, part, tmp_path, batch_size=8).kept == 0 and file.read_bytes() == whole
    assert embed_source(embedder, part, tmp_path, batch_size=8).kept == 1


def test_table_that_is_none_of_ours_is_named(embedder: Embedder, tmp_path: Path) -> None:
    source = open_source(str(write_folder(tmp_path / "data", 2)))
    embed_source(embedder, source, tmp_path / "out")
    table = tmp_path / "out" / "metadata" / "metadata_0.parquet"
    pq.write_table(pa.table({"image_path": ["a"]}), tmp_path / "other")
    for data in (b"PAR1 and no more", b"", (tmp_path / "other").read_bytes()):
        table.write_bytes(data)
        with pytest.raises(ValueError, match=r"metadata_0\.parquet was not written by this command"):
            embed_source(embedder, source, tmp_path / "out")


def test_command_embeds_and_goes_on(embedder: Embedder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embedder.model.save_pretrained(tmp_path / "model")
    real_pictures(tmp_path / "data")
    words = ["embed", str(tmp_path / "data"), "--checkpoint", str(tmp_path / "model"), "--device", "cpu"]
    words += ["--workers", "0", "--output", str(tmp_path / "out"), "--samples-per-file", "5"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"wrote {tmp_path}/out: 5 samples in 2 files\nskipped: 1 ") and "1 truncated image (" in out
    assert cli.main(words) == 0 and "5 samples in 2 files, 2 of which already existed" in capsys.readouterr().out
    assert cli.main([*words, "--dtype", "float32"]) == 1
    assert "fastclip embed: " in capsys.readouterr().err


def test_pictures_without_captions_are_embedded_alone(
    embedder: Embedder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedder.model.save_pretrained(tmp_path / "model")
    data = write_folder(tmp_path / "data", 3, [(HTML, b"x")])
    for text in data.glob("*.txt"):
        text.unlink()
    words = ["embed", str(data), "--checkpoint", str(tmp_path / "model"), "--device", "cpu", "--workers", "0"]
    for _ in range(2):
        assert cli.main([*words, "--output", str(tmp_path / "out")]) == 0
        said = capsys.readouterr()
        assert "3 samples in 1 file" in said.out and "no image has a caption, so only images" in said.err
    assert "1 of which already existed" in said.out and "1 not an image" in said.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["img_emb", "metadata", "options.json"]
    images = np.load(tmp_path / "out" / "img_emb" / "img_emb_0.npy")
    table = pq.read_table(tmp_path / "out" / "metadata" / "metadata_0.parquet").to_pylist()
    assert images.shape == (3, embedder.dim) and [row.keys() for row in table] == [{"image_path"}] * 3
