"""Whatever is written is read back the same: files drawn by hypothesis."""

from __future__ import annotations

import struct
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mopeq_edge.expert_groups.layout import VERSION_KEY, ExpertGroup, expert_map, group_name, map_name
from mopeq_edge.expert_groups.read import read_groups
from mopeq_edge.ggml.types import BY_NAME, I32, GgmlType
from mopeq_edge.gguf_file import KV, SCALAR_FORMATS, ValueType, read_header
from mopeq_edge.gguf_layout import layout, uint32
from mopeq_edge.imatrix import Entry, Imatrix, read_imatrix, write_imatrix
from mopeq_edge.plan.artifact import Plan, PlannedTensor, id_runs, ids_of, read_plan, write_plan
from mopeq_edge.split import part_paths, read_parts, split_layouts

FEW = settings(max_examples=60, deadline=None)

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=15).filter(str.isprintable)
TEXTS = st.binary(max_size=20).map(lambda raw: raw.decode("utf-8", "surrogateescape"))


def scalars(kind: ValueType) -> st.SearchStrategy[Any]:
    if kind is ValueType.BOOL:
        return st.booleans()
    if kind in (ValueType.FLOAT32, ValueType.FLOAT64):
        return st.floats(allow_nan=False, width=32 if kind is ValueType.FLOAT32 else 64)
    size = 8 * struct.calcsize(SCALAR_FORMATS[kind])
    signed = kind.name.startswith("I")
    return st.integers(-(2 ** (size - 1)) if signed else 0, 2 ** (size - signed) - 1)


def kvs_of(kind: ValueType) -> st.SearchStrategy[KV]:
    one = TEXTS if kind is ValueType.STRING else scalars(kind)
    whole = one.map(lambda value: KV(kind, value))
    return whole | st.lists(one, max_size=5).map(lambda values: KV(ValueType.ARRAY, values, kind))


KVS = st.dictionaries(
    NAMES.filter(lambda name: not name.startswith(("general.", "split."))),
    st.sampled_from([kind for kind in ValueType if kind is not ValueType.ARRAY]).flatmap(kvs_of),
    max_size=6,
)
TYPES = st.sampled_from([BY_NAME[name] for name in ("F32", "F16", "I8", "Q4_0", "Q8_0", "Q2_K", "MXFP4")])


@st.composite
def specs(draw: st.DrawFn) -> list[tuple[str, tuple[int, ...], GgmlType]]:
    found = []
    for name in draw(st.lists(NAMES, max_size=5, unique=True)):
        kind = draw(TYPES)
        more = draw(st.lists(st.integers(1, 3), max_size=3))
        found.append((name, (kind.block_size * draw(st.integers(1, 2)), *more), kind))
    return found


@FEW
@given(KVS, specs(), st.sampled_from([None, 1, 8, 32, 4096]))
def test_gguf(kvs: dict[str, KV], tensors: list[Any], alignment: int | None) -> None:
    if alignment is not None:
        kvs = {**kvs, "general.alignment": uint32(alignment)}
    place = layout(kvs, tensors)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        path.write_bytes(place.header + bytes(place.file_size - len(place.header)))
        found = read_header(path)
    assert (found.kvs, found.tensors, found.alignment) == (kvs, place.tensors, place.alignment)
    assert found.data_start == len(place.header)


@FEW
@given(KVS, specs().filter(len), st.integers(0, 3000))
def test_split_gguf(kvs: dict[str, KV], tensors: list[Any], spare: int) -> None:
    largest = max(layout(kvs, [spec]).file_size for spec in tensors)
    places = split_layouts(kvs, tensors, largest + 300 + spare)
    with TemporaryDirectory() as folder:
        paths = part_paths(Path(folder) / "m.gguf", len(places))
        for path, place in zip(paths, places, strict=True):
            path.write_bytes(place.header + bytes(place.file_size - len(place.header)))
        headers = read_parts(paths[0])
    assert {key: kv for key, kv in headers[0].kvs.items() if not key.startswith("split.")} == kvs
    assert [(t.name, t.shape, t.type) for header in headers for t in header.tensors] == tensors


