"""Per-expert plans: exact bytes of odd shapes, against all assignments, never worse than stock, and in plan.json."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mopeq_edge.errors import FormatError, PlanError
from mopeq_edge.expert_groups.layout import MAX_GROUPS, Grouping, file_layout, groups_of
from mopeq_edge.expert_groups.read import read_groups
from mopeq_edge.ggml.types import BF16, BY_NAME, F32, GgmlType
from mopeq_edge.gguf_file import read_header
from mopeq_edge.plan.artifact import MIXED, PER_EXPERT, STOCK, Plan, id_runs, ids_of, read_plan, write_plan
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import DEFAULT_TYPES, FLOORS, parse_types
from mopeq_edge.plan.make import make_plan, size_range
from mopeq_edge.plan.options import PlanOptions
from mopeq_edge.sensitivity.table import SensitivityTable
from mopeq_edge.source.model import SourceTensor
from mopeq_edge.source.roles import Role

from .synthetic import MemorySource, table, tensors

DEFAULT = tuple(BY_NAME[name] for name in DEFAULT_TYPES)
OPTIONS = PlanOptions("fisher", DEFAULT, FLOORS, PER_EXPERT)
UP, GATE = "blk.0.ffn_up_exps.weight", "blk.0.ffn_gate_exps.weight"


def of_bytes(n: int) -> Budget:
    return Budget(gb=n / 1e9)


def written_size(source: MemorySource, plan: Plan, path: Path) -> int:
    """The size of a file of zeros with the plan's tensors, written and read back."""
    place = file_layout(source.kvs, source.tensors, plan.type_of())
    with path.open("wb") as file:
        file.write(place.header)
        for info in place.tensors:
            if info.name.endswith(".map"):
                groups = plan.type_of()[f"{info.name.removesuffix('.map')}.weight"]
                assert not isinstance(groups, GgmlType)
                rows = np.full((info.shape[1], info.shape[0]), -1, dtype="<i4")
                for g, group in enumerate(groups):
                    rows[list(group.experts), g] = range(len(group.experts))
                file.write(rows.tobytes())
            else:
                file.write(bytes(info.nbytes))
            file.write(bytes(-file.tell() % 32))
    found = {stack.name: stack.groups for stack in read_groups(read_header(path))}
    assert found == {name: kind for name, kind in plan.type_of().items() if not isinstance(kind, GgmlType)}
    return path.stat().st_size


def check(source: MemorySource, damages: SensitivityTable, plan: Plan) -> None:
    """What must hold for every plan."""
    place = file_layout(source.kvs, source.tensors, plan.type_of())
    assert plan.layout == PER_EXPERT
    assert plan.file_bytes == place.file_size <= plan.budget_bytes
    assert plan.header_bytes == len(place.header)
    assert plan.file_bytes == plan.header_bytes + sum(t.nbytes for t in plan.tensors)
    assert plan.smallest_bytes <= plan.file_bytes <= plan.largest_bytes
    assert sum(plan.bytes_by_type().values()) == plan.file_bytes - plan.header_bytes
    assert 0 <= plan.gap <= 1
    total = []
    for tensor, planned in zip(source.tensors, plan.tensors, strict=True):
        assert (planned.name, planned.shape) == (tensor.name, tensor.shape)
        kinds = types_of(planned.written_as(), tensor.n_matrices)
        if not tensor.quantizable:
            assert kinds == [tensor.type] * tensor.n_matrices
            continue
        errors = damages.errors[tensor.name]
        own = [errors.damage["fisher"][errors.types.index(kind.name), e] for e, kind in enumerate(kinds)]
        assert all(kind.bpw >= FLOORS.get(tensor.role, 0) for kind in kinds)
        assert planned.damage == pytest.approx(math.fsum(own), rel=1e-12)
        total.extend(own)
        assert len(planned.groups) <= MAX_GROUPS
        assert (planned.type == MIXED) == (len({kind.name for kind in kinds}) > 1) == bool(planned.groups)
    assert plan.damage == pytest.approx(math.fsum(total), rel=1e-12)


def types_of(kind: GgmlType | Grouping, n: int) -> list[GgmlType]:
    if isinstance(kind, GgmlType):
        return [kind] * n
    by_expert = {expert: group.type for group in kind for expert in group.experts}
    return [by_expert[expert] for expert in range(n)]


def odd(n_expert: int) -> MemorySource:
    """Groups of whatever size need padding: 34-byte blocks, F16 and rows of one block."""
    return MemorySource(
        [
            SourceTensor("token_embd.weight", (96, 41), BF16),
            SourceTensor("blk.0.ffn_gate_inp.weight", (96, n_expert), F32),
            SourceTensor(GATE, (96, 33, n_expert), BY_NAME["F16"]),
            SourceTensor(UP, (256, 9, n_expert), BF16),
            SourceTensor("blk.0.ffn_down_exps.weight", (32, 7, n_expert), BF16),
            SourceTensor("blk.0.ffn_down_exps.bias", (7, n_expert), F32),
        ]
    )


