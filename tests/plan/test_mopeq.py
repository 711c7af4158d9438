"""Plans of the paper's planner: exact bytes, the types by hand, scaling to budgets, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mopeq_edge.errors import FormatError, PlanError
from mopeq_edge.expert_groups.layout import file_layout, groups_of
from mopeq_edge.ggml.types import BF16, BY_NAME, F32
from mopeq_edge.plan.artifact import KNAPSACK, MOPEQ, PER_EXPERT, STOCK, Plan, read_plan, write_plan
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import DEFAULT_TYPES, FLOORS
from mopeq_edge.plan.expert_scores import expert_scores
from mopeq_edge.plan.file_bytes import FileBytes
from mopeq_edge.plan.make import make_plan, require_budget, size_range
from mopeq_edge.plan.options import PER_LAYER, PER_MODEL, MapOptions, PlanOptions, parse_bits
from mopeq_edge.sensitivity.table import SensitivityTable
from mopeq_edge.source.model import SourceTensor
from mopeq_edge.source.roles import Role

from .synthetic import N_EXPERT, MemorySource, table, tensors
from .test_per_expert import odd, of_bytes, types_of, wide, written_size

DEFAULT = tuple(BY_NAME[name] for name in DEFAULT_TYPES)
SCORES = ("fisher", "weight-mse", "mopeq", "frequency", "hybrid")
OPTIONS = PlanOptions("mopeq", DEFAULT, FLOORS, PER_EXPERT, MapOptions(PER_LAYER))
# both layers have four experts
S = {0: np.array([1.0, 9.0, 5.0, 1.0]), 1: np.array([100.0, 900.0, 500.0, 900.0])}


def with_scores(source: MemorySource, mopeq: Mapping[int, Any] = S) -> SensitivityTable:
    return replace(table(source, DEFAULT, SCORES), mopeq=dict(mopeq))


def experts(plan: Plan, name: str) -> list[str]:
    tensor = next(t for t in plan.tensors if t.name == name)
    return [kind.name for kind in types_of(tensor.written_as(), tensor.shape[2])]


def check(source: MemorySource, damages: SensitivityTable, plan: Plan, path: Path) -> None:
    """What must hold for every plan."""
    assert (plan.layout, plan.planner, plan.gap) == (PER_EXPERT, MOPEQ, None)
    assert plan.file_bytes == file_layout(source.kvs, source.tensors, plan.type_of()).file_size
    assert plan.file_bytes == plan.header_bytes + sum(t.nbytes for t in plan.tensors)
    assert plan.file_bytes == written_size(source, plan, path / "m.gguf")
    assert plan.budget_bytes is None or plan.file_bytes <= plan.budget_bytes
    total = []
    for tensor, planned in zip(source.tensors, plan.tensors, strict=True):
        if not tensor.quantizable:
            assert (planned.type, planned.damage) == (tensor.type.name, 0)
            continue
        errors = damages.errors[tensor.name]
        kinds = types_of(planned.written_as(), tensor.n_matrices)
        own = [errors.damage[plan.sensitivity][errors.types.index(k.name), e] for e, k in enumerate(kinds)]
        assert planned.damage == pytest.approx(math.fsum(own), rel=1e-12)
        total += own
    assert plan.damage == pytest.approx(math.fsum(total), rel=1e-12)


def test_the_map_by_hand(tmp_path: Path) -> None:
    source = MemorySource()
    damages = with_scores(source)
    plan = make_plan(source, damages, source.kvs, None, OPTIONS)
    check(source, damages, plan, tmp_path)
    assert plan.budget_bytes is None
    for name in ("gate", "up"):
        assert experts(plan, f"blk.0.ffn_{name}_exps.weight") == ["Q2_K", "Q4_K", "Q3_K", "Q2_K"]
        assert experts(plan, f"blk.1.ffn_{name}_exps.weight") == ["Q2_K", "Q4_K", "Q3_K", "Q4_K"]
    for tensor in plan.tensors:
        if "ffn_down" in tensor.name:
            # rows of 96 take no 256-blocks: the next larger candidate, for all three precisions
            assert (tensor.type, tensor.groups) == ("IQ4_NL", ())
        elif tensor.role in ("embedding", "output", "attention") and not tensor.name.endswith(".bias"):
            assert tensor.type == ("F32" if "norm" in tensor.name else "Q4_K")
    record = plan.precision_map
    assert record is not None
    assert (record.scope, record.types, record.experts) == ("layer", ("Q2_K", "Q3_K", "Q4_K"), (3, 2, 3))
    assert (record.unscaled_bytes, record.steps) == (plan.file_bytes, 0)
    assert record.sentence(None) == "experts clustered by layer: 3 at Q2_K, 2 at Q3_K, 3 at Q4_K"
    whole = make_plan(source, damages, source.kvs, None, replace(OPTIONS, precision_map=MapOptions(PER_MODEL)))
    assert experts(whole, "blk.0.ffn_up_exps.weight") == ["Q2_K"] * N_EXPERT
    assert experts(whole, "blk.1.ffn_up_exps.weight") == ["Q2_K", "Q4_K", "Q3_K", "Q4_K"]


def test_other_types_and_floors(tmp_path: Path) -> None:
    source = MemorySource()
    damages = with_scores(source)
    bits = parse_bits("2=iq2_xs, 4=IQ4_XS")
    assert {n: kind.name for n, kind in bits.items()} == {2: "IQ2_XS", 3: "Q3_K", 4: "IQ4_XS"}
    floors = {**FLOORS, Role.OUTPUT: BY_NAME["Q6_K"].bpw, Role.EXPERT: 3.0}
    asked = replace(OPTIONS, precision_map=MapOptions(PER_LAYER, bits), floors=floors)
    plan = make_plan(source, damages, source.kvs, None, asked)
    check(source, damages, plan, tmp_path)
    by_name = {t.name: t.type for t in plan.tensors}
    assert (by_name["output.weight"], by_name["token_embd.weight"]) == ("Q6_K", "IQ4_XS")
    # IQ2_XS has 2.3125 bits: the next larger one of the candidates at the experts' floor has 3.0625
    assert experts(plan, "blk.0.ffn_up_exps.weight") == ["IQ3_XXS", "IQ4_XS", "Q3_K", "IQ3_XXS"]


def test_a_tensor_never_grows(tmp_path: Path) -> None:
    """A source that is quantized already."""
    source = MemorySource(tensors(stored="Q4_0"))
    damages = with_scores(source)
    plan = make_plan(source, damages, source.kvs, None, OPTIONS)
    check(source, damages, plan, tmp_path)
    assert experts(plan, "blk.0.ffn_up_exps.weight") == ["Q2_K", "Q4_0", "Q3_K", "Q2_K"]
    assert next(t.type for t in plan.tensors if t.name == "output.weight") == "Q4_0"


@pytest.mark.parametrize("scope", [PER_LAYER, PER_MODEL])
@pytest.mark.parametrize("source", [odd(5), wide(16)], ids=["odd 5", "wide"])
def test_scaled_to_budgets(source: MemorySource, scope: str, tmp_path: Path) -> None:
    """Every size between the extremes: it fits, one step more would not, and the maps are nested."""
    layers = sorted({t.layer for t in source.tensors if t.layer is not None})
    n_expert = next(t.n_matrices for t in source.tensors if t.projection is not None)
    rng = np.random.default_rng(3)
    damages = with_scores(source, {layer: 10 ** rng.uniform(-3, 0, n_expert) for layer in layers})
    options = replace(OPTIONS, precision_map=MapOptions(scope))
    free = make_plan(source, damages, source.kvs, None, options)
    smallest, largest = size_range(source, source.kvs, options, has_imatrix=True)
    assert (free.smallest_bytes, free.largest_bytes) == (smallest, largest)
    sizes = {smallest, largest, largest + 100, free.file_bytes, free.file_bytes - 1, free.file_bytes + 1}
    sizes |= set(np.linspace(smallest, largest, 40).astype(int).tolist())
    before: Plan | None = None
    for limit in sorted(sizes):
        plan = make_plan(source, damages, source.kvs, of_bytes(int(limit)), options)
        check(source, damages, plan, tmp_path)
        assert plan.budget_bytes == limit
        record = plan.precision_map
        assert record is not None
        assert record.unscaled_bytes == free.file_bytes
        assert (record.steps < 0) == (limit < free.file_bytes)
        assert sum(record.experts) == len(layers) * n_expert
        if before is not None:
            pairs = [
                (old.bpw, new.bpw)
                for a, b in zip(before.tensors, plan.tensors, strict=True)
                if b.role == "expert"
                for old, new in zip(types_of(a.written_as(), n_expert), types_of(b.written_as(), n_expert), strict=True)
            ]
            assert all(old <= new for old, new in pairs)
            if before.file_bytes < plan.file_bytes:
                assert before.budget_bytes < plan.file_bytes
        before = plan
    exact = make_plan(source, damages, source.kvs, of_bytes(free.file_bytes), options)
    assert exact.tensors == free.tensors
    lowest = make_plan(source, damages, source.kvs, of_bytes(smallest), options)
    assert lowest.file_bytes == smallest
    for refuse in (make_plan_of(source, damages, smallest - 1, options), check_of(source, smallest - 1, options)):
        with pytest.raises(PlanError, match=rf"\({smallest - 1} bytes\): .* lowest type of the map has {smallest} "):
            refuse()
    check_of(source, smallest, options)()


def make_plan_of(source: MemorySource, damages: SensitivityTable, n: int, options: PlanOptions) -> Any:
    return lambda: make_plan(source, damages, source.kvs, of_bytes(n), options)


def check_of(source: MemorySource, n: int, options: PlanOptions) -> Any:
    return lambda: require_budget(source, source.kvs, of_bytes(n), options)


def test_what_the_scaled_map_says() -> None:
    source = wide(16)
    damages = with_scores(source, {n: np.arange(16.0) for n in (0, 1)})
    free = make_plan(source, damages, source.kvs, None, OPTIONS)
    plan = make_plan(source, damages, source.kvs, of_bytes(free.file_bytes + 400_000), OPTIONS)
    record = plan.precision_map
    assert record is not None
    low, middle, high = record.experts
    assert record.sentence(plan.budget_bytes) == (
        f"experts clustered by layer: {low} at Q2_K, {middle} at Q3_K, {high} at Q4_K; {free.file_bytes + 400_000:,} "
        f"bytes asked for, {free.file_bytes:,} without a target: {record.steps} steps up"
    )
    assert record.steps > 1


def test_bits_per_weight_mean_what_they_mean_to_the_knapsack() -> None:
    source = wide(16)
    damages = with_scores(source, {n: np.arange(16.0) for n in (0, 1)})
    paper = make_plan(source, damages, source.kvs, Budget(bpw=4), OPTIONS)
    ours = make_plan(source, damages, source.kvs, Budget(bpw=4), PlanOptions("mopeq", DEFAULT, FLOORS, PER_EXPERT))
    assert paper.budget_bytes == ours.budget_bytes
    assert (ours.planner, ours.precision_map) == (KNAPSACK, None)
    assert ours.damage < paper.damage


def test_the_scores_of_other_sensitivities() -> None:
    source = MemorySource()
    made = table(source, DEFAULT, SCORES)
    stacks = [t for t in source.tensors if t.projection is not None]
    tokens = np.array([7.0, 0.5, 7.0, 40.0]) / 64
    for stack in stacks:
        errors = made.errors[stack.name]
        for ranking in ("frequency", "hybrid"):
            errors.damage[ranking][:] = errors.damage["weight-mse"] * tokens
    kinds = {"gate": "Q3_K", "up": "Q3_K", "down": "IQ4_NL"}
    found = expert_scores(stacks, made, "fisher", lambda stack: BY_NAME[kinds[stack.projection or ""]])
    for layer in (0, 1):
        expected = np.zeros(N_EXPERT)
        for projection, kind in kinds.items():
            errors = made.errors[f"blk.{layer}.ffn_{projection}_exps.weight"]
            expected += errors.damage["fisher"][errors.types.index(kind)]
        np.testing.assert_allclose(found[layer], expected, rtol=1e-15)
    for ranking in ("frequency", "hybrid"):
        found = expert_scores(stacks, made, ranking, lambda stack: BY_NAME[kinds[stack.projection or ""]])
        for layer in (0, 1):
            # to the last digit, so that as many tokens are a tie
            assert found[layer].tolist() == tokens.tolist()
    plan = make_plan(source, made, source.kvs, None, replace(OPTIONS, sensitivity="frequency"))
    assert experts(plan, "blk.1.ffn_up_exps.weight") == ["Q3_K", "Q2_K", "Q3_K", "Q4_K"]


def test_a_file_whose_tensors_change() -> None:
    for source in (odd(5), wide(4), MemorySource()):
        rng = np.random.default_rng(1)
        kinds = [BY_NAME[name] for name in ("Q8_0", "Q4_0", "BF16")]
        types: dict[str, Any] = {t.name: t.type for t in source.tensors}
        size = FileBytes(source.kvs, source.tensors, types)
        stacks = [t for t in source.tensors if t.projection is not None]
        for number in range(60):
            stack = stacks[rng.integers(len(stacks))]
            # now and then a single type, at last for all: the version key goes with the last group
            n_kinds = 1 if number >= 50 else rng.integers(1, 4)
            stack = stacks[number % len(stacks)] if number >= 50 else stack
            types[stack.name] = groups_of([kinds[i] for i in rng.integers(0, n_kinds, stack.n_matrices)])
            size.change(stack.name, types[stack.name])
            assert size.total == file_layout(source.kvs, source.tensors, types).file_size


def test_plan_json(tmp_path: Path) -> None:
    source = MemorySource()
    damages = with_scores(source)
    path = tmp_path / "plan.json"
    for budget in (None, Budget(bpw=4.2)):
        plan = make_plan(source, damages, source.kvs, budget, OPTIONS)
        write_plan(plan, path)
        assert read_plan(path) == plan
        assert read_plan(path).sha256 == plan.sha256
    others = [OPTIONS, replace(OPTIONS, precision_map=MapOptions(PER_MODEL)), replace(OPTIONS, sensitivity="fisher")]
    assert len({make_plan(source, damages, source.kvs, None, other).made_from for other in others}) == 3
    path.write_text(path.read_text().replace('"scope"', '"scopes"'))
    with pytest.raises(FormatError, match="not a plan as mopeq-edge writes it"):
        read_plan(path)


def test_refusals() -> None:
    source = MemorySource()
    damages = with_scores(source)
    with pytest.raises(PlanError, match=r"--layout stock: --planner mopeq gives every expert a type of its own"):
        replace(OPTIONS, layout=STOCK)
    with pytest.raises(PlanError, match=r"--planner knapsack: expected a budget, found none"):
        make_plan(source, damages, source.kvs, None, PlanOptions("fisher", DEFAULT, FLOORS))
    with pytest.raises(PlanError, match=r"scope 'x': expected layer or model"):
        MapOptions("x")
    for bits in ("2=Q3_K,3=Q2_K", "3=Q2_K", "2=Q4_K"):
        with pytest.raises(
            PlanError, match=r"--bits: expected types for 2, 3 and 4 of rising bits per weight, found 2="
        ):
            MapOptions(PER_LAYER, parse_bits(bits))
    for bits in ("5=Q5_K", "2", "2=", "=Q2_K", "x"):
        with pytest.raises(PlanError, match=r"expected 2=TYPE, 3=TYPE or 4=TYPE"):
            parse_bits(bits)
    with pytest.raises(PlanError, match="cannot quantize to F32"):
        parse_bits("4=F32")
    with pytest.raises(FormatError, match="type 'Q9': unknown"):
        parse_bits("4=Q9")
    with pytest.raises(PlanError, match=r"layer 1: the sensitivity table has no 'mopeq' score for each of its 4 exper"):
        make_plan(source, with_scores(source, {0: S[0]}), source.kvs, None, OPTIONS)
    with pytest.raises(PlanError, match=r"has no 'imatrix' damage for it"):
        make_plan(source, damages, source.kvs, None, replace(OPTIONS, sensitivity="imatrix"))


def test_a_type_that_was_not_measured() -> None:
    source = MemorySource()
    few = tuple(BY_NAME[name] for name in ("Q2_K", "Q3_K", "Q8_0"))
    damages = replace(table(source, few, SCORES), mopeq=S)
    options = replace(OPTIONS, types=few)
    with pytest.raises(
        PlanError, match=r"tensor 'token_embd.weight': type Q4_K of the map was not measured, found Q2_"
    ):
        make_plan(source, damages, source.kvs, None, options)
    asked = MapOptions(PER_LAYER, parse_bits("2=IQ2_XS,4=Q8_0"))
    with pytest.raises(PlanError, match=r"ffn_gate_exps.weight': type IQ2_XS of the map was not measured"):
        make_plan(source, damages, source.kvs, None, replace(options, precision_map=asked))
    # without an imatrix it cannot be measured: the next larger type
    bare = replace(damages, quantized_with="none")
    plan = make_plan(source, bare, source.kvs, None, replace(options, precision_map=asked))
    assert experts(plan, "blk.0.ffn_up_exps.weight") == ["Q2_K", "Q8_0", "Q3_K", "Q2_K"]


def test_experts_of_one_score_are_a_stock_file(tmp_path: Path) -> None:
    stacks = [SourceTensor("blk.0.ffn_up_exps.weight", (256, 16, 4), BF16), SourceTensor("blk.0.x.weight", (8,), F32)]
    source = MemorySource(stacks)
    damages = with_scores(source, {0: np.ones(4)})
    plan = make_plan(source, damages, source.kvs, None, OPTIONS)
    check(source, damages, plan, tmp_path)
    assert [t.type for t in plan.tensors] == ["Q3_K", "F32"]