FLOATS = st.floats(0, 2.0**60, width=32)


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Entry]:
    found = {}
    for name in draw(st.lists(NAMES, max_size=4, unique=True)):
        n_matrices, n_in = draw(st.integers(1, 4)), draw(st.integers(1, 5))
        sums = draw(st.lists(FLOATS.filter(bool), min_size=n_matrices * n_in, max_size=n_matrices * n_in))
        counts = draw(st.lists(st.integers(1, 2**24), min_size=n_matrices, max_size=n_matrices))
        found[name] = Entry(np.array(sums, np.float32).reshape(n_matrices, n_in), np.array(counts, np.float32))
    return found


@FEW
@given(
    entries(), st.lists(TEXTS, max_size=3), st.integers(0, 2**32 - 1), st.floats(1e-6, 1e6), st.lists(TEXTS, max_size=3)
)
def test_imatrix(found: dict[str, Entry], datasets: list[str], chunks: int, scale: float, unrouted: list[str]) -> None:
    written = Imatrix(found, tuple(datasets), chunks, 512, "gradient", scale, tuple(unrouted))
    with TemporaryDirectory() as folder:
        write_imatrix(written, Path(folder) / "i.gguf")
        back = read_imatrix(Path(folder) / "i.gguf")
    assert back.entries.keys() == found.keys()
    for name, entry in found.items():
        assert np.array_equal(back.entries[name].sums, entry.sums)
        assert np.array_equal(back.entries[name].counts, entry.counts)
    simple = ("datasets", "chunk_count", "chunk_size", "kind", "scale", "unrouted")
    assert [getattr(back, name) for name in simple] == [getattr(written, name) for name in simple]


@FEW
@given(st.lists(st.integers(0, 6), min_size=2, max_size=40), st.randoms(use_true_random=False))
def test_expert_groups(group_of: list[int], random: Any) -> None:
    """Any partition: the map that is written gives it back, whatever the types."""
    numbers = {group: n for n, group in enumerate(dict.fromkeys(group_of))}
    groups = tuple(
        ExpertGroup(
            random.choice([BY_NAME["Q4_0"], BY_NAME["Q8_0"]]),
            tuple(e for e, own in enumerate(group_of) if own == group),
        )
        for group in numbers
    )
    stack, n_expert = "blk.3.ffn_up_exps.weight", len(group_of)
    tensors = [(group_name(stack, g), (32, 2, len(own.experts)), own.type) for g, own in enumerate(groups)]
    tensors.append((map_name(stack), (len(groups), n_expert), I32))
    place = layout({VERSION_KEY: uint32(1)}, tensors)
    raw = bytearray(place.header + bytes(place.file_size - len(place.header)))
    table = expert_map(groups, n_expert).tobytes()
    start = len(place.header) + place.tensors[-1].offset
    raw[start : start + len(table)] = table
    with TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        path.write_bytes(raw)
        (found,) = read_groups(read_header(path))
    assert (found.name, found.shape, found.groups) == (stack, (32, 2, n_expert), groups)


@given(st.sets(st.integers(0, 1000), min_size=1))
def test_runs_of_experts(ids: set[int]) -> None:
    assert ids_of(id_runs(sorted(ids)), 1001) == tuple(sorted(ids))


@FEW
@given(specs(), st.floats(allow_nan=False, allow_infinity=False), st.none() | st.integers(0, 2**62))
def test_plan(tensors: list[Any], damage: float, budget: int | None) -> None:
    planned = tuple(PlannedTensor(name, "other", shape, kind.name, 1, damage) for name, shape, kind in tensors)
    plan = Plan(
        **{"layout": "stock", "planner": "knapsack", "sensitivity": "x", "unit": "nats", "budget_bytes": budget},
        **{"file_bytes": 3, "header_bytes": 1, "smallest_bytes": 1, "largest_bytes": 3, "damage": damage, "gap": 0.0},
        **{"quantized_with": "none", "types": ("Q4_0",), "made_from": "ü\n", "tensors": planned, "n_weights": 1},
    )
    with TemporaryDirectory() as folder:
        write_plan(plan, Path(folder) / "plan.json")
        assert read_plan(Path(folder) / "plan.json") == plan