def wide(n_expert: int) -> MemorySource:
    """Two layers of stacks that are large beside what a group costs, and the other tensors of a model."""
    grown = [
        SourceTensor(t.name, (512, 512, n_expert), t.type)
        if t.role is Role.EXPERT
        else SourceTensor(t.name, (256, n_expert), t.type)
        if t.role is Role.ROUTER
        else t
        for t in tensors(2)
    ]
    return MemorySource(grown)


def heads() -> MemorySource:
    """Also a stack that is no expert's: a matrix a head, of one type, beside odd ones."""
    return MemorySource([*odd(5).tensors, SourceTensor("blk.0.attn_k_b.weight", (32, 33, 3), BF16)])


@pytest.mark.parametrize(
    "source",
    [odd(2), odd(5), odd(40), wide(16), MemorySource(), heads()],
    ids=["odd 2", "odd 5", "odd 40", "wide", "small", "heads"],
)
def test_bytes_budget_and_stock(source: MemorySource, tmp_path: Path) -> None:
    options = replace(OPTIONS, types=parse_types("Q2_K,Q3_K,Q4_0,IQ4_NL,Q4_K,Q5_0,Q6_K,Q8_0"))
    damages = table(source, options.types, ("fisher",), seed=1)
    smallest, largest = size_range(source, source.kvs, options, has_imatrix=True)
    before, stacks = math.inf, 0
    budgets = [np.linspace(smallest, largest + 100, 20), smallest + np.arange(0, 400, 57), smallest * 2 + np.arange(6)]
    for limit in np.sort(np.concatenate(budgets).astype(int)):
        plan = make_plan(source, damages, source.kvs, of_bytes(int(limit)), options)
        check(source, damages, plan)
        assert (plan.budget_bytes, plan.smallest_bytes, plan.largest_bytes) == (limit, smallest, largest)
        stock = make_plan(source, damages, source.kvs, of_bytes(int(limit)), replace(options, layout=STOCK))
        assert stock.layout == STOCK
        assert plan.damage <= stock.damage * (1 + 1e-12)
        assert plan.damage <= before * (1 + 1e-12)
        before = plan.damage
        if sum(bool(t.groups) for t in plan.tensors) > stacks:
            stacks = sum(bool(t.groups) for t in plan.tensors)
            assert written_size(source, plan, tmp_path / "m.gguf") == plan.file_bytes
        assert not any(t.groups for t in plan.tensors if "_exps" not in t.name)
    assert stacks > 0
    assert before == 0
    with pytest.raises(PlanError, match=rf"\({smallest - 1} bytes\): the smallest file .* has {smallest} bytes"):
        make_plan(source, damages, source.kvs, of_bytes(smallest - 1), options)


def every_plan(source: MemorySource, damages: SensitivityTable) -> Iterator[tuple[int, float]]:
    """(bytes, damage) of all assignments of types to experts."""
    own = {t.name: t.type for t in source.tensors if not t.quantizable}
    stacks = [t for t in source.tensors if t.quantizable]
    ways: list[list[tuple[GgmlType | Grouping, float]]] = []
    for tensor in stacks:
        errors = damages.errors[tensor.name]
        picks = itertools.product(range(len(errors.types)), repeat=tensor.n_matrices)
        ways.append(
            [
                (
                    groups_of([BY_NAME[errors.types[i]] for i in pick]),
                    math.fsum(errors.damage["fisher"][i, e] for e, i in enumerate(pick)),
                )
                for pick in picks
            ]
        )
    for way in itertools.product(*ways):
        types = own | {t.name: kind for t, (kind, _) in zip(stacks, way, strict=True)}
        yield file_layout(source.kvs, source.tensors, types).file_size, math.fsum(damage for _, damage in way)


