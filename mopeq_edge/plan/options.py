"""What a plan is asked for, apart from its budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mopeq_edge.errors import PlanError
from mopeq_edge.ggml.types import BY_NAME, QUANTIZABLE, GgmlType, type_named
from mopeq_edge.plan.artifact import KNAPSACK, LAYOUTS, MOPEQ, PER_EXPERT, STOCK
from mopeq_edge.source.roles import Role

PER_LAYER, PER_MODEL = "layer", "model"
SCOPES = (PER_LAYER, PER_MODEL)

AUTO, NEVER, ALWAYS = "auto", "never", "always"
PADDING = (AUTO, NEVER, ALWAYS)
"""Whether experts of an awkward width are padded: where that is better, not, or wherever it is possible."""

BITS: Mapping[int, GgmlType] = {2: BY_NAME["Q2_K"], 3: BY_NAME["Q3_K"], 4: BY_NAME["Q4_K"]}
"""The GGUF type of each precision of the paper, unless ``--bits`` says otherwise."""


@dataclass(frozen=True)
class MapOptions:
    """The paper's map: experts are clustered within each layer or over the whole model (``scope``).

    ``bits`` has the type of 2, 3 and 4 bit, each of more bits per weight than the one before.
    """

    scope: str = PER_MODEL
    bits: Mapping[int, GgmlType] = field(default_factory=lambda: dict(BITS))

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise PlanError(f"scope '{self.scope}': expected {' or '.join(SCOPES)}")
        sizes = [kind.bpw for kind in self.types]
        if sorted(self.bits) != sorted(BITS) or not sizes[0] < sizes[1] < sizes[2]:
            found = ", ".join(f"{n}={kind.name} ({kind.bpw:g} bpw)" for n, kind in sorted(self.bits.items()))
            raise PlanError(f"--bits: expected types for 2, 3 and 4 of rising bits per weight, found {found}")

    @property
    def types(self) -> tuple[GgmlType, ...]:
        """Of 2, 3 and 4 bit."""
        return tuple(kind for _, kind in sorted(self.bits.items()))


@dataclass(frozen=True)
class PlanOptions:
    """``types`` may be chosen among, ``floors`` are least bits per weight by role, ``layout`` is one of LAYOUTS.

    ``precision_map`` asks for the paper's planner instead of the knapsack. ``split_bytes`` is the largest file where
    the result is to be split into several, which share the budget. ``pad_experts`` is one of :data:`PADDING`.
    """

    sensitivity: str
    types: tuple[GgmlType, ...]
    floors: Mapping[Role, float]
    layout: str = STOCK
    precision_map: MapOptions | None = None
    split_bytes: int | None = None
    pad_experts: str = AUTO

    def __post_init__(self) -> None:
        if self.pad_experts not in PADDING:
            raise PlanError(f"--pad-experts {self.pad_experts}: expected {', '.join(PADDING)}")
        if self.layout not in LAYOUTS:
            raise PlanError(f"layout '{self.layout}': expected {' or '.join(LAYOUTS)}")
        if self.precision_map is not None and self.layout != PER_EXPERT:
            raise PlanError(
                f"--layout {self.layout}: --planner mopeq gives every expert a type of its own; leave --layout out, "
                "or use --planner knapsack"
            )

    @property
    def planner(self) -> str:
        return KNAPSACK if self.precision_map is None else MOPEQ


def for_llama_quantize(options: PlanOptions) -> PlanOptions:
    """``options`` for a plan that llama-quantize can write: the stock layout, no padding.

    Raises :class:`PlanError` if they ask for anything else.
    """
    if options.layout != STOCK:
        raise PlanError(
            f"--tensor-type-file: llama-quantize writes the stock layout only, this plan is '{options.layout}'; "
            "leave it out and use mopeq-edge emit, or plan with --layout stock"
        )
    if options.pad_experts == ALWAYS:
        raise PlanError(
            "--tensor-type-file: llama-quantize cannot pad experts, --pad-experts always asks for it; leave one out"
        )
    return replace(options, pad_experts=NEVER)


def parse_bits(text: str) -> dict[int, GgmlType]:
    """``2=IQ2_XS,4=IQ4_XS`` on top of :data:`BITS`."""
    bits = dict(BITS)
    for item in (part.strip() for part in text.split(",") if part.strip()):
        number, _, name = item.partition("=")
        if number not in {str(n) for n in BITS} or not name:
            raise PlanError(f"--bits {item}: expected 2=TYPE, 3=TYPE or 4=TYPE")
        kind = type_named(name)
        if kind.name not in QUANTIZABLE:
            raise PlanError(f"--bits {item}: cannot quantize to {kind.name}; see --types all")
        bits[int(number)] = kind
    return bits
