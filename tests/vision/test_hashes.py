"""Every changed byte of a vision file is found and named, by hashes that hashlib gives for the bytes on disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from mopeq_edge.cli import cli
from mopeq_edge.errors import DamagedError, FormatError
from mopeq_edge.progress import SilentProgress
from mopeq_edge.verify import verify
from mopeq_edge.vision.description import weights_file
from mopeq_edge.vision.hashes import KEY
from tools.fuzz.seeds import vision_weights, write_vision_files

from ..test_verify import write

DATA = (4096, 4096 + 384)
"""Where the matrix lies."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_vision_files(tmp_path / "out.vision.onnx")


def said(path: Path) -> dict[str, object]:
    metadata = {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}
    found: dict[str, object] = json.loads(metadata[KEY])
    return found


def test_the_hashes_are_those_of_the_bytes(path: Path) -> None:
    raw, found = path.read_bytes(), said(path)
    matrix = weights_file(path).read_bytes()[slice(*DATA)]
    assert found["tensors"] == {"matrix": hashlib.blake2b(matrix, digest_size=16).hexdigest()}
    own = str(found["graph"]).encode()
    assert raw.count(own) == 1
    assert own.decode() == hashlib.blake2b(raw.replace(own, b"0" * 32), digest_size=16).hexdigest()
    result = verify(path, SilentProgress())
    assert result.whole
    assert (result.n_tensors, result.n_bytes) == (1, len(raw) + len(vision_weights()))


def test_every_changed_byte_of_the_weights(path: Path) -> None:
    beside, raw = weights_file(path), weights_file(path).read_bytes()
    for at in (*range(0, 4096, 97), 4095, *range(4096, len(raw))):
        changed = bytearray(raw)
        changed[at] ^= 1 << at % 8
        beside.write_bytes(changed)
        name = "matrix" if DATA[0] <= at < DATA[1] else "end of the file" if at >= DATA[1] else "padding before matrix"
        assert verify(path, SilentProgress()).damaged == ((str(beside), name),), at
    for longer in (raw[:-1], raw + b"a"):
        beside.write_bytes(longer)
        assert verify(path, SilentProgress()).damaged == ((str(beside), "end of the file"),)


def test_every_changed_byte_of_the_graph(path: Path) -> None:
    raw, unread = path.read_bytes(), 0
    for at in range(len(raw)):
        changed = bytearray(raw)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        try:
            found = verify(path, SilentProgress())
        except FormatError:
            unread += 1
            continue
        # the key of the hashes itself may be what changed
        assert (str(path), "graph and description") in found.damaged or found.without_hashes == (str(path),), at
    assert unread < len(raw)


def test_beside_a_gguf(tmp_path: Path, path: Path) -> None:
    gguf = write(tmp_path / "out.gguf")[0]
    alone, seeing = verify(gguf, SilentProgress()), CliRunner().invoke(cli, ["verify", str(gguf), "--json"])
    found = json.loads(seeing.stdout)
    assert alone.whole
    assert alone.files == (str(gguf), str(path), str(weights_file(path)))
    assert (found["whole"], found["n_tensors"], found["without_hashes"]) == (True, 4, [])
    beside = weights_file(path)
    raw = bytearray(beside.read_bytes())
    raw[DATA[0] + 5] ^= 1
    beside.write_bytes(raw)
    done = CliRunner().invoke(cli, ["verify", str(gguf)])
    assert isinstance(done.exception, DamagedError)
    assert str(done.exception).startswith(f"{gguf}: not as written: matrix of out.vision.onnx.data; ")
    # what cannot be read any more is told with the rest
    path.write_bytes(b"nothing")
    assert [what[:34] for _, what in verify(gguf, SilentProgress()).damaged] == ["everything (" + str(path)[:22]]
    path.unlink()
    assert verify(gguf, SilentProgress()).whole


def test_a_file_of_before_without_hashes(tmp_path: Path, path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    kept = {entry.key: entry.value for entry in model.metadata_props if entry.key != KEY}
    onnx.helper.set_model_props(model, kept)
    path.write_bytes(model.SerializeToString())
    gguf = write(tmp_path / "out.gguf")[0]
    for file in (gguf, path):
        done = CliRunner().invoke(cli, ["verify", str(file)])
        assert done.exit_code == 3
        assert done.stderr.startswith(f"{path}: carries no hashes, so there is nothing to verify with; ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ('{"format": "mopeq-edge hashes", "version": 2}', "version 2 is not known, expected 1"),
        ('{"format": "mopeq-edge hashes", "version": 1, "graph": "0", "tensors": {}}', "graph is '0'"),
    ],
)
def test_what_are_no_hashes(path: Path, text: str, message: str) -> None:
    model = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(model, {KEY: text})
    path.write_bytes(model.SerializeToString())
    with pytest.raises(FormatError, match=message):
        verify(path, SilentProgress())


def test_weights_that_are_gone(path: Path) -> None:
    weights_file(path).unlink()
    with pytest.raises(FormatError, match=r"its weights, out.vision.onnx.data, are not beside it; copy both files"):
        verify(path, SilentProgress())
