"""Names, maps and files of grouped stacks, against gguf-py and by hand."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from mopeq_edge.emit import emit
from mopeq_edge.errors import FormatError
from mopeq_edge.expert_groups.layout import (
    VERSION_KEY,
    ExpertGroup,
    Types,
    expert_map,
    file_layout,
    group_name,
    groups_of,
    map_name,
    stack_specs,
)
from mopeq_edge.expert_groups.read import is_part, read_groups
from mopeq_edge.ggml.library import load_ggml
from mopeq_edge.ggml.types import BF16, BY_NAME, F16, F32, I32
from mopeq_edge.gguf_file import read_header
from mopeq_edge.imatrix import Entry, Imatrix
from mopeq_edge.progress import SilentProgress
from mopeq_edge.source.model import Source, SourceTensor
from mopeq_edge.source.roles import Role, projection_of, role_of

from ..arrays import ArraySource

UP = "blk.0.ffn_up_exps.weight"
STACK = SourceTensor(UP, (96, 7, 9), BF16)
Q4_0, Q5_0, Q8_0, IQ4_NL = (BY_NAME[name] for name in ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL"))


def write(source: Source, types: Types, path: Path, threads: int = 2, imatrix: Imatrix | None = None) -> int:
    ggml = load_ggml()
    return emit(source, types, source.kvs, imatrix, ggml, path, threads=threads, progress=SilentProgress())


def own_types(source: Source, **changes: object) -> Types:
    return {t.name: t.type for t in source.tensors} | {UP: changes["up"]}  # type: ignore[dict-item]


def test_names() -> None:
    assert group_name(UP, 0) == "blk.0.ffn_up_exps.0.weight"
    assert group_name("blk.61.ffn_gate_up_exps.weight", 6) == "blk.61.ffn_gate_up_exps.6.weight"
    assert map_name(UP) == "blk.0.ffn_up_exps.map"
    for name in (group_name(UP, 3), map_name(UP)):
        assert is_part(name)
        assert (role_of(name), projection_of(name)) == (Role.EXPERT, None)
    for name in (UP, "blk.0.ffn_up_exps.bias", "blk.0.ffn_up_exps.scale", "blk.0.ffn_up_shexp.weight", "x.map"):
        assert not is_part(name)


def test_groups_by_bits_then_name() -> None:
    assert groups_of([Q8_0, Q4_0, IQ4_NL, Q4_0]) == (
        ExpertGroup(IQ4_NL, (2,)),
        ExpertGroup(Q4_0, (1, 3)),
        ExpertGroup(Q8_0, (0,)),
    )
    assert groups_of([Q4_0] * 5) is Q4_0
    seven = [BY_NAME[n] for n in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F32")]
    assert len(groups_of(seven)) == 7  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=r"a stack of 8 types \(Q4_0, .*\), expected at most 7"):
        groups_of([*seven, F16])


def test_map_by_hand() -> None:
    groups = (ExpertGroup(Q4_0, (1, 3)), ExpertGroup(Q8_0, (0, 2, 4)))
    assert expert_map(groups, 5).tolist() == [[-1, 0], [0, -1], [-1, 1], [1, -1], [-1, 2]]
    assert expert_map(groups, 5).dtype == np.dtype("<i4")


def test_specs() -> None:
    groups = (ExpertGroup(Q4_0, (1, 3)), ExpertGroup(Q8_0, (0, 2, 4, 5, 6, 7, 8)))
    assert stack_specs(STACK, groups) == [
        ("blk.0.ffn_up_exps.0.weight", (96, 7, 2), Q4_0),
        ("blk.0.ffn_up_exps.1.weight", (96, 7, 7), Q8_0),
        ("blk.0.ffn_up_exps.map", (2, 9), I32),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(0, 1, 2)], "hold experts .*, expected each of 9 once"),
        ([range(9), (3,)], "hold experts .*, expected each of 9 once"),
        ([range(10)], "hold experts .*, expected each of 9 once"),
        ([range(9), ()], "experts must rise, found \\[\\]"),
        ([(1, 0, *range(2, 9))], "experts must rise"),
        ([], "0 groups, expected 1 to 7"),
        ([(e,) for e in range(9)], "9 groups, expected 1 to 7"),
    ],
)
def test_what_is_no_partition(rows: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(FormatError, match=f"'{UP}'.*{message}"):
        stack_specs(STACK, tuple(ExpertGroup(Q4_0, tuple(experts)) for experts in rows))


def test_only_stacks_are_grouped() -> None:
    for name, shape in (("blk.0.attn_q.weight", (96, 7, 9)), ("blk.0.ffn_up_exps.bias", (7, 9)), (UP, (96, 9))):
        with pytest.raises(FormatError, match="only a stack of experts"):
            stack_specs(SourceTensor(name, shape, F32), (ExpertGroup(F32, tuple(range(9))),))


def test_the_version_key_is_there_with_groups_only() -> None:
    source = ArraySource()
    grouped = own_types(source, up=(ExpertGroup(Q8_0, tuple(range(9))),))
    key = VERSION_KEY.encode()
    assert key in file_layout(source.kvs, source.tensors, grouped).header
    assert key not in file_layout(source.kvs, source.tensors, own_types(source, up=Q8_0)).header


@pytest.mark.runtime
def test_gguf_py_reads_slices_of_the_stock_tensors(tmp_path: Path) -> None:
    """Quantized with each expert's own row of the imatrix; odd group sizes, so that padding is not zero."""
    source, rng = ArraySource(), np.random.default_rng(1)
    weights = Entry(rng.random((9, 96), dtype=np.float32) + 0.1, np.full(9, 4, np.float32))
    imatrix = Imatrix({UP: weights}, ("text",), 1, 4)
    groups = (
        ExpertGroup(Q4_0, (2, 7)),
        ExpertGroup(Q5_0, (0, 3, 8)),
        ExpertGroup(BF16, (1,)),
        ExpertGroup(Q5_0, (4, 5, 6)),
    )
    path = tmp_path / "grouped.gguf"
    written = write(source, own_types(source, up=groups), path, imatrix=imatrix)
    assert (
        written
        == path.stat().st_size
        == file_layout(source.kvs, source.tensors, own_types(source, up=groups)).file_size
    )
    reader = gguf.GGUFReader(path)
    assert reader.get_field(VERSION_KEY).contents() == 1
    found = {t.name: t for t in reader.tensors}
    names = [t.name for t in reader.tensors]
    assert names[names.index("blk.0.ffn_up_exps.0.weight") :][:5] == [
        *(group_name(UP, g) for g in range(4)),
        map_name(UP),
    ]
    assert UP not in found
    for g, group in enumerate(groups):
        stock_path = tmp_path / f"{g}.gguf"
        write(source, own_types(source, up=group.type), stock_path, imatrix=imatrix)
        (stock,) = (t for t in gguf.GGUFReader(stock_path).tensors if t.name == UP)
        own = found[group_name(UP, g)]
        assert own.tensor_type == stock.tensor_type
        assert own.shape.tolist() == [96, 7, len(group.experts)]
        np.testing.assert_array_equal(own.data, stock.data[list(group.experts)])
    table = found[map_name(UP)]
    assert (table.tensor_type.name, table.shape.tolist()) == ("I32", [4, 9])
    np.testing.assert_array_equal(table.data, expert_map(groups, 9))
    for name in names:
        if not is_part(name):
            tensor = next(t for t in source.tensors if t.name == name)
            stored = [source.read_stored(tensor, m).tobytes() for m in range(tensor.n_matrices)]
            assert found[name].data.tobytes() == b"".join(stored)
    (stack,) = read_groups(read_header(path))
    assert (stack.name, stack.shape, stack.groups) == (UP, (96, 7, 9), groups)


@pytest.mark.runtime
def test_threads_change_no_byte(tmp_path: Path) -> None:
    source = ArraySource()
    types = own_types(source, up=groups_of([Q4_0, Q8_0, Q4_0, BF16, Q5_0, Q5_0, Q8_0, Q4_0, Q4_0]))
    for threads in (1, 3):
        write(source, types, tmp_path / f"{threads}.gguf", threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()


@pytest.mark.runtime
def test_one_type_for_all_is_a_stock_file(tmp_path: Path) -> None:
    source = ArraySource()
    write(source, own_types(source, up=groups_of([Q5_0] * 9)), tmp_path / "a.gguf")
    write(source, own_types(source, up=Q5_0), tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert read_groups(read_header(tmp_path / "a.gguf")) == ()
