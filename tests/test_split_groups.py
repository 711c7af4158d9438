"""Split files of the per-expert layout: a stack's groups and map in several files, read and loaded as from one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from converters import CONVERTERS
from mopeq_edge.cli import cli
from mopeq_edge.emit import emit, planned_files
from mopeq_edge.errors import FormatError, MopeqError, PlanError, SourceError
from mopeq_edge.expert_groups.layout import VERSION_KEY, ExpertGroup, Grouping, Types, file_layout
from mopeq_edge.expert_groups.read import read_groups
from mopeq_edge.ggml.library import load_ggml
from mopeq_edge.ggml.types import BY_NAME, GgmlType
from mopeq_edge.gguf_file import KV, read_header
from mopeq_edge.gguf_layout import layout, string, uint32
from mopeq_edge.output_kvs import PLAN_KEY
from mopeq_edge.pictures.type_map import map_of_gguf
from mopeq_edge.progress import SilentProgress
from mopeq_edge.runtime.choose import prepare_start
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.source.open import open_source
from mopeq_edge.split import part_paths, read_parts, split_kvs
from mopeq_edge.summary import summarise

from .builders import EXAMPLE_TEXT, write_raw_gguf
from .commands import run_json

LIMIT = 1_200_000
KINDS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K")
UP = "blk.0.ffn_up_exps"


def types_of(source: HuggingFaceSource, kinds: Sequence[str] = KINDS) -> dict[str, GgmlType | Grouping]:
    """Experts by turns in four groups (``kinds`` may repeat), all else as Q6_K."""
    found: dict[str, GgmlType | Grouping] = {}
    for tensor in source.tensors:
        found[tensor.name] = BY_NAME["Q6_K"] if tensor.quantizable else tensor.type
        if tensor.projection is not None and tensor.quantizable:
            n = tensor.n_matrices
            found[tensor.name] = tuple(ExpertGroup(BY_NAME[k], tuple(range(g, n, 4))) for g, k in enumerate(kinds))
    return found


def kvs_of(source: HuggingFaceSource, plan: str = "a") -> dict[str, KV]:
    return {**source.kvs, PLAN_KEY: string(plan * 64)}


def write(source: HuggingFaceSource, types: Types, path: Path, limit: int | None = None, plan: str = "a") -> int:
    path.parent.mkdir(exist_ok=True)
    kvs, progress = kvs_of(source, plan), SilentProgress()
    return emit(source, types, kvs, None, load_ggml(), path, threads=2, progress=progress, split_bytes=limit)


def raw_tensors(paths: Sequence[Path]) -> dict[str, tuple[str, list[int], bytes]]:
    """(type, shape, bytes) of every tensor, as gguf-py reads them."""
    found: dict[str, tuple[str, list[int], bytes]] = {}
    for path in paths:
        for tensor in gguf.GGUFReader(path).tensors:
            assert tensor.name not in found
            found[tensor.name] = (tensor.tensor_type.name, tensor.shape.tolist(), tensor.data.tobytes())
    return found


def file_of(parts: Sequence[Path]) -> dict[str, int]:
    return {info.name: at for at, part in enumerate(parts) for info in read_header(part).tensors}


def logits(path: Path) -> Any:
    from mopeq_edge.binding import LlamaModel

    with LlamaModel(path, n_threads=1) as llama:
        return llama.logits(np.arange(40, 90).tolist())


@pytest.fixture(scope="module")
def whole(tiny_source: HuggingFaceSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with four groups a stack, in one file."""
    path = tmp_path_factory.mktemp("whole") / "m.gguf"
    write(tiny_source, types_of(tiny_source), path)
    return path


