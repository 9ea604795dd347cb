"""`fastclip doctor` describes a machine correctly, and detects wrong losses."""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastclip import cli, doctor
from fastclip.cli import main
from fastclip.doctor import Finding
from fastclip.parity import compare
from fastclip.system import cores, env, machine


@pytest.fixture(autouse=True)
def plain_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine without a GPU or environment variables, on which only the CPU's backends serve."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in env.in_effect():
        monkeypatch.delenv(name)
    there = {name: state for name, state in compare.backends().items() if name in ("cpu", "reference")}
    monkeypatch.setattr(compare, "backends", lambda: there)


def findings(part: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in part()}


def test_doctor_needs_torch_alone(tmp_path: Path) -> None:
    """The doctor needs torch alone. It runs in a process that cannot import any package of the extras."""
    others = ["PIL", "datasets", "ftfy", "huggingface_hub", "matplotlib", "numpy", "open_clip", "packaging", "pyarrow"]
    others += ["regex", "safetensors", "scipy", "sklearn", "timm", "tokenizers", "torchvision", "transformers", "yaml"]
    code = f"import sys; sys.modules.update(dict.fromkeys({others}))\n"
    code += "from fastclip.cli import main\nsys.exit(main(['doctor', '--json', 'report.json']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert re.fullmatch(r"usable: \d+ comparisons, 0 failed; faults: 0, warnings: \d+", last)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["usable"] and f"usable: {len(report['tests'])} comparisons" in last
    assert {"versions", "GPUs", "backends", "served by", "machine", "extras"} <= {
        x["section"] for x in report["findings"]
    }
    extras = {x["name"]: x["value"] for x in report["findings"] if x["section"] == "extras"}
    assert {*extras.values()} <= {"not installed", "not installed: this is the source tree only"}
    assert all(test["ok"] and test["errors"]["loss"] <= test["budgets"]["loss"] for test in report["tests"])


@pytest.mark.parametrize("name", ["contrastive_loss", "sigmoid_loss"])
def test_wrong_loss_is_seen(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = getattr(compare, name)
    monkeypatch.setattr(compare, name, lambda *args, **options: 1.0001 * right(*args, **options))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out and "what to do: report this as a bug of fastclip" in out and "NOT usable" in out


def test_every_backend_and_dtype_is_tested() -> None:
    rows = compare.alone(torch.device("cpu"))
    tested = {(row.backend, row.dtype, row.case) for row in rows}
    names = [name for name, state in compare.backends().items() if state == "available"]
    expected = {
        (name, dtype, case) for name in names for dtype in ("float32", "bfloat16", "float16") for case in compare._ALONE
    }
    assert expected | {("reference", "float64", case) for case in compare._ALONE} == tested
    assert all(row.ok for row in rows)


def test_variables_are_shown_and_misspelt_ones_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FASTCLIP_BACKEN": "cpu", "FASTCLIP_CACHE": "/x", "TRITON_INTERPRET": "1"}.items():
        monkeypatch.setenv(name, value)
    found = findings(doctor._environment)
    assert found["FASTCLIP_CACHE"] == ("environment", "FASTCLIP_CACHE", "/x", "", "")
    assert found["FASTCLIP_BACKEN"].state == "warning"
    assert found["FASTCLIP_BACKEN"].advice == "fastclip does not read it; did you mean FASTCLIP_BACKEND?"
    assert found["TRITON_INTERPRET"].state == "warning" and found["TRITON_INTERPRET"].advice.startswith("unset it")
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "much")
    assert findings(doctor._environment)["FASTCLIP_WORKSPACE_MB"].state == "fault"


def test_every_variable_that_is_read_is_known() -> None:
    read = set(re.findall(r'environ(?:\.get\(|\[)"(FASTCLIP_\w+)"', Path(env.__file__).read_text()))
    assert len(read) > 3 and read == set(env.OWN)


