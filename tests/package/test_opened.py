"""All files that the package opens are listed in docs/reliability.md, and none of them is executed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from reliability import OPENED
from support import ROOT

PACKAGE = ROOT / "fastclip"
_OPENS = re.compile(
    r"torch\.load\(|safe_open\(|load_file\(|Image\.open\(|json\.loads?\(|read_json\(|parse_json\(|open_tensors\("
    r"|read_tensors\(|safe_load\(|sqlite3\.connect\(|\.restore\(|ZipFile\(|gzip\.\w+\(|tarfile\.open\("
    r"|load_dataset\(|load_from_disk\(|fsspec\.core|csv\.reader\(|pq\.read_|\.read_bytes\(|\.read_text\(|np\.load\("
    r"|\.from_pretrained\(|BertTokenizerFast\(|snapshot_download\(|spec_from_file_location\("
    r'|\.open\((?:"rb|\)|encoding|newline)|\bopen\([\w.]+, "r|\bopen_file\(|\bread_file\('
)


_MODULE = re.compile(r"`([\w/]+\.py)`")


def test_modules_that_open_files_are_in_the_table() -> None:
    named = {module for line in OPENED.read_text("utf-8").splitlines() for module in _MODULE.findall(line)}
    assert not [module for module in named if not (PACKAGE / module).is_file()]
    opening = {
        str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if _OPENS.search(file.read_text("utf-8"))
    }
    assert opening <= named, "tests/opened.md: say how these read their files"


def runs(source: str) -> Iterator[str]:
    """Yield calls that execute what they read, or could."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            yield from (
                f"import {name}" for name in names if name in ("dill", "cloudpickle", "joblib", "marshal", "shelve")
            )
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if (
            name in ("eval", "exec", "compile", "__import__", "os.system", "torch.jit.load", "torch.hub.load")
            or name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.package.PackageImporter")
            or (name == "torch.load" and options.get("weights_only") != "True")
            or (name.startswith("yaml.") and name not in ("yaml.SafeLoader", "yaml.safe_load", "yaml.safe_dump"))
            or options.get("trust_remote_code", "False") != "False"
            or options.get("allow_pickle", "False") != "False"
            or (name == "Image.open" and "formats" not in options)
            or (name.endswith("AutoTokenizer.from_pretrained") and "trust_remote_code" not in options)
        ):
            yield name


def test_nothing_that_is_read_is_run() -> None:
    found = {file.name: names for file in PACKAGE.rglob("*.py") if (names := [*runs(file.read_text("utf-8"))])}
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "torch.jit.load(x)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "pickle.load(x)",
        "yaml.load(x, Loader=yaml.Loader)",
        "eval(x)",
        "from_pretrained(x, trust_remote_code=True)",
        "transformers.AutoTokenizer.from_pretrained(x)",
        "np.load(x, allow_pickle=True)",
        "Image.open(x)",
        "import joblib",
    ],
)
def test_what_would_run_is_seen(line: str) -> None:
    assert list(runs(line))


@pytest.mark.parametrize("line", ['open(path, "rb")', "read_file(self._file(index))", "with open_file(path) as file:"])
def test_what_opens_a_file_is_seen(line: str) -> None:
    assert _OPENS.search(line)
