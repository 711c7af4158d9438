"""The files of a card: sizes, types, checksums and, from the work directory, how they were made and measured."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mopeq_edge.artifacts import read_json
from mopeq_edge.card.metadata import Origin, origin_of_kvs
from mopeq_edge.convert import VALIDATION_FORMAT
from mopeq_edge.convert import VERSION as VALIDATION_VERSION
from mopeq_edge.device_files import device_files
from mopeq_edge.errors import FormatError, MopeqError
from mopeq_edge.expert_groups.read import is_part
from mopeq_edge.gguf_file import GGUFHeader
from mopeq_edge.output_kvs import PLAN_KEY
from mopeq_edge.plan.artifact import Plan
from mopeq_edge.progress import BYTES, Progress
from mopeq_edge.source.roles import Role, role_of
from mopeq_edge.split import read_parts
from mopeq_edge.summary import summarise
from mopeq_edge.validate.structure import find_plan
from mopeq_edge.vision.description import vision_beside
from mopeq_edge.vision.mmproj import mmproj_beside


@dataclass(frozen=True)
class Measured:
    """Against the source, on held-out text: KLD in nats, ``same_top`` a fraction."""

    kld_mean: float
    kld_p99_9: float
    same_top: float
    n_tokens: int


@dataclass(frozen=True)
class CardFile:
    """One GGUF, split or not. ``bpw`` of tensor data, zeros of padded experts not counted where the plan is known."""

    name: str
    layout: str
    architecture: str
    n_expert: int
    file_bytes: int
    bpw: float
    expert_bpw: float | None
    types_by_role: dict[str, dict[str, int]]
    """Number of tensors of each type."""
    sha256: dict[str, str]
    """By file name, in order."""
    title: str
    version: str
    """Of the mopeq-edge that wrote it; empty for a file of another tool."""
    plan_sha256: str
    imatrix: bool
    imatrix_text: str
    made: dict[str, str]
    """``planner``, ``sensitivity``, ``quantized with`` and ``padding``, of the plan where it is known."""
    measured: Measured | None
    origin: Origin
    beside: dict[str, int]
    """Bytes by name of the files beside it that see pictures."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_card_file(path: Path, work: Path, progress: Progress) -> CardFile:
    """Read ``path``, the first file of a split one, with what ``work`` knows of the same plan.

    Raises :class:`MopeqError` for what is no model, or a name that no command line could hold.
    """
    headers = read_parts(path)
    unprintable = [header.path for header in headers if not header.path.name.isprintable()]
    if unprintable:
        raise MopeqError(f"{unprintable[0]!r}: expected a file name of printable characters; rename it")
    found = summarise(path)
    if found.architecture is None:
        raise MopeqError(f"{path}: no model but a file of type '{found.kind}'; give a GGUF of a model")
    if found.projector is not None:
        raise MopeqError(
            f"{path}: is no model but what sees pictures for one; give the model that it is for, which names it too"
        )
    plan, _ = find_plan(headers, work)
    kvs = headers[0]
    types: dict[str, Counter[str]] = {}
    expert_weights = 0
    for info in (info for header in headers for info in header.tensors):
        is_map = is_part(info.name) and info.name.endswith(".map")
        if is_map:
            continue
        role = role_of(info.name)
        types.setdefault(role.value, Counter())[info.type.name] += 1
        expert_weights += info.n_weights if role is Role.EXPERT else 0
    n_weights = plan.n_weights if plan is not None else found.n_weights
    # of padded experts the zeros count in the file and not in bits per weight
    real = expert_weights - (found.n_weights - n_weights)
    expert_bytes = found.bytes_by_role.get(Role.EXPERT.value, 0)
    dataset = _text(kvs, "quantize.imatrix.dataset")
    eyes = [found for found in (vision_beside(path), mmproj_beside(path)) if found.is_file()]
    beside = device_files(eyes[0]) if eyes else ()
    return CardFile(
        name=path.name,
        layout=found.layout,
        architecture=found.architecture,
        n_expert=found.n_expert,
        file_bytes=found.file_bytes,
        bpw=8 * found.tensor_bytes / n_weights,
        expert_bpw=8 * expert_bytes / real if real > 0 else None,
        types_by_role={role: dict(counts.most_common()) for role, counts in sorted(types.items())},
        sha256={
            **{header.path.name: _sha256(header.path, header.file_size, progress) for header in headers},
            **{file.name: _sha256(path.with_name(file.name), file.nbytes, progress) for file in beside},
        },
        title=_text(kvs, "general.name") or path.name.removesuffix(".gguf"),
        version=_text(kvs, "mopeq.version"),
        plan_sha256=_text(kvs, PLAN_KEY),
        imatrix="quantize.imatrix.entries_count" in kvs.kvs,
        # llama-quantize writes the path on the machine where it ran
        imatrix_text=dataset.replace("\\", "/").rpartition("/")[2],
        made=_made(plan) if plan is not None else {},
        measured=_measured(work / "validation.json", _text(kvs, PLAN_KEY), found.file_bytes),
        origin=origin_of_kvs(kvs.kvs),
        beside={file.name: file.nbytes for file in beside},
    )


def _made(plan: Plan) -> dict[str, str]:
    made = {
        "planner": plan.planner,
        "sensitivity": plan.sensitivity,
        "quantized with": f"{plan.quantized_with} imatrix",
    }
    if plan.expert_padding is not None:
        made["padding"] = f"experts of {plan.expert_padding.width} neurons padded with zeros to "
        made["padding"] += str(plan.expert_padding.padded)
    return made


def _measured(path: Path, plan_sha256: str, file_bytes: int) -> Measured | None:
    """What convert measured of the file with this plan and size; None if that was another one, or not measured."""
    if not path.is_file() or not plan_sha256:
        return None
    found = read_json(path, VALIDATION_FORMAT, VALIDATION_VERSION)
    if (found.get("plan_sha256"), found.get("file_bytes")) != (plan_sha256, file_bytes):
        return None
    values: Mapping[str, Any] | None = found.get("evaluation")
    if values is None:
        return None
    try:
        numbers = [float(values[key]) for key in ("kld_mean_nats", "kld_p99_9_nats", "same_top_fraction")]
        return Measured(numbers[0], numbers[1], numbers[2], int(values["positions_count"]))
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: not a validation as convert writes it ({error!r}); convert again") from None


def _sha256(path: Path, file_bytes: int, progress: Progress) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as file, progress.step(f"hashing {path.name}", file_bytes, BYTES) as step:
        while chunk := file.read(1 << 22):
            hasher.update(chunk)
            step.advance(len(chunk))
    return hasher.hexdigest()


def _text(header: GGUFHeader, key: str) -> str:
    value = header.get(key)
    return value if isinstance(value, str) else ""
