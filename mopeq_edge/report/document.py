"""The whole report as plain numbers: what the page shows and ``report --json`` prints."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mopeq_edge.artifacts import digest
from mopeq_edge.card.files import CardFile, read_card_file
from mopeq_edge.errors import FormatError, MopeqError
from mopeq_edge.json_file import is_count, is_number
from mopeq_edge.output_kvs import PLAN_KEY
from mopeq_edge.pipeline import imatrix_file
from mopeq_edge.plan.artifact import PER_EXPERT
from mopeq_edge.progress import Progress
from mopeq_edge.report.artifacts import (
    CHECKS,
    GGUF,
    PLAN,
    ROUTING,
    SENSITIVITY,
    Artifacts,
    Missing,
    without_folders,
)
from mopeq_edge.report.coverage import Coverage, coverage
from mopeq_edge.report.device import Memory, memory
from mopeq_edge.report.experts import ExpertMap, expert_map
from mopeq_edge.report.overview import Overview, overview
from mopeq_edge.report.presets import Preset, presets
from mopeq_edge.report.replan import WIDEST, Curve, replan
from mopeq_edge.report.sizes import Size, sizes
from mopeq_edge.study.report import label

FORMAT, VERSION = "mopeq-edge report", 1
N_POINTS = 8
"""Replans of each layout, unless asked otherwise."""


@dataclass(frozen=True)
class Routers:
    """Agreement of one layer's router in llama.cpp with the ONNX reference, in tokens."""

    layer: int
    tokens: int
    same: int
    ties: int
    wrong: int
    noise: float


@dataclass(frozen=True)
class Studied:
    """A file that ``study`` measured: on a text of its own, so not to be compared with convert's numbers."""

    name: str
    layout: str
    file_bytes: int
    predicted_fisher: float | None
    kld_mean: float
    same_top: float


@dataclass(frozen=True)
class Report:
    """Every part, or why it is missing."""

    name: str
    title: str
    overview: Overview
    sizes: tuple[Size, ...]
    experts: ExpertMap | Missing
    curve: Curve | Missing
    presets: tuple[Preset, ...] | Missing
    studied: tuple[Studied, ...]
    coverage: Coverage | Missing
    routers: tuple[Routers, ...] | Missing
    memory: Memory | Missing
    commands: Mapping[str, str]
    provenance: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with units in the names or beside them."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "title": self.title,
            "overview": self.overview.as_dict(),
            "sizes": [{**asdict(size), "bpw": size.bpw} for size in self.sizes],
            "experts": _plain(self.experts),
            "curve": _plain(self.curve),
            "presets": _plain(self.presets),
            "studied": _plain(self.studied),
            "coverage": _plain(self.coverage),
            "routers": _plain(self.routers),
            "memory": _plain(self.memory),
            "commands": dict(self.commands),
            "provenance": dict(self.provenance),
        }


def make_report(found: Artifacts, progress: Progress, n_points: int = N_POINTS) -> Report:
    """Compute what the artifacts do not say themselves; with 0 ``n_points`` no other plans are made.

    Raises :class:`MopeqError` for a file that is no model of experts, and for artifacts of another form.
    """
    card = read_card_file(found.path, found.work, progress) if found.path is not None else None
    drawn = _curve(found, n_points, progress)
    largest = max((point.file_bytes for point in drawn.points), default=0) if isinstance(drawn, Curve) else 0
    return Report(
        name=found.name,
        title=card.title if card is not None else found.name,
        overview=overview(found, card),
        sizes=sizes(found),
        experts=expert_map(found),
        curve=drawn,
        presets=_presets(found, largest, n_points, progress),
        studied=tuple(
            Studied(label(r), r.layout, r.file_bytes, r.predicted_fisher, r.kld_mean, r.same_top) for r in found.rows
        ),
        coverage=coverage(found.routing) if found.routing is not None else found.missing[ROUTING],
        routers=_routers(found.checks) if found.checks is not None else found.missing[CHECKS],
        memory=_memory(found),
        commands=_commands(found),
        provenance=_provenance(found, card),
    )


def _curve(found: Artifacts, n_points: int, progress: Progress) -> Curve | Missing:
    if found.plan is None or found.table is None:
        return found.missing[PLAN if found.plan is None else SENSITIVITY]
    again = f"mopeq-edge report {shlex.quote(found.name)} -o report.html"
    if not found.headers:
        return found.missing[GGUF]
    if n_points == 0:
        return Missing("other plans were not wanted (--points 0)", again)
    try:
        return replan(found.plan, found.table, found.headers[0], n_points, progress)
    except MopeqError as error:
        return _failed(error, found, "mopeq-edge sensitivity MODEL")


