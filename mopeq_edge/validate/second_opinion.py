"""llama.cpp against the ONNX reference on the same tokens: logits, routing, and the batch against token by token.

The reference computes the experts that llama.cpp chose, so that a choice that turned in a tie changes nothing behind
it; the choice itself is compared layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mopeq_edge.binding import Floats, Tokens
from mopeq_edge.evaluate.divergence import compare
from mopeq_edge.units import plural
from mopeq_edge.validate.check import Check, Names
from mopeq_edge.validate.llama_run import LlamaRouted, LlamaRun
from mopeq_edge.validate.tolerance import Tolerance

LOGITS, ROUTING, STEPS = "logits", "routing", "token by token"
SHOWN = 8
"""Layers that get a line each."""

_LEAST_MARGIN = 1e-5
"""What scores in float32 may differ by although the logits do not: the order of sums in a softmax."""

Array = npt.NDArray[Any]


class Routed(Protocol):
    """One layer of the reference: its own choice, the weights of llama.cpp's, margins of its own, the logits."""

    @property
    def ids(self) -> npt.NDArray[np.int32]: ...

    @property
    def weights(self) -> Floats: ...

    @property
    def margins(self) -> Floats: ...

    @property
    def logits(self) -> Floats | None: ...


class Reference(Protocol):
    """What the reference computed with llama.cpp's choice of experts."""

    @property
    def logits(self) -> Floats: ...

    @property
    def routed(self) -> Mapping[int, Routed]: ...


@dataclass(frozen=True)
class _Layer:
    """Tokens whose experts differ: in a tie, and beyond one; RMS difference of logits over their spread; largest
    difference of weights over its tolerance.
    """

    ties: int
    wrong: list[int]
    noise: float
    weights: float


@dataclass(frozen=True)
class Agreement:
    """How often llama.cpp's router of one layer chose the reference's experts, of ``tokens``.

    Of the others ``ties`` are choices that rounding can turn and ``wrong`` are not. ``noise``: RMS difference of the
    router's logits over their spread.
    """

    layer: int
    tokens: int
    ties: int
    wrong: int
    noise: float

    @property
    def same(self) -> int:
        return self.tokens - self.ties - self.wrong

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "same": self.same}


def check_logits(run: LlamaRun, reference: Reference, tokens: Tokens, tolerance: Tolerance) -> Check:
    """The mean KLD of llama.cpp's next token from the reference's."""
    looked_at = f"{plural(len(tokens), 'token')}, llama.cpp against ONNX"
    return _compared(LOGITS, looked_at, reference.logits, run.logits, tokens, tolerance)


def check_steps(run: LlamaRun, tokens: Tokens, tolerance: Tolerance) -> Check:
    """The same of llama.cpp token by token, as in generation, from its own batch."""
    looked_at = f"{plural(len(tokens), 'token')}, llama.cpp's batch against one at a time"
    return _compared(STEPS, looked_at, run.logits, run.stepped, tokens, tolerance)


def check_routing(run: LlamaRun, reference: Reference, tolerance: Tolerance) -> list[Check]:
    """A line for every layer in which llama.cpp chose experts that no tie explains, or weighed them otherwise."""
    layers = _layers(run, reference, tolerance)
    checks = [
        Check(
            ROUTING, f"layer {layer}", None, None, False, f"layer {layer}: llama.cpp has no router there", Names.TENSOR
        )
        for layer in reference.routed
        if layer not in run.routed
    ]
    n_tokens = len(run.logits)
    for layer, found in layers.items():
        where = f"layer {layer}"
        if found.noise > tolerance.noise:
            message = f"{where} (blk.{layer}.ffn_gate_inp.weight): the router's logits are off by {found.noise:.2g} "
            message += f"of their spread in RMS; {tolerance.noise:.2g} is what rounding can make"
            checks.append(Check(ROUTING, where, found.noise, tolerance.noise, False, message, Names.TENSOR))
        elif found.wrong:
            checks.append(_wrong(layer, run.routed[layer], reference.routed[layer], found.wrong, n_tokens))
        elif found.weights > 1:
            message = f"{where} (blk.{layer}.ffn_gate_inp.weight): llama.cpp weighs the same experts otherwise"
            checks.append(Check(ROUTING, where, found.weights, 1, False, message, Names.TENSOR))
    if len(checks) > SHOWN:
        message = f"{len(checks) - SHOWN} layers more are routed otherwise"
        checks = [*checks[:SHOWN], Check(ROUTING, "layers", len(checks), 0, False, message)]
    ties = sum(found.ties for found in layers.values())
    total = n_tokens * len(layers)
    share = 1 - ties / total if total else 1.0
    noise = max((found.noise for found in layers.values()), default=0.0)
    message = f"the same experts in {total - ties} of {total} choices, the others are ties; logits of a layer off by "
    message += f"{noise:.1e} of their spread at most"
    return checks or [Check(ROUTING, plural(len(layers), "layer"), share, None, True, message)]


