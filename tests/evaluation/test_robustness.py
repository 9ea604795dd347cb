"""ImageNet and its variants with one zero-shot head."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support import needs

needs("train")
import torch
import torch.nn.functional as F
from PIL import Image

from fastclip.cli import main
from fastclip.data.classes import imagenet
from fastclip.data.spec import open_source
from fastclip.evaluation import robustness
from fastclip.evaluation.published import ZERO_SHOT
from fastclip.models import create_model
from fastclip.models.embedder import Embedder
from fastclip.models.tokenizers.clip import ClipTokenizer

TEMPLATES = ("a {}", "many {}")


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    torch.manual_seed(0)
    return Embedder(create_model("ViT-tiny"), ClipTokenizer(), name="tiny")


def indices(name: str) -> list[int]:
    import timm

    text = (Path(timm.__file__).parent / "data" / "_info" / f"{name}_indices.txt").read_text()
    return [int(number) for number in text.split()]


@pytest.fixture(scope="module")
def class_rows(embedder: Embedder) -> torch.Tensor:
    """Embeddings (1000, D) of all of ImageNet's classes, computed from the formula alone."""
    import open_clip

    texts = [template.format(name) for name in open_clip.IMAGENET_CLASSNAMES for template in TEMPLATES]
    features = F.normalize(embedder.embed_texts(texts), dim=1).view(1000, len(TEMPLATES), -1)
    return F.normalize(features.sum(1), dim=1)


AMONG = {"imagenet-r": indices("imagenet_r"), "imagenet-a": indices("imagenet_a")}


def among(name: str) -> list[int]:
    return AMONG.get(name, list(range(1000)))


