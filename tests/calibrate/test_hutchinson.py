"""The estimator against whole Hessians in float64, and the paper's closed form against the estimator."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from mopeq_edge.calibrate.hutchinson import hutchinson, mean_and_error, probe_generator, rademacher, unit
from mopeq_edge.sensitivity.scores import mopeq_score


def random(*shape: int, seed: int) -> Tensor:
    return 0.3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


EXPERT = {"down": random(6, 3, seed=3), "gate": random(4, 6, seed=1), "up": random(4, 6, seed=2)}
SIZES = {name: w.numel() for name, w in EXPERT.items()}


def norm(w: Tensor) -> Tensor:
    return w.square().sum().sqrt()


def norms(matrices: Mapping[str, Tensor]) -> Tensor:
    """The paper's loss, summed over an expert's matrices: its blocks are those of each norm alone."""
    return torch.stack([norm(w) for w in matrices.values()]).sum()


def swiglu(matrices: Mapping[str, Tensor]) -> Tensor:
    """A loss with cross terms between the matrices of an expert."""
    x = random(9, 6, seed=7) * 3
    inner = torch.nn.functional.silu(x @ matrices["gate"].T) * (x @ matrices["up"].T)
    return (inner @ random(3, 4, seed=8).T @ matrices["down"].T).square().mean().log1p()


@pytest.mark.parametrize("name", EXPERT)
def test_each_probe_is_the_exact_product(name: str) -> None:
    """One matrix: the form of every probe is v.Hv of torch's own second derivative."""
    w = EXPERT[name]
    values = []
    for probe in range(5):
        v = unit(tuple(w.shape), probe_generator(11, probe, name))
        assert float(norm(v)) == pytest.approx(1, rel=1e-14)
        _, product = torch.autograd.functional.hvp(norm, w, v)
        values.append(float((v * product).sum()))
        # and by hand: H = (I - w w^T / |w|^2) / |w|
        assert values[-1] == pytest.approx(float((1 - (v * w).sum().square() / norm(w) ** 2) / norm(w)), rel=1e-12)
    found = hutchinson(norms, {name: w}, n_probes=5, seed=11, draw=unit)[name]
    np.testing.assert_allclose(found.mean, [np.mean(values)], rtol=1e-12)
    np.testing.assert_allclose(found.standard_error, [np.std(values, ddof=1) / 5**0.5], rtol=1e-9)


def test_the_closed_form_is_what_the_paper_estimates() -> None:
    found = hutchinson(norms, EXPERT, n_probes=300, seed=5, draw=unit)
    for name, w in EXPERT.items():
        own = mopeq_score({name: float(norm(w))}, SIZES)
        assert found[name].standard_error[0] < 0.01 * own
        assert abs(found[name].mean[0] - own) < 4 * found[name].standard_error[0]
    whole = mopeq_score({name: float(norm(w)) for name, w in EXPERT.items()}, SIZES)
    error = sum(e.standard_error[0] ** 2 for e in found.values()) ** 0.5
    assert abs(sum(e.mean[0] for e in found.values()) - whole) < 4 * error
    # Rademacher probes are of length sqrt(n): n times as much
    wide = hutchinson(norms, EXPERT, n_probes=300, seed=5)
    for name, w in EXPERT.items():
        own = (w.numel() - 1) / float(norm(w))
        assert abs(wide[name].mean[0] - own) < 4 * wide[name].standard_error[0]


def test_blocks_of_a_loss_with_cross_terms_against_the_whole_hessian() -> None:
    names = sorted(EXPERT)

    def flat(*matrices: Tensor) -> Tensor:
        return swiglu(dict(zip(names, matrices, strict=True)))

    blocks = torch.autograd.functional.hessian(flat, tuple(EXPERT[name] for name in names))
    exact = [float(blocks[i][i].reshape(SIZES[n], SIZES[n]).trace()) for i, n in enumerate(names)]
    assert all(float(blocks[i][j].abs().max()) > 1e-4 for i in range(3) for j in range(3))
    # the stated error is the real one: over 60 seeds the deviations in its units have about unit spread, no bias
    deviations = []
    for seed in range(60):
        found = hutchinson(swiglu, EXPERT, n_probes=40, seed=seed)
        deviations.append(
            [(found[n].mean[0] - e) / found[n].standard_error[0] for n, e in zip(names, exact, strict=True)]
        )
    spread = np.std(deviations, axis=0, ddof=1)
    assert spread.min() > 0.7
    assert spread.max() < 1.4
    assert np.abs(np.mean(deviations, axis=0)).max() < 3 / 60**0.5


def test_a_diagonal_hessian_has_no_error() -> None:
    c = torch.tensor([[1.0, 2.0], [3.0, -10.0]], dtype=torch.float64)
    found = hutchinson(lambda m: (c * m["w"].square()).sum() / 2, {"w": torch.ones_like(c)}, n_probes=2, seed=0)["w"]
    assert (found.mean.tolist(), found.standard_error.tolist(), found.n_probes) == ([-4.0], [0.0], 2)
    linear = hutchinson(lambda m: m["w"].sum() + m["v"].square().sum(), {"w": c, "v": c}, n_probes=2, seed=0)
    assert (linear["w"].mean.tolist(), linear["v"].mean.tolist()) == ([0.0], [8.0])


def test_probes_are_reproducible_and_independent() -> None:
    def draw(*key: object) -> Tensor:
        return rademacher((40, 50), probe_generator(*key))  # type: ignore[arg-type]

    v = draw(1, 2, "a")
    assert v.dtype == torch.int8
    assert v.unique().tolist() == [-1, 1]
    assert abs(float(v.double().mean())) < 4 / 2000**0.5
    assert torch.equal(v, draw(1, 2, "a"))
    for other in ((1, 2, "b"), (1, 3, "a"), (2, 2, "a")):
        assert abs(float((v.double() * draw(*other).double()).mean())) < 4 / 2000**0.5


def test_mean_and_error_by_hand() -> None:
    found = mean_and_error([np.array([1.0, 0.0]), np.array([3.0, 0.0]), np.array([8.0, 3.0])])
    np.testing.assert_allclose(found.mean, [4, 1])
    np.testing.assert_allclose(found.standard_error, [(13 / 3) ** 0.5, 1])
    with pytest.raises(ValueError, match="at least 2 probes, got 1"):
        mean_and_error([np.array([1.0])])
