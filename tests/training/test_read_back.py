"""Files that commands write and read again may contain anything: an error names the file, or the file is rebuilt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support import needs

needs("train", "search")

import pyarrow as pa
import pyarrow.parquet as pq

from fastclip.curation.embed import _written
from fastclip.curation.filter import _decided
from fastclip.data.faults import Tally
from fastclip.data.pack import _finished
from fastclip.embedding.features import FeatureStore
from fastclip.embedding.pairs import faults_of
from fastclip.report.run import _versions, read_run
from fastclip.report.view import read_results
from fastclip.search.approximate import Approximate
from fastclip.system.claim import claim
from fastclip.system.durable import check_manifest, write_tensors
from fastclip.training.finetune import FinetuneOptions, _Run
from fastclip.training.options import read_options
from fastclip.training.run.checkpoints import read_state
from fastclip.training.run.metrics import cut_metrics
from fastclip.training.wise_ft import ensemble_accuracies

ANYTHING = [b"", b"\xff", b"[" * 5000, b"[]", b"null", b"{}", b"1e999", b'"x"', b"\0" * 9, b'{"a": ' * 5000]
NEEDED = ("options", "samples", "skipped", "param_groups", "ema_updates")
STATE = {"step": 1, "options": {}, "samples": 2, "skipped": {}, "param_groups": [], "ema_updates": 0}
STATS = {"a": 1, "content": "", "successes": 1, "bytes": 2, "failures": {}, "failed": {}}


class Pictures:
    spec, class_names = "pictures", ("a", "b")

    def __len__(self) -> int:
        return 2

    def key(self, index: int) -> str:
        return str(index)

    def captions(self, index: int) -> tuple[str, ...]:
        return ("a",)


def fine_tuned(file: Path) -> None:
    run = SimpleNamespace(folder=file.parent, source=Pictures(), embedder=SimpleNamespace(identity="x"))
    run.options = FinetuneOptions()
    _Run._claim(run, ())  # type: ignore[arg-type]


def evaluated(file: Path) -> None:
    run: Any = SimpleNamespace(folder=file.parent, complete=True)
    ensemble_accuracies(run, Pictures(), ())  # type: ignore[arg-type]


def parquet(read: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return a reader that applies `read` to a table with the file's bytes as metadata."""

    def told(file: Path) -> object:
        data = file.read_bytes()
        pq.write_table(pa.table([["kept"]], pa.schema([("state", pa.string())], metadata={"fastclip": data})), file)
        return read(file)

    return told


def kept_faults(file: Path) -> None:
    store = FeatureStore(SimpleNamespace(identity="x"), [], folder=file.parent)  # type: ignore[arg-type]
    data = torch.frombuffer(bytearray(file.read_bytes() or b" "), dtype=torch.uint8)
    store.add(0, {"used": torch.ones(1), "faults": data})
    faults_of(store)


WHOLE = {("config.yaml", b"{}"), ("evaluations.json", b"{}"), ("results.json", b"[]")}  # valid files that may be empty
READERS: dict[str, tuple[Callable[[Path], object], list[Any]]] = {
    "state.json": (
        lambda file: read_state(file.parent, *NEEDED),
        [{**STATE, name: value} for name in STATE for value in ("x", None, -1, [1])],
    ),
    "manifest.json": (
        lambda file: check_manifest(file.parent),
        [{"files": 5}, {"files": {"x": 5}}, {"files": {"x": {"bytes": [], "sha256": 1}}}, {"files": {"x": {}}}],
    ),
    "results.json": (lambda file: read_results([file]), [[5], {"metrics": 5}, [{"metrics": []}], [None]]),
    "finetune.json": (fine_tuned, [{"checkpoint": []}]),
    "evaluations.json": (evaluated, [{"data": "pictures", "pictures": 2, "alphas": x} for x in (5, [], {"1": 2})]),
    "options.json": (lambda file: claim(file.parent, {"a": 1}, result="*.npy"), [{"a": []}]),
    "00000_stats.json": (
        lambda file: _finished(file.parent, 0, {"a": 1}, ""),
        [{**STATS, name: "x"} for name in STATS if name not in ("bytes", "failed", "content")]
        + [{**STATS, "failures": {"a": 1}}],
    ),
    "metadata.parquet": (parquet(_written), [{"successes": x, "failures": x, "failed": x} for x in (1, [], "x")]),
    "broken.parquet": (_written, []),
    "other.parquet": (lambda file: _decided(file, {"a": 1}), []),
    "faults.part": (kept_faults, [[5, 5], [{"a": "x"}, {"a": []}], [{"a": 1}, {}], [{}]]),
    "config.yaml": (read_options, [[1], {"5": 6}, {"betas": 5, "dota": 1}]),
}


