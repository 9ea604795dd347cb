"""Diagnosis of the installation and the machine, with advice for each problem, as `fastclip doctor` prints it."""

from __future__ import annotations

import difflib
import importlib.metadata
import math
import os
import platform
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastclip._backends import backends, build_info, pick
from fastclip._backends.advice import mending
from fastclip.parity.compare import Row, alone
from fastclip.system import env, machine
from fastclip.system.cores import contended
from fastclip.system.installed import install_advice, installed_version

__all__ = ["Diagnosis", "Finding", "diagnose"]

DISTRIBUTION = "fastclip-kernels"
EXTRAS = {
    "models": "encoders, tokenizers, checkpoints",
    "train": "fastclip train, eval and data",
    "search": "fastclip search",
    "hf": "data from the Hugging Face library `datasets`",
    "remote": "data at https:// addresses",
}
_LIBRARIES = {
    "open_clip": "open_clip_torch",
    "timm": "timm",
    "transformers": "transformers",
    "torchvision": "torchvision",
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GIB, _LEAST_FILES = 2**30, 1024


class Finding(NamedTuple):
    """One line of the diagnosis."""

    section: str
    name: str
    value: str
    state: str = ""  # "" if all is well (advice is then optional), "warning", or "fault": the losses do not run
    advice: str = ""  # what to do about it


def _finding(section: str, name: str, value: str, advice: str = "") -> Finding:
    """Return a finding that is a warning if there is advice."""
    return Finding(section, name, value, "warning" if advice else "", advice)


class Diagnosis(NamedTuple):
    """Result of `diagnose`."""

    findings: list[Finding]
    tests: list[Row]  # errors of both losses on every backend and dtype, compared with float64

    @property
    def usable(self) -> bool:
        """True if the losses run on this machine and are accurate."""
        return all(row.ok for row in self.tests) and all(finding.state != "fault" for finding in self.findings)


def diagnose() -> Diagnosis:
    """Examine this machine and installation, and run every backend on a small batch.

    This takes a few seconds, or longer if Triton must first compile its kernels for this GPU.
    """
    parts = (_versions, _gpus, _backends, _served, _environment, _machine, _extras)
    findings = [finding for part in parts for finding in part()]
    return Diagnosis(findings, [row for device in _devices() for row in alone(device)])


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def _versions() -> Iterator[Finding]:
    built = build_info()
    versions = {"fastclip": built["fastclip"], "python": platform.python_version(), "torch": built["torch"]}
    versions |= {"triton": built["triton"]} | {name: installed_version(pip) for name, pip in _LIBRARIES.items()}
    versions |= {"torch's CUDA": torch.version.cuda or "", "torch's ROCm": torch.version.hip or ""}
    versions |= {"native CPU": built["cpu"], "native CUDA": built["cuda"], "system": platform.platform()}
    for name, text in versions.items():
        yield Finding("versions", name, text or "none")


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        value, advice = machine.unseen_gpu() or ("the losses run on the CPU", "")
        yield _finding("GPUs", "none", value, advice)
        return
    driver = "".join(f", driver {text}" for text in machine.nvidia_smi("driver_version"))
    for index in range(torch.cuda.device_count()):
        try:
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError as error:  # another process uses it exclusively, or its memory is full
            message = str(error).splitlines()[0]  # the following lines are about debugging CUDA
            yield _finding("GPUs", f"cuda:{index}", message, "choose other GPUs with CUDA_VISIBLE_DEVICES")
            continue
        about = f"{properties.name}, compute capability {properties.major}.{properties.minor}{driver}"
        yield Finding("GPUs", f"cuda:{index}", f"{about}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free")


def _backends() -> Iterator[Finding]:
    capabilities = [torch.cuda.get_device_capability(k) for k in range(torch.cuda.device_count())]
    nvidia = torch.version.cuda is not None and torch.cuda.is_available()
    # No advice for a backend that cannot run on this machine anyway
    wanted = {"cpu": True, "triton": bool(capabilities), "cuda": nvidia and (9, 0) in capabilities}
    for name, state in backends().items():
        advice = mending(name, state) if state != "available" and wanted.get(name) else ""
        yield _finding("backends", name, state, advice)


def _served() -> Iterator[Finding]:
    unset = "unset FASTCLIP_BACKEND"
    for device in _devices():
        for dtype in _DTYPES:
            name = f"{str(dtype).removeprefix('torch.')} on {device.type}"
            try:
                chosen = pick(None, torch.empty(1, 1, dtype=dtype, device=device))[0]
            except RuntimeError as error:  # FASTCLIP_BACKEND names a backend that refuses
                yield _finding("served by", name, str(error), unset)
                continue
            except ValueError as error:
                # FASTCLIP_BACKEND is not the name of a backend: the other lines would repeat this
                yield Finding("served by", name, str(error), "fault", unset)
                return
            if chosen == "reference" and env.backend() != "reference":
                dense = "reference, which is slow and needs much memory: it stores all N x N similarities"
                yield _finding("served by", name, dense, "see the backends above: no fused backend is available")
            else:
                yield Finding("served by", name, chosen)


def _environment() -> Iterator[Finding]:
    for name, value in env.in_effect().items():
        state = advice = ""
        if name.startswith("FASTCLIP_") and name not in env.OWN + env.OF_BUILDS:
            close = difflib.get_close_matches(name, env.OWN, 1)
            state, advice = "warning", f"fastclip does not read it{'; did you mean ' + close[0] + '?' if close else ''}"
        elif name == "TRITON_INTERPRET" and value != "0":
            state, advice = "warning", "unset it: it makes Triton's kernels run as Python on the CPU, for debugging"
        elif f"{name}={value}" in env.SLEEPING:
            value += ", which fastclip's commands set unless you choose how OpenMP's threads wait"
        elif name == "FASTCLIP_WORKSPACE_MB":
            try:
                env.workspace_bytes()
            except ValueError as error:
                state, advice = "fault", str(error)
        yield Finding("environment", name, value, state, advice)


def _machine() -> Iterator[Finding]:
    yield _processor()
    memory, limit = machine.memory_bytes(), machine.container_bytes()
    allowed = f", of which this container may use {limit / _GIB:.1f} GiB" if limit < memory else ""
    yield Finding("machine", "memory", f"{memory / _GIB:.1f} GiB{allowed}, {machine.available_bytes() / _GIB:.1f} free")
    if (shared := machine.shared_memory_bytes()) is not None:
        advice = "the processes that load data die if it is full: start the container with docker run --shm-size=8g"
        advice += " (or --ipc=host), mount a larger /dev/shm, or set --workers 0"
        yield _finding("machine", "/dev/shm", f"{shared / _GIB:.2f} GiB", advice if shared < _GIB else "")
    if (files := machine.open_files()) is not None:
        advice = "run ulimit -n 65536: the processes that load data send batches through open files"
        yield _finding("machine", "open files", f"{files:,}", advice if files < _LEAST_FILES else "")
    yield _cache()


def _processor() -> Finding:
    cores, threads = machine.usable_cores(), torch.get_num_threads()
    whole = max(1, math.floor(cores))
    value = f"{machine.processor()}; {cores:g} of {os.cpu_count()} cores, torch's threads: {threads}"
    if threads > math.ceil(cores):
        advice = f"set OMP_NUM_THREADS={whole}: this process may use {cores:g} cores, and more threads only wait"
        return _finding("machine", "processor", value, advice)
    note = ""  # a note, not a warning: it may be intended
    if threads < whole and "OMP_NUM_THREADS" in env.in_effect():
        note = "unset OMP_NUM_THREADS, which keeps torch from using the other cores"
    elif contended(threads):
        note = (
            "the cores are busy: fastclip's commands let waiting threads sleep at once (OMP_WAIT_POLICY=PASSIVE), "
            "unless you set OMP_WAIT_POLICY, GOMP_SPINCOUNT or KMP_BLOCKTIME"
        )
    return Finding("machine", "processor", value, "", note)


def _cache() -> Finding:
    folder = env.cache_folder()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())  # it may not exist yet
    free = shutil.disk_usage(existing).free
    value, advice = f"{folder}, {free / _GIB:.1f} GiB free", ""
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        value, advice = f"{value}; not writable", "set FASTCLIP_CACHE to a folder that you can write to"
    elif free < _GIB:
        advice = "set FASTCLIP_CACHE to a folder on a disk with more space"
    return _finding("machine", "cache", value, advice)


def _extras() -> Iterator[Finding]:
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        bare = "not installed: this is the source tree only"
        yield Finding("extras", DISTRIBUTION, bare, "", install_advice())
        return
    for extra, what in EXTRAS.items():
        try:
            missing = sorted(_missing(lines, extra))
            value = f"lacks {', '.join(missing)}" if missing else "installed"
        except ModuleNotFoundError:  # the package `packaging`, which every extra installs, is missing
            value = "not installed"
        advice = "" if value == "installed" else f"for {what}: {install_advice(extra)}"
        yield Finding("extras", extra, value, "", advice)


def _missing(lines: list[str], extra: str) -> set[str]:
    """Return the packages required by an extra, or by one it includes, that are missing or have a wrong version."""
    from packaging.requirements import Requirement  # the losses do not need it

    missing: set[str] = set()
    for requirement in map(Requirement, lines):
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name == DISTRIBUTION:
            missing.update(*(_missing(lines, other) for other in requirement.extras))
        elif not (installed := installed_version(requirement.name)):
            missing.add(requirement.name)
        elif not requirement.specifier.contains(installed, prereleases=True):
            missing.add(f"{requirement.name}{requirement.specifier} (not {installed})")
    return missing
