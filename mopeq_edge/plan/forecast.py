"""What a type for every expert would bring over a type for every stack, told from a model's own statistics.

The more the experts of a stack differ in what an error costs, the more there is to gain. If the damage of expert e
falls as d_e 4^-b with its bits b, the best bits of equal sum give every expert the same damage, the geometric mean of
d_e, where one type for all leaves the arithmetic mean. Their quotient is transform coding's gain (Jayant and Noll,
1984), the most that the layout could bring if types came in any number of bits. The two knapsacks say what real types
and bytes leave of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mopeq_edge.calibrate.statistics import Routing
from mopeq_edge.plan.artifact import PER_EXPERT, Plan
from mopeq_edge.sensitivity.scores import IN_NATS, Doubles
from mopeq_edge.sensitivity.table import SensitivityTable
from mopeq_edge.source.model import SourceTensor

MEASURED_OVER_PREDICTED = (0.84, 1.13)
"""Range of (measured / predicted) ratio of the two layouts' KLD over the models and budgets of docs/study.md."""


@dataclass(frozen=True)
class Forecast:
    """``damage`` and ``file_bytes`` are the other layout's; ``ratio`` is per-expert over stock, predicted.

    ``coding_gain`` is the arithmetic over the geometric mean of the damages of a stack's experts, ``damage_spread`` the
    standard deviation of their logarithms, ``routing_skew`` that of the tokens of a layer's experts over their mean
    (None without routing); each the mean over stacks or layers.
    """

    layout: str
    damage: float
    file_bytes: int
    ratio: float
    coding_gain: float
    damage_spread: float
    routing_skew: float | None
    sensitivity: str

    @property
    def measured(self) -> tuple[float, float] | None:
        """The ratio of KLD to expect, from models that were measured; None where nothing was: other scores."""
        if self.sensitivity not in IN_NATS:
            return None
        low, high = MEASURED_OVER_PREDICTED
        return low * self.ratio, high * self.ratio

    def sentence(self) -> str:
        """The gain, why, and how to get it."""
        if self.ratio >= 1:
            return f"a type for every expert would bring nothing at this size ({self._statistics()})"
        found = f"per-expert has {self.ratio:.2f} times the predicted damage of stock at the same size"
        if self.measured is not None:
            found += f" (measured on other models: {self.measured[0]:.2f} to {self.measured[1]:.2f})"
        return f"{found}; {self._statistics()}" + (
            ""
            if self.layout != PER_EXPERT
            else "; --layout per-expert runs in the llama.cpp of `mopeq-edge runtime install`"
        )

    def _statistics(self) -> str:
        skew = "" if self.routing_skew is None else f", routing skew {self.routing_skew:.2f}"
        return f"coding gain {self.coding_gain:.2f}, damage spread {self.damage_spread:.2f}{skew}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "measured_ratio": list(self.measured) if self.measured is not None else None}


def forecast(
    stacks: Iterable[SourceTensor], table: SensitivityTable, routing: Routing | None, plan: Plan, other: Plan
) -> Forecast:
    """Compare ``plan`` with the ``other`` layout's plan of the same budget and sensitivity."""
    per_expert, stock = (plan, other) if plan.layout == PER_EXPERT else (other, plan)
    damages = [own for stack in stacks if (own := _damages(table, stack, plan.sensitivity)) is not None]
    gains = [float(own.mean() / np.exp(np.log(own).mean())) for own in damages]
    spreads = [float(np.log(own).std()) for own in damages]
    return Forecast(
        layout=other.layout,
        damage=other.damage,
        file_bytes=other.file_bytes,
        ratio=per_expert.damage / stock.damage if stock.damage > 0 else 1.0,
        coding_gain=float(np.mean(gains)) if gains else 1.0,
        damage_spread=float(np.mean(spreads)) if spreads else 0.0,
        routing_skew=routing_skew(routing) if routing is not None else None,
        sensitivity=plan.sensitivity,
    )


def routing_skew(routing: Routing) -> float:
    """Mean over layers of the standard deviation of an expert's tokens over their mean; 0 if all get as many."""
    own = [counts.std() / counts.mean() for counts in routing.counts.values() if counts.sum() > 0]
    return float(np.mean(own)) if own else 0.0


def _damages(table: SensitivityTable, stack: SourceTensor, score: str) -> Doubles | None:
    """[n_expert] in the stack's middle type; None if nothing was measured or hurts."""
    errors = table.require(stack.name, score)
    row = errors.middle_type()
    if row is None:
        return None
    own = errors.damage[score][row]
    own = own[own > 0]
    return own if len(own) else None
