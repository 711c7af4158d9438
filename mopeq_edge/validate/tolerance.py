"""How far llama.cpp may be from a computation in float32 with the same weights and the same chosen experts.

What goes into a matrix is rounded first: to 8 bits in blocks before quantized weights, to F16 or BF16 before such
weights, not at all before F32. That is the only thing that the two do differently, so the tolerance is the error of
that rounding times what a network makes of it. Both were measured, see docs/validate.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mopeq_edge.ggml.types import GgmlType

ROUNDING: Mapping[str, float] = {"F32": 6e-7, "F16": 0.00021, "BF16": 0.0017}
"""Relative RMS error of what goes into a matrix of the type; of F32 the order of sums."""

ROUNDING_8_BIT = 0.0094
"""Before every quantized type: that of Q8_0 on heavy-tailed numbers (:data:`mopeq_edge.validate.bounds.MEASURED`)."""

GAIN = 20.0
"""Noise of logits, relative to their spread, over the rounding: twice the largest that was measured."""

LEAST_KLD = 1e-6


@dataclass(frozen=True)
class Tolerance:
    """``noise``: largest RMS difference of logits, those of tokens or a router's, over their standard deviation."""

    noise: float

    def kld(self, spread: float) -> float:
        """Largest mean KLD in nats where logits have the standard deviation ``spread``.

        Half the variance of the logits' difference is the KLD of small differences.
        """
        return max(LEAST_KLD, 0.5 * (self.noise * spread) ** 2)


def tolerance_of(types: Iterable[GgmlType]) -> Tolerance:
    """For a file whose matrices have these ``types``: that of the coarsest."""
    return Tolerance(GAIN * max((ROUNDING.get(kind.name, ROUNDING_8_BIT) for kind in types), default=0.0))
