"""A folder of real images, which come with scikit-learn and matplotlib, and of files that cannot be used."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from support.faulty import HTML, picture

FILES = {
    "china.jpg": ("sklearn", "datasets/images/china.jpg", "a Chinese temple"),
    "flower.jpg": ("sklearn", "datasets/images/flower.jpg", "a red flower"),
    "hopper.jpg": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "an officer in uniform"),
    "cards.png": ("matplotlib", "mpl-data/sample_data/Minduka_Present_Blue_Pack.png", "a blue present"),
    "logo.png": ("matplotlib", "mpl-data/sample_data/logo2.png", "a logo"),
}


def real_pictures(folder: Path) -> Path:
    """Write five usable images, one with two captions and one with a .json of further fields, and four
    unusable files.
    """
    folder.mkdir(parents=True)
    for name, (package, path, caption) in FILES.items():
        found = find_spec(package)
        assert found is not None and found.origin is not None
        file = folder / name
        file.write_bytes((Path(found.origin).parent / path).read_bytes())
        file.with_suffix(".txt").write_text(caption)
    (folder / "flower.txt").write_text("a red flower\na car\n")
    (folder / "hopper.txt").unlink()
    about = {"caption": "an officer in uniform", "key": "h1", "url": "https://example.org/hopper.jpg"}
    (folder / "hopper.json").write_text(json.dumps(about))
    for name, data, text in (("html", HTML, "x"), ("cut", picture()[:200], "y"), ("mute", picture(), None)):
        (folder / f"{name}.png").write_bytes(data)
        if text is not None:
            (folder / f"{name}.txt").write_text(text)
    (folder / "empty.png").write_bytes(picture())
    (folder / "empty.txt").write_text(" ")
    return folder
