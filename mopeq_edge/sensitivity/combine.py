"""``fisher-trace``: what gradients and the Hessian's trace say of an expert, averaged.

The two err in different ways. ``fisher`` knows which inputs matter and draws its labels from the model; ``trace`` is
measured with all weights moved, on true labels, and knows nothing of inputs. Why that helps is not known; that plans by
the mean are at least as good as by either was measured (docs/study.md). The trace is scaled to the fisher damage
of all experts together: it says how damage spreads over experts, not what experts are worth beside other matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mopeq_edge.sensitivity.measure import TensorErrors
from mopeq_edge.sensitivity.scores import FISHER, FISHER_TRACE, TRACE
from mopeq_edge.source.roles import Role, role_of


def with_fisher_trace(errors: Mapping[str, TensorErrors]) -> dict[str, TensorErrors]:
    """``errors`` with damage and variance by ``fisher-trace``, where there are both ``fisher`` and ``trace``.

    Matrices that are no experts keep their ``fisher`` damage. The variance is an upper bound: the two are measured on
    the same rows.
    """
    if any(not {FISHER, TRACE} <= own.damage.keys() for own in errors.values()):
        return dict(errors)
    scale = _scale(errors)
    found = {}
    for name, own in errors.items():
        weights = (0.5, 0.5 * scale) if role_of(name) is Role.EXPERT else (1.0, 0.0)
        damage = weights[0] * own.damage[FISHER] + weights[1] * own.damage[TRACE]
        deviation = weights[0] * own.variance[FISHER] ** 0.5 + weights[1] * own.variance[TRACE] ** 0.5
        found[name] = replace(
            own,
            damage={**own.damage, FISHER_TRACE: damage},
            variance={**own.variance, FISHER_TRACE: deviation**2},
        )
    return found


def _scale(errors: Mapping[str, TensorErrors]) -> float:
    """Damage of all experts by ``fisher`` over that by ``trace``, each stack in its middle type."""
    total = {FISHER: 0.0, TRACE: 0.0}
    for name, own in errors.items():
        row = own.middle_type()
        if role_of(name) is Role.EXPERT and row is not None:
            for score in total:
                total[score] += float(own.damage[score][row].sum())
    return total[FISHER] / total[TRACE] if total[TRACE] > 0 else 1.0
