"""Folders of classes, and ImageNet's classes, compared with torchvision, timm and open_clip."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from support import needs
from support.faulty import picture, write_tar

needs("models")
from PIL import Image

from fastclip.data.classes import imagenet
from fastclip.data.classes.names import join_names
from fastclip.data.faults import BadSample
from fastclip.data.sources.classes import ClassFolder
from fastclip.data.spec import open_labelled, open_pictures, open_source

WORDNET_IDS = ("n01440764", "n01443537", "n01484850", "n01491361")  # the first of ImageNet


def folders(root: Path, names: Iterable[str], each: int = 1) -> str:
    for name in names:
        (root / name).mkdir(parents=True)
        for k in range(each):
            Image.new("RGB", (4, 4)).save(root / name / f"{k}.png")
    return str(root)


def labels(source: ClassFolder) -> list[int | None]:
    return [source[i].label for i in range(len(source))]


def test_folder_is_torchvisions(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    root = folders(tmp_path, ("red_fox", "Zebra", "ant", "red_fox/deep", "ant/b"), each=2)
    Image.new("RGB", (4, 4)).save(tmp_path / "ant" / "X.JPEG", "jpeg")
    (tmp_path / "ant" / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "Zebra")
    ours, theirs = ClassFolder(root), ImageFolder(str(tmp_path), allow_empty=True)
    classes = [name for name in theirs.classes if name != ".hidden"]
    assert ours.class_names == tuple(name.replace("_", " ") for name in classes)
    found = {ours.key(i): ours.class_names[ours[i].label or 0] for i in range(len(ours))}
    assert found == {path: theirs.classes[label].replace("_", " ") for path, label in theirs.samples}
    assert ours.captions(len(ours) - 1) == ("a photo of a red fox",) and len(ours) == 13
    assert ours.picture_bytes(0) == Path(ours.key(0)).read_bytes()


def test_folder_of_classes_is_data_wherever_data_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folders(tmp_path / "a", ("red_fox", "zebra"), each=2)
    source = open_source(root)
    assert source.class_names == ("red fox", "zebra") and len(source) == 4
    assert source.captions(3) == ("a photo of a zebra",) and source[3].label == 1
    assert "no image has a caption, so the 2 folders are read as classes (red fox, zebra, ...)" in caplog.text
    (tmp_path / "a" / "zebra" / "0.txt").write_text("one has a caption")
    assert open_source(root).class_names == ()
    for name in ("loose", "single"):
        folders(tmp_path / name, ("cat",))
    Image.new("RGB", (4, 4)).save(tmp_path / "loose" / "x.png")
    with pytest.raises(
        ValueError, match=r"none of 2 images has a caption; the first is .*x\.png: x\.txt or .* in the same folder$"
    ):
        open_source(str(tmp_path / "loose"))
    with pytest.raises(
        ValueError,
        match=r"none of 1 images has a caption.*read as a folder of classes either: .* only one class, cat",
    ):
        open_source(str(tmp_path / "single"))


@pytest.mark.fault("A folder contains links to folders of classes", "The links are followed")
def test_linked_folders_of_classes_are_data_wherever_data_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders(tmp_path / "real", ("cat", "dog", "owl"), each=5)
    (tmp_path / "part" / "owl").mkdir(parents=True)
    for name in ("links/cat", "links/dog", "part/dog"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "real" / Path(name).name)
    Image.new("RGB", (4, 4)).save(tmp_path / "part" / "owl" / "0.png")
    for name, names, count in (("links", ("cat", "dog"), 10), ("part", ("dog", "owl"), 6)):
        root = str(tmp_path / name)
        for source in (open_source(root), open_labelled(root)):
            assert (len(source), source.class_names) == (count, names)
    assert caplog.messages == [
        f"{tmp_path}/{name}: no image has a caption, so the 2 folders are read as classes ({names}, ...)"
        for name, names in (("links", "cat, dog"), ("part", "dog, owl"))
    ]
    assert len(open_pictures(str(tmp_path / "links"))) == 10


def test_links_that_are_passed_over_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folders(tmp_path / "a", ("cat",))
    (tmp_path / "a" / "more").symlink_to(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "x.png")
    message = f"{root}: 1 links to folders are not followed; the first is {root}/more"
    with pytest.raises(ValueError, match="none of 2 images has a caption"):
        open_source(root)
    assert caplog.messages == [message]
    open_pictures(root)
    (tmp_path / "a" / "x.txt").write_text("a cat")
    open_source(root)
    assert caplog.messages == [message] * 3


def test_imagenet_is_timms_and_open_clips() -> None:
    import open_clip
    from timm.data import ImageNetInfo

    assert imagenet.wordnet_ids() == tuple(ImageNetInfo().label_names())
    names = imagenet.class_names("imagenet")
    assert names == tuple(open_clip.IMAGENET_CLASSNAMES)
    # A few of the 200 classes, from the lists of the datasets' authors
    assert imagenet.class_names("imagenet-r")[:3] == ("goldfish", "great white shark", "hammerhead shark")
    assert imagenet.class_names("imagenet-a")[:3] == ("stingray", "goldfinch", "junco")
    for name in ("imagenet-r", "imagenet-a"):
        places = imagenet.folder_places(name)
        assert sorted(places.values()) == list(range(200))
        for wordnet_id, place in places.items():
            assert names[imagenet.wordnet_ids().index(wordnet_id)] == imagenet.class_names(name)[place]


def test_imagenet_is_read_without_its_packages() -> None:
    code = "import sys; from fastclip.data.classes import imagenet; imagenet.class_names('imagenet-a')\n"
    code += (
        "sys.exit(str({'timm', 'open_clip'} & sys.modules.keys()) if {'timm', 'open_clip'} & sys.modules.keys() else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_imagenet_without_timm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastclip.system.installed.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install timm"):
        imagenet.folder_places("imagenet-a")


def test_wordnet_ids_get_clips_names_in_order(tmp_path: Path) -> None:
    source = ClassFolder(folders(tmp_path, reversed(WORDNET_IDS)))
    assert source.class_names == ("tench", "goldfish", "great white shark", "tiger shark")
    assert labels(source) == [0, 1, 2, 3]
    assert Path(source.key(1)).parent.name == "n01443537"


def test_numbers_are_classes_by_number(tmp_path: Path) -> None:
    """Folders named by numbers are classes in numerical order, as in ImageNet-V2. Sorted as text
    they would be 0, 1, 10, 100 ...
    """
    source = ClassFolder(folders(tmp_path, map(str, range(1000))))
    assert source.class_names == imagenet.class_names("imagenet")
    for i in range(len(source)):
        assert source[i].label == int(Path(source.key(i)).parent.name)


def test_some_numbers_are_classes_by_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folders(tmp_path, ("2", "10", "1"))
    assert ClassFolder(root).class_names == ("1", "2", "10")
    with caplog.at_level(logging.WARNING):
        source = ClassFolder(root, classes="imagenet")
    assert labels(source) == [1, 2, 10] and len(source.class_names) == 1000
    assert "997 of 1000 classes of imagenet have no folder" in caplog.text


@pytest.mark.parametrize("name", ["imagenet-r", "imagenet-a"])
def test_subsets_have_their_200_classes(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    places = imagenet.folder_places(name)
    some = [wordnet_id for wordnet_id, place in places.items() if place % 40 == 7]
    root = folders(tmp_path, some)
    with caplog.at_level(logging.WARNING):
        source = ClassFolder(root, classes=name)
    assert len(source.class_names) == 200 and labels(source) == [7, 47, 87, 127, 167]
    assert f"195 of 200 classes of {name} have no folder" in caplog.text
    assert len(ClassFolder(root).class_names) == 5  # the folders alone do not determine the dataset
    folders(tmp_path, ("n01440764",))  # tench is in neither subset
    with pytest.raises(ValueError, match=f"1 of 6 folders are not classes of {name}: n01440764"):
        ClassFolder(root, classes=name)


def named(tmp_path: Path, spec: str, lines: str) -> list[str]:
    """Return the name that a file with these lines gives to each class of the data, in the order of the classes."""
    file = tmp_path / "names.txt"
    file.write_text(lines, encoding="utf-8")
    source = open_labelled(spec, classes=str(file))
    if isinstance(source, ClassFolder):
        return [source.class_names[label] for label in labels(source) if label is not None]
    return list(source.class_names)


def test_class_names_of_a_file_go_by_name(tmp_path: Path) -> None:
    root = folders(tmp_path / "set", ("ant", "Red_fox", "b-52", "é"))  # sorted: Red_fox, ant, b-52, é
    for lines in ("ant\nb-52 \nred fox\ne\u0301\n\n", "e\u0301\nred  Fox\nant\nB 52\n"):
        found = [" ".join(name.lower().replace("-", " ").split()) for name in named(tmp_path, root, lines)]
        assert found == ["red fox", "ant", "b 52", "e\u0301"]
    assert named(tmp_path, root, "ant\tan insect\nRed_fox\ta fox\né\tan accent\nb-52\ta plane\n") == [
        *("a fox", "an insect", "a plane", "an accent")
    ]
    with pytest.raises(ValueError, match=r"has 2 names, but .*set has 4 classes"):
        named(tmp_path, root, "ant\nred fox\n")
    with pytest.raises(ValueError, match="line 2: the class name is empty"):
        named(tmp_path, root, "ant\n\nred fox\n")
    with pytest.raises(
        ValueError, match=r"without a name: Red_fox\. Names without a class: wolf\. To match them, write"
    ):
        named(tmp_path, root, "ant\nwolf\nb-52\né\n")
    with pytest.raises(ValueError, match=r"all lines or none must have the form CLASS<TAB>NAME, with a class of "):
        named(tmp_path, root, "ant\nRed_fox\ta fox\nb-52\né\n")


def test_class_names_of_classes_that_have_names(tmp_path: Path) -> None:
    own = open_labelled("digits").class_names
    assert named(tmp_path, "digits", "\n".join(reversed(own)).upper()) == [name.upper() for name in own]
    with pytest.raises(ValueError, match=r"name the classes of digits\. Classes without a name: zero, one, two, three"):
        named(tmp_path, "digits", "\n".join("abcdefghij"))


def test_class_names_of_numbers_and_wordnet_ids_go_in_their_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert named(tmp_path, folders(tmp_path / "0", ("0", "1", "2")), "a\nb\nc") == ["a", "b", "c"] and not caplog.text
    assert named(tmp_path, folders(tmp_path / "1", ("1", "2", "3")), "a\nb\nc") == ["a", "b", "c"]
    assert "matched with the classes in order, beginning with a for class '1'" in caplog.text
    with pytest.raises(ValueError, match=r"without a name: 1, 2, 10\. Names without a class: a, b, c"):
        named(tmp_path, folders(tmp_path / "10", ("1", "2", "10")), "a\nb\nc")
    assert named(tmp_path, str(tmp_path / "10"), "10\tc\n1\ta\n2\tb") == ["a", "b", "c"]
    root = folders(tmp_path / "ids", WORDNET_IDS[:3])  # tench, goldfish, great white shark
    assert named(tmp_path, root, "a fish\ngoldfish\na shark") == ["a fish", "goldfish", "a shark"]
    assert named(tmp_path, root, "Great white shark\ntench\ngoldfish") == ["tench", "goldfish", "Great white shark"]
    with pytest.raises(ValueError, match=f"without a name: {WORDNET_IDS[0]}, {WORDNET_IDS[2]}"):
        named(tmp_path, root, "goldfish\na fish\na shark")
    names = imagenet.class_names("imagenet")  # some names occur twice
    assert join_names(names, imagenet.wordnet_ids(), what="", spec="") == (names, list(range(1000)))
    told, places = join_names(names[::-1], imagenet.wordnet_ids(), what="", spec="")
    assert [told[place] for place in places] == [*names]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("",), "1 image and no class folders; images must be in one folder per class: .*/CLASS/IMAGE"),
        (("train/a", "val/a"), "holds train, val, which are splits, not classes: name one of these folders"),
        (("n01440764", "n99999999", "misc"), "2 of 3 folders are not classes of imagenet: misc, n99999999"),
        (("only",), "there is only one class, only"),
    ],
    ids=["flat", "splits", "unknown", "one"],
)
def test_folder_that_is_not_in_order_is_refused(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    root = folders(tmp_path / "set", names) if names != ("",) else str(tmp_path)
    if names == ("",):
        Image.new("RGB", (4, 4)).save(tmp_path / "ILSVRC2012_val_00000001.JPEG", "jpeg")
    with pytest.raises(ValueError, match=message):
        open_labelled(root)


def test_folders_without_pictures_are_named(tmp_path: Path) -> None:
    root = folders(tmp_path, ("a", "b"))
    (tmp_path / "notes").mkdir()
    with pytest.raises(ValueError, match="folders without images: notes"):
        open_labelled(root)


def test_data_without_classes_are_refused(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    table.write_text("filepath,title\na.png,a caption\n")
    with pytest.raises(ValueError, match="have no classes"):
        open_labelled(str(table))


def test_shards_are_clip_benchmarks(tmp_path: Path) -> None:
    """Shards with KEY.cls are read in clip_benchmark's layout: tar files, with names and
    templates in the parent folder.
    """
    needs("bench")
    import webdataset

    (tmp_path / "test").mkdir()
    (tmp_path / "classnames.txt").write_text("ant\nred fox\nzebra\n")
    shards = str(tmp_path / "test")
    with webdataset.TarWriter(str(tmp_path / "test" / "0.tar")) as writer:
        for k, label in enumerate((2, 0, 1, 3)):
            writer.write({"__key__": f"s{k}", "png": Image.new("RGB", (4, 4)), "cls": label})
    source = open_labelled(shards)
    assert source.class_names == ("ant", "red fox", "zebra") and source.templates == ()
    assert [source[i].label for i in range(3)] == [2, 0, 1] and source.captions(2) == ("a photo of a red fox",)
    with pytest.raises(BadSample, match="must contain a number from 0 to 2, got b'3'"):
        _ = source[3]
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}\n")
    assert open_labelled(shards).templates == ("a {}", "the {}")
    (tmp_path / "classnames.txt").unlink()
    with pytest.raises(ValueError, match=r"no captions, and there is no classnames.txt beside the shards: add"):
        open_labelled(shards)
    (tmp_path / "names").write_text("a\nb\nc\n")
    named = open_labelled(shards, classes=str(tmp_path / "names"))
    assert (named.class_names, named[0].label) == (("a", "b", "c"), 2) and named.captions(0) == ("a c", "the c")
    (tmp_path / "names").write_text("1\tb\n2\tc\n0\ta\n")
    assert open_labelled(shards, classes=str(tmp_path / "names")).class_names == ("a", "b", "c")
    (tmp_path / "classnames.txt").write_text("ant\nred fox\nzebra\n")
    (tmp_path / "names").write_text("Zebra\nred_fox\nant\n")
    assert open_labelled(shards, classes=str(tmp_path / "names")).class_names == ("ant", "red_fox", "Zebra")
    (tmp_path / "classnames.txt").unlink()
    assert len(open_labelled(shards, classes="imagenet-r").class_names) == 200
    with webdataset.TarWriter(str(tmp_path / "test" / "1.tar")) as writer:
        writer.write({"__key__": "s9", "png": Image.new("RGB", (4, 4)), "txt": "a caption"})
    source = open_source(shards)  # captions without classes
    assert source.class_names == () and source.captions(4) == ("a caption",)
    with pytest.raises(BadSample, match="no caption"):
        source.captions(0)


def test_shards_whose_json_has_no_caption_have_their_classes(tmp_path: Path) -> None:
    """Shards have classes if KEY.json beside KEY.cls contains no caption, as in timm's ImageNet."""
    needs("bench")
    import webdataset

    def write(caption: dict[str, str]) -> str:
        with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
            for key in "ab":
                told = {"label": 1, **caption}
                writer.write({"__key__": key, "png": Image.new("RGB", (4, 4)), "cls": 1, "json": told})
        return str(tmp_path / "0.tar")

    source = open_source(write({}), class_names=["cat", "dog"])  # the names are given, so no file is needed
    assert source[0].label == 1 and source.captions(0) == source[0].captions == ("a photo of a dog",)
    with pytest.raises(ValueError, match="these data have no classes"):
        open_labelled(write({}))
    with pytest.raises(BadSample, match=r'0\.tar: a: its caption file has no "caption" \(it has label\)'):
        open_source(write({}))[0]
    (tmp_path / "classnames.txt").write_text("ant\nred fox\n")
    source = open_labelled(write({}))
    assert source.class_names == ("ant", "red fox") and [source[k].label for k in range(2)] == [1, 1]
    with pytest.raises(
        ValueError,
        match=r"shards with KEY\.cls\. .* write the shards without KEY\.txt and without captions in KEY\.json",
    ):
        open_labelled(write({"caption": "x"}))


@pytest.mark.parametrize("number", [b"-1", b"2", b"x", b"", b"1.0", b"9" * 5000, b"\xb2"])
def test_class_out_of_range_is_a_bad_sample(tmp_path: Path, number: bytes) -> None:
    (tmp_path / "classnames.txt").write_text("ant\nred fox\n")
    members = [("a.png", picture(0)), ("a.cls", b" 1\n"), ("b.png", picture(1)), ("b.cls", number)]
    source = open_source(str(write_tar(tmp_path / "0.tar", members)))
    assert source[0].label == 1
    with pytest.raises(BadSample, match=r"b: its \.cls must contain a number from 0 to 1") as caught:
        source[1]
    assert caught.value.fault.cause == "damaged class"
