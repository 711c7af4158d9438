"""Checkpoints at URLs: fsspec's own file systems in memory and on disk, against the same files as a directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from converters import CONVERTERS
from mopeq_edge.errors import ExtraMissingError, FormatError, SourceError
from mopeq_edge.source.checkpoint import Checkpoint
from mopeq_edge.source.huggingface import open_huggingface
from mopeq_edge.source.open import open_remote
from mopeq_edge.source.remote import ModelURL, RemoteDirectory, RemoteFile

from ..builders import build_olmoe, write_safetensors

URL = "memory://bucket/models/tiny"


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    yield system
    if system.exists("/bucket"):
        system.rm("/bucket", recursive=True)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_olmoe(tmp_path_factory.mktemp("remote") / "tiny", n_layer=1, n_expert=4, n_shards=2)


def upload(system: Any, directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            system.pipe_file(f"/bucket/models/tiny/{path.relative_to(directory).as_posix()}", path.read_bytes())


class Reads:
    """Records every range that is read of the shards."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: list[int] = []
        own = RemoteFile.read

        def read(file: RemoteFile, offset: int, count: int) -> Any:
            if file.name.endswith(".safetensors"):
                self.counts.append(count)
            return own(file, offset, count)

        monkeypatch.setattr(RemoteFile, "read", read)


