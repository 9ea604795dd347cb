"""TorchScript archives: the tensors equal those that torch reads, and no code of an archive is executed."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from support import needs

needs("models")

import fastclip
from fastclip.cli import main
from fastclip.models.checkpoints.torchscript import is_torchscript, read_torchscript

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 4).half())
        self.turned = nn.Parameter(torch.randn(4, 3).T)
        self.register_buffer("whole", torch.arange(5))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("one", torch.tensor(7))
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.turned.sum()


class Whole(nn.Module):
    """A module with attributes of all kinds, shared parameters and shared submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.list = Part(), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 2)])
        self.again, self.tied = self.part, self.list[0].weight
        self.input_resolution, self.name, self.lengths, self.device = 32, "whole", [1, 2], torch.device("cpu")
        self.numbers = {"a": 1.5}

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.list[0](x)) + self.again(x)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("archives")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = {
            "scripted": torch.jit.script(Whole()),
            "traced": torch.jit.trace(Whole().eval(), torch.ones(3, 4)),
            "half": torch.jit.script(Whole().half()),
            "plain": torch.jit.script(nn.Linear(2, 3)),
        }
        for name, module in made.items():
            module.save(str(folder / f"{name}.pt"))
    return {name: folder / f"{name}.pt" for name in made}


@pytest.mark.parametrize("name", ["scripted", "traced", "half"])
def test_tensors_are_those_of_torchs_loader(name: str, archives: dict[str, Path]) -> None:
    wanted = torch.jit.load(str(archives[name])).state_dict()
    assert is_torchscript(archives[name]) and len(wanted) > 10
    found = read_torchscript(archives[name])
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype and found[key].stride() == tensor.stride()
        assert torch.equal(found[key], tensor), key


