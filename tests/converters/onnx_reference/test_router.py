"""The router's graph against routing written down token by token, in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from converters.onnx_graph import Floats
from converters.onnx_reference.read_settings import read_settings
from converters.onnx_reference.router import LEAST_SUM, router_graph
from converters.onnx_reference.settings import Gating, Router, Settings
from mopeq_edge.gguf_file import read_header

from ...expert_groups.architectures import ARCHITECTURES, random_tensors, write_model

Doubles = npt.NDArray[np.float64]
N_EMBD, N_EXPERT, N_USED = 12, 16, 3


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    path = tmp_path_factory.mktemp("router") / "model.gguf"
    own = ARCHITECTURES["deepseek2"]
    write_model(path, own, random_tensors(own), lambda _, values: (values, gguf.GGMLQuantizationType.F32))
    return replace(read_settings(read_header(path)), n_embd=N_EMBD)


def route(own: Router, logits: Doubles, correction: Doubles | None) -> tuple[list[int], list[float]]:
    """Ids and weights of one token, from the best on."""
    if own.gating is Gating.SOFTMAX:
        scores = np.exp(logits) / np.exp(logits).sum()
    else:
        scores = 1 / (1 + np.exp(-logits)) if own.gating is Gating.SIGMOID else logits
    ranks = scores if correction is None else scores + correction
    size = own.n_expert // own.n_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(own.n_groups)]
    if own.n_groups > 1:
        groups.sort(key=lambda group: -sum(sorted(ranks[group])[-2:]))
        groups = groups[: own.n_groups_used]
    ids = sorted((e for group in groups for e in group), key=lambda e: -ranks[e])[: own.n_used]
    weights = scores[ids]
    if own.gating is Gating.SOFTMAX_OF_CHOSEN:
        weights = np.exp(weights) / np.exp(weights).sum()
    if own.normalised:
        weights = weights / max(weights.sum(), LEAST_SUM)
    return ids, list(weights * own.scale)


def run(
    settings: Settings, x: Floats, matrix: Floats, correction: Floats | None = None
) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
    feeds = {"x": x, "ffn_gate_inp.weight": matrix}
    if correction is not None:
        feeds["exp_probs_b.bias"] = correction
    ids, weights, margins = router_graph(settings, correction is not None).session(1).run(feeds)
    return ids, weights, margins


@pytest.mark.parametrize(
    ("gating", "normalised", "scale", "groups", "corrected"),
    list(product(Gating, (False, True), (1.0, 2.5), (1, 4), (False, True))),
)
def test_routing(
    settings: Settings, gating: Gating, normalised: bool, scale: float, groups: int, corrected: bool
) -> None:
    own = Router(N_EXPERT, N_USED, groups, min(groups, 2), gating, normalised, scale)
    rng = np.random.default_rng(0)
    x, matrix = rng.standard_normal((50, N_EMBD), dtype=np.float32), rng.standard_normal((N_EXPERT, N_EMBD))
    correction = rng.standard_normal(N_EXPERT).astype(np.float32) if corrected else None
    ids, weights, margins = run(replace(settings, router=own), x, matrix.astype(np.float32), correction)
    logits = x.astype(np.float64) @ matrix.astype(np.float32).astype(np.float64).T
    for token in range(len(x)):
        wide = None if correction is None else correction.astype(np.float64)
        expected = route(own, logits[token], wide)
        assert ids[token].tolist() == expected[0]
        np.testing.assert_allclose(weights[token], expected[1], rtol=1e-5)
    assert (margins > 0).all()


def test_sums_near_zero_are_not_divided_by(settings: Settings) -> None:
    own = Router(4, 2, 1, 1, Gating.SIGMOID, True, 1.0)
    x, matrix = np.ones((1, N_EMBD), np.float32), np.full((4, N_EMBD), -2, np.float32)
    _, weights, _ = run(replace(settings, router=own), x, matrix)
    np.testing.assert_allclose(weights, np.exp(-24.0) / 2.0**-14, rtol=1e-4)


def test_ties_go_to_the_lower_id_and_have_no_margin(settings: Settings) -> None:
    own = Router(8, 3, 1, 1, Gating.SOFTMAX, False, 1.0)
    matrix = np.zeros((8, N_EMBD), np.float32)
    matrix[:, 0] = [1, 3, 2, 2, 0, 2, -1, 0]
    x = np.zeros((2, N_EMBD), np.float32)
    x[0, 0], x[1, 0] = 1, 0
    ids, _, margins = run(replace(settings, router=own), x, matrix)
    assert ids.tolist() == [[1, 2, 3], [0, 1, 2]]
    assert margins.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        # of the logits 5, 4, 3, 2.5, 0 ... the second and the third
        (Router(8, 2, 1, 1, Gating.SOFTMAX, True, 1.0), 1.0),
        (Router(8, 3, 1, 1, Gating.SOFTMAX_OF_CHOSEN, False, 1.0), 0.5),
        (Router(8, 8, 1, 1, Gating.SOFTMAX, False, 1.0), np.inf),
        # sigmoids: the groups' sums are 0.9933 + 0.9820 and 0.9526 + 0.9241, the least of all margins
        (Router(8, 2, 2, 1, Gating.SIGMOID, False, 1.0), 0.09855),
    ],
)
def test_margins(settings: Settings, own: Router, expected: float) -> None:
    matrix = np.zeros((8, N_EMBD), np.float32)
    matrix[:, 0] = [5, 4, -1, -1, 3, 2.5, -1, -1]
    x = np.zeros((1, N_EMBD), np.float32)
    x[0, 0] = 1
    _, _, margins = run(replace(settings, router=own), x, matrix)
    np.testing.assert_allclose(margins, [expected], rtol=1e-3)