@pytest.fixture(scope="module")
def parts(tiny_source: HuggingFaceSource, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same in files of at most LIMIT. Do not change them."""
    folder = tmp_path_factory.mktemp("parts")
    write(tiny_source, types_of(tiny_source), folder / "m.gguf", LIMIT)
    return sorted(folder.iterdir())


def test_layouts_by_brute_force(tiny_source: HuggingFaceSource) -> None:
    """No file beyond the limit, none that could have taken the next tensor too; the order of one file."""
    types = types_of(tiny_source)
    given = kvs_of(tiny_source)
    one = file_layout(given, tiny_source.tensors, types)
    kvs, rest = {**given, VERSION_KEY: uint32(1)}, {PLAN_KEY: given[PLAN_KEY]}
    specs = [(info.name, info.shape, info.type) for info in one.tensors]
    for limit in (1_114_368, LIMIT, 2_345_678, one.file_size + 200):
        places = planned_files(tiny_source, types, given, limit)
        assert [(i.name, i.shape, i.type) for place in places for i in place.tensors] == specs
        at = 0
        for number, place in enumerate(places):
            assert place.file_size <= limit
            assert (VERSION_KEY.encode() in place.header) == (number == 0)
            assert PLAN_KEY.encode() in place.header
            at += len(place.tensors)
            if at < len(specs):
                more = [*((i.name, i.shape, i.type) for i in place.tensors), specs[at]]
                numbers = split_kvs(number, len(places), len(specs))
                assert layout({**(kvs if number == 0 else rest), **numbers}, more).file_size > limit
    assert len(places) == 1


@pytest.mark.runtime
def test_written_parts_are_the_whole_file_in_pieces(
    tiny_source: HuggingFaceSource, whole: Path, parts: list[Path], tmp_path: Path
) -> None:
    size = write(tiny_source, types_of(tiny_source), tmp_path / "again" / "m.gguf", LIMIT)
    planned = planned_files(tiny_source, types_of(tiny_source), kvs_of(tiny_source), LIMIT)
    assert [part.stat().st_size for part in parts] == [place.file_size for place in planned]
    assert sum(part.stat().st_size for part in parts) == size
    assert max(part.stat().st_size for part in parts) <= LIMIT
    assert [part.read_bytes() for part in sorted((tmp_path / "again").iterdir())] == [p.read_bytes() for p in parts]
    assert parts == part_paths(parts[0].with_name("m.gguf"), len(parts))
    where = file_of(parts)
    assert len({where[f"blk.{n}.ffn_{p}_exps.map"] for n in range(4) for p in ("gate", "up", "down")}) >= 3
    apart = [name for name in where if name.endswith(".map") and where[name] != where[name[:-3] + "0.weight"]]
    assert apart, "no stack whose groups and map are in different files"
    assert list(raw_tensors([whole]).items()) == list(raw_tensors(parts).items())
    assert read_groups(*read_parts(parts[0])) == read_groups(read_header(whole))
    assert np.array_equal(logits(whole), logits(parts[0]))


@pytest.mark.runtime
def test_files_with_nothing_but_maps(whole: Path, tmp_path: Path) -> None:
    """Maps in the first file or in the last, no two groups of a stack together: llama.cpp looks everywhere."""
    header, raw = read_header(whole), raw_tensors([whole])
    paths = part_paths(tmp_path / "m.gguf", 6)
    contents: list[list[tuple[str, tuple[int, ...], GgmlType, bytes]]] = [[] for _ in paths]
    for info in header.tensors:
        if info.name.endswith(".map"):
            at = 0 if info.name.startswith(("blk.0.", "blk.3.")) else 5
        elif "_exps." in info.name:
            at = 1 + int(info.name.split(".")[-2])
        else:
            at = 1
        contents[at].append((info.name, info.shape, info.type, raw[info.name][2]))
    for at, (path, own) in enumerate(zip(paths, contents, strict=True)):
        write_raw_gguf(path, {**(header.kvs if at == 0 else {}), **split_kvs(at, 6, len(header.tensors))}, own)
    found = {stack.name: stack for stack in read_groups(*read_parts(paths[0]))}
    assert found == {stack.name: stack for stack in read_groups(header)}
    assert np.array_equal(logits(whole), logits(paths[0]))


@pytest.mark.runtime
def test_groups_of_one_type_are_the_stock_file(tiny_source: HuggingFaceSource, tmp_path: Path) -> None:
    """The logits of groups in several files are those of the same weights as stock stacks."""
    grouped = types_of(tiny_source, ("Q3_K",) * 4)
    stock = {name: kind if isinstance(kind, GgmlType) else BY_NAME["Q3_K"] for name, kind in grouped.items()}
    write(tiny_source, grouped, tmp_path / "grouped.gguf", LIMIT)
    write(tiny_source, stock, tmp_path / "stock.gguf", LIMIT)
    firsts = [next(tmp_path.glob(f"{name}-00001-of-*.gguf")) for name in ("grouped", "stock")]
    assert [summarise(first).layout for first in firsts] == ["per-expert", "stock"]
    assert np.array_equal(*(logits(first) for first in firsts))


@pytest.mark.runtime
def test_described_like_the_whole_file(whole: Path, parts: list[Path]) -> None:
    def plain(path: Path) -> dict[str, Any]:
        found = summarise(path).as_dict()
        return {key: value for key, value in found.items() if key not in ("file_bytes", "header_bytes")}

    assert plain(parts[0]) == plain(whole)
    assert len(plain(parts[0])["stacks"]) == 12
    assert summarise(parts[0]).file_bytes == sum(part.stat().st_size for part in parts)
    assert map_of_gguf(parts[0]).types == map_of_gguf(whole).types
    assert "expert groups, version 1" in prepare_start("llama-cli", parts[0]).message
    with pytest.raises(SourceError, match="file of the per-expert layout, its experts are already in groups"):
        open_source(parts[0], CONVERTERS)


@pytest.mark.runtime
def test_parts_that_do_not_belong_together(tiny_source: HuggingFaceSource, parts: list[Path], tmp_path: Path) -> None:
    shutil.copytree(parts[0].parent, tmp_path / "m")
    mine = sorted((tmp_path / "m").iterdir())

    def refused(*args: object) -> str:
        result = CliRunner().invoke(cli, [str(arg) for arg in args])
        assert isinstance(result.exception, MopeqError), result.output
        assert "\n" not in str(result.exception)
        return str(result.exception)

    for command in (("validate",), ("inspect",), ("run",)):
        assert "give the first, m-00001-of-" in refused(*command, mine[1])
    kept = mine[-1].read_bytes()
    mine[-1].unlink()
    against = ("--against", mine[0], "--text", EXAMPLE_TEXT, "--work-dir", tmp_path / "work")
    for command in (("validate", mine[0]), ("inspect", mine[0]), ("run", mine[0]), ("evaluate", mine[0], *against)):
        assert f"{mine[-1].name} is missing beside it; download it too" in refused(*command)
    assert not (tmp_path / "work").exists()
    mine[-1].write_bytes(kept)
    # another plan of the same model, whose tensors have the same names and sizes
    other = {
        name: kind
        if isinstance(kind, GgmlType)
        else tuple(replace(g, experts=o.experts) for g, o in zip(kind, kind[::-1], strict=True))
        for name, kind in types_of(tiny_source).items()
    }
    write(tiny_source, other, tmp_path / "other" / "m.gguf", LIMIT, plan="b")
    theirs = sorted((tmp_path / "other").iterdir())
    assert [part.stat().st_size for part in mine] == [part.stat().st_size for part in theirs]
    for at in range(1, len(mine)):
        kept = mine[at].read_bytes()
        shutil.copy(theirs[at], mine[at])
        said = refused("validate", mine[0])
        assert said.startswith(f"{mine[at]}: {PLAN_KEY} is bbb")
        assert said.endswith("the files are of different models, download them again")
        mine[at].write_bytes(kept)
    assert summarise(mine[0]).stacks


F16, I32 = BY_NAME["F16"], BY_NAME["I32"]
ROWS = np.array([[0, -1], [-1, 0], [1, -1]], dtype="<i4").tobytes()


def two_files(
    folder: Path, *, n_rows: int = 2, version_in: int | None = 0, rows: bytes = ROWS, swapped: bool = False
) -> Path:
    """Group 0 in one file, group 1 and the map in the other; ``swapped``: the map comes first."""
    first: list[Any] = [(f"{UP}.0.weight", (4, 3, n_rows), F16, bytes(24 * n_rows))]
    second: list[Any] = [(f"{UP}.1.weight", (4, 3, 1), F16, bytes(24)), (f"{UP}.map", (2, 3), I32, rows)]
    paths = part_paths(folder / "m.gguf", 2)
    for at, own in enumerate((second, first) if swapped else (first, second)):
        kvs = {"general.architecture": string("olmoe")} if at == 0 else {}
        kvs |= {VERSION_KEY: uint32(1)} if at == version_in else {}
        write_raw_gguf(paths[at], {**kvs, **split_kvs(at, 2, 3)}, own)
    return paths[0]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_stack_over_two_files(tmp_path: Path, swapped: bool) -> None:
    (stack,) = summarise(two_files(tmp_path, swapped=swapped)).stacks
    assert (stack.name, stack.shape) == (f"{UP}.weight", (4, 3, 3))
    assert stack.groups == (ExpertGroup(F16, (0, 2)), ExpertGroup(F16, (1,)))


def test_what_is_rejected_names_the_file_with_the_tensor(tmp_path: Path) -> None:
    first, second = part_paths(tmp_path / "m.gguf", 2)
    twice = np.array([[0, -1], [-1, 0], [0, -1]], dtype="<i4").tobytes()
    wrong: list[tuple[Path, dict[str, Any], str]] = [
        (second, {"n_rows": 3}, rf"tensor '{UP}.map': expected 4 experts as in its groups, found 3"),
        (second, {"rows": twice}, rf"tensor '{UP}.map': expected row 0 of group 0 once"),
        (first, {"version_in": None}, rf"tensor '{UP}.0.weight': expected the key '{VERSION_KEY}'"),
        # llama.cpp takes the key-values of the first file alone
        (first, {"version_in": 1}, rf"tensor '{UP}.0.weight': expected the key '{VERSION_KEY}'"),
        (first, {"n_rows": 3, "swapped": True}, rf"tensor '{UP}.map': expected 4 experts as in its groups, found 3"),
    ]
    for path, changes, message in wrong:
        with pytest.raises(FormatError, match=message) as caught:
            summarise(two_files(tmp_path, **changes))
        assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.runtime
def test_the_commands(tiny_model: Path, tmp_path: Path) -> None:
    """convert within the budget to the byte, and the paper's planner: plan and emit."""

    work = ("--work-dir", tmp_path / "work", "--threads", 2, "--json")
    options = ("--text", EXAMPLE_TEXT, "--window", 64, "--chunks", 2, "--sample-rows", 4, "--no-fisher")
    split = ("--types", "Q2_K,Q3_K,Q4_K", "--split-max-size", "1200K")
    knapsack = ("--layout", "per-expert", "--target-gb", 0.007)
    out = tmp_path / "out.gguf"
    found = run_json("convert", tiny_model, out, "--no-report", *knapsack, *split, *options, *work)
    files = part_paths(out, found["output_files"])
    sizes = [file.stat().st_size for file in files]
    assert len(files) >= 4
    assert max(sizes) <= 1_200_000
    assert sum(sizes) == found["file_bytes"] == found["predicted_file_bytes"] <= 7_000_000
    assert found["evaluation"]["target_bytes"] == sum(sizes)
    assert found["evaluation"]["kld_mean_nats"] < 1
    described = run_json("validate", files[0], "--work-dir", tmp_path / "work", "--json")
    assert (described["layout"], described["file_bytes"]) == ("per-expert", sum(sizes))
    assert len(described["stacks"]) > 3
    checks = {check["name"]: check["passed"] for check in described.pop("checks")}
    assert {"structure", "plan", "scales", "zeros", "logits", "routing"} <= {name for name in checks if checks[name]}
    assert described.pop("passed")
    described.pop("seconds")
    assert [row["layer"] for row in described.pop("routing")] == [0, 1, 2, 3]
    assert run_json("inspect", files[0], "--json") == described
    # what no target was given for comes out of the map, in the same files by plan and emit
    made = run_json("plan", tiny_model, "--planner", "mopeq", "--sensitivity", "imatrix", *split, *work)
    again = tmp_path / "again.gguf"
    emitted = run_json("emit", tiny_model, again, "--split-max-size", "1200K", *work)
    sizes = [file.stat().st_size for file in part_paths(again, emitted["output_files"])]
    assert max(sizes) <= 1_200_000
    assert sum(sizes) == emitted["file_bytes"] == made["file_bytes"]
    assert summarise(part_paths(again, len(sizes))[0]).layout == "per-expert"
    with pytest.raises(PlanError, match="alone needs a file of"):
        run_json("plan", tiny_model, *knapsack, *split[:2], "--split-max-size", "400K", *work)