@pytest.mark.fault(
    "A file that a command has written has other content when it is read again", "A one-line error names the file"
)
@pytest.mark.parametrize("name", READERS)
def test_what_is_not_what_was_written_is_an_error_that_names_the_file(name: str, tmp_path: Path) -> None:
    read, wrong = READERS[name]
    for number, data in enumerate([*ANYTHING, *(json.dumps(value).encode() for value in wrong)]):
        if (name, data) in WHOLE:
            continue
        file = tmp_path / str(number) / name
        file.parent.mkdir()
        file.write_bytes(data)
        with pytest.raises((ValueError, OSError)) as caught:
            read(file)
        message = str(caught.value)
        assert str(file) in message or str(file.parent) in message, message
        assert "\n" not in message.strip(), message


@pytest.mark.parametrize("before", [{"a": 1, "names": "60b7"}, {}, {"b": 2}])
def test_folder_that_another_version_began_is_told(tmp_path: Path, before: dict[str, Any]) -> None:
    for name in ("options.json", "finetune.json"):
        (tmp_path / name).write_text(json.dumps(before))
    with pytest.raises(ValueError, match=r"created by another version of fastclip: choose another folder$"):
        claim(tmp_path, {"a": 1}, result="*.npy")
    with pytest.raises(ValueError, match=r"created by another version of fastclip: choose another folder$"):
        fine_tuned(tmp_path / "finetune.json")


def test_states_of_a_table_that_filter_wrote_otherwise(tmp_path: Path) -> None:
    file, options = tmp_path / "similarities.parquet", {"a": 1}
    schema = pa.schema([("state", pa.string())], metadata={"fastclip": json.dumps(options)})
    pq.write_table(pa.table([["of another time"]], schema), file)
    with pytest.raises(ValueError, match=r"similarities\.parquet was not written by this command"):
        _decided(file, options)
    assert _decided(file, {"a": 2}) is None


@pytest.mark.parametrize("data", [*ANYTHING, *(b'{"step": %s}' % x for x in (b"[]", b"{}", b"null", b"1e999", b'"x"'))])
def test_lines_of_metrics_that_are_none_are_left_out(tmp_path: Path, data: bytes) -> None:
    metrics, options = tmp_path / "metrics.jsonl", {"data": "digits", "model": "ViT-tiny"}
    (tmp_path / "config.yaml").write_text(json.dumps(options))
    whole = [b'{"step": 1, "loss": 2}', b'{"step": 2, "loss": 1}']
    metrics.write_bytes(whole[0] + b"\n" + data + b"\n" + whole[1] + b"\n" + data)
    run = read_run(tmp_path)
    assert run.series["loss"].values.tolist() == [2, 1] and run.steps == 2
    cut_metrics(metrics, 2)
    assert metrics.read_bytes().splitlines() == whole


@pytest.mark.parametrize("loss", [b"1" + b"0" * 400, b"[]", b'"x"', b"{}"])
def test_metric_that_is_no_number_is_left_out(tmp_path: Path, loss: bytes) -> None:
    (tmp_path / "config.yaml").write_text('{"data": "digits", "model": "ViT-tiny"}')
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2}\n{"step": 2, "loss": %s}\n' % loss)
    assert read_run(tmp_path).series["loss"].values.tolist() == [2]


@pytest.mark.parametrize("name", ["data", "model", "val_data", "precision", "max_steps"])
def test_report_names_the_option_that_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "config.yaml").write_text(json.dumps({"data": "digits", "model": "ViT-tiny", name: [5]}))
    with pytest.raises(ValueError, match=rf"config\.yaml must hold .* `model: ViT-B-32`: {name} is missing or invalid"):
        read_run(tmp_path)


@pytest.mark.parametrize("data", ANYTHING)
def test_what_can_be_made_anew_is_no_error(tmp_path: Path, data: bytes) -> None:
    told = tmp_path / "checkpoints" / "step-00000001" / "state.json"
    told.parent.mkdir(parents=True)
    told.write_bytes(data)
    assert _versions(tmp_path) == {}
    index: Any = SimpleNamespace(_about=told, _file=told)
    assert Approximate._read(index, SimpleNamespace(restore=lambda name: [1]))[0] is None


@pytest.mark.parametrize("samples", [None, "x", "-1"])
def test_part_of_other_metadata_is_computed_again(tmp_path: Path, samples: str | None) -> None:
    store = FeatureStore(SimpleNamespace(identity="x"), [], folder=tmp_path)  # type: ignore[arg-type]
    store.add(0, {"features": torch.ones(2, 1)})
    (file,) = store.folder.iterdir()
    assert len(store.parts()) == 1
    write_tensors(file, {"features": torch.ones(2, 1)}, None if samples is None else {"samples": samples})
    assert store.parts() == []


def test_tally_of_something_else_is_an_error() -> None:
    assert Tally.of({"a": 2}, {"a": ["x"]}).total == 2
    for counts, keys in ((None, None), ({"a": 1}, {}), ([], {}), ({"a": []}, {"a": []}), ({"a": 1}, {"a": 5})):
        with pytest.raises(ValueError, match="counts"):
            Tally.of(counts, keys)
