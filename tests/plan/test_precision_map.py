"""Precisions by hand for both scopes, and the steps by which a map grows and shrinks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from mopeq_edge.plan.options import PER_LAYER, PER_MODEL
from mopeq_edge.plan.precision_map import Expert, classes_of, steps
from mopeq_edge.sensitivity.scores import Doubles


def scores(*layers: list[float]) -> dict[int, Doubles]:
    return {layer: np.array(values, dtype=float) for layer, values in enumerate(layers)}


def by_layer(classes: Mapping[Expert, int]) -> list[list[int]]:
    return [[c for (layer, _), c in sorted(classes.items()) if layer == n] for n in sorted({e[0] for e in classes})]


def test_the_scopes() -> None:
    """The second layer's scores are a hundred times the first's."""
    given = scores([1, 9, 5, 1], [100, 900, 500, 900])
    assert by_layer(classes_of(given, PER_LAYER)) == [[0, 2, 1, 0], [0, 2, 1, 2]]
    # 1, 1, 5, 9, 100 | 500 | 900, 900
    assert by_layer(classes_of(given, PER_MODEL)) == [[0, 0, 0, 0], [0, 2, 1, 2]]


def test_fewer_than_three_scores() -> None:
    given = scores([3, 7, 3, 7], [4, 4], [5])
    # two are the highest and the lowest, one is neither
    assert by_layer(classes_of(given, PER_LAYER)) == [[0, 2, 0, 2], [1, 1], [1]]


def test_layers_keep_their_numbers() -> None:
    """The first layers of a model may be dense."""
    given = {3: np.array([1.0, 2.0, 9.0]), 5: np.array([9.0, 2.0, 1.0])}
    assert classes_of(given, PER_LAYER) == {(3, 0): 0, (3, 1): 1, (3, 2): 2, (5, 0): 2, (5, 1): 1, (5, 2): 0}


def test_steps_by_hand() -> None:
    """0 and 1 are lowest, 2 middle, 3 highest."""
    given = scores([0, 1, 50, 99])
    classes = classes_of(given, PER_LAYER)
    assert by_layer(classes) == [[0, 0, 1, 2]]
    # up: the two low ones reach the middle at 1/2 and 1; the three below the highest get there at 1/3, 2/3 and 1
    assert [e for _, e in steps(given, PER_LAYER, classes, up=True)] == [2, 1, 1, 0, 0]
    # down: the highest leaves at 1; of the two above the lowest one goes at 1/2 and one at 1
    assert [e for _, e in steps(given, PER_LAYER, classes, up=False)] == [2, 3, 3]


def test_all_layers_arrive_together() -> None:
    given = scores([0, 1, 50, 99], [0, 1, 2, 3, 100, 200])
    classes = classes_of(given, PER_LAYER)
    half = steps(given, PER_LAYER, classes, up=True)
    moved = [sum(layer == n for layer, _ in half[: len(half) // 2]) for n in (0, 1)]
    whole = [sum(layer == n for layer, _ in half) for n in (0, 1)]
    assert whole == [5, 9]
    assert moved == [2, 5]


@pytest.mark.parametrize("scope", [PER_LAYER, PER_MODEL])
@pytest.mark.parametrize("seed", range(5))
def test_every_step_keeps_the_order_of_scores(scope: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    given = {layer: rng.integers(0, 20, 16) ** 2.0 for layer in range(4)}
    start = classes_of(given, scope)
    for up in (True, False):
        classes = dict(start)
        for expert in steps(given, scope, start, up=up):
            classes[expert] += 1 if up else -1
            assert 0 <= classes[expert] <= 2
            layers = [[n] for n in given] if scope == PER_LAYER else [list(given)]
            for unit in [[(n, e) for n in together for e in range(16)] for together in layers]:
                found = sorted((given[n][e], classes[n, e]) for n, e in unit)
                tops = [max(c for score, c in found if score == value) for value in sorted({s for s, _ in found})]
                lows = [min(c for score, c in found if score == value) for value in sorted({s for s, _ in found})]
                assert all(top <= low for top, low in zip(tops, lows[1:], strict=False))
        assert set(classes.values()) == {2 if up else 0}
