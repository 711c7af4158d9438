"""What a file was measured to be against the source's logits, against thresholds and against what was predicted."""

from __future__ import annotations

from dataclasses import dataclass

from mopeq_edge.evaluate.run import Evaluation
from mopeq_edge.plan.artifact import Plan
from mopeq_edge.units import plural
from mopeq_edge.validate.check import Check, skipped

EVALUATION, PREDICTION = "evaluation", "prediction"


@dataclass(frozen=True)
class Thresholds:
    """KLD in nats, ``same_top`` as a fraction; None measures without judging."""

    kld: float | None = None
    kld_p99_9: float | None = None
    same_top: float | None = None


def check_evaluation(found: Evaluation, limits: Thresholds) -> list[Check]:
    """A line for each of the measures that have a threshold, and PPL without one."""
    d = found.divergence
    where = f"{plural(d.n_positions, 'token')} of {found.source_name}"
    return [
        _most("mean KLD", where, d.kld_mean, limits.kld, "--max-kld"),
        _most("99.9 % KLD", where, d.kld_p99_9, limits.kld_p99_9, "--max-kld-99.9"),
        _least("same top token", where, d.same_top, limits.same_top, "--min-same-top"),
        Check(EVALUATION, where, d.ppl_target, None, True, f"PPL {d.ppl_target:.4f}, of the source {d.ppl_base:.4f}"),
    ]


def check_prediction(found: Evaluation, plan: Plan) -> Check:
    """The plan's damage beside the mean KLD; judged by nobody, as a sum of layers' damages is not the model's."""
    measured = found.divergence.kld_mean
    if not plan.unit.startswith("nats"):
        return skipped(PREDICTION, plan.sensitivity, f"the plan's damage is in {plan.unit}, which no KLD compares with")
    ratio = plan.damage / measured if measured else float("inf")
    message = f"predicted damage {plan.damage:.6g} ({plan.unit}), measured mean KLD {measured:.6g} nats: ratio"
    return Check(PREDICTION, plan.sensitivity, ratio, None, True, f"{message} {ratio:.3g}")


def _most(what: str, where: str, value: float, limit: float | None, option: str) -> Check:
    passed = limit is None or value <= limit
    message = f"{what} {value:.6g} nats"
    if not passed:
        message += f" on {where}: at most {limit:g} was asked for ({option})"
    return Check(EVALUATION, where, value, limit, passed, message)


def _least(what: str, where: str, value: float, limit: float | None, option: str) -> Check:
    passed = limit is None or value >= limit
    message = f"{what} {100 * value:.3f} %"
    if not passed and limit is not None:
        message += f" on {where}: at least {100 * limit:g} % was asked for ({option})"
    return Check(EVALUATION, where, value, limit, passed, message)
