"""Plans for several files: all together within the budget, to the byte, and no tensor larger than a file."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mopeq_edge.errors import PlanError
from mopeq_edge.expert_groups.layout import file_specs
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.plan.artifact import PER_EXPERT
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import DEFAULT_TYPES, FLOORS
from mopeq_edge.plan.make import make_plan, require_budget, size_range
from mopeq_edge.plan.options import PlanOptions
from mopeq_edge.split import bytes_alone, split_layouts

from .synthetic import KVS, MemorySource, table, tensors

TYPES = tuple(BY_NAME[name] for name in DEFAULT_TYPES)
LIMIT = 120_000


def options(split: int | None = LIMIT) -> PlanOptions:
    return PlanOptions("fisher", TYPES, FLOORS, split_bytes=split)


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
    with pytest.raises(PlanError, match="layout per-expert cannot be split yet"):
        replace(options(), layout=PER_EXPERT)


def test_a_budget_that_only_the_headers_break(source: MemorySource) -> None:
    damages = table(source, TYPES, ("fisher",))
    low, _ = size_range(source, KVS, options(), has_imatrix=True)
    make_plan(source, damages, KVS, Budget(gb=low / 1e9), options(None))
    with pytest.raises(PlanError, match=r"GB less \d+ bytes for the headers of several files"):
        make_plan(source, damages, KVS, Budget(gb=low / 1e9), options())