def test_unknown_backend_is_a_fault(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FASTCLIP_BACKEND", "warp")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "what to do: unset FASTCLIP_BACKEND" in out and "what to do: fix the lines marked X first" in out
    monkeypatch.setenv("FASTCLIP_BACKEND", "cuda")
    (found, *_) = doctor._served()
    assert found.state == "warning" and "cannot serve" in found.value


def test_dense_service_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "pick", lambda name, image: ("reference", None))
    assert {found.state for found in doctor._served()} == {"warning"}
    reason = "the native module was not built: `cmake -S` failed (no C++ compiler was found)"
    monkeypatch.setattr(doctor, "backends", lambda: {"cuda": "no driver", "cpu": reason, "reference": "available"})
    found = findings(doctor._backends)
    assert found["cpu"].state == "warning" and found["cpu"].advice.startswith(
        "install a C++ compiler, then rebuild fastclip in the folder of its source code"
    )
    assert found["cuda"].state == found["cuda"].advice == ""  # without a GPU nothing can be done


def test_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "nvidia_smi", lambda fields: ["NVIDIA H100", "535.1"])
    monkeypatch.setattr(torch.version, "cuda", None)
    (found,) = doctor._gpus()
    assert found.state == "warning" and "NVIDIA H100, driver 535.1" in found.value and "build for CUDA" in found.advice
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (found,) = doctor._gpus()
    assert "a driver for CUDA 13.0" in found.advice
    monkeypatch.setattr(machine, "nvidia_smi", lambda fields: [])
    (found,) = doctor._gpus()
    assert found.state == ""


def test_gpu_that_cannot_be_used_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(index: int) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nand more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", busy)
    monkeypatch.setattr(machine, "nvidia_smi", lambda fields: ["580.1"])
    (found,) = doctor._gpus()
    assert found.state == "warning" and found.value.endswith("busy or unavailable")


