"""Plans of a synthetic model whose experts are 896 wide: padded where that is better, and only there."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from mopeq_edge.errors import PlanError
from mopeq_edge.expert_groups.layout import file_layout
from mopeq_edge.ggml.types import BY_NAME, F32, GgmlType
from mopeq_edge.gguf_layout import layout, uint32
from mopeq_edge.pipeline import check_plan, planned_source
from mopeq_edge.plan.artifact import PER_EXPERT, Plan, read_plan, write_plan
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import DEFAULT_TYPES, FLOORS
from mopeq_edge.plan.make import make_plan, require_budget, size_range
from mopeq_edge.plan.options import ALWAYS, AUTO, NEVER, MapOptions, PlanOptions, for_llama_quantize
from mopeq_edge.sensitivity.table import SensitivityTable
from mopeq_edge.source.model import SourceTensor
from mopeq_edge.source.padded import ExpertPadding, PaddedSource

from .synthetic import KVS, N_EXPERT, MemorySource
from .synthetic import table as table_of

DEFAULT = tuple(BY_NAME[name] for name in DEFAULT_TYPES)
WIDE = {**KVS, "olmoe.feed_forward_length": uint32(896)}
PADDING = ExpertPadding("olmoe.feed_forward_length", 896, 1024)
STACKS = [f"blk.{n}.ffn_{p}_exps.weight" for n in (0, 1) for p in ("gate", "up", "down")]
BF16 = BY_NAME["BF16"]


def tensors(width: int) -> list[SourceTensor]:
    found = [SourceTensor("token_embd.weight", (256, 100), BF16), SourceTensor("output_norm.weight", (256,), F32)]
    for name in STACKS:
        shape = (width, 256, N_EXPERT) if "down" in name else (256, width, N_EXPERT)
        found.append(SourceTensor(name, shape, BF16))
    return found


SOURCE = MemorySource(tensors(896), WIDE)
# measured as the stage does: the types of padded rows too
TABLE = table_of(MemorySource(tensors(1024), WIDE), DEFAULT, ("fisher",))
OPTIONS = PlanOptions("fisher", DEFAULT, FLOORS)


def plan(limit: int, table: SensitivityTable = TABLE, **changes: object) -> Plan:
    return make_plan(SOURCE, table, WIDE, Budget(gb=limit / 1e9), replace(OPTIONS, **changes))  # type: ignore[arg-type]


def limits(n: int = 12) -> list[int]:
    smallest, largest = size_range(SOURCE, WIDE, OPTIONS, has_imatrix=True)
    ratio = (0.5 * largest / smallest) ** (1 / n)
    return [math.ceil(smallest * ratio**step) for step in range(n)]


@pytest.mark.parametrize("form", ["stock", "per-expert"])
def test_the_better_of_both_ways_within_the_same_bytes(form: str) -> None:
    taken = []
    for limit in limits():
        found = plan(limit, layout=form)
        ways = []
        for padding in (NEVER, ALWAYS):
            try:
                ways.append(plan(limit, layout=form, pad_experts=padding))
            except PlanError:
                assert padding == NEVER
        best = min(ways, key=lambda way: way.damage)
        assert found.tensors == best.tensors
        assert found.damage == min(way.damage for way in ways)
        padded = found.expert_padding is not None
        taken.append(padded)
        assert found.expert_padding in (None, PADDING)
        shapes = {t.name: t.shape for t in tensors(1024 if padded else 896)}
        assert {t.name: t.shape for t in found.tensors} == shapes
        own = PaddedSource(SOURCE, PADDING) if padded else SOURCE
        assert file_layout(own.kvs, own.tensors, found.type_of()).file_size == found.file_bytes <= limit
        assert planned_source(SOURCE, found).tensors == own.tensors
        check_plan(found, SOURCE)
        for tensor in found.tensors:
            kinds = [tensor.written_as()] if isinstance(tensor.written_as(), GgmlType) else None
            for kind in kinds or [group.type for group in tensor.written_as()]:  # type: ignore[union-attr]
                assert isinstance(kind, GgmlType)
                assert kind.fits(tensor.shape[0])
    # small files need it, at 4.5 bits and more zeros cost more than they bring
    assert taken[0]
    assert not taken[-1]
    assert taken == sorted(taken, reverse=True)


def test_two_bits_for_the_down_matrix() -> None:
    found = plan(limits()[0])
    assert {t.type for t in found.tensors if "ffn_down" in t.name} == {"IQ2_XXS"}
    never = size_range(SOURCE, WIDE, replace(OPTIONS, pad_experts=NEVER), has_imatrix=True)
    always = size_range(SOURCE, WIDE, replace(OPTIONS, pad_experts=ALWAYS), has_imatrix=True)
    # by hand: 66 bytes for 256 weights against 18 for 32 in the down matrices
    smallest = []
    for width, down in ((896, "IQ4_NL"), (1024, "IQ2_XXS")):
        types = {"token": "IQ4_XS", "outpu": "F32", "blk.0": "IQ2_XXS", "blk.1": "IQ2_XXS"}
        specs = [(t.name, t.shape, BY_NAME[down if "down" in t.name else types[t.name[:5]]]) for t in tensors(width)]
        smallest.append(layout(WIDE, specs).file_size)
    assert (never[0], always[0]) == tuple(smallest)
    both = size_range(SOURCE, WIDE, OPTIONS, has_imatrix=True)
    assert both == (always[0], never[1])
    assert (found.smallest_bytes, found.largest_bytes) == both
    for limit in (always[0], never[0]):
        require_budget(SOURCE, WIDE, Budget(gb=limit / 1e9), OPTIONS)
    with pytest.raises(PlanError, match=f"the smallest file these types and floors allow has {always[0]} bytes"):
        require_budget(SOURCE, WIDE, Budget(gb=(always[0] - 1) / 1e9), OPTIONS)
    with pytest.raises(PlanError, match=f"the smallest file these types and floors allow has {always[0]} bytes"):
        plan(always[0] - 1)
    with pytest.raises(PlanError, match=f"the smallest file these types and floors allow has {never[0]} bytes"):
        plan(never[0] - 1, pad_experts=NEVER)


def test_zeros_are_no_weights() -> None:
    budget = Budget(bpw=3)
    ways = [make_plan(SOURCE, TABLE, WIDE, budget, replace(OPTIONS, pad_experts=p)) for p in (AUTO, ALWAYS)]
    n_weights = sum(t.n_weights for t in tensors(896))
    for way in ways:
        assert way.expert_padding == PADDING
        assert way.n_weights == n_weights
        assert way.budget_bytes == way.header_bytes + int(3 * n_weights / 8)
        assert 2.8 < 8 * (way.file_bytes - way.header_bytes) / n_weights == way.bpw <= 3


def test_the_papers_map_gets_its_types() -> None:
    bits = {2: BY_NAME["IQ2_XXS"], 3: BY_NAME["Q2_K"], 4: BY_NAME["Q3_K"]}
    asked = replace(OPTIONS, layout=PER_EXPERT, precision_map=MapOptions(bits=bits))
    ways = {p: make_plan(SOURCE, TABLE, WIDE, None, replace(asked, pad_experts=p)) for p in (NEVER, ALWAYS, AUTO)}
    assert ways[AUTO].tensors == ways[ALWAYS].tensors
    assert ways[AUTO].file_bytes < ways[NEVER].file_bytes
    kinds = {
        p: {kind for t in way.tensors if "down" in t.name for kind in (t.type, *(g.type for g in t.groups))}
        for p, way in ways.items()
    }
    assert {"IQ2_XXS", "Q2_K", "Q3_K"} <= kinds[AUTO]
    assert not {"IQ2_XXS", "Q2_K", "Q3_K"} & kinds[NEVER]
    # of larger types the zeros cost more than the down matrices save
    large = replace(asked, precision_map=MapOptions(bits={**bits, 2: BY_NAME["Q3_K"], 3: BY_NAME["IQ4_XS"], 4: BF16}))
    assert make_plan(SOURCE, TABLE, WIDE, None, large).expert_padding is None
    limit = ways[AUTO].file_bytes
    scaled = make_plan(SOURCE, TABLE, WIDE, Budget(gb=limit / 1e9), asked)
    assert (scaled.tensors, scaled.budget_bytes) == (ways[AUTO].tensors, limit)
    lowest = size_range(SOURCE, WIDE, asked, has_imatrix=True)[0]
    with pytest.raises(PlanError, match=f"in the lowest type of the map has {lowest} bytes"):
        require_budget(SOURCE, WIDE, Budget(gb=(lowest - 1) / 1e9), asked)


def test_plan_json(tmp_path: Path) -> None:
    found = plan(limits()[0])
    write_plan(found, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == found
    other = MemorySource(tensors(1024), {**WIDE, "olmoe.feed_forward_length": uint32(1024)})
    for check in (planned_source, lambda source, plan: check_plan(plan, source)):
        with pytest.raises(PlanError, match=r"the plan pads experts from 896 to 1024 .* run mopeq-edge plan again"):
            check(other, found)


def test_what_cannot_be() -> None:
    even = MemorySource(tensors(1024), {**WIDE, "olmoe.feed_forward_length": uint32(1024)})
    assert size_range(even, even.kvs, OPTIONS, has_imatrix=True)[0] > 0
    with pytest.raises(PlanError, match=r"--pad-experts always: expected experts whose width .* found none in memory"):
        size_range(even, even.kvs, replace(OPTIONS, pad_experts=ALWAYS), has_imatrix=True)
    with pytest.raises(PlanError, match="--pad-experts sometimes: expected auto, never, always"):
        replace(OPTIONS, pad_experts="sometimes")
    assert for_llama_quantize(OPTIONS).pad_experts == NEVER
    with pytest.raises(PlanError, match="llama-quantize cannot pad experts"):
        for_llama_quantize(replace(OPTIONS, pad_experts=ALWAYS))
