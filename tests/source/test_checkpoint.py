"""One file or shards with an index: the same tensors; every way in which index and shards can disagree."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from mopeq_edge.errors import FormatError, MopeqError, SourceError
from mopeq_edge.source.checkpoint import INDEX, MAX_SHARDS, SINGLE, Checkpoint, read_config

from ..builders import write_safetensors

A = np.arange(6, dtype="<f4").reshape(2, 3)
B = np.arange(24, dtype="<f4").reshape(2, 3, 4)


def f32(values: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return "F32", values.shape, values.tobytes()


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """``a`` in the second shard, ``b`` in the first."""
    write_safetensors(tmp_path / "one.safetensors", {"b": f32(B)})
    write_safetensors(tmp_path / "two.safetensors", {"a": f32(A)})
    set_index(tmp_path, {"a": "two.safetensors", "b": "one.safetensors"})
    return tmp_path


def set_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_one_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / SINGLE, {"b": f32(B), "a": f32(A)})
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names == ("a", "b")
    assert checkpoint.shapes == {"a": (2, 3), "b": (2, 3, 4)}
    assert checkpoint.files == (tmp_path / SINGLE,)


def test_shards(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    assert checkpoint.names == ("b", "a")  # shard by shard
    assert checkpoint.dtype("a") == "F32"
    assert [path.name for path in checkpoint.files] == [INDEX, "one.safetensors", "two.safetensors"]
    assert np.array_equal(checkpoint.read_f32("a"), A)
    assert np.array_equal(checkpoint.read_f32("b"), B)
    assert np.array_equal(checkpoint.read_f32("b", 1), B[1])
    assert checkpoint.read_f32("a", 1).tolist() == A[1].tolist()
    assert np.array_equal(checkpoint.read_rows("b", 2, 5), B.reshape(6, 4)[2:5])
    assert checkpoint.read_stored("a", 1, 2).tobytes() == A[1].tobytes()


@pytest.mark.parametrize("stray", ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors"])
def test_other_weights_beside_them_are_not_read(sharded: Path, stray: str) -> None:
    """Another layout of the same model in one download, also one that is no safetensors file."""
    write_safetensors(sharded / stray, {"a": f32(A + 1), "layers.0.attention.wq.weight": f32(A)})
    before = Checkpoint(sharded)
    assert before.names == ("b", "a")
    assert np.array_equal(before.read_f32("a"), A)
    assert [path.name for path in before.files] == [INDEX, "one.safetensors", "two.safetensors"]
    (sharded / INDEX).unlink()
    write_safetensors(sharded / SINGLE, {"a": f32(A)})
    (sharded / stray).write_bytes(b"broken")
    assert Checkpoint(sharded).names == ("a",)
    assert Checkpoint(sharded).files == (sharded / SINGLE,)
    (sharded / SINGLE).unlink()
    with pytest.raises(SourceError, match=r"expected model.safetensors or model.safetensors.index.json, found consol"):
        Checkpoint(sharded)


def test_no_such_tensor(sharded: Path) -> None:
    with pytest.raises(SourceError, match="has no tensor 'c'"):
        Checkpoint(sharded).read_f32("c")
    with pytest.raises(IndexError, match="no index 2"):
        Checkpoint(sharded).read_f32("b", 2)


def test_missing_shard(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    with pytest.raises(SourceError, match=r"shard 'two.safetensors' is missing, .* names 2 shards"):
        Checkpoint(sharded)


def test_tensor_of_the_index_is_not_in_its_shard(sharded: Path) -> None:
    set_index(sharded, {"a": "two.safetensors", "b": "one.safetensors", "c": "one.safetensors"})
    with pytest.raises(FormatError, match=r"tensor 'c' is said to be in 'one.safetensors', but is not there"):
        Checkpoint(sharded)


def test_tensor_of_a_shard_is_not_in_the_index(sharded: Path) -> None:
    write_safetensors(sharded / "two.safetensors", {"a": f32(A), "c": f32(A)})
    with pytest.raises(FormatError, match=r"two.safetensors: holds tensor 'c', but .* does not name it"):
        Checkpoint(sharded)


def test_tensor_is_in_two_shards(sharded: Path) -> None:
    write_safetensors(sharded / "two.safetensors", {"a": f32(A), "b": f32(B)})
    with pytest.raises(FormatError, match=r"two.safetensors: holds tensor 'b', but .* puts it in 'one.safetensors'"):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    "place",
    ["../two.safetensors", "/etc/passwd", "x/two.safetensors", "c:\\two", "..", "", 3, "a\n", "n" * 256, "\ud800"],
)
def test_index_may_not_lead_elsewhere(sharded: Path, place: object) -> None:
    set_index(sharded, {"a": place})
    with pytest.raises(FormatError, match=r"tensor 'a' is said to be in .*, expected the plain name"):
        Checkpoint(sharded)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\xff"])
def test_broken_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=r"index.json"):
        Checkpoint(sharded)


def test_truncated_shard(sharded: Path) -> None:
    raw = (sharded / "one.safetensors").read_bytes()
    (sharded / "one.safetensors").write_bytes(raw[:-1])
    with pytest.raises(FormatError, match=r"one.safetensors: truncated safetensors: tensor 'b' needs"):
        Checkpoint(sharded)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="found no weights"):
        Checkpoint(tmp_path)
    (tmp_path / "weights.pth").touch()
    with pytest.raises(SourceError, match=r"expected model.safetensors or .*, found weights.pth"):
        Checkpoint(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere: does not exist"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"has no config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormatError, match="not valid JSON") as caught:
        read_config(tmp_path)
    assert isinstance(caught.value, MopeqError)
    with pytest.raises(SourceError, match="is a file"):
        read_config(tmp_path / "config.json")


def test_an_index_of_very_many_files(sharded: Path) -> None:
    """Each would be looked for on the disk."""
    set_index(sharded, {str(n): f"{n}.safetensors" for n in range(MAX_SHARDS + 1)})
    with pytest.raises(FormatError, match=f"names {MAX_SHARDS + 1} files, expected at most {MAX_SHARDS}"):
        Checkpoint(sharded)


def test_a_shard_that_is_a_pipe(sharded: Path) -> None:
    (sharded / "one.safetensors").unlink()
    os.mkfifo(sharded / "one.safetensors")
    with pytest.raises(SourceError, match=r"shard 'one.safetensors' is missing"):
        Checkpoint(sharded)
