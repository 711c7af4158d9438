"""The paper's score against second derivatives that torch computes, and prices against einsum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mopeq_edge.sensitivity.scores import Pricing, hybrid_scores, mopeq_score


def norm(w: torch.Tensor) -> torch.Tensor:
    return w.square().sum().sqrt()


def hessian_product(w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """H v of L(W) = |W|_F by two backward passes, as the authors' code does it."""
    w = w.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(norm(w), w, create_graph=True)
    (product,) = torch.autograd.grad((gradient * v).sum(), w)
    return product


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 2), (3, 5), (8, 6)])
def test_mopeq_is_the_mean_diagonal_of_the_hessian(shape: tuple[int, int]) -> None:
    w = weights(*shape)
    hessian = torch.autograd.functional.hessian(norm, w).reshape(w.numel(), w.numel())
    expected = float(hessian.trace()) / w.numel()
    assert mopeq_score({"gate": float(norm(w))}, {"gate": w.numel()}) == pytest.approx(expected, rel=1e-12)


def test_mopeq_is_what_hutchinson_estimates_with_unit_probes() -> None:
    w = weights(6, 8, seed=1)
    n = w.numel()
    # the columns of a random rotation are unit probes whose n estimates have exactly tr(H)/n as their mean
    probes, _ = torch.linalg.qr(weights(n, n, seed=2))
    exact = np.mean([float((v.reshape(6, 8) * hessian_product(w, v.reshape(6, 8))).sum()) for v in probes.T])
    score = mopeq_score({"gate": float(norm(w))}, {"gate": n})
    assert score == pytest.approx(exact, rel=1e-10)
    # and as the authors draw them: independent Gaussian probes, scaled to length one
    generator = torch.Generator().manual_seed(3)
    drawn = []
    for _ in range(400):
        v = torch.randn(6, 8, dtype=torch.float64, generator=generator)
        v /= norm(v)
        drawn.append(float((v * hessian_product(w, v)).sum()))
    error = np.std(drawn, ddof=1) / np.sqrt(len(drawn))
    assert error < 0.003 * score
    assert abs(np.mean(drawn) - score) < 4 * error


def test_mopeq_of_an_expert_is_the_sum_over_its_matrices() -> None:
    stacks = {"gate": weights(4, 6, seed=4), "up": weights(4, 6, seed=5), "down": weights(6, 3, seed=6)}
    sizes = {name: w.numel() for name, w in stacks.items()}
    norms = {name: float(norm(w)) for name, w in stacks.items()}
    parts = [mopeq_score({name: norms[name]}, sizes) for name in stacks]
    assert mopeq_score(norms, sizes) == pytest.approx(sum(parts), rel=1e-14)
    assert mopeq_score({"gate": 2.0, "up": 4.0}, {"gate": 4, "up": 8}) == 3 / 8 + 7 / 32
    assert mopeq_score({"gate": 2.0, "up": 0.0}, {"gate": 4, "up": 8}) == 3 / 8


def test_hybrid_by_hand() -> None:
    # means 4 and 2
    assert hybrid_scores([2, 4, 6], [3, 2, 1]).tolist() == [0.75, 1.0, 0.75]
    # neither the text's length nor the weights' scale matters, and a lone matrix is the average one
    assert hybrid_scores([20, 40, 60], [0.75, 0.5, 0.25]).tolist() == [0.75, 1.0, 0.75]
    assert hybrid_scores([7], [0.3]).tolist() == [1.0]
    assert hybrid_scores([2, 4, 6], [0, 0, 0]).tolist() == [0.5, 1.0, 1.5]


def test_a_price_by_hand() -> None:
    squared = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float32)
    rows = np.array([3, 1])
    columns = np.array([1.0, 0.0, 10.0])
    assert Pricing(0.5).row_damage(squared, rows).tolist() == [3, 7.5]
    assert Pricing(0.5, columns).row_damage(squared, rows).tolist() == [15.5, 32]
    # row weights belong to the matrix, of which rows 3 and 1 were measured
    weighted = Pricing(0.5, columns, rows=np.array([100.0, 2.0, 100.0, 4.0]))
    assert weighted.row_damage(squared, rows).tolist() == [62, 64]


def test_a_price_is_computed_in_double_precision() -> None:
    rng = np.random.default_rng(0)
    # mostly small errors beside a large one: float32 sums would lose them
    squared = (rng.random((5, 4096)) * 1e-4).astype(np.float32)
    squared[:, 0] = 1e4
    columns, all_rows = rng.random(4096), rng.random(9)
    rows = np.array([0, 2, 3, 5, 8])
    for pricing, c, r in (
        (Pricing(1.0), np.ones(4096), np.ones(5)),
        (Pricing(0.25, columns), columns, np.ones(5)),
        (Pricing(3.0, columns, all_rows), columns, all_rows[rows]),
        (Pricing(3.0, rows=all_rows), np.ones(4096), all_rows[rows]),
    ):
        expected = pricing.factor * np.einsum("ij,j,i->i", squared.astype(np.float64), c, r)
        got = pricing.row_damage(squared, rows)
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, expected, rtol=1e-12)
