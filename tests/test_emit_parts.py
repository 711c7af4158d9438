"""The parts of a file, without a cluster: the bytes of the local engine, and no page that two machines write."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from mopeq_edge import emit_parts
from mopeq_edge.emit import emit
from mopeq_edge.emit_parts import TensorToHash, cut, emit_on, hash_tensor
from mopeq_edge.engine.interface import Tools
from mopeq_edge.engine.local import LocalEngine
from mopeq_edge.errors import OutputError
from mopeq_edge.file_hashes import new_hash, unknown_hashes
from mopeq_edge.ggml.library import Ggml
from mopeq_edge.ggml.types import BF16, F32
from mopeq_edge.progress import SilentProgress
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.source.model import SourceTensor
from mopeq_edge.split import part_paths


class NoQuantizer:
    """For types that need none."""

    def quantize(self, to: Any, rows: Any, imatrix: Any = None) -> Any:
        assert to is F32
        return np.ascontiguousarray(rows, dtype="<f4").view(np.uint8)


GGML = cast(Ggml, NoQuantizer())


class PartsEngine(LocalEngine):
    """Runs parts as a cluster would, one after the other."""

    def __init__(self, part_weights: int) -> None:
        super().__init__(1, GGML)
        self.part_weights = part_weights  # type: ignore[assignment]


@pytest.mark.parametrize("split", [None, 12_000_000])
@pytest.mark.parametrize("part_weights", [3_000, 70_000, 2**30])
def test_the_same_file(tiny_source: HuggingFaceSource, tmp_path: Path, part_weights: int, split: int | None) -> None:
    """Also of rows of a matrix, and of parts that are smaller than a page."""
    types = {t.name: F32 if t.layer == 1 else t.type for t in tiny_source.tensors}
    kvs = {**tiny_source.kvs, **unknown_hashes(0)}
    rest: dict[str, Any] = {"progress": SilentProgress(), "split_bytes": split}
    sizes = [
        emit(tiny_source, types, kvs, None, GGML, tmp_path / "a" / "x.gguf", threads=1, **rest),
        emit_on(PartsEngine(part_weights), tiny_source, types, kvs, None, tmp_path / "b" / "x.gguf", **rest),
    ]
    assert sizes[0] == sizes[1]
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert (len(names) > 1) == (split is not None)
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len(part_paths(tmp_path / "x.gguf", len(names))) == len(names)


def test_no_two_tasks_write_one_page(
    tiny_source: HuggingFaceSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client of NFS writes whole pages: what a task writes must be whole pages, each by one task."""
    page = 4096
    monkeypatch.setattr(emit_parts, "PAGE", page)
    written: list[tuple[int, int]] = []
    own = os.pwrite

    def pwrite(handle: int, data: Any, at: int) -> int:
        written.append((at, at + len(data)))
        return own(handle, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    types = {t.name: t.type for t in tiny_source.tensors}
    kvs = {**tiny_source.kvs, **unknown_hashes(0)}
    out = tmp_path / "x.gguf"
    emit_on(PartsEngine(5_000), tiny_source, types, kvs, None, out, progress=SilentProgress())
    written.sort()
    assert all(before[1] <= after[0] for before, after in pairwise(written))
    # what touches is of one task; where a run of writes begins or ends a page does too
    ends = [(at, end) for at, end in written]
    edges = {at for at, _ in ends} ^ {end for _, end in ends}
    assert edges
    assert all(edge % page == 0 for edge in edges)
    assert sum(end - at for at, end in written) > 0.4 * out.stat().st_size


def test_a_part_is_some_matrices_or_some_rows_of_one() -> None:
    stack = SourceTensor("blk.0.ffn_up_exps.weight", (10, 4, 5), BF16)
    assert list(cut(stack, (4, 1, 0, 2), 80)) == [((4, 1), range(4)), ((0, 2), range(4))]
    assert list(cut(stack, (4, 1), None)) == [((4, 1), range(4))]
    assert [(list(m), r) for m, r in cut(stack, (3, 1), 30)] == [
        *(([3], range(3)), ([3], range(3, 4))),
        *(([1], range(3)), ([1], range(3, 4))),
    ]


def test_storage_that_loses_a_write_is_found_out(tmp_path: Path) -> None:
    data = os.urandom(1000)
    path = tmp_path / "x"
    path.write_bytes(b"head" + data)
    own = new_hash()
    own.update(data[400:])
    first = new_hash()
    first.update(data[:400])
    task = TensorToHash(path, 4, "w", ((400, first.hexdigest()), (600, own.hexdigest())))
    tools = Tools(GGML, cast(Any, None), 1, lambda _: None)
    whole = new_hash()
    whole.update(data)
    assert hash_tensor(cast(Any, None), task, tools) == whole.hexdigest()
    for lost in (b"head" + data[:500] + bytes(100) + data[600:], b"head" + data[:-1]):
        path.write_bytes(lost)
        with pytest.raises(OutputError, match="tensor 'w', part 1 of 2: the storage does not give back"):
            hash_tensor(cast(Any, None), task, tools)


def test_a_machine_that_sees_other_storage(tiny_source: HuggingFaceSource, tmp_path: Path) -> None:
    class Elsewhere(PartsEngine):
        def map(self, work: Any, source: Any, tasks: Any, advance: Any) -> Any:
            for path in tmp_path.glob(".x.gguf*.tmp"):
                path.rename(tmp_path / "moved")
            return super().map(work, source, tasks, advance)

    types = {t.name: t.type for t in tiny_source.tensors}
    with pytest.raises(OutputError, match="not found; expected storage that every machine of the cluster has"):
        emit_on(
            *(Elsewhere(2**20), tiny_source, types, tiny_source.kvs, None, tmp_path / "x.gguf"),
            **{"progress": SilentProgress()},
        )