def _presets(found: Artifacts, largest: int, n_points: int, progress: Progress) -> tuple[Preset, ...] | Missing:
    plan, table = found.plan, found.table
    if plan is None or table is None:
        return found.missing[PLAN if plan is None else SENSITIVITY]
    again = "mopeq-edge runtime install --stock; mopeq-edge convert MODEL OUT --target-gb N"
    if n_points == 0:
        return Missing("other plans were not wanted (--points 0)", f"mopeq-edge report {shlex.quote(found.name)}")
    if plan.expert_padding is not None:
        return Missing("llama-quantize cannot pad experts as this file does", "mopeq-edge plan --pad-experts never")
    sources = [found.work / name for name in ("source.gguf", "converted.gguf")]
    source = next((path for path in sources if path.is_file()), None)
    if source is None:
        return Missing("llama-quantize asks for the source as a GGUF, which is not in the work directory", again)
    try:
        imatrix = found.work / imatrix_file(plan.quantized_with)
        return presets(plan, table, source, imatrix, largest or int(WIDEST * plan.file_bytes), progress)
    except (MopeqError, KeyError) as error:
        return _failed(error, found, again)


def _failed(error: Exception, found: Artifacts, command: str) -> Missing:
    folders = [found.work] if found.path is None else [found.work, found.path.parent]
    return Missing(without_folders(str(error), *folders), command)


def _routers(checks: Mapping[str, Any]) -> tuple[Routers, ...] | Missing:
    rows = checks.get("routing")
    counts = ("layer", "tokens", "same", "ties", "wrong")
    if not isinstance(rows, list):
        raise FormatError("--validation: has no 'routing'; make it with this version's mopeq-edge validate OUT --json")
    for row in rows:
        if not isinstance(row, dict) or not all(is_count(row.get(key)) for key in counts):
            raise FormatError("--validation: its 'routing' is not as validate --json writes it; validate again")
        if not is_number(row.get("noise")) or sum(row[key] for key in counts[2:]) != row["tokens"]:
            raise FormatError("--validation: its 'routing' does not add up; validate again")
    if not rows:
        left_out = (c for c in checks["checks"] if isinstance(c, dict) and c.get("passed") is None)
        why = next((str(c.get("message")) for c in left_out), "no router was compared")
        return Missing(f"validate left it out ({why})", "mopeq-edge validate OUT --json")
    return tuple(Routers(**{key: row[key] for key in counts}, noise=float(row["noise"])) for row in rows)


def _memory(found: Artifacts) -> Memory | Missing:
    if not found.headers:
        return found.missing[GGUF]
    try:
        return memory(found.headers, found.headers[0].path.name)
    except MopeqError as error:
        return _failed(error, found, "mopeq-edge memory OUT --ctx N")


def _commands(found: Artifacts) -> dict[str, str]:
    first = found.headers[0].path.name if found.headers else "OUT.gguf"
    name = shlex.quote(first)
    grouped = found.plan is not None and found.plan.layout == PER_EXPERT
    if found.headers:
        grouped = any(".ffn_" in t.name and t.name.endswith("_exps.map") for h in found.headers for t in h.tensors)
    said = {} if not grouped else {"build the llama.cpp that runs it": "mopeq-edge runtime install"}
    said["chat or complete"] = f"mopeq-edge run {name} -p Hello" if grouped else f"llama-cli -m {name} -p Hello"
    said["serve"] = f"mopeq-edge serve {name} --port 8080" if grouped else f"llama-server -m {name} --port 8080"
    said["will it fit?"] = f"mopeq-edge memory {name} --ctx 4096"
    said["is every byte as written?"] = f"mopeq-edge verify {name}"
    said["is it what it should be?"] = f"mopeq-edge validate {name}"
    return said


def _provenance(found: Artifacts, card: CardFile | None) -> dict[str, str]:
    said: dict[str, str] = {}
    if card is not None:
        said |= {f"SHA-256 of {name}": value for name, value in card.sha256.items()}
        said |= {"mopeq-edge that wrote it": card.version, "calibration text": card.imatrix_text}
    if found.headers:
        kvs = found.headers[0]
        for key, what in (("mopeq.source.sha256", "SHA-256 of the source"), (PLAN_KEY, "SHA-256 of the plan")):
            value = kvs.get(key)
            said[what] = value if isinstance(value, str) else ""
    elif found.plan is not None:
        said["SHA-256 of the plan"] = found.plan.sha256
    if found.plan is not None:
        said["imatrix of the sensitivity"] = found.plan.quantized_with
        said["the plan was made from"] = found.plan.made_from
    if found.table is not None:
        said["the sensitivity was made from"] = found.table.made_from
    if found.validation is not None:
        said["validation"] = digest(dict(found.validation))
        evaluation = found.validation.get("evaluation")
        if isinstance(evaluation, dict) and isinstance(evaluation.get("library"), str):
            said["measured in"] = evaluation["library"]
            said["SHA-256 of the measured text"] = str(evaluation.get("text_sha256", ""))
    return {what: value for what, value in said.items() if value}


def _plain(part: Any) -> Any:
    if isinstance(part, Missing):
        return {"missing": part.why, "command": part.command}
    if isinstance(part, tuple):
        return [asdict(item) for item in part]
    return part.as_dict()
