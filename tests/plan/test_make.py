"""Plans of a synthetic model: exact bytes, floors, the smallest and the largest budget, and plan.json."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mopeq_edge.errors import FormatError, PlanError
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.gguf_layout import layout
from mopeq_edge.plan.artifact import Plan, read_plan, tensor_type_lines, write_plan
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import DEFAULT_TYPES, FLOORS, parse_types
from mopeq_edge.plan.make import make_plan, require_budget, size_range
from mopeq_edge.plan.options import PlanOptions
from mopeq_edge.sensitivity.table import SensitivityTable
from mopeq_edge.source.roles import Role

from .synthetic import KVS, MemorySource, table, tensors

DEFAULT = tuple(BY_NAME[name] for name in DEFAULT_TYPES)
SCORES = ("fisher", "imatrix")
TENSOR: dict[str, Any] = {"name": "x", "role": "x", "shape": [1], "nbytes": 1, "damage": 0, "groups": []}


@pytest.fixture
def source() -> MemorySource:
    return MemorySource()


@pytest.fixture
def damages(source: MemorySource) -> SensitivityTable:
    return table(source, DEFAULT, SCORES)


def options(**changes: Any) -> PlanOptions:
    return PlanOptions(**{"sensitivity": "fisher", "types": DEFAULT, "floors": FLOORS, **changes})


def of_bytes(n: int) -> Budget:
    return Budget(gb=n / 1e9)


def file_size(source: MemorySource, types: dict[str, str]) -> int:
    specs = [(t.name, t.shape, BY_NAME[types[t.name]]) for t in source.tensors]
    return layout(source.kvs, specs).file_size


def lossless_size(source: MemorySource) -> int:
    return file_size(source, {t.name: t.type.name for t in source.tensors})


def check(source: MemorySource, damages: SensitivityTable, plan: Plan, score: str = "fisher") -> None:
    """What must hold for every plan."""
    assert [(t.name, t.shape) for t in plan.tensors] == [(t.name, t.shape) for t in source.tensors]
    types = {t.name: t.type for t in plan.tensors}
    assert plan.file_bytes == file_size(source, types) <= plan.budget_bytes
    assert plan.file_bytes == plan.header_bytes + sum(t.nbytes for t in plan.tensors)
    assert plan.smallest_bytes <= plan.file_bytes <= plan.largest_bytes
    assert sum(plan.bytes_by_type().values()) == plan.file_bytes - plan.header_bytes
    total = []
    for tensor, planned in zip(source.tensors, plan.tensors, strict=True):
        if not tensor.quantizable:
            assert (planned.type, planned.damage) == (tensor.type.name, 0)
            continue
        errors = damages.errors[tensor.name]
        assert BY_NAME[planned.type].fits(tensor.n_in)
        total.append(float(errors.damage[score][errors.types.index(planned.type)].sum()))
        assert planned.damage == pytest.approx(total[-1], rel=1e-12)
    assert plan.damage == pytest.approx(math.fsum(total), rel=1e-12)
    assert 0 <= plan.gap < 1e-3


def test_exact_bytes_at_every_budget(source: MemorySource, damages: SensitivityTable) -> None:
    smallest, largest = size_range(source, source.kvs, options(), has_imatrix=True)
    before = None
    for limit in np.linspace(smallest, largest + 100, 60).astype(int):
        plan = make_plan(source, damages, source.kvs, of_bytes(int(limit)), options())
        check(source, damages, plan)
        assert plan.budget_bytes == limit
        assert (plan.smallest_bytes, plan.largest_bytes) == (smallest, largest)
        if before is not None:
            assert plan.damage <= before.damage
        before = plan
    assert before is not None
    assert before.damage == 0


def test_the_minimum_is_exact(source: MemorySource, damages: SensitivityTable) -> None:
    smallest, _ = size_range(source, source.kvs, options(), has_imatrix=True)
    plan = make_plan(source, damages, source.kvs, of_bytes(smallest), options())
    check(source, damages, plan)
    assert plan.file_bytes == smallest
    # By hand: the smallest type of each, down projections of 96 take 32-blocks only
    for tensor in plan.tensors:
        if tensor.role == "expert":
            assert tensor.type == ("IQ4_NL" if "down" in tensor.name else "IQ2_XXS")
        elif tensor.role in ("attention", "output", "embedding") and tensor.name.endswith(".weight"):
            assert tensor.type == "IQ4_XS"
    budget = of_bytes(smallest - 1)
    for refuse in (
        lambda: make_plan(source, damages, source.kvs, budget, options()),
        lambda: require_budget(source, source.kvs, budget, options()),
    ):
        with pytest.raises(PlanError, match=rf"\({smallest - 1} bytes\): the smallest file .* has {smallest} bytes"):
            refuse()
    require_budget(source, source.kvs, of_bytes(smallest), options())


def test_a_budget_larger_than_the_source(source: MemorySource, damages: SensitivityTable) -> None:
    plan = make_plan(source, damages, source.kvs, Budget(gb=1), options())
    check(source, damages, plan)
    assert plan.file_bytes == plan.largest_bytes == lossless_size(source)
    assert [t.type for t in plan.tensors] == [t.type.name for t in source.tensors]
    assert (plan.damage, plan.gap) == (0, 0)
    # One byte less and something must be quantized
    less = make_plan(source, damages, source.kvs, of_bytes(plan.file_bytes - 1), options())
    check(source, damages, less)
    assert less.damage > 0


def test_optimal(damages: SensitivityTable) -> None:
    """Against every combination of types, on a part of the model."""
    source = MemorySource([t for t in tensors(1) if t.role in (Role.EXPERT, Role.NORM, Role.ROUTER)])
    types = parse_types("IQ2_XXS,IQ2_S,Q2_K,Q3_K,IQ4_NL,Q4_K,Q6_K")
    stacks = [t for t in source.tensors if t.quantizable]
    known = [damages.errors[t.name] for t in stacks]
    allowed = [[n for n in e.types if n == "BF16" or BY_NAME[n] in types] for e in known]
    every = []
    for pick in itertools.product(*allowed):
        kinds = {
            **{t.name: t.type.name for t in source.tensors},
            **{t.name: n for t, n in zip(stacks, pick, strict=True)},
        }
        damage = sum(e.damage["fisher"][e.types.index(n)].sum() for e, n in zip(known, pick, strict=True))
        every.append((file_size(source, kinds), float(damage)))
    sizes = sorted({size for size, _ in every})
    for limit in (sizes[0], sizes[5] - 1, sizes[len(sizes) // 2], sizes[-2], sizes[-1]):
        plan = make_plan(source, damages, source.kvs, of_bytes(limit), options(types=types))
        check(source, damages, plan)
        assert plan.damage == pytest.approx(min(d for size, d in every if size <= limit), rel=1e-9)


def test_floors(source: MemorySource, damages: SensitivityTable) -> None:
    floors = {Role.ATTENTION: 6.0, Role.EXPERT: 3.0}
    smallest, _ = size_range(source, source.kvs, options(floors=floors), has_imatrix=True)
    plan = make_plan(source, damages, source.kvs, of_bytes(smallest), options(floors=floors))
    check(source, damages, plan)
    by_name = {t.name: t.type for t in plan.tensors}
    assert by_name["blk.0.attn_q.weight"] == "Q6_K"
    assert by_name["blk.0.ffn_up_exps.weight"] == "IQ3_XXS"
    assert by_name["output.weight"] == "IQ2_XXS"
    for limit in (smallest + 10_000, smallest + 50_000):
        for t in make_plan(source, damages, source.kvs, of_bytes(limit), options(floors=floors)).tensors:
            assert BY_NAME[t.type].bpw >= floors.get(Role(t.role), 0)


def test_types_restrict(source: MemorySource, damages: SensitivityTable) -> None:
    few = parse_types("Q4_K,Q2_K,Q8_0")
    _, largest = size_range(source, source.kvs, options(types=few), has_imatrix=True)
    plan = make_plan(source, damages, source.kvs, of_bytes(largest * 2 // 5), options(types=few))
    check(source, damages, plan)
    chosen = {t.type for t in plan.tensors if plan.is_quantized(t)}
    assert chosen <= {"Q2_K", "Q4_K", "Q8_0", "BF16"}
    assert {t.type for t in plan.tensors if not plan.is_quantized(t)} == {"F32"}
    assert plan.types == ("Q2_K", "Q4_K", "Q8_0")
    # Types that were not measured cannot be planned with, even where they would be the smallest
    smallest = of_bytes(plan.smallest_bytes)
    more = options(types=(*few, BY_NAME["TQ1_0"]))
    assert make_plan(source, damages, source.kvs, smallest, more).bytes_by_type().keys() == {
        "Q2_K",
        "Q4_K",
        "Q8_0",
        "F32",
    }


def test_the_score_decides(source: MemorySource, damages: SensitivityTable) -> None:
    limit = of_bytes(lossless_size(source) // 4)
    plans = {s: make_plan(source, damages, source.kvs, limit, options(sensitivity=s)) for s in SCORES}
    for score, plan in plans.items():
        check(source, damages, plan, score)
        assert plan.sensitivity == score
    assert plans["fisher"].type_of() != plans["imatrix"].type_of()
    assert plans["fisher"].made_from != plans["imatrix"].made_from
    with pytest.raises(PlanError, match=r"no 'weight-mse' damage.*run sensitivity again"):
        make_plan(source, damages, source.kvs, limit, options(sensitivity="weight-mse"))


def test_a_table_of_another_model(source: MemorySource, damages: SensitivityTable) -> None:
    larger = MemorySource(tensors(3))
    with pytest.raises(PlanError, match=r"tensor 'blk\.2\.attn_q\.weight': the sensitivity table has no 'fisher'"):
        make_plan(larger, damages, KVS, Budget(gb=1), options())


def test_bits_per_weight(source: MemorySource, damages: SensitivityTable) -> None:
    plan = make_plan(source, damages, source.kvs, Budget(bpw=5.5), options())
    check(source, damages, plan)
    weights = sum(int(np.prod(t.shape)) for t in source.tensors)
    assert plan.bpw == 8 * (plan.file_bytes - plan.header_bytes) / weights
    assert 5.3 < plan.bpw <= 5.5


def test_plan_json(source: MemorySource, damages: SensitivityTable, tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        write_plan(make_plan(source, damages, source.kvs, Budget(bpw=5), options()), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    plan = make_plan(source, damages, source.kvs, Budget(bpw=5), options())
    found = read_plan(paths[0])
    assert found == plan
    assert found.sha256 == plan.sha256
    assert make_plan(source, damages, source.kvs, Budget(bpw=6), options()).sha256 != plan.sha256
    write_plan(found, paths[1])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    document = json.loads(paths[0].read_text())
    assert (document["format"], document["version"]) == ("mopeq-edge plan", 4)
    assert list(document) == sorted(document)


@pytest.mark.parametrize(
    "change",
    [{"version": 1}, {"version": 2}, {"version": 3}, {"version": "4"}, {"version": None}, {"format": "mopeq-edge x"}],
)
def test_another_version_of_plan_json(
    source: MemorySource, damages: SensitivityTable, tmp_path: Path, change: dict[str, Any]
) -> None:
    path = tmp_path / "plan.json"
    write_plan(make_plan(source, damages, source.kvs, Budget(bpw=5), options()), path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FormatError, match=f"^{path}: expected 'mopeq-edge plan' version 4, found .*; make it again"):
        read_plan(path)


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": None},
        {"tensors": [{"name": "x"}]},
        {"tensors": ["x"]},
        {"types": 3},
        {"colour": "blue"},
        {"tensors": [{**TENSOR, "type": "Q9_K"}]},
        {"tensors": [{**TENSOR, "type": "mixed", "groups": [{"type": "Q9_K", "experts": "0-3", "nbytes": 1}]}]},
        {"tensors": [{**TENSOR, "type": "mixed", "groups": [{"type": "Q4_K", "experts": "3-0", "nbytes": 1}]}]},
        {"tensors": [{**TENSOR, "type": "mixed", "groups": [{"type": "Q4_K", "experts": "", "nbytes": 1}]}]},
        {"tensors": [{**TENSOR, "type": "mixed", "groups": [{"type": "Q4_K", "experts": "0-3"}]}]},
    ],
)
def test_a_plan_json_of_another_form(
    source: MemorySource, damages: SensitivityTable, tmp_path: Path, change: dict[str, Any]
) -> None:
    path = tmp_path / "plan.json"
    write_plan(make_plan(source, damages, source.kvs, Budget(bpw=5), options()), path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FormatError, match=f"^{path}: "):
        read_plan(path)


def test_tensor_type_lines() -> None:
    text = tensor_type_lines({"blk.1.attn_q.weight": "Q4_K", "output.weight": "IQ4_NL"})
    assert text == "^blk\\.1\\.attn_q\\.weight$=q4_k\n^output\\.weight$=iq4_nl\n"
    # Each line means one tensor: blk.1 is not blk.11, and a dot is no other letter.
    patterns = [line.split("=")[0] for line in text.splitlines()]
    for name in ("blk.11.attn_q.weight", "blk.1.attn_q.weight.x", "blk_1.attn_q.weight", "x.blk.1.attn_q.weight"):
        assert not re.search(patterns[0], name)
    assert re.search(patterns[0], "blk.1.attn_q.weight")
    names = [t.name for t in tensors(12)]
    lines = tensor_type_lines(dict.fromkeys(names, "Q2_K")).splitlines()
    for name, line in zip(names, lines, strict=True):
        assert [other for other in names if re.search(line.split("=")[0], other)] == [name]
