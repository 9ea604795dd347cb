"""What pip installs: a wheel with the native module, and a working package where there is no compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRACKED = (
    *("csrc", "fastclip", "triton_kernels"),
    *("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"),
)


def _run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FASTCLIP_BUILD_CPU", "CXX")}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=inherited | environment, capture_output=True, text=True)


def _source(folder: Path) -> Path:
    """A copy of the sources without anything built."""
    folder.mkdir()
    for name in TRACKED:
        path = ROOT / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "_*_build_report.txt")
            shutil.copytree(path, folder / name, ignore=ignored)
        else:
            shutil.copy(path, folder / name)
    return folder


def _wheel(source: Path, output: Path, **environment: str) -> Path:
    """Built as pip builds it for a user, in an environment of its own."""
    done = _run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", output, source, cwd=output.parent, **environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = output.glob("*.whl")
    return wheel


def _use(folder: Path) -> list[str]:
    """What a user of the unpacked wheel sees: where it was imported from, the reason or "available", and a loss."""
    # an editable installation of the repository would step in for modules that the wheel lacks
    code = (
        "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'Editable' not in repr(finder)]; "
        "import fastclip, torch; x = torch.eye(4); print(fastclip.__file__); print(fastclip.backends()['cpu']); "
        "print(round(fastclip.contrastive_loss(x, x, 1.0).item(), 4))"
    )
    done = _run(sys.executable, "-c", code, cwd=folder, PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


EXPECTED_LOSS = "0.7437"  # log(e + 3) - 1


def test_wheel_has_native_module_and_nothing_else(tmp_path: Path) -> None:
    wheel = _wheel(_source(tmp_path / "source"), tmp_path / "wheels", FASTCLIP_BUILD_CPU="1")
    assert wheel.name.startswith("fastclip_kernels-")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("fastclip/_cpu.") for name in names)
    assert "fastclip/py.typed" in names
    assert "fastclip/triton_kernels/contrastive_fwd.py" in names
    assert {name.split("/")[0] for name in names} == {"fastclip", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    where, cpu, loss = _use(tmp_path / "site")
    assert where.startswith(str(tmp_path / "site"))
    assert (cpu, loss) == ("available", EXPECTED_LOSS)


def test_package_works_without_compiler(tmp_path: Path) -> None:
    wheel = _wheel(_source(tmp_path / "source"), tmp_path / "wheels", CXX="/nonexistent/c++")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    _, cpu, loss = _use(tmp_path / "site")
    assert cpu == "the native module was not built: `cmake -S` failed (no C++ compiler was found)"
    assert loss == EXPECTED_LOSS


@pytest.mark.parametrize(("choice", "message"), [("1", "no C++ compiler was found"), ("yes", "must be 0, 1 or unset")])
def test_build_that_was_asked_for_fails_loudly(tmp_path: Path, choice: str, message: str) -> None:
    source = _source(tmp_path / "source")
    environment = {"CXX": "/nonexistent/c++", "FASTCLIP_BUILD_CPU": choice}
    done = _run(sys.executable, "-m", "pip", "wheel", "--no-deps", source, cwd=tmp_path, **environment)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_setup_imports_no_torch_and_is_short() -> None:
    text = (ROOT / "setup.py").read_text()
    assert "torch" not in text
    assert len(text.splitlines()) < 120
