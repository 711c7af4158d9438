"""Controls have the plan's multiset of types and its bytes; orders and choices by hand and by trying all."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from mopeq_edge.errors import PlanError
from mopeq_edge.expert_groups.layout import file_layout
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.plan.artifact import PER_EXPERT, STOCK, Plan
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import FLOORS, parse_types
from mopeq_edge.plan.fixed import fixed_plan, predicted
from mopeq_edge.plan.make import make_plan
from mopeq_edge.plan.options import PlanOptions
from mopeq_edge.plan.per_expert import is_stack
from mopeq_edge.source.model import SourceTensor
from mopeq_edge.study.controls import hand_map, inverse_map, random_map, summed_scores, uniform_map
from mopeq_edge.study.expert_types import ExpertTypes, expert_types, with_experts

from ..plan.synthetic import KVS, MemorySource, table, tensors

TYPES = parse_types("default")
SOURCE = MemorySource(tensors(n_layer=3))
TABLE = table(SOURCE, TYPES, ("fisher", "imatrix"))
STACKS = tuple(t for t in SOURCE.tensors if is_stack(t))
Q2, Q3, Q4 = (BY_NAME[name] for name in ("Q2_K", "Q3_K", "Q4_K"))


def plan_of(layout: str, size: int = 560_000) -> Plan:
    return make_plan(SOURCE, TABLE, KVS, Budget(gb=size / 1e9), PlanOptions("fisher", TYPES, FLOORS, layout))


def as_plan(base: Plan, experts: ExpertTypes) -> Plan:
    types = with_experts(base, experts)
    return fixed_plan(SOURCE, TABLE, KVS, types, planner="control", sensitivity="fisher", budget_bytes=None)


def multiset(types: ExpertTypes, projection: str) -> Counter[str]:
    return Counter(kind.name for name, own in types.items() if f"_{projection}_" in name for kind in own)


@pytest.mark.parametrize("layout", [STOCK, PER_EXPERT])
def test_random_and_inverse_maps_have_the_types_and_bytes_of_the_plan(layout: str) -> None:
    base = plan_of(layout)
    own = expert_types(base, STACKS)
    assert len({kind.name for kinds in own.values() for kind in kinds}) > 2
    scores = summed_scores(STACKS, own, TABLE, "fisher")
    maps = [random_map(STACKS, own, seed) for seed in range(20)]
    for experts in (*maps, inverse_map(STACKS, own, scores)):
        made = as_plan(base, experts)
        assert made.file_bytes == base.file_bytes
        assert file_layout(KVS, SOURCE.tensors, made.type_of()).file_size == base.file_bytes
        for projection in ("gate", "up", "down"):
            assert multiset(experts, projection) == multiset(own, projection)
        others = [t for t in SOURCE.tensors if t not in STACKS]
        assert [made.type_of()[t.name] for t in others] == [base.type_of()[t.name] for t in others]
    assert maps[0] == random_map(STACKS, own, 0)
    assert len({str(experts) for experts in maps}) > (2 if layout == STOCK else 15)


def test_every_expert_gets_each_type_with_its_share() -> None:
    stacks = STACKS[:1] + STACKS[3:4]
    types = {stacks[0].name: [Q2, Q2, Q2, Q3], stacks[1].name: [Q2, Q3, Q4, Q4]}
    drawn = Counter(random_map(stacks, types, seed)[stacks[0].name][1].name for seed in range(4000))
    # of eight: four, two and two; standard error 0.008
    assert drawn["Q2_K"] / 4000 == pytest.approx(0.5, abs=0.04)
    assert drawn["Q3_K"] / 4000 == pytest.approx(0.25, abs=0.04)


def test_the_inverse_order_by_hand() -> None:
    first, second = (SourceTensor(f"blk.{n}.ffn_up_exps.weight", (256, 32, 3), BY_NAME["BF16"]) for n in (0, 1))
    types = {first.name: [Q4, Q2, Q3], second.name: [Q2, Q2, Q3]}
    scores = {first.name: np.array([9.0, 1.0, 5.0]), second.name: np.array([2.0, 0.5, 2.0])}
    # the first stack is the more sensitive one, so it gets the smaller multiset, and of it 9 > 5 > 1 the least
    expected = {first.name: [Q2, Q3, Q2], second.name: [Q2, Q4, Q3]}
    assert inverse_map((first, second), types, scores) == expected


def test_stacks_that_are_not_alike_keep_their_types() -> None:
    """Ten and above have longer names, and another shape has other bytes."""
    kind = BY_NAME["BF16"]
    shapes = ((9, 32), (10, 32), (8, 64))
    stacks = tuple(SourceTensor(f"blk.{n}.ffn_up_exps.weight", (256, rows, 2), kind) for n, rows in shapes)
    types = {stack.name: [own] * 2 for stack, own in zip(stacks, (Q2, Q3, Q4), strict=True)}
    assert all(random_map(stacks, types, seed) == types for seed in range(10))


def test_the_uniform_control_is_the_best_of_all_triples() -> None:
    base = plan_of(PER_EXPERT)
    found = uniform_map(SOURCE, STACKS, base, TABLE, KVS)
    best = np.inf
    down = [t for t in TYPES if t.fits(96)]
    for gate, up, low in itertools.product(TYPES, TYPES, down):
        kind = {"gate": gate, "up": up, "down": low}
        types = {**base.type_of(), **{s.name: kind[str(s.projection)] for s in STACKS}}
        if file_layout(KVS, SOURCE.tensors, types).file_size <= base.file_bytes:
            damage = predicted(STACKS, types, TABLE, "fisher")
            best = min(best, sum(damage.values()))
    made = as_plan(base, found)
    assert made.file_bytes <= base.file_bytes
    assert sum(t.damage for t in made.tensors if t.role == "expert") == pytest.approx(best, rel=1e-12)


def test_the_hand_recipe_is_the_highest_pair_that_fits() -> None:
    source = MemorySource([t for t in tensors() if "down" not in t.name] + [_down(n) for n in (0, 1)])
    stacks = tuple(t for t in source.tensors if is_stack(t))
    damages = table(source, TYPES, ("fisher",))
    for low, high in (("Q2_K", "Q3_K"), ("Q3_K", "Q4_K"), ("Q4_K", "Q5_K")):
        types = {t.name: BY_NAME["Q4_K"] if t.quantizable else t.type for t in source.tensors}
        types |= {s.name: BY_NAME[high if s.projection == "down" else low] for s in stacks}
        pair = fixed_plan(source, damages, KVS, types, planner="x", sensitivity="fisher", budget_bytes=None)
        found = hand_map(source, stacks, pair, KVS)
        assert {name: own[0] for name, own in found.items()} == {s.name: types[s.name] for s in stacks}
    smallest = fixed_plan(
        source,
        damages,
        KVS,
        types | {s.name: BY_NAME["IQ2_XXS"] for s in stacks},
        planner="x",
        sensitivity="fisher",
        budget_bytes=None,
    )
    with pytest.raises(PlanError, match="no pair of neighbours"):
        hand_map(source, stacks, smallest, KVS)


def _down(n: int) -> SourceTensor:
    return SourceTensor(f"blk.{n}.ffn_down_exps.weight", (256, 96, 4), BY_NAME["BF16"])


@pytest.mark.parametrize("layout", [STOCK, PER_EXPERT])
def test_a_fixed_plan_of_a_plans_own_types_is_that_plan(layout: str) -> None:
    base = plan_of(layout)
    made = as_plan(base, expert_types(base, STACKS))
    assert made.file_bytes == base.file_bytes
    assert made.damage == pytest.approx(base.damage, rel=1e-12)
    assert [(t.name, t.type, t.groups, t.nbytes) for t in made.tensors] == [
        (t.name, t.type, t.groups, t.nbytes) for t in base.tensors
    ]
