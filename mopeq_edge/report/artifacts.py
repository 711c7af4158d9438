"""What a report is made of: a finished GGUF, its work directory, and what ``validate --json`` said of it.

Everything is checked to belong together; what does not is left out, with the reason and the command that makes it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mopeq_edge.artifacts import read_json
from mopeq_edge.calibrate.statistics import Routing, read_routing
from mopeq_edge.convert import VALIDATION_FORMAT
from mopeq_edge.convert import VERSION as VALIDATION_VERSION
from mopeq_edge.errors import FormatError, MopeqError
from mopeq_edge.gguf_file import GGUFHeader
from mopeq_edge.json_file import load_json
from mopeq_edge.output_kvs import PLAN_KEY
from mopeq_edge.pipeline_calibrate import ROUTING_FILE
from mopeq_edge.plan.artifact import Plan, PlannedTensor, read_plan
from mopeq_edge.sensitivity.scores import Doubles
from mopeq_edge.sensitivity.table import SensitivityTable, read_table
from mopeq_edge.split import read_parts, whole_name
from mopeq_edge.study.rows import Row, RowFile
from mopeq_edge.validate.structure import find_plan

PLAN, SENSITIVITY, ROUTING = "plan", "sensitivity", "routing"
VALIDATION, CHECKS, GGUF = "validation", "checks", "gguf"

T = TypeVar("T")


@dataclass(frozen=True)
class Missing:
    """Why a part has no numbers, and the command that makes them."""

    why: str
    command: str


@dataclass(frozen=True)
class Artifacts:
    """``name`` as people know it; None for what there is not, and then ``missing`` says why, by part."""

    name: str
    work: Path
    headers: tuple[GGUFHeader, ...] = ()
    """Of the GGUF, in one file or several; empty where there is only a plan."""
    plan: Plan | None = None
    table: SensitivityTable | None = None
    routing: Routing | None = None
    validation: Mapping[str, Any] | None = None
    """What convert measured of this file."""
    checks: Mapping[str, Any] | None = None
    """What ``validate --json`` said of this file."""
    rows: tuple[Row, ...] = ()
    """What ``study`` measured in the same work directory."""
    missing: Mapping[str, Missing] = field(default_factory=dict)

    @property
    def path(self) -> Path | None:
        return self.headers[0].path if self.headers else None


def read_artifacts(path: Path, work: Path | None = None, checks: Path | None = None) -> Artifacts:
    """All that there is of ``path``, a GGUF or a work directory; ``work`` is ``OUT.mopeq`` unless given.

    Raises :class:`MopeqError` where there is neither a GGUF nor a plan, and for ``checks`` of another file.
    """
    if path.is_dir():
        folder, file = path, _file_of(path)
    else:
        folder, file = work if work is not None else _work_of(path), path
    headers = read_parts(file) if file is not None else ()
    name = whole_name(file) if file is not None else path.resolve().name
    shown = shlex.quote(name)
    missing: dict[str, Missing] = {}
    plan, why = find_plan(headers, folder) if headers else (read_plan(_required(folder)), "")
    if plan is None:
        missing[PLAN] = Missing(
            without_folders(why.partition("; give")[0], folder), f"mopeq-edge report {shown} --work-dir DIR"
        )
    if not headers:
        missing[GGUF] = Missing("the planned file is not written, or not beside the work directory", _EMIT)

    def read(part: str, reader: Callable[[], T], command: str) -> T | None:
        try:
            return reader()
        except MopeqError as error:
            missing[part] = Missing(without_folders(str(error), folder), command)
            return None

    table = read(SENSITIVITY, lambda: _table(folder, plan), _REPLAN)
    routing = read(ROUTING, lambda: _routing(folder, plan), _CALIBRATE)
    validation = read(VALIDATION, lambda: _validation(folder, headers, plan), _CONVERT)
    validate = f"mopeq-edge validate {shown} --json > checks.json; mopeq-edge report {shown} --validation checks.json"
    found = _checks(checks, headers) if checks is not None else None
    if found is None:
        missing[CHECKS] = Missing("no results of validate were given", validate)
    study = folder / "study.csv"
    rows = RowFile(study).rows if study.is_file() else ()
    return Artifacts(name, folder, headers, plan, table, routing, validation, found, rows, missing)


_EMIT = "mopeq-edge emit MODEL OUT"
_REPLAN = "mopeq-edge sensitivity MODEL; mopeq-edge plan MODEL --target-gb N"
_CALIBRATE = "mopeq-edge calibrate MODEL --text FILE"
_CONVERT = "mopeq-edge convert MODEL OUT --target-gb N --text FILE"


def _work_of(file: Path) -> Path:
    return file.with_name(f"{whole_name(file).removesuffix('.gguf')}.mopeq")


def _required(folder: Path) -> Path:
    plan = folder / "plan.json"
    if not plan.is_file():
        raise MopeqError(f"{folder}: expected a work directory with a plan.json, found none; give a GGUF or convert")
    return plan


def _file_of(folder: Path) -> Path | None:
    """The GGUF that the last conversion in ``folder`` wrote, if it lies beside it and has its plan."""
    if not (folder / "validation.json").is_file() or not (folder / "plan.json").is_file():
        return None
    name = read_json(folder / "validation.json", VALIDATION_FORMAT, VALIDATION_VERSION).get("output")
    # a name alone: an artifact does not say which other places are read
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
        return None
    file = folder.resolve().parent / name
    if not file.is_file():
        return None
    try:
        wanted = read_parts(file)[0].get(PLAN_KEY)
    except MopeqError:
        return None
    return file if wanted == read_plan(folder / "plan.json").sha256 else None


def without_folders(text: str, *folders: Path) -> str:
    """``text`` with names in the place of paths: a page is shown to others, and the same wherever it is made."""
    for folder in folders:
        for path in (folder, folder.resolve()):
            text = text.replace(f"{path}/", "")
    return text


def _table(folder: Path, plan: Plan | None) -> SensitivityTable:
    """The damages that ``plan`` was made of. Raises :class:`FormatError` for those of another run."""
    path = _known(folder, plan, f"sensitivity-{plan.quantized_with}.safetensors" if plan is not None else "")
    table = read_table(path)
    assert plan is not None
    for tensor in plan.tensors:
        if not plan.is_quantized(tensor):
            continue
        own = planned_damage(table, plan.sensitivity, tensor)
        if own is None or not np.isclose(own.sum(), tensor.damage, rtol=1e-6, atol=0):
            raise FormatError(f"{path}: was measured anew since the plan was made ('{tensor.name}' has another damage)")
    return table


def planned_damage(table: SensitivityTable, score: str, tensor: PlannedTensor) -> Doubles | None:
    """Damage [n_matrices] by ``score`` of ``tensor`` in its planned type or types; None where it was not measured."""
    errors, kind = table.errors.get(tensor.name), tensor.written_as()
    if errors is None or score not in errors.damage:
        return None
    damage: Doubles = errors.damage[score]
    n = damage.shape[1]
    kinds = [kind.name] * n if not isinstance(kind, tuple) else [""] * n
    for group in kind if isinstance(kind, tuple) else ():
        for expert in group.experts:
            if expert >= n:
                return None
            kinds[expert] = group.type.name
    if any(name not in errors.types for name in kinds):
        return None
    own: Doubles = damage[[errors.types.index(name) for name in kinds], np.arange(n)]
    return own


def _routing(folder: Path, plan: Plan | None) -> Routing:
    return read_routing(_known(folder, plan, ROUTING_FILE))


def _validation(folder: Path, headers: tuple[GGUFHeader, ...], plan: Plan | None) -> Mapping[str, Any]:
    found = read_json(_known(folder, plan, "validation.json"), VALIDATION_FORMAT, VALIDATION_VERSION)
    size = sum(header.file_size for header in headers)
    assert plan is not None
    if found.get("plan_sha256") != plan.sha256 or (headers and found.get("file_bytes") != size):
        raise FormatError(f"{folder / 'validation.json'}: is of another conversion in this work directory")
    return found


def _known(folder: Path, plan: Plan | None, name: str) -> Path:
    if plan is None:
        raise FormatError("the file's plan is not known")
    if not (folder / name).is_file():
        raise FormatError(f"{folder / name} is not there")
    return folder / name


def _checks(path: Path, headers: tuple[GGUFHeader, ...]) -> Mapping[str, Any]:
    """What ``validate --json`` printed. Raises :class:`FormatError` for anything else, and for another file's."""
    try:
        found = load_json(path)
    except (OSError, ValueError) as error:
        raise FormatError(
            f"{path}: cannot be read as JSON ({error}); run mopeq-edge validate OUT --json again"
        ) from None
    if not isinstance(found, dict) or not isinstance(found.get("checks"), list):
        raise FormatError(f"{path}: expected what mopeq-edge validate OUT --json prints, found something else")
    size = sum(header.file_size for header in headers)
    if headers and found.get("file_bytes") != size:
        raise FormatError(f"{path}: is of a file of {found.get('file_bytes')} bytes, this one has {size}; validate it")
    return found
