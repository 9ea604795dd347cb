"""Other builds beside this one (`--variant`): whose modules are timed, on which backend, and possible failures."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from support import ROOT, needs
from support.rows import rows_of

needs("models")


from benchmarks.gpu import variants as gpu_variants
from benchmarks.gpu.log import Log
from benchmarks.gpu.pretended import Pretended
from benchmarks.losses.providers import OURS


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    monkeypatch.setitem(OURS, "cuda", dict.fromkeys(OURS["cuda"], "reference"))
    return Log("variants", tmp_path, Pretended(), time.monotonic() + 100, tmp_path / "done", "code")


def test_variants_are_folders_or_settings(tmp_path: Path) -> None:
    package = tmp_path / "before" / "fastclip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert gpu_variants.parse(f"old={tmp_path / 'before'}").folder == tmp_path / "before"
    setting = gpu_variants.parse("portable=FASTCLIP_CPU_ISA:portable")
    assert setting.environment == (("FASTCLIP_CPU_ISA", "portable"),) and setting.folder == ROOT
    for text in (f"old={tmp_path / 'before'}", "portable=FASTCLIP_CPU_ISA:portable"):
        assert str(gpu_variants.parse(text)) == text


def test_another_build_is_timed_beside_this_one(log: Log, tmp_path: Path) -> None:
    """A variant's own package is loaded. A wrong or broken variant gets a status, and this build keeps its figures."""
    broken = "raise ImportError('not built')\n"
    wrong = "contrastive_loss = lambda i, t, s, **_: (s * i @ t.T).logsumexp(1).mean()\n"
    real = (ROOT / "fastclip" / "__init__.py").read_text()
    texts = [package(tmp_path / "broken", broken), package(tmp_path / "wrong", f"{real}\nimport torch\n{wrong}")]
    variants = [gpu_variants.parse(text) for text in texts]
    gpu_variants.run(log, variants)
    rows = rows_of(tmp_path)
    assert {row["provider"] for row in rows if row["value"] and row["case"].startswith("softmax")} == {"this"}
    told = {row["provider"]: row["status"] for row in reversed(rows) if row["status"]}
    assert told["broken"].startswith("error: the process ended") and told["wrong"].startswith("check failed")
    assert {row["provider"] for row in rows if row["value"] and row["case"].startswith("sigmoid")} == {"this", "wrong"}


def package(folder: Path, init: str, without: str = "") -> str:
    """Create a folder with this build and another `__init__.py`, and return it as an argument of `--variant`."""
    target = folder / "fastclip"
    target.mkdir(parents=True)
    (target / "__init__.py").write_text(init)
    for path in (ROOT / "fastclip").iterdir():
        if path.name not in ("__init__.py", "__pycache__", "triton_kernels", without):
            (target / path.name).symlink_to(path)
    if without != "triton_kernels":
        (target / "triton_kernels").symlink_to(ROOT / "triton_kernels")
    return f"{folder.name}={folder}"


def test_a_folder_that_lacks_a_module_has_no_figures(log: Log, tmp_path: Path) -> None:
    """A variant that lacks a module has no figures, because an installation, such as an
    editable one, provides the module.
    """
    real = (ROOT / "fastclip" / "__init__.py").read_text()
    installed = tmp_path / "installed"
    package(installed, "")
    falls_through = f"{real}\n__path__.append({str(installed / 'fastclip')!r})\n"
    built = [path.name for path in (ROOT / "fastclip").glob("_c*.so")]
    lacking = {path.split(".")[0]: path for path in ("triton_kernels", "losses", *built)}
    texts = [package(tmp_path / "whole", falls_through)]
    texts += [package(tmp_path / name, falls_through, path) for name, path in lacking.items()]
    gpu_variants.run(log, [gpu_variants.parse(text) for text in texts])
    rows = rows_of(tmp_path)
    assert {row["provider"] for row in rows if row["value"]} == {"this", "whole"}
    told = {row["provider"]: row["status"] for row in rows if row["status"]}
    assert set(told) == set(lacking)
    for name, status in told.items():
        assert f"fastclip.{name} came from {installed}" in status


@pytest.mark.parametrize("setting", ["", "FASTCLIP_BACKEND:nothing"])
def test_a_variant_runs_on_the_backend_that_is_meant(log: Log, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    """A variant that cannot run on the intended backend fails instead of running on another; so does one that sets a
    backend.
    """
    monkeypatch.setitem(OURS, "cuda", dict.fromkeys(OURS["cuda"], "reference" if setting else "nothing"))
    gpu_variants.run(log, [gpu_variants.parse(f"other={setting}")] if setting else [])
    rows = rows_of(log.rows)
    assert {row["provider"] for row in rows if row["value"]} == ({"this"} if setting else set())
    told = {row["status"] for row in rows if row["status"]}
    assert len(told) == 1 and "nothing" in told.pop()
