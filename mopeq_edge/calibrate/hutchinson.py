"""Hutchinson's estimator: the trace of a Hessian from random probes, with its standard error.

For a probe v with E[v v^T] = c I the quadratic form v^T H v has the mean c tr(H). Two kinds of probes:

==============  =================================  ===========  =============================
kind            drawn as                           c            the mean of v^T H v is
==============  =================================  ===========  =============================
``rademacher``  +1 or -1 for each weight           1            tr(H)
``unit``        Gaussian, scaled to length one     1/n          tr(H)/n, the mean diagonal
==============  =================================  ===========  =============================

With several matrices one Hessian-vector product serves them all: v_e . (H v)_e = v_e^T H_ee v_e plus the cross terms
v_e^T H_ef v_f, whose mean is zero because the probes of different matrices are independent. They only add to the
standard error. Sources: Hutchinson 1989; HAWQ-V2, arXiv 1911.03852; unit probes as in MoPEQ, arXiv 2509.02512.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mopeq_edge.calibrate.statistics import Doubles

Loss = Callable[[Mapping[str, Tensor]], Tensor]
Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]


@dataclass(frozen=True)
class Estimate:
    """Mean over ``n_probes`` probes and its standard error, arrays of one shape."""

    mean: Doubles
    standard_error: Doubles
    n_probes: int


def probe_generator(seed: int, probe: int, matrix: str) -> torch.Generator:
    """Random numbers of one probe of one matrix: the same in whatever order matrices are visited."""
    key = hashlib.sha256(f"{seed}/{probe}/{matrix}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))


def rademacher(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """+1 or -1 with equal odds, int8 [shape]: a model's probe is as large as its weights."""
    return torch.randint(0, 2, shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)


def unit(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A direction, uniform on the sphere: float64 [shape] of length one."""
    v = torch.randn(shape, generator=generator, dtype=torch.float64)
    return v / v.square().sum().sqrt()


def mean_and_error(forms: Iterable[Doubles]) -> Estimate:
    """Mean of the probes' quadratic forms (arrays of one shape), and its standard error.

    Raises :class:`ValueError` for fewer than two probes, which cannot tell their own error.
    """
    values = np.stack(list(forms))
    n = len(values)
    if n < 2:
        raise ValueError(f"expected at least 2 probes, got {n}")
    return Estimate(values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(n), n)


def hutchinson(
    loss: Loss, matrices: Mapping[str, Tensor], *, n_probes: int, seed: int, draw: Draw = rademacher
) -> dict[str, Estimate]:
    """Estimate of each matrix's diagonal block of the Hessian of ``loss``, by exact Hessian-vector products.

    ``loss`` maps the matrices by name to a number and must be twice differentiable; it is evaluated in the
    matrices' own dtype (float64 for a reference). The estimates are of tr(H_ee), or with ``draw=unit`` of
    tr(H_ee)/n. Needs the graph of ``loss`` in memory: for one expert or a small model.
    """
    names = sorted(matrices)
    leaves = {name: matrices[name].detach().clone().requires_grad_() for name in names}
    inputs = [leaves[name] for name in names]
    first = torch.autograd.grad(loss(leaves), inputs, create_graph=True, materialize_grads=True)
    # a loss that is linear in a matrix has a gradient without a graph there: its curvature is zero, no error
    gradients = [g + 0.0 * w for g, w in zip(first, inputs, strict=True)]

    def forms(probe: int) -> Doubles:
        probes = [
            draw(tuple(leaves[name].shape), probe_generator(seed, probe, name)).to(leaves[name].dtype) for name in names
        ]
        products = torch.autograd.grad(gradients, inputs, probes, retain_graph=True)
        return np.array([float((v * hv).sum(dtype=torch.float64)) for v, hv in zip(probes, products, strict=True)])

    whole = mean_and_error(forms(probe) for probe in range(n_probes))
    return {
        name: Estimate(whole.mean[i : i + 1], whole.standard_error[i : i + 1], n_probes) for i, name in enumerate(names)
    }