def test_small_containers_are_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in (("shared_memory_bytes", 64 * 2**20), ("open_files", 256), ("container_bytes", 3.5 * 2**30)):
        monkeypatch.setattr(machine, name, lambda value=value: value)
    monkeypatch.setattr(machine, "usable_cores", lambda: 1.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setenv("FASTCLIP_CACHE", str(tmp_path / "not" / "yet"))
    found = findings(doctor._machine)
    assert "--shm-size" in found["/dev/shm"].advice and found["/dev/shm"].value == "0.06 GiB"
    assert "ulimit -n" in found["open files"].advice
    assert "this container may use 3.5 GiB" in found["memory"].value
    assert found["processor"].advice.startswith("set OMP_NUM_THREADS=1: this process may use 1.5 cores")
    assert [f.state for f in found.values()] == ["warning", "", "warning", "warning", ""]
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert doctor._cache().state == "warning"


def test_limits_are_those_of_all_groups_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    groups, root = tmp_path / "groups", tmp_path / "cgroup"
    monkeypatch.setattr(cores, "_OWN_GROUPS", groups)
    monkeypatch.setattr(cores, "_CGROUPS", root)
    assert machine.container_bytes() == math.inf  # no control groups
    (root / "pod" / "inner").mkdir(parents=True)
    groups.write_text("0::/pod/inner\n")
    (root / "pod" / "memory.max").write_text("1073741824\n")
    (root / "pod" / "inner" / "memory.max").write_text("max\n")
    (root / "pod" / "inner" / "cpu.max").write_text("50000 100000\n")
    assert machine.container_bytes() == machine.available_bytes() == 2**30
    assert machine.usable_cores() == 0.5
    groups.write_text("4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n")
    (root / "memory").mkdir()
    (root / "memory" / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    assert machine.container_bytes() == math.inf
    (root / "memory" / "memory.limit_in_bytes").write_text(f"{2**29}\n")
    assert machine.container_bytes() == 2**29


@pytest.mark.parametrize(
    ("threads", "processes", "load", "sleep"),
    [
        *((None, 1, 0.0, False), (None, 1, 0.5, False), (None, 1, 1.0, True), (2, 1, 1.0, False), (1, 1, 9.0, False)),
        *((None, 2, 0.0, True), (2, 2, 0.0, False), (2, 4, 0.0, True)),
    ],
)
def test_threads_sleep_where_they_outnumber_the_free_cores(
    threads: int | None, processes: int, load: float, sleep: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Threads sleep if they outnumber the free cores, here of a machine with four cores."""
    for name, found in (("cpu_count", 4), ("sched_getaffinity", set(range(4))), ("getloadavg", (load, 0.0, 0.0))):
        monkeypatch.setattr(cores.os, name, lambda *of, found=found: found, raising=False)
    monkeypatch.setattr(cores, "_OWN_GROUPS", tmp_path / "none")
    monkeypatch.setattr(cores, "_SIBLINGS", tmp_path / "none")
    assert cores.contended(threads, processes) is sleep
    if threads is None and processes == 1:  # one thread per core, with two hardware threads each
        (tmp_path / "some").write_text("1\n")
        monkeypatch.setattr(cores, "_SIBLINGS", tmp_path / "some")
        assert not cores.contended(None)
    (tmp_path / "group").write_text("0::/\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    monkeypatch.setattr(cores, "_OWN_GROUPS", tmp_path / "group")
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path)
    assert cores.contended(4) and not cores.contended(1)  # one and a half cores are allowed
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    for name, many in (("cpu_count", 64), ("sched_getaffinity", set(range(64))), ("getloadavg", (6.0, 0.0, 0.0))):
        monkeypatch.setattr(cores.os, name, lambda *of, many=many: many)
    assert not cores.contended(4)  # four cores of 64 are allowed, and others run six threads


def test_setting_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "contended", lambda threads, processes: (threads, processes) == (3, 2))
    for name in env._SPINNING:
        monkeypatch.setenv(name, "")
    for name, value in (("OMP_NUM_THREADS", "3,1"), ("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert not env.let_threads_sleep()  # torch has read it already
    monkeypatch.delitem(sys.modules, "torch")
    for name in env._SPINNING:
        monkeypatch.setenv(name, "7")
        assert env.let_threads_sleep() == "" and env.in_effect()[name] == "7"
        monkeypatch.setenv(name, "")
    assert env.let_threads_sleep() == "OMP_WAIT_POLICY=PASSIVE" and env.in_effect()["OMP_WAIT_POLICY"] == "PASSIVE"
    assert env.let_threads_sleep() == "" and "GOMP_SPINCOUNT" not in env.in_effect()


@pytest.mark.parametrize(("threads", "spins"), [("", True), ("2", True), ("1", False)])
def test_threads_spin_briefly_where_cores_are_free(threads: str, spins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that starts later cannot be foreseen, so threads on free cores do not spin for long either."""
    monkeypatch.setattr(env, "contended", lambda threads, processes: False)
    monkeypatch.delitem(sys.modules, "torch")
    for name in env._SPINNING:
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert env.let_threads_sleep() == ("GOMP_SPINCOUNT=3000" if spins else "")
    assert env.in_effect().get("GOMP_SPINCOUNT") == ("3000" if spins else None)
    assert "OMP_WAIT_POLICY" not in env.in_effect()
    assert any("fastclip's commands set" in finding.value for finding in doctor._environment()) is spins


@pytest.mark.parametrize("command", ["train", "finetune", "eval", "embed", "search", "bench"])
def test_commands_let_threads_sleep(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All commands but bench, which times what a program of the user would see."""
    seen: list[str] = []
    monkeypatch.setattr(cli, "let_threads_sleep", lambda: "NAME=VALUE")
    monkeypatch.setattr(cli, "prepare_streams", lambda: None)
    monkeypatch.setattr(cli.gc, "freeze", lambda: None)
    parser = argparse.ArgumentParser()
    parser.set_defaults(command=command, run=lambda args: seen.append(args.threads_sleep))
    monkeypatch.setattr(cli, "_parser", lambda: parser)
    monkeypatch.setattr(sys, "argv", ["fastclip"])
    assert cli.main() == 0
    assert seen == ["" if command == "bench" else "NAME=VALUE"]


def test_lacking_extras_are_named_with_the_line_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2.8", "timm>=1.0.20; extra == 'models'", 'transformers<6,>=5; extra == "models"']
    lines += ["pillow; extra == 'models'", "fastclip-kernels[models]; extra == 'train'", "tqdm; extra == 'train'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: lines)
    versions = {"timm": "1.0.9", "transformers": "5.24.0", "pillow": "13.0"}
    monkeypatch.setattr(doctor, "installed_version", lambda name: versions.get(name, ""))
    found = findings(doctor._extras)
    assert found["models"].value == "lacks timm>=1.0.20 (not 1.0.9)"
    assert found["train"].value == "lacks timm>=1.0.20 (not 1.0.9), tqdm"
    assert "run pip install '.[train]' in the folder of fastclip's source code" in found["train"].advice
    assert found["hf"].value == "installed"
    versions |= {"timm": "1.1", "transformers": "6.0", "tqdm": "4"}
    assert findings(doctor._extras)["train"].value == "lacks transformers<6,>=5 (not 6.0)"
