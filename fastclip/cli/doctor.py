"""``fastclip doctor``: check this installation."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fastclip.cli.help import describe
from fastclip.cli.outputs import add_force, owned_files
from fastclip.cli.printing import say

if TYPE_CHECKING:
    from fastclip.doctor import Diagnosis

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Show versions, GPUs, memory, environment variables and installed extras. Show for every backend whether it "
        "runs here, and if not, why; and which backend is used for each device and dtype. Then compare the softmax and "
        "the sigmoid loss of every backend with a float64 reference. Every problem comes with what to do about it. The "
        "exit status is 1 if the losses do not run or their errors exceed the promised limits. On a GPU, the first "
        "run takes longer, because Triton compiles its kernels.",
        "fastclip doctor",
        "fastclip doctor --json doctor.json",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="JSON file for the same findings, to attach to a bug report (default: no file)"
    )
    add_force(parser)
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from fastclip.doctor import diagnose
    from fastclip.system.durable import write_json

    with owned_files(args, "json"):
        diagnosis = diagnose()
        say(_text(diagnosis))
        if args.json is not None:
            findings = [finding._asdict() for finding in diagnosis.findings]
            tests = [{**row._asdict(), "ok": row.ok} for row in diagnosis.tests]
            write_json(args.json, {"usable": diagnosis.usable, "findings": findings, "tests": tests}, indent=1)
    return int(not diagnosis.usable)


def _text(diagnosis: Diagnosis) -> str:
    from fastclip.parity import table

    lines: list[str] = []
    section = None
    for finding in diagnosis.findings:
        if finding.section != section:
            section = finding.section
            lines += ["", section]
        mark = {"": " ", "warning": "!", "fault": "X"}[finding.state]
        lines.append(f"{mark} {finding.name:<18}{finding.value}")
        if finding.advice:
            lines.append(f"{'':<20}what to do: {finding.advice}")
    failed = sum(not row.ok for row in diagnosis.tests)
    faults, warned = (sum(finding.state == state for finding in diagnosis.findings) for state in ("fault", "warning"))
    lines += ["", "losses on a small batch, relative errors, each with its promised limit", table(diagnosis.tests), ""]
    if faults:
        lines.append("what to do: fix the lines marked X first\n")
    elif failed:
        lines.append("what to do: report this as a bug of fastclip, with the file that --json writes\n")
    state = "usable" if diagnosis.usable else "NOT usable"
    lines.append(f"{state}: {len(diagnosis.tests)} comparisons, {failed} failed; faults: {faults}, warnings: {warned}")
    return "\n".join(lines).lstrip("\n")
