"""What was asked for and what came out: sizes, damage predicted and measured, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from mopeq_edge.card.files import CardFile
from mopeq_edge.convert import ImatrixChoice
from mopeq_edge.errors import FormatError
from mopeq_edge.json_file import is_number
from mopeq_edge.pipeline_fits import Fit
from mopeq_edge.plan.forecast import Forecast
from mopeq_edge.report.artifacts import Artifacts
from mopeq_edge.source.roles import Role, role_of
from mopeq_edge.split import whole_name
from mopeq_edge.summary import summarise
from mopeq_edge.vision.description import ENDING

NUMBERS = (
    *("kld_mean_nats", "kld_mean_standard_error_nats", "kld_median_nats", "kld_p99_9_nats", "kld_max_nats"),
    *("same_top_fraction", "ppl_source_per_token", "ppl_target_per_token", "positions_count"),
)
"""Of what convert measured, those that the report shows."""
TEXTS = ("library", "text_sha256", "source_sha256")

T = TypeVar("T")


@dataclass(frozen=True)
class Overview:
    """Bytes, bits per weight and predicted damage in ``unit``; ``measured`` has :data:`NUMBERS` and :data:`TEXTS`.

    None, or an empty string, for what is not known. ``beside``: bytes of files beside the GGUF, by name.
    """

    architecture: str
    n_layer: int | None
    n_expert: int | None
    n_expert_used: int | None
    layout: str
    budget_bytes: int | None
    file_bytes: int
    header_bytes: int
    bpw: float
    expert_bpw: float | None
    files: tuple[str, ...]
    beside: Mapping[str, int]
    smallest_bytes: int | None
    largest_bytes: int | None
    planner: str
    sensitivity: str
    unit: str
    predicted_damage: float | None
    gap: float | None
    sampling_error: float | None
    padding: str
    precision_map: str
    imatrix: str
    forecast: str
    fits: str
    measured: Mapping[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def overview(found: Artifacts, card: CardFile | None) -> Overview:
    """Of the GGUF, ``card``, and of the plan; of the plan alone where there is no GGUF."""
    plan, said = found.plan, found.validation or {}
    summary = summarise(found.path) if found.path is not None else None
    assert plan is not None or (card is not None and summary is not None)
    padding = plan.expert_padding if plan is not None else None
    mapped = plan.precision_map if plan is not None else None
    choice, forecast = _of(ImatrixChoice, said, "imatrix"), _of(Forecast, said, "forecast")
    fit = _of(Fit, said, "fits")
    error = said.get("relative_sampling_error")
    return Overview(
        architecture=card.architecture if card is not None else "",
        n_layer=summary.n_layer if summary is not None else None,
        n_expert=summary.n_expert if summary is not None else None,
        n_expert_used=summary.n_expert_used if summary is not None else None,
        layout=card.layout if card is not None else plan.layout if plan is not None else "",
        budget_bytes=plan.budget_bytes if plan is not None else None,
        file_bytes=card.file_bytes if card is not None else plan.file_bytes if plan is not None else 0,
        header_bytes=summary.header_bytes if summary is not None else plan.header_bytes if plan is not None else 0,
        bpw=card.bpw if card is not None else plan.bpw if plan is not None else 0.0,
        expert_bpw=card.expert_bpw if card is not None else _planned_expert_bpw(found),
        files=tuple(header.path.name for header in found.headers),
        beside=_beside(found),
        smallest_bytes=plan.smallest_bytes if plan is not None else None,
        largest_bytes=plan.largest_bytes if plan is not None else None,
        planner=plan.planner if plan is not None else "",
        sensitivity=plan.sensitivity if plan is not None else "",
        unit=plan.unit if plan is not None else "",
        predicted_damage=plan.damage if plan is not None else None,
        gap=plan.gap if plan is not None else None,
        sampling_error=float(error) if is_number(error) and error is not None else None,
        padding="" if padding is None else f"experts of {padding.width} neurons, with zeros up to {padding.padded}",
        precision_map="" if mapped is None or plan is None else mapped.sentence(plan.budget_bytes),
        imatrix=choice.sentence() if choice is not None else "",
        forecast=forecast.sentence() if forecast is not None else "",
        fits=fit.sentence() if fit is not None else "",
        measured=_measured(found, said),
    )


def _of(kind: type[T], said: Mapping[str, Any], key: str) -> T | None:
    """The dataclass ``kind`` that convert wrote under ``key``. Raises :class:`FormatError` for another form."""
    values = said.get(key)
    if values is None:
        return None
    try:
        made = kind(**{field.name: values[field.name] for field in fields(kind)})  # type: ignore[arg-type]
        made.sentence()  # type: ignore[attr-defined]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"validation.json: '{key}' is not as convert writes it ({error!r}); convert again") from None
    return made


def _measured(found: Artifacts, said: Mapping[str, Any]) -> dict[str, Any] | None:
    values = said.get("evaluation")
    if values is None:
        return None
    path = found.work / "validation.json"
    if not isinstance(values, dict):
        raise FormatError(f"{path}: its evaluation is no object; convert again")
    wrong = [key for key in NUMBERS if not is_number(values.get(key))]
    wrong += [key for key in TEXTS if not isinstance(values.get(key), str)]
    if wrong:
        raise FormatError(f"{path}: its evaluation lacks '{wrong[0]}' as convert writes it; convert again")
    return {key: values[key] for key in (*NUMBERS, *TEXTS)}


def _beside(found: Artifacts) -> dict[str, int]:
    """What sees pictures lies beside the GGUF under its name."""
    if found.path is None:
        return {}
    stem = whole_name(found.path).removesuffix(".gguf")
    names = [f"{stem}{ENDING}", f"{stem}{ENDING}.data", f"mmproj-{stem}.gguf", f"{stem}.mmproj.gguf"]
    paths = [found.path.with_name(name) for name in names]
    return {path.name: path.stat().st_size for path in paths if path.is_file()}


def _planned_expert_bpw(found: Artifacts) -> float | None:
    assert found.plan is not None
    stacks = [tensor for tensor in found.plan.tensors if role_of(tensor.name) is Role.EXPERT]
    weights = 0
    for tensor in stacks:
        n = 1
        for size in tensor.shape:
            n *= size
        weights += n
    return 8 * sum(tensor.nbytes for tensor in stacks) / weights if weights else None