@pytest.mark.parametrize(
    ("shapes", "names", "lost"),
    [
        ([(256, 64, 5)], "Q2_K,Q4_K,Q6_K", 0),
        ([(256, 16, 5)], "Q2_K,Q4_K,Q6_K", 0),
        # At worst the bytes of groups that are not needed are lost
        ([(32, 16, 4)], "Q4_0,Q5_0,Q8_0", 200),
        ([(256, 64, 3), (256, 32, 3)], "Q2_K,Q4_K", 200),
        # and a group's padding is taken as the most that it can be
        ([(96, 7, 4)], "Q4_0,Q5_0,Q8_0", 300),
        ([(256, 64, 3), (96, 33, 3)], "Q2_K,Q5_0", 300),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_against_all_assignments(shapes: Sequence[tuple[int, ...]], names: str, lost: int, seed: int) -> None:
    stacks = [SourceTensor(name, shape, BF16) for name, shape in zip((GATE, UP), shapes, strict=False)]
    source = MemorySource([SourceTensor("blk.0.ffn_gate_inp.weight", (32, shapes[0][2]), F32), *stacks])
    types = parse_types(names)
    damages = table(source, types, ("fisher",), seed)
    every = sorted(every_plan(source, damages))
    sizes, least = np.array([size for size, _ in every]), np.minimum.accumulate([damage for _, damage in every])
    for limit in np.linspace(sizes[0], sizes[-1], 25).astype(int):
        plan = make_plan(source, damages, source.kvs, of_bytes(int(limit)), replace(OPTIONS, types=types))
        check(source, damages, plan)
        best = float(least[np.searchsorted(sizes, limit, side="right") - 1])
        assert plan.damage * (1 - plan.gap) <= best * (1 + 1e-9)
        assert plan.damage >= best * (1 - 1e-9)
        if limit - lost >= sizes[0]:
            assert plan.damage <= least[np.searchsorted(sizes, limit - lost, side="right") - 1] * (1 + 1e-9)


def test_at_most_seven_types() -> None:
    """Thirteen candidates, and experts that want most of them."""
    source = MemorySource([SourceTensor(GATE, (512, 512, 64), BF16)])
    damages = table(source, DEFAULT, ("fisher",), seed=3)
    smallest, largest = size_range(source, source.kvs, OPTIONS, has_imatrix=True)
    n_types = set()
    for limit in np.linspace(smallest, largest, 25).astype(int):
        plan = make_plan(source, damages, source.kvs, of_bytes(int(limit)), OPTIONS)
        check(source, damages, plan)
        assert plan.gap < 0.1
        n_types.add(len(plan.tensors[0].groups))
    assert max(n_types) == MAX_GROUPS


def test_equal_experts_are_a_stock_plan() -> None:
    """Nothing to gain: the plan is the stock plan, and its file has no map."""
    source = MemorySource([SourceTensor(GATE, (256, 16, 4), BF16)])
    damages = table(source, DEFAULT, ("fisher",))
    errors = damages.errors[GATE]
    errors.damage["fisher"][:] = errors.damage["fisher"][:, :1]
    smallest, _ = size_range(source, source.kvs, OPTIONS, has_imatrix=True)
    plan = make_plan(source, damages, source.kvs, of_bytes(smallest + 40), OPTIONS)
    stock = make_plan(source, damages, source.kvs, of_bytes(smallest + 40), replace(OPTIONS, layout=STOCK))
    assert replace(plan, layout=STOCK, gap=stock.gap) == stock


def test_a_model_of_real_size() -> None:
    """16 layers of 64 experts: seconds, and a gap that is proven."""
    stacks = [
        SourceTensor(f"blk.{n}.ffn_{name}_exps.weight", shape, BF16)
        for n in range(16)
        for name, shape in (("gate", (2048, 1024, 64)), ("up", (2048, 1024, 64)), ("down", (1024, 2048, 64)))
    ]
    source = MemorySource(stacks)
    types = parse_types("k")
    damages = table(source, types, ("fisher",))
    smallest, largest = size_range(source, source.kvs, OPTIONS, has_imatrix=True)
    for share in (0.05, 0.2):
        limit = of_bytes(int(smallest + share * (largest - smallest)))
        plan = make_plan(source, damages, source.kvs, limit, replace(OPTIONS, types=types))
        check(source, damages, plan)
        assert plan.gap < 2e-4
        assert plan.budget_bytes - plan.file_bytes < 2048 * 1024


def test_plan_json(tmp_path: Path) -> None:
    source = wide(16)
    damages = table(source, DEFAULT, ("fisher",))
    plan = make_plan(source, damages, source.kvs, Budget(bpw=4), OPTIONS)
    write_plan(plan, tmp_path / "plan.json")
    found = read_plan(tmp_path / "plan.json")
    assert (found, found.sha256) == (plan, plan.sha256)
    document = json.loads((tmp_path / "plan.json").read_text())
    assert (document["layout"], document["version"]) == ("per-expert", 4)
    stack = next(t for t in document["tensors"] if t["type"] == MIXED)
    assert {type(group["experts"]) for group in stack["groups"]} == {str}
    # a type and its experts on a line each, not a line for every expert
    assert len((tmp_path / "plan.json").read_text().splitlines()) < 600
    (tmp_path / "plan.json").write_text(json.dumps({**document, "tensors": [{**stack, "groups": []}]}))
    with pytest.raises(FormatError, match="not a plan as mopeq-edge writes it"):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("ids", "runs"),
    [((0,), "0"), ((0, 1, 2, 3, 7), "0-3,7"), ((5, 6), "5-6"), ((1, 3, 5), "1,3,5"), ((126, 127), "126-127")],
)
def test_runs_of_ids(ids: tuple[int, ...], runs: str) -> None:
    assert id_runs(ids) == runs
    assert ids_of(runs) == ids


@pytest.mark.parametrize("runs", ["", "1-", "-1", "3-1", "0,0", "1,0", "0,1", "a", "0-1-2", " 1"])
def test_what_is_no_runs_of_ids(runs: str) -> None:
    with pytest.raises(ValueError, match=r"experts|invalid literal"):
        ids_of(runs)


def test_unknown_layout() -> None:
    with pytest.raises(PlanError, match="layout 'x': expected stock or per-expert"):
        replace(OPTIONS, layout="x")
