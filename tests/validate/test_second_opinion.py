"""llama.cpp against the reference: what passes is the same computation, and what is none is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from converters import CONVERTERS
from converters.onnx_reference import run_reference
from converters.onnx_reference.run import ReferenceResult, Routed
from mopeq_edge.ggml.types import BF16, BY_NAME, F16, F32
from mopeq_edge.source.open import open_source
from mopeq_edge.validate.llama_run import LlamaRouted, LlamaRun, run_llama
from mopeq_edge.validate.second_opinion import agreement, check_logits, check_routing, check_steps
from mopeq_edge.validate.tolerance import GAIN, LEAST_KLD, ROUNDING_8_BIT, Tolerance, tolerance_of

from ..builders import build_olmoe, write_gguf
from ..converters.onnx_reference.test_families import dense
from .files import change, exchange, swap

TOKENS = np.random.default_rng(3).integers(0, 4096, 48, dtype=np.int32)
EXACT = tolerance_of([F32])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    path = directory / "model.gguf"
    write_gguf(open_source(build_olmoe(directory / "hf", dtype="float32"), CONVERTERS, pre="gpt-2"), path)
    return path


@pytest.fixture(scope="module")
def run(model: Path) -> LlamaRun:
    return run_llama(model, TOKENS, threads=1)


def routing(run: LlamaRun) -> dict[int, np.ndarray]:
    return {layer: routed.ids for layer, routed in run.routed.items()}


@pytest.mark.runtime
def test_routers_are_read_from_the_graph(model: Path, run: LlamaRun) -> None:
    """Against the reference's own choice."""
    reference = run_reference(model, TOKENS)
    assert list(run.routed) == list(reference.routed) == [0, 1]
    for layer, ours in reference.routed.items():
        theirs = run.routed[layer]
        assert theirs.ids.dtype == np.int32
        assert theirs.ids.shape == theirs.weights.shape == (48, 2)
        assert theirs.logits.shape == (48, 8)
        assert np.abs(dense(theirs.ids, theirs.weights, 8) - dense(ours.ids, ours.weights, 8)).max() < 1e-5
        # softmax over all experts, of the logits that were read
        scores = np.exp(theirs.logits) / np.exp(theirs.logits).sum(axis=1, keepdims=True)
        assert np.allclose(np.take_along_axis(scores, theirs.ids, axis=1), theirs.weights, atol=1e-6)


@pytest.mark.runtime
def test_the_same_computation_passes(model: Path, run: LlamaRun) -> None:
    reference = run_reference(model, TOKENS, routing=routing(run))
    checks = [
        check_logits(run, reference, TOKENS, EXACT),
        check_steps(run, TOKENS, EXACT),
        *check_routing(run, reference, EXACT),
    ]
    assert [check.passed for check in checks] == [True] * 3
    assert checks[0].value is not None
    assert checks[0].value < 1e-10
    assert [(a.layer, a.tokens, a.same) for a in agreement(run, reference, EXACT)] == [(0, 48, 48), (1, 48, 48)]


def test_agreement_tells_ties_from_other_choices() -> None:
    """By hand: of four tokens one has the same experts in another order, one turns in a tie, one beyond it."""
    logits = np.array([[4, 3, 1, 0], [4, 3, 1, 0], [4, 2, 2, 0], [4, 3, 1, 0]], np.float32)
    theirs = np.array([[0, 1], [1, 0], [0, 2], [0, 2]], np.int32)
    ours = np.array([[0, 1], [0, 1], [0, 1], [0, 1]], np.int32)
    weights = np.full((4, 2), 0.5, np.float32)
    margins = np.array([2, 2, 0, 2], np.float32)
    unused = np.zeros((4, 9), np.float32)
    run = LlamaRun(unused, unused, {3: LlamaRouted(theirs, weights, logits)})
    reference = ReferenceResult(run.logits, {3: Routed(ours, weights, margins, theirs, logits)})
    (found,) = agreement(run, reference, EXACT)
    assert found.as_dict() == {"layer": 3, "tokens": 4, "same": 2, "ties": 1, "wrong": 1, "noise": 0.0}


@pytest.mark.runtime
@pytest.mark.parametrize("tolerance", [EXACT, Tolerance(GAIN * ROUNDING_8_BIT)])
def test_another_computation_is_found(model: Path, run: LlamaRun, tmp_path: Path, tolerance: Tolerance) -> None:
    """The reference runs a damaged copy, as a llama.cpp that computes wrongly would differ from it."""
    copy = tmp_path / "model.gguf"
    copy.write_bytes(model.read_bytes())
    swap(copy, "blk.1.ffn_up_exps.weight", 2, 5)
    exchange(copy, "blk.1.attn_k.weight", "blk.1.attn_q.weight")
    found = check_logits(run, run_reference(copy, TOKENS, routing=routing(run)), TOKENS, tolerance)
    assert found.passed is False
    assert "what rounding can make" in found.message


