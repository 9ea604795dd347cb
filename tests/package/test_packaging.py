"""The installation by pip: a wheel with the native modules, and a working package if no compiler for them exists."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from support import ROOT
from support.native_build import CAN_BUILD, COMPILER, NVCC, PATH, can_run_setup, cuda_module, toolchain
from support.store import copy_sources, sources, stored

SOURCES = sources(
    *("csrc", "fastclip", "triton_kernels"),
    *("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"),
)
NOT_FOUND = "nvcc was not found (PATH, CUDACXX, CUDA_HOME)"
needs_setup = pytest.mark.skipif(not can_run_setup(), reason="setuptools>=77 or pybind11 is not installed")
needs_nvcc = pytest.mark.skipif(NVCC is None or not CAN_BUILD, reason=f"{NOT_FOUND}, or no C++ compiler, or no cmake")


def _run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command without building the CUDA module, which takes long, unless the environment requests it."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FASTCLIP_BUILD_CPU", "CXX")}
    words = [str(word) for word in command]
    environment = inherited | {"FASTCLIP_BUILD_CUDA": "0"} | environment
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)


def _without_nvcc(folder: Path, path: str = PATH) -> dict[str, str]:
    """Return an environment without nvcc but with everything else in nvcc's folder."""
    names = path.split(os.pathsep)
    for k, name in enumerate(names):
        if shutil.which("nvcc", path=name):
            links = folder / str(k)
            links.mkdir(parents=True)
            for file in Path(name).iterdir():
                if file.name != "nvcc":
                    (links / file.name).symlink_to(file)
            names[k] = str(links)
    return {"PATH": os.pathsep.join(names), "CUDACXX": "/nonexistent/nvcc", "CUDA_HOME": "/nonexistent"}


