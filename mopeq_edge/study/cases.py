"""The cases of a grid: {sensitivity} x {planner} x {layout} x {budget}, and the controls beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mopeq_edge.artifacts import digest
from mopeq_edge.errors import PlanError
from mopeq_edge.pipeline import planner_of
from mopeq_edge.plan.artifact import KNAPSACK, LAYOUTS, MOPEQ, STOCK, Plan
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import FLOORS
from mopeq_edge.plan.fixed import fixed_plan
from mopeq_edge.plan.options import NEVER, MapOptions, PlanOptions
from mopeq_edge.study.controls import (
    CONTROLS,
    HAND,
    INVERSE,
    PRESETS,
    RANDOM,
    UNIFORM,
    hand_map,
    inverse_map,
    random_map,
    summed_scores,
    uniform_map,
)
from mopeq_edge.study.expert_types import ExpertTypes, expert_types, with_experts
from mopeq_edge.study.presets import nearest_below, preset_sizes
from mopeq_edge.study.setup import Setup

PLAN, CONTROL = "plan", "control"
PLANNERS = (KNAPSACK, MOPEQ)
LLAMA_QUANTIZE = "llama-quantize"


@dataclass(frozen=True)
class Grid:
    """What to run. The controls stand beside the knapsack plan of the first of ``sensitivities``.

    ``seeds`` is the number of random maps for each budget and layout.
    """

    sensitivities: tuple[str, ...]
    budgets: tuple[Budget, ...]
    planners: tuple[str, ...] = PLANNERS
    layouts: tuple[str, ...] = LAYOUTS
    controls: tuple[str, ...] = field(default_factory=lambda: tuple(CONTROLS))
    seeds: int = 3

    def __post_init__(self) -> None:
        for name, given, known in (
            ("planners", self.planners, PLANNERS),
            ("layouts", self.layouts, LAYOUTS),
            ("controls", self.controls, tuple(CONTROLS)),
        ):
            strange = [item for item in given if item not in known]
            if strange:
                raise PlanError(f"--{name} {strange[0]}: expected some of {', '.join(known)}")
        if not self.budgets or not self.sensitivities:
            raise PlanError("study: expected at least one budget and one sensitivity; give --budgets")


@dataclass(frozen=True)
class Case:
    """One file to write and measure: a ``plan``, or a ``preset`` of llama-quantize.

    ``name`` tells it from all others of its study. ``budget_bytes`` is None for files that no budget asks for.
    """

    name: str
    kind: str
    planner: str
    sensitivity: str
    layout: str
    budget_bytes: int | None
    plan: Plan | None = None
    preset: str | None = None

    def made_from(self, setup: Setup) -> str:
        """Hash of all that its measurement depends on."""
        return digest([setup.made_from, self.plan.sha256 if self.plan is not None else self.preset])


def grid_cases(setup: Setup, grid: Grid) -> list[Case]:
    """All cases of ``grid``, budget by budget.

    What does not fit a budget (the paper's lowest map, a control's smallest choice) is left out with a note; raises
    :class:`PlanError` where the knapsack has no plan, before anything was run.
    """
    cases: list[Case] = []
    sizes = preset_sizes(setup) if PRESETS in grid.controls else {}
    n_plans = len(grid.budgets) * len(grid.layouts) * len(grid.sensitivities)
    with setup.context.progress.step("planning", n_plans, "plans") as step:
        for budget in grid.budgets:
            for layout in grid.layouts:
                base = _plan(setup, budget, grid.sensitivities[0], KNAPSACK, layout)
                for sensitivity in grid.sensitivities:
                    for planner in grid.planners:
                        if planner == MOPEQ and layout == STOCK:
                            continue
                        cases.extend(_planned(setup, budget, sensitivity, planner, layout, base))
                    step.advance()
                cases.extend(_controls(setup, grid, base, layout))
                limit = base.budget_bytes or 0
                if layout == grid.layouts[0]:
                    cases.extend(
                        Case(f"{limit}-preset-{p}", CONTROL, LLAMA_QUANTIZE, "", STOCK, limit, preset=p)
                        for p in nearest_below(sizes, base.header_bytes, limit)
                    )
    return cases


def _plan(setup: Setup, budget: Budget, sensitivity: str, planner: str, layout: str) -> Plan:
    options = PlanOptions(
        sensitivity, setup.types, FLOORS, layout, MapOptions() if planner == MOPEQ else None, pad_experts=NEVER
    )
    return planner_of(setup.context, setup.table, setup.calibrated.statistics, options).plan(budget)


def _planned(setup: Setup, budget: Budget, sensitivity: str, planner: str, layout: str, base: Plan) -> Iterator[Case]:
    try:
        same = (planner, sensitivity) == (KNAPSACK, base.sensitivity)
        plan = base if same else _plan(setup, budget, sensitivity, planner, layout)
    except PlanError as error:
        if planner == KNAPSACK:
            raise
        setup.context.progress.note(f"note: left out: {planner} by {sensitivity}: {error}")
        return
    name = f"{base.budget_bytes}-{layout}-{planner}-{sensitivity}"
    yield Case(name, PLAN, planner, sensitivity, layout, base.budget_bytes, plan)


def _controls(setup: Setup, grid: Grid, base: Plan, layout: str) -> Iterator[Case]:
    source, table, stacks, kvs = setup.context.source, setup.table, setup.stacks, setup.kvs
    own = expert_types(base, stacks)

    def case(label: str, experts: ExpertTypes) -> Case:
        types = with_experts(base, experts)
        plan = fixed_plan(
            source, table, kvs, types, planner=label, sensitivity=base.sensitivity, budget_bytes=base.budget_bytes
        )
        assert plan.file_bytes <= base.file_bytes, "a control has no more bytes than its plan"
        name = f"{base.budget_bytes}-{layout}-{label}"
        return Case(name, CONTROL, label, base.sensitivity, layout, base.budget_bytes, plan)

    if RANDOM in grid.controls:
        for seed in range(1, grid.seeds + 1):
            yield case(f"{RANDOM}-{seed}", random_map(stacks, own, seed))
    if INVERSE in grid.controls:
        yield case(INVERSE, inverse_map(stacks, own, summed_scores(stacks, own, table, base.sensitivity)))
    try:
        if UNIFORM in grid.controls:
            yield case(UNIFORM, uniform_map(source, stacks, base, table, kvs))
        if HAND in grid.controls and layout == STOCK:
            yield case(HAND, hand_map(source, stacks, base, kvs))
    except PlanError as error:
        setup.context.progress.note(f"note: left out at {base.budget_bytes} bytes, {layout}: {error}")


def check_scores(setup: Setup, sensitivities: Sequence[str]) -> tuple[str, ...]:
    """``sensitivities``, or all that the table has if there are none. Raises :class:`PlanError` for others."""
    for name in sensitivities:
        if name not in setup.table.scores:
            raise PlanError(f"--sensitivities {name}: expected some of {', '.join(setup.table.scores)}")
    return tuple(sensitivities) or setup.table.scores
