"""Error tables against quantizing, dequantizing and summing by hand in double precision."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from converters import CONVERTERS
from mopeq_edge.errors import SourceError
from mopeq_edge.ggml.library import load_ggml
from mopeq_edge.ggml.types import BY_NAME, GgmlType
from mopeq_edge.imatrix import Entry, Imatrix
from mopeq_edge.sensitivity import measure
from mopeq_edge.sensitivity.measure import TensorErrors, measure_tensor
from mopeq_edge.sensitivity.sample import drawn_rows
from mopeq_edge.sensitivity.scores import Pricing
from mopeq_edge.source.huggingface import HuggingFaceSource, open_huggingface
from mopeq_edge.source.model import SourceTensor

from ..builders import build_olmoe

pytestmark = pytest.mark.runtime

DOWN = "blk.1.ffn_down_exps.weight"


def types_of(tensor: SourceTensor, *names: str) -> list[GgmlType]:
    return [*(BY_NAME[name] for name in names), tensor.type]


@pytest.fixture(scope="module")
def down(tiny_source: HuggingFaceSource) -> SourceTensor:
    return next(t for t in tiny_source.tensors if t.name == DOWN)


@pytest.fixture(scope="module")
def imatrix(down: SourceTensor) -> Imatrix:
    rng = np.random.default_rng(0)
    sums = rng.lognormal(0, 1, (down.n_matrices, down.n_in)).astype(np.float32)
    counts = rng.integers(1, 9, down.n_matrices).astype(np.float32)
    return Imatrix({DOWN: Entry(sums, counts)}, ("x",), 1, 8)


def prices(tensor: SourceTensor, seed: int = 1) -> dict[str, list[Pricing]]:
    """One score with all weights different, one with none."""
    rng = np.random.default_rng(seed)
    own = [
        Pricing(rng.random() + 0.5, rng.random(tensor.n_in), rng.random(tensor.n_out)) for _ in range(tensor.n_matrices)
    ]
    return {"all": own, "plain": [Pricing(1.0)] * tensor.n_matrices}


def run(
    source: HuggingFaceSource,
    tensor: SourceTensor,
    types: Sequence[GgmlType],
    imatrix: Imatrix | None,
    *,
    threads: int = 2,
    sample_rows: int | None = None,
) -> TensorErrors:
    with ThreadPoolExecutor(threads) as pool:
        return measure_tensor(
            source, tensor, types, prices(tensor), imatrix, load_ggml(), pool, sample_rows=sample_rows
        )


def squared_error(w: np.ndarray, kind: GgmlType, weights: np.ndarray | None) -> np.ndarray:
    ggml = load_ggml()
    back = ggml.dequantize(kind, ggml.quantize(kind, w, weights), w.shape[1])
    return (back.astype(np.float64) - w.astype(np.float64)) ** 2


@pytest.mark.parametrize("with_imatrix", [True, False])
def test_damage_of_every_type_and_expert(
    tiny_source: HuggingFaceSource, down: SourceTensor, imatrix: Imatrix, with_imatrix: bool
) -> None:
    types = types_of(down, "Q2_K", "IQ3_S", "Q4_K", "Q8_0")
    got = run(tiny_source, down, types, imatrix if with_imatrix else None)
    assert got.types == ("Q2_K", "IQ3_S", "Q4_K", "Q8_0", "BF16")
    entry = imatrix.entries[DOWN]
    for expert in (0, 5, 15):
        w = tiny_source.read(down, expert)
        assert got.norms[expert] == pytest.approx(np.linalg.norm(w.astype(np.float64)), rel=1e-12)
        weights = entry.sums[expert] / entry.counts[expert] if with_imatrix else None
        price = prices(down)["all"][expert]
        for index, kind in enumerate(types[:-1]):
            d2 = squared_error(w, kind, weights)
            expected = price.factor * np.einsum("ij,j,i->", d2, price.columns, price.rows)
            assert got.damage["all"][index, expert] == pytest.approx(expected, rel=1e-5)
            assert got.damage["plain"][index, expert] == pytest.approx(d2.sum(), rel=1e-5)
    # the tensor's own type loses nothing; every other loses something, and fewer bits lose more
    for damage in got.damage.values():
        assert (damage[-1] == 0).all()
        assert (np.diff(damage, axis=0) < 0).all()
    assert all((variance == 0).all() for variance in got.variance.values())


def test_the_imatrix_changes_what_is_lost(tiny_source: HuggingFaceSource, down: SourceTensor, imatrix: Imatrix) -> None:
    types = types_of(down, "Q3_K")
    with_it, without = (run(tiny_source, down, types, given).damage["plain"] for given in (imatrix, None))
    assert (with_it[0] != without[0]).all()


def test_neither_threads_nor_pieces_change_a_number(
    tiny_source: HuggingFaceSource, down: SourceTensor, imatrix: Imatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = types_of(down, "Q2_K", "Q4_K")
    one, three = (run(tiny_source, down, types, imatrix, threads=n, sample_rows=50) for n in (1, 3))
    for score in one.damage:
        np.testing.assert_array_equal(one.damage[score], three.damage[score])
        np.testing.assert_array_equal(one.variance[score], three.variance[score])
    np.testing.assert_array_equal(one.norms, three.norms)
    monkeypatch.setattr(measure, "ROWS_AT_ONCE", 7 * down.n_in)
    pieces = run(tiny_source, down, types, imatrix, sample_rows=50)
    np.testing.assert_allclose(pieces.damage["all"], one.damage["all"], rtol=1e-12)
    np.testing.assert_allclose(pieces.variance["all"], one.variance["all"], rtol=1e-9)


def test_rows_are_drawn_without_replacement_and_a_longer_draw_begins_with_a_shorter() -> None:
    assert drawn_rows(5, 5, 0).tolist() == drawn_rows(5, 9, 0).tolist() == [0, 1, 2, 3, 4]
    drawn = [drawn_rows(20, 6, seed) for seed in range(300)]
    assert all(len(set(rows.tolist())) == 6 for rows in drawn)
    # each row comes 90 times out of 300 in the mean, with a standard deviation of 8
    counts = np.bincount(np.concatenate(drawn), minlength=20)
    assert counts.min() > 90 - 40
    assert counts.max() < 90 + 40
    np.testing.assert_array_equal(drawn_rows(20, 9, 7)[:6], drawn[7])


def test_a_sample_estimates_the_whole_and_states_its_error(
    tiny_source: HuggingFaceSource, down: SourceTensor, imatrix: Imatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = types_of(down, "Q3_K")
    whole = run(tiny_source, down, types, imatrix)
    estimates, stated, norms = [], [], []
    for seed in range(40):
        monkeypatch.setattr(measure, "drawn_rows", lambda n, m, seed, s=seed: drawn_rows(n, m, 1000 * s + seed))
        got = run(tiny_source, down, types, imatrix, sample_rows=64)
        estimates.append(got.damage["all"][0])
        stated.append(np.sqrt(got.variance["all"][0]))
        norms.append(got.norms)
        assert (got.variance["all"][-1] == 0).all()
    # 40 seeds x 16 experts
    deviation = (np.array(estimates) - whole.damage["all"][0]) / np.array(stated)
    assert np.abs(deviation).max() < 4
    assert abs(deviation.mean()) < 0.5
    ratio = np.mean(stated, axis=0) / np.std(estimates, axis=0, ddof=1)
    assert ratio.min() > 0.5
    assert ratio.max() < 2
    np.testing.assert_allclose(np.mean(norms, axis=0), whole.norms, rtol=0.02)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_names_tensor_and_expert(
    tmp_path_factory: pytest.TempPathFactory, bad: float
) -> None:
    from safetensors.torch import load_file, save_file

    directory = build_olmoe(tmp_path_factory.mktemp("bad") / "m")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.experts.5.down_proj.weight"][3, 4] = bad
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    source = open_huggingface(directory, CONVERTERS, pre="gpt-2")
    tensor = next(t for t in source.tensors if t.name == DOWN)
    with pytest.raises(SourceError) as caught:
        run(source, tensor, types_of(tensor, "Q4_0"), None)
    assert f"tensor '{DOWN}', expert 5: 1 of 2048 weights are NaN or infinite" in str(caught.value)