@pytest.fixture(scope="module")
def sets(embedder: Embedder, class_rows: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of real images for every dataset. The model assigns a third of them to their
    labels and a third to near ones.
    """
    root, source = tmp_path_factory.mktemp("sets"), open_source("digits")
    found = {}
    for number, name in enumerate(robustness.SETS):
        for i in range(24):
            picture = source[24 * number + i].image
            image = embedder.embed_images(embedder.transform(picture)[None])[0]
            order = (class_rows[among(name)] @ image).argsort(descending=True).tolist()
            label = among(name)[order[(0, 3, 100)[i % 3]]]
            folder = root / name / (str(label) if name == "imagenetv2" else imagenet.wordnet_ids()[label])
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{i}.png")
        found[name] = str(root / name)
    return found


def by_loops(embedder: Embedder, folder: str, classes: list[int], rows: torch.Tensor) -> tuple[float, float]:
    """Compute top-1 and top-5 among the given ImageNet classes from files and formula alone."""
    hits: list[list[bool]] = []
    for path in sorted(Path(folder).rglob("*.png")):
        name = path.parent.name
        label = int(name) if name.isdecimal() else imagenet.wordnet_ids().index(name)
        image = embedder.embed_images(embedder.transform(Image.open(path))[None])[0]
        best = [classes[k] for k in (rows[classes] @ image).topk(5).indices.tolist()]
        hits.append([best[0] == label, label in best])
    one, five = zip(*hits)
    return sum(one) / len(one), sum(five) / len(five)


def test_every_set_is_classified_among_its_own_classes(
    embedder: Embedder, sets: dict[str, str], class_rows: torch.Tensor
) -> None:
    results = robustness.robustness(embedder, sets, templates=TEMPLATES, pretrained="nothing")
    assert [one["dataset"] for one in results] == list(sets)
    for one in results:
        classes = among(one["dataset"])
        assert one["classes"] == len(classes) and one["images"] == 24 and one["pretrained"] == "nothing"
        acc1, acc5 = by_loops(embedder, sets[one["dataset"]], classes, class_rows)
        assert (one["metrics"]["acc1"], one["metrics"]["acc5"]) == pytest.approx((acc1, acc5))
        assert 0.3 < acc1 < acc5 < 0.7


def test_class_texts_are_embedded_once(
    embedder: Embedder, sets: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = Embedder.embed_texts

    def counted(self: Embedder, texts: list[str], **options: int) -> torch.Tensor:
        seen.extend(texts)
        return real(self, texts, **options)

    monkeypatch.setattr(Embedder, "embed_texts", counted)
    robustness.robustness(embedder, sets, templates=TEMPLATES)
    assert len(seen) == len(set(seen)) == 2 * len(set(imagenet.class_names("imagenet")))


def test_published_results_are_the_papers() -> None:
    """Published results are the top-1 of ImageNet, -R, -A and -V2 in the tables of the three papers."""
    sets = ("imagenet1k", "imagenet-r", "imagenet-a", "imagenetv2")
    assert [ZERO_SHOT["CLIP"].get(name) for name in sets] == [76.2, 88.9, 77.2, 70.1]
    assert [ZERO_SHOT["ALIGN"].get(name) for name in sets] == [76.4, 92.2, 75.8, 70.1]
    assert [ZERO_SHOT["Florence"].get(name) for name in sets] == [83.7, None, None, None]
    assert all(known.keys() <= robustness.SETS.keys() for known in ZERO_SHOT.values())


def test_means_are_over_the_same_sets_for_all() -> None:
    found = {"imagenet1k": 60.0, "imagenetv2": 50.0, "imagenet-r": 70.0, "imagenet_sketch": 10.0}
    sets = robustness.compared_sets(found)
    assert sets == ["imagenetv2", "imagenet-r"]  # no paper has results for -Sketch
    assert robustness.mean_drop(found, sets) == 0.0
    assert robustness.mean_drop(ZERO_SHOT["CLIP"], sets) == pytest.approx(76.2 - (70.1 + 88.9) / 2)
    assert robustness.mean_drop(ZERO_SHOT["Florence"], sets) is None
    points = robustness.points_of(found, sets, name="ours")
    assert points.keys() == {"CLIP (published)", "ALIGN (published)", "ours"}
    assert points["ours"] == pytest.approx((0.6, 0.6))
    assert points["ALIGN (published)"] == pytest.approx((0.764, (0.701 + 0.922) / 2))
    only = {"imagenet1k": 60.0, "imagenet_sketch": 10.0}
    assert (
        robustness.compared_sets(only) == ["imagenet_sketch"] and robustness.mean_drop(only, ["imagenet_sketch"]) == 50
    )
    assert robustness.mean_drop({"imagenet-a": 1.0}, ["imagenet-a"]) is None


@pytest.mark.parametrize("other", ["imagenet-r", "imagenet-a"])
def test_folder_of_another_set_is_refused(embedder: Embedder, other: str, tmp_path: Path) -> None:
    for label in AMONG[other]:
        (tmp_path / imagenet.wordnet_ids()[label]).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / imagenet.wordnet_ids()[label] / "0.png")
    for name in ("imagenet1k", "imagenetv2", "imagenet_sketch"):
        with pytest.raises(
            ValueError, match=f"classes are those of {robustness.SETS[other].title}, but the folder is given as"
        ):
            robustness.robustness(embedder, {other: str(tmp_path), name: str(tmp_path)}, templates=TEMPLATES)
    (found,) = robustness.robustness(embedder, {other: str(tmp_path)}, templates=TEMPLATES)
    shutil.rmtree(tmp_path / imagenet.wordnet_ids()[AMONG[other][0]])  # ImageNet may have missing classes
    (part,) = robustness.robustness(embedder, {"imagenet1k": str(tmp_path)}, templates=TEMPLATES)
    assert (found["classes"], found["images"], part["classes"], part["images"]) == (200, 200, 1000, 199)


@pytest.mark.parametrize("found", [{"imagenet1k": 0.0, "imagenet-a": 100.0}, {"imagenet1k": 76.2, "imagenetv2": 70.1}])
def test_plot_draws_any_accuracy(found: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    real = Figure.savefig

    def kept(self: Figure, *args: Any, **options: Any) -> None:
        drawn.append(self)
        real(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    file = tmp_path / "new" / "plot.png"
    robustness.plot(file, found, name="ours")
    assert Image.open(file).size[0] > 600
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == axes.get_yscale() == "logit" and axes.get_xlim() == axes.get_ylim()
    lines = {line.get_label().split(":")[0]: line.get_xydata() for line in axes.get_lines()}
    assert (lines["no drop"][:, 0] == lines["no drop"][:, 1]).all()
    expected = robustness.points_of(found, robustness.compared_sets(found), name="ours")
    drawn_at = {name: tuple(line[0]) for name, line in lines.items() if name != "no drop"}
    for name, place in drawn_at.items():
        assert place == pytest.approx([min(max(value, 0.001), 0.999) for value in expected[name]])
    assert drawn_at.keys() == expected.keys()
    low, high = axes.get_xlim()
    assert all(low <= value <= high for point in drawn_at.values() for value in point)
    told = [line.get_label() for line in axes.get_lines()]
    assert f"ours: {found['imagenet1k']:.1f}, {100 * expected['ours'][1]:.1f}" in told


def test_plot_needs_imagenet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs ImageNet"):
        robustness.plot(tmp_path / "plot.png", {"imagenet-a": 3.0}, name="ours")
    assert not list(tmp_path.iterdir())


def command(embedder: Embedder, folder: Path, *words: object) -> int:
    embedder.model.save_pretrained(folder / "model")
    (folder / "templates.txt").write_text("\n".join(TEMPLATES))
    options = [
        "--checkpoint",
        folder / "model",
        "--device",
        "cpu",
        "--workers",
        0,
        "--templates",
        folder / "templates.txt",
    ]
    return main(["eval", "robustness", *map(str, (*options, *words))])


def test_command_tells_and_writes_all(
    embedder: Embedder,
    sets: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FASTCLIP_CACHE", str(tmp_path / "cache"))
    words = ["--imagenet", sets["imagenet1k"], "--imagenet-v2", sets["imagenetv2"], "--imagenet-r", sets["imagenet-r"]]
    words += ["--imagenet-a", sets["imagenet-a"], "--imagenet-sketch", sets["imagenet_sketch"]]
    output, plot = tmp_path / "r.json", tmp_path / "plot.png"
    assert command(embedder, tmp_path, *words, "--output", output, "--plot", plot) == 0
    results = json.loads(output.read_text())
    assert results == [
        {**one, "model": str(tmp_path / "model"), "pretrained": str(tmp_path / "model")}
        for one in robustness.robustness(embedder, sets, templates=TEMPLATES)
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["classes", "images", "acc1", "acc5", "CLIP", "ALIGN", "Florence"]
    assert lines[1].split()[-3:] == ["76.2", "76.4", "83.7"] and lines[1].startswith("ImageNet ")
    assert lines[5].split()[0] == "ImageNet-Sketch" and lines[5].split()[-3:] == ["-", "-", "-"]
    own = 100 * (results[0]["metrics"]["acc1"] - sum(one["metrics"]["acc1"] for one in results[1:4]) / 3)
    assert lines[6].split() == ["mean", "drop", "-", "-", f"{own:.1f}", "-", "-2.5", "-3.0", "-"]
    assert plot.read_bytes().startswith(b"\x89PNG") and not list((tmp_path / "cache" / "features").iterdir())


def test_command_says_what_can_be_mended(
    embedder: Embedder, sets: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        ([], "no dataset to evaluate: give at least one of --imagenet, --imagenet-v2"),
        (["--imagenet-a", sets["imagenet-a"], "--plot", tmp_path / "p.png"], "--plot needs --imagenet"),
        (["--imagenet-a", sets["imagenet-r"]], "folders are not classes of imagenet-a"),
        (["--imagenet", tmp_path / "none"], "none"),
    ):
        capsys.readouterr()
        assert command(embedder, tmp_path, *words) == 1
        said = capsys.readouterr()
        assert message in said.err and not said.out
