"""Every changed byte of a file is found and named, by hashes that hashlib gives for the bytes on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from mopeq_edge.cli import cli
from mopeq_edge.emit import emit, planned_files
from mopeq_edge.errors import DamagedError, FormatError, MopeqError
from mopeq_edge.expert_groups.layout import ExpertGroup, Types
from mopeq_edge.file_hashes import HEADER_KEY, TENSORS_KEY
from mopeq_edge.ggml.types import BY_NAME, F32
from mopeq_edge.gguf_file import KV, read_header
from mopeq_edge.imatrix import Imatrix
from mopeq_edge.output_kvs import Provenance, output_kvs
from mopeq_edge.progress import SilentProgress
from mopeq_edge.source.model import SourceTensor
from mopeq_edge.split import part_paths
from mopeq_edge.verify import verify

from .arrays import KVS, ArraySource

BF16 = BY_NAME["BF16"]


class SmallSource(ArraySource):
    """A few hundred weights, so that every byte of the file can be changed in turn."""

    def __init__(self) -> None:
        # not those of the larger source, which take longer than a file is written
        self.broken = None
        self.tensors = (
            SourceTensor("token_embd.weight", (5, 7), BF16),
            SourceTensor("blk.0.attn_norm.weight", (3,), F32),
            SourceTensor("blk.0.ffn_up_exps.weight", (5, 3, 4), BF16),
        )
        rng = np.random.default_rng(4)
        self.values = {
            t.name: rng.standard_normal((t.n_matrices, t.n_out, t.n_in), dtype=np.float32).view("<u4") & 0xFFFF0000
            for t in self.tensors
        }


class NoQuantizer:
    def quantize(self, *_: Any) -> Any:
        raise AssertionError("all tensors keep their type")


STOCK: Types = {t.name: t.type for t in SmallSource().tensors}
GROUPED: Types = {**STOCK, "blk.0.ffn_up_exps.weight": (ExpertGroup(BF16, (0, 2)), ExpertGroup(BF16, (1, 3)))}


def final_kvs() -> Mapping[str, KV]:
    return output_kvs(KVS, 1, Imatrix({}, ("text",), 1, 1), "imatrix.gguf", Provenance("ab" * 32, "cd" * 32))


def write(path: Path, types: Types = STOCK, split_bytes: int | None = None) -> list[Path]:
    places = planned_files(SmallSource(), types, final_kvs(), split_bytes)
    written = emit(
        SmallSource(), types, final_kvs(), None, NoQuantizer(), path, threads=2, progress=SilentProgress(),
        split_bytes=split_bytes,
    )  # fmt: skip
    paths = [path] if split_bytes is None else part_paths(path, len(places))
    assert written == sum(p.stat().st_size for p in paths) == sum(place.file_size for place in places)
    return paths


@pytest.mark.parametrize("types", [STOCK, GROUPED], ids=["stock", "groups"])
@pytest.mark.parametrize("split_bytes", [None, 1300])
def test_the_hashes_are_those_of_the_bytes(tmp_path: Path, types: Types, split_bytes: int | None) -> None:
    paths = write(tmp_path / "out.gguf", types, split_bytes)
    assert len(paths) == 1 if split_bytes is None else len(paths) > 1
    for path in paths:
        reader, raw = gguf.GGUFReader(path), path.read_bytes()
        data = [hashlib.blake2b(t.data.tobytes(), digest_size=16).hexdigest() for t in reader.tensors]
        assert reader.get_field(TENSORS_KEY).contents() == data
        own = reader.get_field(HEADER_KEY).contents()
        header = raw[: read_header(path).data_start]
        assert header.count(own.encode()) == 1
        blank = header.replace(own.encode(), b"0" * 32)
        assert own == hashlib.blake2b(blank, digest_size=16).hexdigest()
    found = verify(paths[0], SilentProgress())
    assert found.whole
    assert found.n_bytes == sum(path.stat().st_size for path in paths)
    assert found.files == tuple(str(path) for path in paths)


@pytest.mark.parametrize("types", [STOCK, GROUPED], ids=["stock", "groups"])
def test_every_changed_byte_is_found(tmp_path: Path, types: Types) -> None:
    path = write(tmp_path / "out.gguf", types)[0]
    raw, header = path.read_bytes(), read_header(path)
    owner = {}
    for tensor in header.tensors:
        start = header.data_start + tensor.offset
        owner.update(dict.fromkeys(range(start, start + tensor.nbytes), tensor.name))
    for at in range(len(raw)):
        changed = bytearray(raw)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        try:
            found = verify(path, SilentProgress())
        except MopeqError:
            # no header to read any more
            assert at < header.data_start
            continue
        assert found.has_hashes, at
        names = [what for _, what in found.damaged]
        if at >= header.data_start:
            before = [t.name for t in header.tensors if header.data_start + t.offset <= at][-1]
            assert names == [owner.get(at, f"padding after {before}")], at
        else:
            assert names[0].startswith("header"), at


def test_a_changed_length(tmp_path: Path) -> None:
    path = write(tmp_path / "out.gguf")[0]
    raw = path.read_bytes()
    path.write_bytes(raw + b"\0")
    assert [what for _, what in verify(path, SilentProgress()).damaged] == [
        f"length ({len(raw) + 1} bytes, {len(raw)} were written)"
    ]
    path.write_bytes(raw[:-40])
    with pytest.raises(FormatError, match="truncated"):
        verify(path, SilentProgress())


def test_the_source_of_a_file_may_carry_hashes_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "out.gguf", GROUPED)[0]
    stale = read_header(path).kvs
    kvs = output_kvs(stale, 1, None, "", Provenance())
    emit(SmallSource(), STOCK, kvs, None, NoQuantizer(), path, threads=1, progress=SilentProgress())
    assert verify(path, SilentProgress()).whole


def test_the_command(tmp_path: Path) -> None:
    path = write(tmp_path / "out.gguf")[0]
    done = CliRunner().invoke(cli, ["verify", str(path)])
    assert (done.exit_code, done.stdout) == (
        0, f"{path}: as written: 3 tensors, {path.stat().st_size:,} bytes in 1 file\n"
    )  # fmt: skip
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    done = CliRunner().invoke(cli, ["verify", str(path)])
    assert isinstance(done.exception, DamagedError)
    assert str(done.exception).startswith(f"{path}: not as written: padding after blk.0.ffn_up_exps.weight; ")
    done = CliRunner().invoke(cli, ["verify", str(path), "--json"])
    assert json.loads(done.stdout)["damaged"] == [{"file": str(path), "what": "padding after blk.0.ffn_up_exps.weight"}]
    foreign = tmp_path / "foreign.gguf"
    emit(SmallSource(), STOCK, KVS, None, NoQuantizer(), foreign, threads=1, progress=SilentProgress())
    done = CliRunner().invoke(cli, ["verify", str(foreign)])
    assert done.exit_code == 3
    assert done.stderr == (
        f"{foreign}: carries no hashes, so there is nothing to verify with; mopeq-edge writes them (emit, convert)\n"
    )
    assert len(done.stderr.splitlines()) == 1