def agreement(run: LlamaRun, reference: Reference, tolerance: Tolerance) -> tuple[Agreement, ...]:
    """Of every layer that both have a router in."""
    return tuple(
        Agreement(layer, len(run.logits), found.ties, len(found.wrong), found.noise)
        for layer, found in sorted(_layers(run, reference, tolerance).items())
    )


def _layers(run: LlamaRun, reference: Reference, tolerance: Tolerance) -> dict[int, _Layer]:
    return {
        layer: _layer(run.routed[layer], routed, tolerance)
        for layer, routed in reference.routed.items()
        if layer in run.routed
    }


def _compared(name: str, looked_at: str, base: Floats, other: Floats, tokens: Tokens, tolerance: Tolerance) -> Check:
    if not np.isfinite(other).all() or not np.isfinite(base).all():
        position = int(np.flatnonzero(~(np.isfinite(other) & np.isfinite(base)).all(axis=1))[0])
        return Check(name, looked_at, None, None, False, f"token {position}: logits that are no numbers")
    kld = compare(base, other, np.roll(tokens, -1)).kld
    spread = float(base.std())
    most = tolerance.kld(spread)
    passed = bool(kld.mean() <= most)
    largest = float(np.abs(base - other).max())
    noise = float(np.sqrt(np.square(base - other).mean())) / spread if spread else 0.0
    message = f"mean KLD {kld.mean():.2g}, max {kld.max():.2g} nats, logits off by {largest:.2g} at most"
    message += f", by {noise:.1e} of their spread in RMS"
    if not passed:
        message = f"{looked_at}: {message}; a KLD of {most:.2g} is what rounding can make"
    return Check(name, looked_at, float(kld.mean()), most, passed, message)


def _layer(theirs: LlamaRouted, ours: Routed, tolerance: Tolerance) -> _Layer:
    """``theirs``: llama.cpp's.

    A choice may turn where its margin is no larger than what two logits of the token differ by; scores differ by less.
    """
    if ours.logits is None:
        raise ValueError("a reference that was not given llama.cpp's choice of experts")
    off = np.abs(theirs.logits - ours.logits)
    spread = float(ours.logits.std())
    differs = (np.sort(theirs.ids, axis=1) != np.sort(ours.ids, axis=1)).any(axis=1)
    wrong = np.flatnonzero(differs & (ours.margins > 2 * off.max(axis=1) + _LEAST_MARGIN * spread))
    noise = float(np.sqrt(np.square(off).mean())) / spread if spread else 0.0
    # the weights of both are of the experts that llama.cpp chose, in its order; no score moves faster than its logit
    most = float(np.abs(ours.weights).max()) * (2 * off.max(axis=1, keepdims=True) + _LEAST_MARGIN)
    apart = float((np.abs(theirs.weights - ours.weights) / most).max())
    return _Layer(int(differs.sum()) - len(wrong), wrong.tolist(), noise, apart)


def _wrong(layer: int, theirs: LlamaRouted, ours: Routed, tokens: list[int], n_tokens: int) -> Check:
    token = tokens[0]
    chose, expected = sorted(theirs.ids[token].tolist()), sorted(ours.ids[token].tolist())
    message = (
        f"layer {layer} (blk.{layer}.ffn_gate_inp.weight): llama.cpp chooses other experts for {len(tokens)} of "
        f"{n_tokens} tokens, beyond a tie: for token {token} {chose}, ONNX {expected}"
    )
    return Check(ROUTING, f"layer {layer}", len(tokens) / n_tokens, 0, False, message, Names.TENSOR)