def _setup(source: Path, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the build that pip would run, without pip's own work."""
    return _run(sys.executable, "setup.py", *words, cwd=source, **({"PATH": PATH} | environment))


def _pip_wheel(source: Path, output: Path, *, isolated: bool, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel as pip does for a user, in an isolated environment or with the packages of this one."""
    here = [] if isolated or not can_run_setup() else ["--no-build-isolation"]
    path = {} if isolated else {"PATH": PATH}
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", *here, "-w", output, source)
    return _run(*command, cwd=source.parent, **(path | environment))


def _stored_wheel(name: str, change: Callable[[Path], dict[str, str]]) -> Path:
    """Build a wheel with the packages of this environment. `change` edits the sources and
    returns the environment variables.
    """

    def make(source: Path, place: Path) -> None:
        done = _pip_wheel(source, place, isolated=False, **change(source))
        assert done.returncode == 0, done.stdout + done.stderr

    (wheel,) = stored(f"wheel-{name}", SOURCES, toolchain(NVCC or ""), make).glob("*.whl")
    return wheel


def _use(folder: Path) -> list[str]:
    """Return what a user of the unpacked wheel sees: the path of the import, "available" or the reason against the CPU
    backend, the reason against the CUDA module, and a loss.
    """
    # An editable installation of the repository would supply modules that the wheel lacks
    code = (
        "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'Editable' not in repr(finder)]; "
        "import fastclip, torch; x = torch.eye(4); print(fastclip.__file__); print(fastclip.backends()['cpu']); "
        "from fastclip._backends.native import load; print(load('_cuda')[1]); "
        "print(round(fastclip.contrastive_loss(x, x, 1.0).item(), 4))"
    )
    done = _run(sys.executable, "-c", code, cwd=folder, PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


EXPECTED_LOSS = "0.7437"  # log(e + 3) - 1


@pytest.fixture(scope="module")
def wheel_without_nvcc() -> Path:
    """Wheel that is built as a user's pip builds it."""
    if COMPILER is None:
        pytest.skip("no C++ compiler is installed")
    choice = {"FASTCLIP_BUILD_CPU": "1", "FASTCLIP_BUILD_CUDA": ""}

    def make(source: Path, place: Path) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            # An earlier failed build in this folder must not matter, nor a ninja that has disappeared since
            tools = folder / "tools"
            tools.mkdir()
            if ninja := shutil.which("ninja", path=PATH):
                (tools / "ninja").symlink_to(ninja)
            environment = _without_nvcc(folder / "path", os.pathsep.join([str(tools), PATH])) | choice
            failed = _pip_wheel(source, folder, isolated=False, **environment, CXX="/nonexistent/c++")
            assert failed.returncode != 0, failed.stdout
            shutil.rmtree(tools)
            environment = _without_nvcc(folder / "user", os.environ["PATH"]) | choice
            done = _pip_wheel(source, place, isolated=True, **environment)
            if done.returncode and "No matching distribution found" in done.stdout + done.stderr and can_run_setup():
                warnings.warn("pip cannot download what builds the package: built with what is installed", stacklevel=1)
                done = _pip_wheel(source, place, isolated=False, **environment)
            assert done.returncode == 0, done.stdout + done.stderr

    (wheel,) = stored("wheel", SOURCES, (choice, toolchain()), make).glob("*.whl")
    return wheel


def test_wheel_has_native_module_and_nothing_else(wheel_without_nvcc: Path, tmp_path: Path) -> None:
    wheel = wheel_without_nvcc
    assert wheel.name.startswith("fastclip_kernels-")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("fastclip/_cpu.") for name in names)
    pages = [f"report/page/{name}" for name in ("report.html", "script.js", "style.css")]
    assert {f"fastclip/{name}" for name in ("py.typed", "search/page.html", *pages)} <= {*names}
    assert "fastclip/triton_kernels/contrastive_fwd.py" in names
    assert {name.split("/")[0] for name in names} == {"fastclip", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    where, cpu, _, loss = _use(tmp_path / "site")
    assert where.startswith(str(tmp_path / "site"))
    assert (cpu, loss) == ("available", EXPECTED_LOSS)


@pytest.fixture(scope="module")
def users_python(wheel_without_nvcc: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of an empty environment with the wheel; torch and the rest come from this environment."""
    folder = tmp_path_factory.mktemp("user")
    made = _run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    assert made.returncode == 0, made.stderr
    python = folder / "bin" / "python"
    install = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    done = _run(*install, wheel_without_nvcc, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    # Searched after the wheel. The .pth files there, such as an editable installation's, are not processed again
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_installed_wheel_serves_a_user(users_python: Path) -> None:
    code = """
import importlib.metadata, pathlib, sys
import fastclip, torch
package, environment = pathlib.Path(fastclip.__file__).parent, pathlib.Path(sys.prefix)
assert package.is_relative_to(environment), package
assert fastclip.backends()["cpu"] == "available"
image, text = torch.randn(2, 16, 8, requires_grad=True), torch.randn(2, 16, 8)
loss = fastclip.contrastive_loss(image[0], text[0], 10.0)
loss.backward()
truth = fastclip.contrastive_loss(image[0].double(), text[0].double(), 10.0)
assert abs(loss - truth) < 1e-5 and image.grad[0].norm() > 0
assert (package / "py.typed").is_file()
about = importlib.metadata.metadata("fastclip-kernels")
assert about["License-Expression"] == "Apache-2.0" and about.get_all("License-File") == ["LICENSE"]
assert about["Version"] == fastclip.__version__ and about["Description-Content-Type"] == "text/markdown"
licence = next(file for file in importlib.metadata.files("fastclip-kernels") if file.name == "LICENSE")
assert "Apache License" in licence.read_text()
"""
    done = _run(users_python, "-I", "-c", code, cwd=Path("/"))
    assert done.returncode == 0, done.stderr


def test_installed_wheel_has_every_file_of_the_package(users_python: Path) -> None:
    (installed,) = users_python.parent.parent.glob("lib/python*/site-packages/fastclip")
    built = ("__pycache__", ".so", "_build_report.txt")
    for folder, place in ((ROOT / "fastclip", installed), (ROOT / "triton_kernels", installed / "triton_kernels")):
        names = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        names = {name for name in names if not any(word in str(name) for word in built)}
        assert names and not [str(name) for name in names if not (place / name).is_file()]


@pytest.mark.parametrize(("words", "expected"), [("--version", "fastclip "), ("models", "ViT-B-32"), ("doctor", "cpu")])
def test_installed_command_runs(users_python: Path, words: str, expected: str) -> None:
    done = _run(users_python.with_name("fastclip"), words, cwd=Path("/"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert expected in done.stdout


def test_package_works_without_compiler(tmp_path: Path) -> None:
    wheel = _stored_wheel("without-compiler", lambda source: {"CXX": "/nonexistent/c++"})
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    _, cpu, cuda, loss = _use(tmp_path / "site")
    assert cpu == "the native module was not built: `cmake -S` failed (no C++ compiler was found)"
    assert cuda == "the native module was not built: FASTCLIP_BUILD_CUDA=0 was set when the package was built"
    assert loss == EXPECTED_LOSS


def test_package_works_without_nvcc(wheel_without_nvcc: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel_without_nvcc).extractall(tmp_path / "site")
    _, cpu, cuda, loss = _use(tmp_path / "site")
    assert cuda == f"the native module was not built: {NOT_FOUND}"
    assert (cpu, loss) == ("available", EXPECTED_LOSS)


@needs_setup
@pytest.mark.parametrize("variable", ["CUDACXX", "CUDA_HOME"])
def test_old_nvcc_is_told(variable: str, tmp_path: Path) -> None:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.4, V12.4.99\n")
    nvcc.chmod(0o755)
    environment = _without_nvcc(tmp_path / "path") | {"FASTCLIP_BUILD_CPU": "0", "FASTCLIP_BUILD_CUDA": ""}
    environment |= {variable: str(nvcc if variable == "CUDACXX" else nvcc.parent.parent)}
    library = tmp_path / "library"
    done = _setup(copy_sources(SOURCES, tmp_path / "source"), "build_ext", "--build-lib", library, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (library / "fastclip" / "_cuda_build_report.txt").read_text()
    assert report == f"nvcc 12.5 or newer is required, {nvcc} is release 12.4\n"


@needs_nvcc
@needs_setup
def test_cuda_module_loads_without_driver(tmp_path: Path) -> None:
    library = cuda_module() / "lib" / "fastclip"
    assert not (library / "_cuda_build_report.txt").exists()
    (built,) = library.glob("_cuda.*")
    module = tmp_path / built.name  # alone, because torch would load CUDA's libraries
    shutil.copy(built, module)
    needed = _run("readelf", "-d", module, cwd=tmp_path).stdout
    assert "libc.so" in needed and "libcuda" not in needed
    done = _run(sys.executable, "-c", "import _cuda; print(_cuda.__file__)", cwd=module.parent)
    assert done.stdout.strip() == str(module), done.stderr


@needs_nvcc
def test_cuda_that_does_not_compile_costs_no_cpu_module(tmp_path: Path) -> None:
    def change(source: Path) -> dict[str, str]:
        for path in (source / "csrc" / "cuda").glob("*.cu"):
            path.write_text("#error not today\n")
        fast = source.parent / "c++"  # optimising takes longer than the few computations
        fast.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -O0\n')
        fast.chmod(0o755)
        return {"FASTCLIP_BUILD_CUDA": "", "CXX": str(fast)}

    wheel = _stored_wheel("cuda-fails", change)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    _, cpu, cuda, loss = _use(tmp_path / "site")
    assert cuda.startswith("the native module was not built: `cmake --build` failed (") and "not today" in cuda
    assert (cpu, loss) == ("available", EXPECTED_LOSS)


@needs_setup
@pytest.mark.parametrize(
    ("kind", "choice", "message"),
    [
        ("CPU", "1", "no C++ compiler was found"),
        ("CPU", "yes", "FASTCLIP_BUILD_CPU must be 0, 1 or unset"),
        ("CUDA", "1", NOT_FOUND),
        ("CUDA", "yes", "FASTCLIP_BUILD_CUDA must be 0, 1 or unset"),
    ],
)
def test_build_that_was_asked_for_fails_loudly(tmp_path: Path, kind: str, choice: str, message: str) -> None:
    source = copy_sources(SOURCES, tmp_path / "source")
    environment = _without_nvcc(tmp_path / "path") | {"CXX": "/nonexistent/c++", f"FASTCLIP_BUILD_{kind}": choice}
    done = _setup(source, "build_ext", "--build-lib", tmp_path / "library", **environment)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


@needs_setup
def test_rebuilding_in_place_leaves_the_loaded_module(tmp_path: Path) -> None:
    package = copy_sources(SOURCES, tmp_path / "source") / "fastclip"
    cpu, cuda = (package / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in ("_cpu", "_cuda"))
    cmake = tmp_path / "bin" / "cmake"
    cmake.parent.mkdir()
    cmake.write_text(
        "#!/bin/sh\necho words of the compiler\nfor word; do case $word in -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=*) "
        f"printf new > ${{word#*=}}/{cpu.name};; esac; done\n"
    )
    cmake.chmod(0o755)
    for path in (cpu, cuda, package / "_cpu_build_report.txt"):
        path.write_text("old")
    with cpu.open() as loaded:
        path = os.pathsep.join([str(cmake.parent), os.environ["PATH"]])
        done = _setup(package.parent, "build_ext", "--inplace", PATH=path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "words of the compiler" in done.stdout  # the compiler's output, as `pip install -v` shows it
        assert (loaded.read(), cpu.read_text()) == ("old", "new")
    assert {path.name for path in package.glob("*_c[pu]*")} == {cpu.name, "_cuda_build_report.txt"}


@needs_setup
def test_source_distribution_has_the_native_sources(tmp_path: Path) -> None:
    source = copy_sources(SOURCES, tmp_path / "source")
    for name in ("kernel.cu", "kernel.cuh"):
        (source / "csrc" / "cuda").mkdir(exist_ok=True)
        (source / "csrc" / "cuda" / name).touch()
    done = _setup(source, "sdist", "--dist-dir", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    expected = {str(path.relative_to(source)) for path in (source / "csrc").rglob("*") if path.is_file()}
    assert expected <= names


def test_setup_imports_no_torch_and_is_short() -> None:
    text = (ROOT / "setup.py").read_text()
    assert "torch" not in text
    assert len(text.splitlines()) < 120
