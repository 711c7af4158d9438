"""The work directory: artifacts of finished stages, and what each was made from.

``stages.json`` records for every stage the hash of its inputs and the hash of each file it left. A stage is
reused only when both still match, so a changed input, option or file runs it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mopeq_edge.artifacts import file_digest, read_json, write_json
from mopeq_edge.errors import FormatError

FORMAT, VERSION = "mopeq-edge work directory", 1


class WorkDirectory:
    """One directory of artifacts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, name: str) -> Path:
        """Where the artifact ``name`` is or will be."""
        return self.path / name

    def has(self, stage: str, made_from: str, digest_of: Callable[[Path], str] = file_digest) -> bool:
        """Whether ``stage`` was finished from inputs of hash ``made_from`` and its files are unchanged.

        ``digest_of`` may remember what it read: for files of many gigabytes.
        """
        record = self._stages().get(stage)
        if record is None or record["made_from"] != made_from:
            return False
        return all(self.file(n).is_file() and digest_of(self.file(n)) == h for n, h in record["files"].items())

    def files(self, stage: str) -> tuple[str, ...]:
        """Names of the files that ``stage`` left; empty if it never finished."""
        record = self._stages().get(stage)
        return tuple(sorted(record["files"])) if record is not None else ()

    def made_from(self, stage: str) -> str | None:
        """The input hash of the finished ``stage``, or None."""
        record = self._stages().get(stage)
        return str(record["made_from"]) if record is not None else None

    def forget(self, stage: str) -> None:
        """Note that the files of ``stage`` are about to change: until it is recorded again there are none.

        A process that is killed between two of them must not leave some of each kind that look finished.
        """
        stages = self._stages()
        if stages.pop(stage, None) is not None:
            write_json(self.file("stages.json"), FORMAT, VERSION, {"stages": stages})

    def record(
        self, stage: str, made_from: str, names: Sequence[str], digest_of: Callable[[Path], str] = file_digest
    ) -> None:
        """Note that ``stage`` is finished and left the files ``names``."""
        stages = self._stages()
        stages[stage] = {"made_from": made_from, "files": {name: digest_of(self.file(name)) for name in names}}
        write_json(self.file("stages.json"), FORMAT, VERSION, {"stages": stages})

    def _stages(self) -> dict[str, Any]:
        path = self.file("stages.json")
        if not path.exists():
            return {}
        try:
            records = read_json(path, FORMAT, VERSION)["stages"].items()
            return {stage: {"made_from": r["made_from"], "files": dict(r["files"])} for stage, r in records}
        except (FormatError, KeyError, TypeError, AttributeError, ValueError):
            # an unreadable record only means that nothing can be reused
            return {}
