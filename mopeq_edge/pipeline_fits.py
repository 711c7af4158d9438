"""The plan of the largest file that runs in a device's memory: budget and plan are found together."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from mopeq_edge.device_files import DeviceFile, total_bytes
from mopeq_edge.errors import PlanError
from mopeq_edge.memory.command import arguments
from mopeq_edge.memory.fits import HEADROOM, file_budget
from mopeq_edge.memory.model import model_of_plan, model_of_source
from mopeq_edge.memory.predict import predict
from mopeq_edge.memory.repack import this_cpu
from mopeq_edge.memory.settings import Settings
from mopeq_edge.memory.tower import LEFT_BYTES, TowerMemory
from mopeq_edge.pipeline import Context
from mopeq_edge.plan.artifact import Plan, write_plan
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.make import Planner
from mopeq_edge.units import format_bytes

MOST_PLANS = 4
"""Plans that are tried: the second already differs from the last by a few kB."""


@dataclass(frozen=True)
class FitsRequest:
    """``memory``: bytes that llama.cpp may take with ``settings``, of which the share ``headroom`` stays free.

    ``tower`` sees pictures before the model is loaded; files ``beside`` are in memory with it.
    """

    memory: int
    settings: Settings
    headroom: float = HEADROOM
    tower: TowerMemory | None = None
    beside: tuple[DeviceFile, ...] = ()

    @property
    def limit(self) -> int:
        """Bytes that the prediction may have."""
        return self.memory - int(self.memory * self.headroom)


@dataclass(frozen=True)
class Fit:
    """Bytes: ``memory`` asked for, ``needed`` of it; ``text`` by the plan's file in llama.cpp, ``weights`` of these the
    whole file, before that ``tower`` by what sees pictures.
    """

    memory: int
    needed: int
    weights: int
    options: tuple[str, ...]
    text: int
    tower: int

    @property
    def headroom(self) -> int:
        return self.memory - self.needed

    def sentence(self) -> str:
        """What is needed and what stays free."""
        rest = self.text - self.weights
        seeing = f"; before that {format_bytes(self.tower)} to see pictures" if self.tower else ""
        return (
            f"{format_bytes(self.text)} of {format_bytes(self.memory)} with {' '.join(self.options)}: the file, and "
            f"{format_bytes(rest)} for cache, buffers and program{seeing}; {format_bytes(self.headroom)} stay free"
        )

    def as_dict(self) -> dict[str, Any]:
        """Sizes in bytes."""
        sizes = {f"{key}_bytes": value for key, value in asdict(self).items() if key != "options"}
        return {**sizes, "headroom_bytes": self.headroom, "llama_cpp_options": list(self.options)}


def first_budget(context: Context, request: FitsRequest) -> Budget:
    """A budget whose file fits in whatever types; from shapes alone.

    Raises :class:`PlanError` if cache, buffers and program leave no room, or what sees pictures has none.
    """
    if request.tower is not None and request.tower.nbytes > request.limit:
        raise PlanError(
            f"{context.source.path}: what sees pictures takes {request.tower.nbytes:,} bytes of memory before the text "
            f"model is loaded, {request.limit:,} may be taken; give --vision-type INT8, --text-only or more memory"
        )
    model = replace(model_of_source(context.source), name=str(context.source.path))
    beside = total_bytes(request.beside) + (LEFT_BYTES if request.tower is not None else 0)
    found = file_budget(model, request.settings, this_cpu(), request.memory, request.headroom, beside)
    return Budget(nbytes=found.budget)


def run_plan_that_fits(context: Context, planner: Planner, request: FitsRequest) -> tuple[Plan, Fit, Budget]:
    """The plan stage: the plan of the largest budget found whose file is predicted to fit. Leaves plan.json.

    The first budget allows for the types that need the largest buffers. What the plan's own types leave of that goes
    into the next budget, as long as it fits.
    """
    budget = first_budget(context, request)
    best: tuple[Plan, Fit, Budget] | None = None
    for _ in range(MOST_PLANS):
        plan = planner.plan(budget)
        fit = _fit(plan, context, request)
        spare = request.limit - fit.text
        if spare >= 0 and (best is None or plan.damage < best[0].damage):
            best = plan, fit, budget
        further = Budget(nbytes=plan.file_bytes + spare)
        if further == budget or (spare >= 0 and plan.file_bytes == plan.largest_bytes):
            break
        budget = further
    if best is None:
        raise PlanError(
            f"{context.source.path}: no plan was found that fits {format_bytes(request.memory)} with "
            f"{' '.join(arguments(request.settings))}; ask for a smaller context, or give --target-gb"
        )
    write_plan(best[0], context.work.file("plan.json"))
    return best


def _fit(plan: Plan, context: Context, request: FitsRequest) -> Fit:
    model = model_of_plan(plan, context.source.kvs, str(context.source.path))
    found = predict(model, request.settings, this_cpu(), tower=request.tower)
    text = found.host - found.droppable + found.gpu + total_bytes(request.beside)
    options = tuple(arguments(request.settings))
    return Fit(request.memory, max(text, found.tower), plan.file_bytes, options, text, found.tower)