class Archive(nn.Module):
    """A module that writes a file when torch loads it; the path of the file replaces TARGET."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.training = nn.Parameter(torch.zeros(3)), False

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return (self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.training = state[1]
        x = torch.from_file("TARGET", True, 8, dtype=torch.uint8)
        x.fill_(65)
        self.weight = state[0] + x.sum().float() * 0

    def forward(self, x: Tensor) -> Tensor:
        return x


def rewritten(archive: Path, change: Callable[[str, bytes], bytes | None], compression: int = 0) -> bytes:
    """Return the archive with its entries replaced by `change`, which drops an entry by returning None."""
    out = io.BytesIO()
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(out, "w", compression) as new:
        for entry in old.infolist():
            if (data := change(entry.filename, old.read(entry))) is not None:
                new.writestr(entry.filename, data)
    return out.getvalue()


@pytest.mark.fault(
    "The code of a TorchScript archive writes a file when it is loaded",
    "The reader extracts tensors and calls no code of the archive. The archive is refused, and no file is written",
)
def test_no_code_of_an_archive_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written, path = tmp_path / "written", tmp_path / "archive.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Archive()).save(str(tmp_path / "made.pt"))
    path.write_bytes(rewritten(tmp_path / "made.pt", lambda _, data: data.replace(b"TARGET", str(written).encode())))
    for argv in (
        ["convert", str(path), str(tmp_path / "out"), "--to", "open_clip", "--model", "ViT-tiny"],
        ["search", "a dog", str(tmp_path), "--checkpoint", str(path), "--model", "ViT-tiny"],
    ):
        assert main(argv) == 1
        assert "archive.pt" in (told := capsys.readouterr().err) and "__setstate__" in told
    with pytest.raises(ValueError, match="__setstate__"):
        fastclip.create_model("ViT-tiny", pretrained=path)
    assert not written.exists()
    torch.jit.load(str(path))  # the payload works
    assert written.exists()


def edited(old: bytes, new: bytes) -> Callable[[str, bytes], bytes]:
    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        assert old in data
        return data.replace(old, new, 1)

    return change


@pytest.mark.fault(
    "A TorchScript archive declares sizes, strides, storages or names that do not match its content",
    "A ValueError names the file before memory is allocated",
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edited(b"K\x06tQ", b"J\xff\xff\xff\x7ftQ"), r"data/0 has 24 bytes for 2,147,483,647 elements"),
        (edited(b"K\x03K\x02t", b"J\xff\xff\xff\x7fK\x02t"), "weight of shape .* exceeds its storage"),
        (edited(b"K\x03K\x02t", b"J\xff\xff\xff\xffK\x02t"), "not described as torch describes it"),
        (edited(b"(K\x02K\x01t", b"(K\x00K\x00t"), None),  # overlapping numbers do no harm
        (edited(b"(K\x02K\x01t", b"(J\xff\xff\xff\x7fK\x01t"), "exceeds its storage"),
        (edited(b"FloatStorage", b"TypedStorag_"), "storage must be one of .*, got torch TypedStorag_"),
        (edited(b"FloatStorage", b"QInt8Storage"), "storage must be one of .*, got torch QInt8Storage"),
        (edited(b"__torch__.torch.nn", b"os.system.torch.nn"), "contains no module"),
        (edited(b"\x80\x02", b"\x80\x02\x8c\x01a\x93"), "opcode STACK_GLOBAL"),
        (edited(b"\x80\x02", b"\x80\x02h\xff"), "is not a readable TorchScript archive"),
        (edited(b"\x80\x02", b"\x80\x02bbbb"), "is not a readable TorchScript archive"),
        (lambda name, data: None if "/data/0" in name else data, "data/0"),
        (lambda name, data: data[:4] if "/data/0" in name else data, "data/0 has 4 bytes for 6 elements"),
        (lambda name, data: data[:9] if name.endswith("data.pkl") else data, "is not a readable TorchScript archive"),
        (lambda name, data: b"big" if name.endswith("byteorder") else data, "numbers are big-endian"),
    ],
)
def test_claims_are_checked(
    change: Callable[[str, bytes], bytes | None], message: str | None, archives: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(rewritten(archives["plain"], change))
    if message is None:
        assert read_torchscript(path)["weight"].shape == (3, 2)
        return
    with pytest.raises(ValueError, match=rf"x\.pt .*{message}"):
        read_torchscript(path)


def test_entries_are_checked(archives: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(
        rewritten(
            archives["plain"], lambda name, data: bytes(2**26) if "/data/0" in name else data, zipfile.ZIP_DEFLATED
        )
    )
    with pytest.raises(ValueError, match=r"x\.pt .*is compressed, which torch never does"):
        read_torchscript(path)
    path.write_bytes(archives["plain"].read_bytes())
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("plain/data/0", bytes(24))
    with pytest.raises(ValueError, match=r"x\.pt .*two entries with the same name"):
        read_torchscript(path)
    whole = archives["plain"].read_bytes()
    for end in range(0, len(whole), 97):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"x\.pt"):
            fastclip.create_model("ViT-tiny", pretrained=path)


def nested(depth: int) -> bytes:
    """Pickle a module with nine attributes that are all the same module, nested to this depth."""
    if not depth:
        return b"c__torch__\nM\n)\x81q\x00"
    again = b"".join(b"X\x01\x00\x00\x00%dh%c" % (k, depth - 1) for k in range(1, 9))
    return b"c__torch__\nM\n)\x81}(X\x01\x00\x00\x000" + nested(depth - 1) + again + b"ubq" + bytes([depth])


@pytest.mark.parametrize("pickled", [b"c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb", nested(40)])
def test_modules_that_lie_in_each_other(pickled: bytes, archives: dict[str, Path], tmp_path: Path) -> None:
    path, data = tmp_path / "x.pt", b"\x80\x02" + pickled + b"."
    path.write_bytes(rewritten(archives["plain"], lambda name, old: data if name.endswith("data.pkl") else old))
    with pytest.raises(ValueError, match=r"x\.pt .*contain each other endlessly"):
        read_torchscript(path)