@pytest.mark.runtime
def test_a_router_that_chooses_otherwise_is_named(model: Path, run: LlamaRun, tmp_path: Path) -> None:
    copy = tmp_path / "model.gguf"
    copy.write_bytes(model.read_bytes())
    change(copy, "blk.1.ffn_gate_inp.weight", lambda rows: rows.__setitem__([0, 7], rows[[7, 0]]), "<f4")
    reference = run_reference(copy, TOKENS, routing=routing(run))
    checks = check_routing(run, reference, Tolerance(GAIN * ROUNDING_8_BIT))
    assert [check.passed for check in checks] == [False]
    assert checks[0].message.startswith("layer 1 (blk.1.ffn_gate_inp.weight): the router's logits are off by")


@pytest.mark.runtime
def test_a_choice_that_no_tie_explains(model: Path, run: LlamaRun) -> None:
    """The logits are right, what llama.cpp makes of them is not; then the weights alone."""
    reference = run_reference(model, TOKENS, routing=routing(run))
    theirs = run.routed[1]
    ids = theirs.ids.copy()
    ids[17, 1] = int(theirs.logits[17].argmin())
    wrong = replace(run, routed={**run.routed, 1: LlamaRouted(ids, theirs.weights, theirs.logits)})
    checks = check_routing(wrong, reference, EXACT)
    assert len(checks) == 1
    router = "layer 1 (blk.1.ffn_gate_inp.weight)"
    assert checks[0].message.startswith(f"{router}: llama.cpp chooses other experts for 1 of 48 tokens")
    assert f"for token 17 {sorted(ids[17].tolist())}, ONNX {sorted(theirs.ids[17].tolist())}" in checks[0].message
    doubled = {**run.routed, 0: replace(run.routed[0], weights=2 * run.routed[0].weights)}
    checks = check_routing(replace(run, routed=doubled), reference, EXACT)
    assert [check.message for check in checks] == [
        "layer 0 (blk.0.ffn_gate_inp.weight): llama.cpp weighs the same experts otherwise"
    ]
    checks = check_routing(replace(run, routed={0: run.routed[0]}), reference, EXACT)
    assert [check.message for check in checks] == ["layer 1: llama.cpp has no router there"]


@pytest.mark.runtime
def test_a_tie_is_none_of_its_faults(model: Path, run: LlamaRun) -> None:
    """The logits of two experts are set so near to each other that what they are off by turns the choice."""
    reference = run_reference(model, TOKENS, routing=routing(run))
    ours, theirs = reference.routed[0], run.routed[0]
    assert ours.logits is not None
    margin = float(ours.margins[5])
    last, first_out = np.argsort(-ours.logits[5])[1:3]
    logits, ids = theirs.logits.copy(), theirs.ids.copy()
    logits[5, first_out] += margin
    ids[5, ids[5] == last] = first_out
    near = replace(run, routed={**run.routed, 0: LlamaRouted(ids, theirs.weights, logits)})
    checks = check_routing(near, reference, Tolerance(1.0))
    assert [check.passed for check in checks] == [True]
    assert "in 95 of 96 choices" in checks[0].message


@pytest.mark.runtime
def test_token_by_token(run: LlamaRun) -> None:
    wrong = run.stepped.copy()
    wrong[20] = wrong[21]
    assert check_steps(replace(run, stepped=wrong), TOKENS, EXACT).passed is False
    wrong[3, 7] = np.nan
    found = check_steps(replace(run, stepped=wrong), TOKENS, EXACT)
    assert (found.passed, found.message) == (False, "token 3: logits that are no numbers")


@pytest.mark.runtime
def test_given_routing_is_computed(model: Path) -> None:
    """Against a model whose router has these experts for every token: the same matrices, other weights."""
    own = run_reference(model, TOKENS)
    given = {layer: routed.ids for layer, routed in own.routed.items()}
    same = run_reference(model, TOKENS, routing=given)
    assert np.array_equal(same.logits, own.logits)
    other = {layer: (ids + 1) % 8 for layer, ids in given.items()}
    found = run_reference(model, TOKENS, routing=other)
    assert np.abs(found.logits - own.logits).max() > 0.1
    for layer, routed in found.routed.items():
        assert np.array_equal(routed.used, other[layer])
        assert routed.logits is not None
        scores = np.exp(routed.logits) / np.exp(routed.logits).sum(axis=1, keepdims=True)
        assert np.allclose(np.take_along_axis(scores, other[layer], axis=1), routed.weights, atol=1e-6)
    assert np.array_equal(found.routed[0].ids, own.routed[0].ids)
    with pytest.raises(ValueError, match="routing of layer 1"):
        run_reference(model, TOKENS, routing={0: given[0]})
    with pytest.raises(ValueError, match="from 0 to 7"):
        run_reference(model, TOKENS, routing={0: given[0], 1: given[1] + 7})


def test_tolerances_by_hand() -> None:
    assert tolerance_of([F32, F16]).noise == GAIN * 0.00021
    assert tolerance_of([F32, BF16, BY_NAME["Q2_K"]]).noise == GAIN * 0.0094
    assert tolerance_of([F32]).kld(spread=3.0) == LEAST_KLD
    assert Tolerance(0.1).kld(spread=2.0) == pytest.approx(0.02)
