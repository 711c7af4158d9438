"""Collects what every test found and writes the report, behind each of them: a crash leaves what was known before."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mopeq_edge import __version__
from mopeq_edge.device_report.build import Build, tool_version
from mopeq_edge.device_report.document import FAILED, PASSED, SKIPPED, Report, TestResult, write_report
from mopeq_edge.device_report.machine import describe
from mopeq_edge.errors import MopeqError
from mopeq_edge.memory.device import Machine, this_machine
from mopeq_edge.output_kvs import PLAN_KEY
from mopeq_edge.split import read_parts
from mopeq_edge.summary import summarise

LONGEST_REASON = 600


class Recorder:
    """A plugin of one pytest run, in the process that collects the results."""

    def __init__(self, path: Path, model: Path, build: Build, options: Mapping[str, Any]) -> None:
        self.path, self._options = path, dict(options)
        self._tests: dict[str, TestResult] = {}
        self._problem: str | None = None
        # asked before the model takes its memory
        machine = this_machine()
        self._device, self._about = describe(machine), describe_model(model)
        self._llama_cpp = describe_build(build, machine)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("/")[2]
        before = self._tests.get(name)
        seconds = report.duration + (before.seconds if before else 0.0)
        outcome, reason = (before.outcome, before.reason) if before else (PASSED, None)
        if report.failed:
            outcome, reason = FAILED, _reason(report)
        elif report.skipped and outcome == PASSED:
            outcome, reason = SKIPPED, _reason(report)
        properties = dict(report.user_properties)
        figures = {key: _number(value) for key, value in properties.items() if not isinstance(value, str)}
        texts = {key: value for key, value in properties.items() if isinstance(value, str)}
        self._tests[name] = TestResult(name, outcome, seconds, reason, figures, texts)

    def pytest_runtest_logfinish(self) -> None:
        self._write()

    def pytest_sessionfinish(self) -> None:
        self._write()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._problem is None:
            terminalreporter.write_line(f"Report: {self.path}")
        else:
            terminalreporter.write_line(f"No report: {self._problem}", red=True)

    def report(self) -> Report:
        """All that is known at this moment."""
        tests = tuple(self._tests.values())
        said = {name: text for test in tests for name, text in test.texts.items()}
        return Report(
            mopeq_edge_version=__version__,
            device=self._device,
            llama_cpp={**self._llama_cpp, **{name: said.get(name) for name in ("binding", "backends")}},
            model=self._about,
            options=self._options,
            tests=tests,
        )

    def _write(self) -> None:
        try:
            write_report(self.path, self.report())
            self._problem = None
        except MopeqError as error:
            self._problem = str(error)


def describe_model(path: Path) -> dict[str, Any]:
    """What the file is; of a broken one the name and the size alone."""
    found: dict[str, Any] = {"name": path.name, "file_bytes": None, "header_sha256": None, "plan_sha256": None}
    try:
        found["file_bytes"] = path.stat().st_size
        headers = read_parts(path)
        summary = summarise(path)
    except (MopeqError, OSError):
        return found
    digest = hashlib.sha256()
    for header in headers:
        with header.path.open("rb") as file:
            digest.update(file.read(header.data_start))
    return {
        **found,
        "file_bytes": summary.file_bytes,
        "header_sha256": digest.hexdigest(),
        "plan_sha256": headers[0].get(PLAN_KEY),
        "architecture": summary.architecture,
        "layout": summary.layout,
        "layers_count": summary.n_layer,
        "experts_count": summary.n_expert,
        "experts_used_count": summary.n_expert_used,
        "weights_count": summary.n_weights,
        "bits_per_weight": summary.bpw,
        "bytes_by_type": dict(summary.bytes_by_type),
    }


def describe_build(build: Build, machine: Machine) -> dict[str, Any]:
    """What is known of the llama.cpp before it is used."""
    programs = [program for program in map(build.tool, ("llama-server", "llama-cli", "llama-bench")) if program]
    version = tool_version(programs[0]) if programs else None
    devices = machine.run((str(programs[0]), "--list-devices")) if programs else None
    return {
        "given_by": build.given_by,
        "tools_directory": _without_home(build.tools),
        "library_directory": _without_home(build.library),
        "version": version.version if version else None,
        "build_number": version.build_number if version else None,
        "commit": version.commit if version else None,
        "devices": _devices(devices),
        "runs_expert_groups": build.runs_expert_groups,
    }


def _devices(text: str | None) -> list[str] | None:
    """The lines below "Available devices:"; None where the tool does not say."""
    head, found, rest = (text or "").partition("Available devices:\n")
    del head
    lines = [line.strip() for line in rest.splitlines() if line.startswith(" ")]
    return [line for line in lines if line != "(none)"] if found else None


def _without_home(path: Path | None) -> str | None:
    """A user's name is nobody's business."""
    if path is None:
        return None
    home = Path.home()
    return f"~/{path.relative_to(home).as_posix()}" if path.is_relative_to(home) else str(path)


def _reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        text = report.longrepr[2].removeprefix("Skipped: ")
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        text = crash.message if crash is not None else report.longreprtext
    return " ".join(text.split())[:LONGEST_REASON]


def _number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