def test_the_same_model(memory: Any, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, key-values, and weights; opening reads the headers of shards alone, reading what was asked for."""
    upload(memory, sharded)
    reads = Reads(monkeypatch)
    source, content = open_remote(ModelURL(URL), tmp_path / "tiny", CONVERTERS, "gpt-2")
    headers = sum(reads.counts)
    assert headers == sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in sharded.glob("*.safetensors"))
    local = open_huggingface(sharded, CONVERTERS, "gpt-2")
    assert source.tensors == local.tensors
    assert source.kvs == local.kvs
    for tensor in local.tensors:
        last = tensor.n_matrices - 1
        np.testing.assert_array_equal(source.read(tensor, last), local.read(tensor, last))
    stack = next(tensor for tensor in source.tensors if tensor.n_matrices > 1)
    reads.counts.clear()
    assert (source.read_stored(stack, 1, slice(3, 5)) == local.read_stored(stack, 1, slice(3, 5))).all()
    assert sum(reads.counts) == stack.n_in * 2 * 2
    assert open_remote(ModelURL(URL), tmp_path / "tiny", CONVERTERS, "gpt-2")[1] == content
    assert not [path for path in (tmp_path / "tiny").rglob("*") if path.suffix == ".safetensors"]


def test_a_change_is_seen(memory: Any, sharded: Path, tmp_path: Path) -> None:
    """By the hash: of a small file, of a shard by what the storage says of it. What is gone there is gone here."""
    upload(memory, sharded)
    found = [open_remote(ModelURL(URL), tmp_path / "tiny", CONVERTERS, "gpt-2")[1]]
    memory.pipe_file("/bucket/models/tiny/chat_template.jinja", b"{{ messages }}")
    found.append(open_remote(ModelURL(URL), tmp_path / "tiny", CONVERTERS, "gpt-2")[1])
    assert (tmp_path / "tiny" / "chat_template.jinja").exists()
    memory.rm("/bucket/models/tiny/chat_template.jinja")
    shard = sorted(path.name for path in sharded.glob("*.safetensors"))[0]
    data = bytearray((sharded / shard).read_bytes())
    data[-1] ^= 1
    memory.pipe_file(f"/bucket/models/tiny/{shard}", bytes(data))
    found.append(open_remote(ModelURL(URL), tmp_path / "tiny", CONVERTERS, "gpt-2")[1])
    assert not (tmp_path / "tiny" / "chat_template.jinja").exists()
    assert len(set(found)) == 3


def test_another_process_reads_it(sharded: Path, tmp_path: Path) -> None:
    """Pickled, as Ray sends it; fsspec's ``local`` stands for a storage that processes share."""
    import multiprocessing

    url = ModelURL(f"local://{sharded}")
    source, _ = open_remote(url, tmp_path / "tiny", CONVERTERS, "gpt-2")
    local = open_huggingface(sharded, CONVERTERS, "gpt-2")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        read = pool.apply(source.checkpoint.read_f32, ("model.embed_tokens.weight",))
    np.testing.assert_array_equal(read, local.checkpoint.read_f32("model.embed_tokens.weight"))


def test_damage_has_one_line_with_the_url(memory: Any, sharded: Path, tmp_path: Path) -> None:
    upload(memory, sharded)
    shard = sorted(path.name for path in sharded.glob("*.safetensors"))[1]
    whole = (sharded / shard).read_bytes()
    for data, problem in (
        (whole[:-1], "truncated safetensors"),
        (b"x" * 50, "not a safetensors file"),
        (b"", "truncated safetensors: the file has 0 bytes"),
    ):
        memory.pipe_file(f"/bucket/models/tiny/{shard}", data)
        with pytest.raises(FormatError, match=f"{URL}/{shard}: {problem}"):
            open_remote(ModelURL(URL), tmp_path / "tiny", CONVERTERS, "gpt-2")
    memory.rm(f"/bucket/models/tiny/{shard}")
    with pytest.raises(SourceError, match=f"{URL}: shard '{shard}' is missing"):
        open_remote(ModelURL(URL), tmp_path / "tiny", CONVERTERS, "gpt-2")


def test_a_file_that_shrinks_while_it_is_read(memory: Any, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a": ("F32", [4, 4], bytes(64))})
    upload(memory, tmp_path)
    checkpoint = Checkpoint(tmp_path, None, RemoteDirectory(URL))
    memory.pipe_file("/bucket/models/tiny/model.safetensors", (tmp_path / "model.safetensors").read_bytes()[:-30])
    with pytest.raises(FormatError, match=r"34 bytes from byte \d+, expected 64; it changed while it was read"):
        checkpoint.read_f32("a")
    memory.rm("/bucket/models/tiny/model.safetensors")
    with pytest.raises(FormatError, match=r"model.safetensors: cannot be read \(FileNotFoundError"):
        checkpoint.read_f32("a")


def test_an_index_cannot_lead_elsewhere(memory: Any, sharded: Path, tmp_path: Path) -> None:
    upload(memory, sharded)
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    memory.pipe_file("/bucket/models/tiny/model.safetensors.index.json", json.dumps(index).encode())
    with pytest.raises(FormatError, match="expected the plain name of a file beside it"):
        open_remote(ModelURL(URL), tmp_path / "tiny", CONVERTERS, "gpt-2")


@pytest.mark.parametrize(
    ("url", "error", "problem"),
    [
        ("memory://nothing/here", SourceError, "cannot be listed"),
        ("nosuch://a/b", SourceError, "no URL that fsspec can open"),
        ("s3://bucket/model", ExtraMissingError, "fsspec needs one more package"),
    ],
)
def test_urls_that_cannot_be_read(url: str, error: type[Exception], problem: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=f"^{url}: .*{problem}"):
        open_remote(ModelURL(url), tmp_path / "x", CONVERTERS)


def test_weights_of_torch_are_refused(memory: Any, sharded: Path, tmp_path: Path) -> None:
    memory.pipe_file("/bucket/models/tiny/config.json", (sharded / "config.json").read_bytes())
    memory.pipe_file("/bucket/models/tiny/pytorch_model.bin", b"PK")
    with pytest.raises(SourceError, match=r"found pytorch_model\.bin; files of torch's own are read from a directory"):
        open_remote(ModelURL(URL), tmp_path / "tiny", CONVERTERS, "gpt-2")


def test_the_name_of_a_url() -> None:
    assert ModelURL("s3://bucket/models/OLMoE-1B-7B/").name == "OLMoE-1B-7B"
    assert ModelURL("s3://bucket").name == "bucket"
