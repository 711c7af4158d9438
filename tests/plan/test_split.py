"""Plans for several files: all together within the budget, to the byte, and no tensor larger than a file."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest

from mopeq_edge.emit import planned_files
from mopeq_edge.errors import PlanError
from mopeq_edge.expert_groups.layout import file_specs
from mopeq_edge.ggml.types import BY_NAME, GgmlType
from mopeq_edge.gguf_layout import Layout, layout, string
from mopeq_edge.output_kvs import PLAN_KEY
from mopeq_edge.plan.artifact import MIXED, PER_EXPERT, Plan
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import DEFAULT_TYPES, FLOORS
from mopeq_edge.plan.make import make_plan, require_budget, size_range
from mopeq_edge.plan.options import MapOptions, PlanOptions
from mopeq_edge.plan.split import types_in_a_file
from mopeq_edge.source.model import SourceTensor
from mopeq_edge.split import bytes_alone, split_kvs, split_layouts

from .synthetic import KVS, MemorySource, table, tensors

TYPES = tuple(BY_NAME[name] for name in DEFAULT_TYPES)
LIMIT = 120_000


def options(split: int | None = LIMIT) -> PlanOptions:
    return PlanOptions("fisher", TYPES, FLOORS, split_bytes=split)


def per_expert(split: int | None = LIMIT) -> PlanOptions:
    return replace(options(split), layout=PER_EXPERT)


def by_map(split: int | None = LIMIT) -> PlanOptions:
    return replace(per_expert(split), precision_map=MapOptions())


def files(source: MemorySource, plan: Plan, limit: int = LIMIT) -> tuple[Layout, ...]:
    return planned_files(source, plan.type_of(), KVS, limit)


@pytest.fixture
def source() -> MemorySource:
    return MemorySource(tensors(6))


def test_all_files_within_the_budget(source: MemorySource) -> None:
    damages = table(source, TYPES, ("fisher",))
    low, high = size_range(source, KVS, options(), has_imatrix=True)
    tight = 0
    for at in range(12):
        allowed = low + 2000 + (high - low) * at // 12 + at
        plan = make_plan(source, damages, KVS, Budget(gb=allowed / 1e9), options())
        places = split_layouts(KVS, file_specs(source.tensors, plan.type_of()), LIMIT)
        assert plan.budget_bytes == allowed
        assert plan.file_bytes == sum(place.file_size for place in places) <= allowed
        assert max(place.file_size for place in places) <= LIMIT
        assert plan.header_bytes == sum(len(place.header) for place in places)
        whole = make_plan(source, damages, KVS, Budget(gb=allowed / 1e9), options(None))
        # without the reserve the files would have been too large
        tight += plan.type_of() != whole.type_of()
        # headers are all that the limit costs where no type is too large for a file
        if all(bytes_alone(KVS, (t.name, t.shape, BY_NAME[t.type])) <= LIMIT for t in whole.tensors):
            less = make_plan(source, damages, KVS, Budget(gb=(allowed - 137 * len(places) - 200) / 1e9), options(None))
            assert whole.damage <= plan.damage * (1 + 1e-9)
            assert plan.damage <= less.damage * (1 + 1e-9)
    assert tight


def test_bits_per_weight_are_of_the_data(source: MemorySource) -> None:
    damages = table(source, TYPES, ("fisher",))
    whole = make_plan(source, damages, KVS, Budget(bpw=4.5), options(None))
    split = make_plan(source, damages, KVS, Budget(bpw=4.5), options(300_000))
    assert split.type_of() == whole.type_of()
    assert split.bpw == whole.bpw <= 4.5
    assert split.file_bytes > whole.file_bytes
    assert split.budget_bytes is not None
    assert split.file_bytes <= split.budget_bytes


def test_a_type_that_no_file_has_room_for_is_not_taken(source: MemorySource) -> None:
    """At 4.5 bit a stack of 98,304 weights is 55 kB, at 16 it is 197 kB."""
    damages = table(source, TYPES, ("fisher",))
    plenty = Budget(gb=1.0)
    plan = make_plan(source, damages, KVS, plenty, options(100_000))
    assert max(t.nbytes for t in plan.tensors) < 100_000
    assert max(t.nbytes for t in make_plan(source, damages, KVS, plenty, options(None)).tensors) > 100_000


def test_refused_before_any_work(source: MemorySource) -> None:
    budget = Budget(gb=1.0)
    require_budget(source, KVS, budget, options())
    with pytest.raises(PlanError, match=r"tensor 'blk.0.* alone needs a file of \d+ bytes in .*, its smallest"):
        require_budget(source, KVS, budget, options(20_000))
    with pytest.raises(PlanError, match="the header with the vocabulary alone needs"):
        require_budget(source, KVS, budget, options(100))


def test_a_budget_that_only_the_headers_break(source: MemorySource) -> None:
    damages = table(source, TYPES, ("fisher",))
    low, _ = size_range(source, KVS, options(), has_imatrix=True)
    make_plan(source, damages, KVS, Budget(gb=low / 1e9), options(None))
    with pytest.raises(PlanError, match=r"GB less \d+ bytes for the headers of several files"):
        make_plan(source, damages, KVS, Budget(gb=low / 1e9), options())


def test_groups_within_the_budget(source: MemorySource) -> None:
    """Groups, maps and the headers of all files count, to the byte, and it is no worse than the stock layout."""
    damages = table(source, TYPES, ("fisher",))
    low, high = size_range(source, KVS, options(), has_imatrix=True)
    grouped = tight = 0
    for at in range(6):
        allowed = low + 3000 + (high - low) * at // 6 + at
        plan = make_plan(source, damages, KVS, Budget(gb=allowed / 1e9), per_expert())
        places = files(source, plan)
        assert plan.layout == PER_EXPERT
        assert plan.budget_bytes == allowed
        assert plan.file_bytes == sum(place.file_size for place in places) <= allowed
        assert plan.header_bytes == sum(len(place.header) for place in places)
        assert plan.file_bytes == plan.header_bytes + sum(t.nbytes for t in plan.tensors)
        assert max(place.file_size for place in places) <= LIMIT
        assert plan.damage <= make_plan(source, damages, KVS, Budget(gb=allowed / 1e9), options()).damage
        grouped += sum(t.type == MIXED for t in plan.tensors)
        whole = make_plan(source, damages, KVS, Budget(gb=allowed / 1e9), per_expert(None))
        tight += plan.type_of() != whole.type_of()
    assert grouped > 12
    assert tight


def test_bits_per_weight_of_groups(source: MemorySource) -> None:
    damages = table(source, TYPES, ("fisher",))
    whole = make_plan(source, damages, KVS, Budget(bpw=4.5), per_expert(None))
    split = make_plan(source, damages, KVS, Budget(bpw=4.5), per_expert(300_000))
    assert any(t.type == MIXED for t in whole.tensors)
    assert split.type_of() == whole.type_of()
    assert split.file_bytes == sum(place.file_size for place in files(source, split, 300_000))
    assert split.budget_bytes is not None
    assert whole.file_bytes < split.file_bytes <= split.budget_bytes


def test_no_group_of_a_type_that_no_file_has_room_for(source: MemorySource) -> None:
    """Of 98,304 weights a stack is 55 kB at 4.5 bit, and 81 kB at 6.6."""
    damages = table(source, TYPES, ("fisher",))
    plan = make_plan(source, damages, KVS, Budget(gb=1.0), per_expert(70_000))
    assert max(place.file_size for place in files(source, plan, 70_000)) <= 70_000
    kinds = {name for t in plan.tensors if "_exps" in t.name for name in (t.type, *(g.type for g in t.groups))}
    assert "Q5_K" in kinds
    assert not kinds & {"Q6_K", "Q8_0", "BF16"}
    with pytest.raises(PlanError, match=r"tensor 'blk.0.* alone needs a file of \d+ bytes in .*, its smallest"):
        require_budget(source, KVS, Budget(gb=1.0), per_expert(20_000))


def test_small_matrices_with_long_names() -> None:
    """A group without one expert, or a map, can need a larger file than the stack: the planner keeps to that too."""
    kind, largest = BY_NAME["Q4_0"], Counter[str]()
    for n_expert, length in itertools.product((1, 2, 3, 9), range(32)):
        kvs = {PLAN_KEY: string("a" * length)}
        n_groups = min(7, n_expert)
        parts: dict[str, tuple[tuple[int, ...], GgmlType]] = {"blk.0.ffn_up_exps.weight": ((32, 1, n_expert), kind)}
        for n in range(1, n_expert):
            parts[f"blk.0.ffn_up_exps.{n % n_groups}.weight"] = (32, 1, n), kind
        if n_expert > 1:
            parts["blk.0.ffn_up_exps.map"] = (n_groups, n_expert), BY_NAME["I32"]
        sizes = {name: layout({**kvs, **split_kvs(1, 2, 1)}, [(name, *part)]).file_size for name, part in parts.items()}
        first, *others = sorted(sizes, key=lambda name: -sizes[name])
        if not others or sizes[first] > sizes[others[0]]:
            largest[first] += 1
        stack = SourceTensor("blk.0.ffn_up_exps.weight", (32, 1, n_expert), BY_NAME["F32"])
        assert types_in_a_file(stack, [kind], kvs, sizes[first]) == (kind,)
        with pytest.raises(PlanError, match=f"alone needs a file of {sizes[first]} bytes"):
            types_in_a_file(stack, [kind], kvs, sizes[first] - 1)
    assert len(largest) == 3, "the stack, a group and the map"


def test_the_papers_map_in_files(source: MemorySource) -> None:
    """Without a target, and scaled to one in both directions."""
    damages = table(source, TYPES, ("fisher",))
    free = make_plan(source, damages, KVS, None, by_map())
    assert free.type_of() == make_plan(source, damages, KVS, None, by_map(None)).type_of()
    assert free.budget_bytes is None
    steps = []
    for budget in (None, *(Budget(gb=free.file_bytes * share / 1e9) for share in (0.99, 1.05))):
        plan = make_plan(source, damages, KVS, budget, by_map())
        places = files(source, plan)
        assert plan.file_bytes == sum(place.file_size for place in places)
        assert max(place.file_size for place in places) <= LIMIT
        assert plan.budget_bytes is None or plan.file_bytes <= plan.budget_bytes
        assert any(t.type == MIXED for t in plan.tensors)
        assert plan.precision_map is not None
        steps.append(plan.precision_map.steps)
    assert steps[1] < 0 == steps[0] < steps[2]


@pytest.mark.parametrize("budget", [None, Budget(gb=1.0)])
def test_the_papers_map_leaves_no_type_out(source: MemorySource, budget: Budget | None) -> None:
    require_budget(source, KVS, budget, by_map())
    said = r"tensor 'blk.0.ffn_gate_exps.weight' alone needs a file of \d+ bytes in Q4_K, which the map may give it"
    with pytest.raises(PlanError, match=said):
        require_budget(source, KVS, budget, by_map(50_000))
    with pytest.raises(PlanError, match=said):
        make_plan(source, table(source, TYPES, ("fisher",)), KVS, budget, by_map(50_000))
    with pytest.raises(PlanError, match="the header with the vocabulary alone needs"):
        require_budget(source, KVS, budget, by_map(100))
