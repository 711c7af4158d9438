"""The report of one run of the suite on one device: a JSON file of a versioned format, with units in the key names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mopeq_edge.atomic import atomic_write
from mopeq_edge.errors import FormatError

KIND = "mopeq-edge device report"
FORMAT = 1

PASSED, FAILED, SKIPPED = OUTCOMES = ("passed", "failed", "skipped")
_SECTIONS = ("device", "llama_cpp", "model", "options")


@dataclass(frozen=True)
class TestResult:
    """One test: ``name`` is "test_file.py::test_name[parameter]", ``reason`` why it failed or was skipped.

    ``figures`` are numbers with units in their names, None where nothing was measured; ``texts`` what was said.
    """

    __test__ = False

    name: str
    outcome: str
    seconds: float
    reason: str | None = None
    figures: Mapping[str, float | None] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Plain values: what the device, its llama.cpp, the file and the suite's options were, and every test."""

    mopeq_edge_version: str
    device: Mapping[str, Any]
    llama_cpp: Mapping[str, Any]
    model: Mapping[str, Any]
    options: Mapping[str, Any]
    tests: Sequence[TestResult]

    def counts(self) -> dict[str, int]:
        """Number of tests by outcome."""
        return {outcome: sum(test.outcome == outcome for test in self.tests) for outcome in OUTCOMES}

    def as_dict(self) -> dict[str, Any]:
        """As in the file."""
        return {
            "kind": KIND,
            "format": FORMAT,
            "mopeq_edge_version": self.mopeq_edge_version,
            **{name: dict(getattr(self, name)) for name in _SECTIONS},
            "outcome": {f"{outcome}_count": count for outcome, count in self.counts().items()},
            "tests": [
                {
                    "name": test.name,
                    "outcome": test.outcome,
                    "seconds": round(test.seconds, 3),
                    "reason": test.reason,
                    "figures": {name: _plain(value) for name, value in sorted(test.figures.items())},
                    "texts": dict(sorted(test.texts.items())),
                }
                for test in self.tests
            ],
        }


def write_report(path: Path, report: Report) -> None:
    """Write the file, whole or not at all. Raises :class:`OutputError`."""
    text = json.dumps(report.as_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as file:
        file.write(f"{text}\n".encode("utf-8", errors="replace"))


def read_report(path: Path) -> Report:
    """Read a file of :func:`write_report`. Raises :class:`FormatError` for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}); give a report of runtime_tests") from None
    except (ValueError, RecursionError):
        raise FormatError(f"{path}: expected a report of runtime_tests, found no JSON; make it again") from None
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise FormatError(
            f'{path}: expected a report of runtime_tests ("kind": "{KIND}"), found other JSON; give its --report file'
        )
    if found.get("format") != FORMAT:
        raise FormatError(
            f"{path}: is a report of format {found.get('format')!r}, expected {FORMAT}; "
            "make both reports with the same mopeq-edge"
        )
    try:
        return _report(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{path}: a damaged report ({error!r}); make it again") from None


def is_report(path: Path) -> bool:
    """Whether ``path`` holds a report of any format, so that a newer one may take its place."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("kind") == KIND


def _report(found: dict[str, Any]) -> Report:
    for name in _SECTIONS:
        if not isinstance(found[name], dict):
            raise TypeError(f"{name} is no object")
    return Report(
        str(found["mopeq_edge_version"]),
        **{name: found[name] for name in _SECTIONS},
        tests=tuple(_test(test) for test in found["tests"]),
    )


def _test(found: dict[str, Any]) -> TestResult:
    figures = {str(name): None if value is None else float(value) for name, value in found["figures"].items()}
    texts = {str(name): str(value) for name, value in found["texts"].items()}
    if found["outcome"] not in OUTCOMES:
        raise ValueError(f"outcome {found['outcome']!r}")
    reason = found["reason"]
    seconds = float(found["seconds"])
    return TestResult(
        str(found["name"]), found["outcome"], seconds, None if reason is None else str(reason), figures, texts
    )


def _plain(value: float | None) -> float | None:
    """JSON has no word for NaN and infinity."""
    return None if value is None or not math.isfinite(value) else value
