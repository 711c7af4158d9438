"""The reader against the safetensors library, and one test for each way in which a file can be broken."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mopeq_edge.errors import FormatError
from mopeq_edge.source.safetensors_file import SafetensorsFile

from ..builders import write_safetensors

# Two tensors by hand: "b" F16 [2] = 1, 2 first in the data; "a" F32 [1, 2] = 1, -2 first by name
GOLDEN = (
    b'\x83\x00\x00\x00\x00\x00\x00\x00{"b":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},'
    b'"a":{"dtype":"F32","shape":[1,2],"data_offsets":[4,12]},"__metadata__":{}}   '
    b"\x00\x3c\x00\x40\x00\x00\x80\x3f\x00\x00\x00\xc0"
)


def make(path: Path, header: object, data: bytes = b"") -> Path:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_a_file_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "golden.safetensors"
    path.write_bytes(GOLDEN)
    file = SafetensorsFile(path)
    assert list(file.entries) == ["a", "b"]
    assert [(e.dtype, e.shape, e.nbytes) for e in file.entries.values()] == [("F32", (1, 2), 8), ("F16", (2,), 4)]
    assert file.read("b").tobytes() == b"\x00\x3c\x00\x40"
    assert file.read_f32("a").tolist() == [[1.0, -2.0]]
    assert file.read_f32("b").tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_values_are_torchs(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    tensors = {
        "cube": torch.randn(3, 4, 5).to(dtype),
        "row": torch.randn(7).to(dtype),
        "one": torch.randn(()).to(dtype),
        "none": torch.zeros(0, 3).to(dtype),
    }
    save_file(tensors, tmp_path / "t.safetensors")
    file = SafetensorsFile(tmp_path / "t.safetensors")
    for name, value in tensors.items():
        assert file.entries[name].shape == tuple(value.shape)
        assert np.array_equal(file.read_f32(name).reshape(value.shape), value.float().numpy())
        assert file.read(name).tobytes() == value.reshape(-1).view(torch.uint8).numpy().tobytes()
    rows = tensors["cube"].float().reshape(12, 5)[4:9].numpy()
    assert np.array_equal(file.read_f32("cube", 4, 9), rows)


def test_integers_are_entries_but_no_weights(tmp_path: Path) -> None:
    save_file({"ids": torch.arange(3)}, tmp_path / "t.safetensors")
    file = SafetensorsFile(tmp_path / "t.safetensors")
    assert file.entries["ids"].dtype == "I64"
    with pytest.raises(FormatError, match=r"tensor 'ids' has type I64, expected weights in BF16, F16, F32"):
        file.read_f32("ids")


def test_rows_out_of_range(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "t.safetensors", {"w": ("F32", (2, 1), bytes(8))})
    with pytest.raises(ValueError, match="rows 1 to 3 of 2"):
        SafetensorsFile(tmp_path / "t.safetensors").read("w", 1, 3)


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    for size in range(len(GOLDEN)):
        path.write_bytes(GOLDEN[:size])
        with pytest.raises(FormatError, match="truncated safetensors") as caught:
            SafetensorsFile(path)
        assert "\n" not in str(caught.value)
    assert "tensor 'a' needs 151 bytes, file has 150" in str(caught.value)


def test_one_byte_too_many(tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes(GOLDEN + b"\0")
    with pytest.raises(FormatError, match="the last tensor ends at byte 151, but the file has 152"):
        SafetensorsFile(path)


def test_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(GOLDEN)
    file = SafetensorsFile(path)
    path.write_bytes(GOLDEN[:-1])
    with pytest.raises(FormatError, match="changed while it was read"):
        file.read("a")


W = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"GGUF", "no safetensors file"),
        (b"\xff\xfe", "no safetensors file"),
        (b"[" * 100_000, "nested more than 200 deep"),
        ([1], "expected an object, found list"),
        (b'{"w":{},"w":{}}', "'w' appears twice"),
        ({"w": 1}, "tensor 'w': expected an object"),
        ({"w": {**W, "dtype": "Q4"}}, "tensor 'w': unknown dtype 'Q4'"),
        ({"w": {**W, "dtype": ["F32"]}}, "tensor 'w': unknown dtype"),
        ({"w": {**W, "shape": [-1]}}, r"tensor 'w': shape \[-1\]"),
        ({"w": {**W, "shape": [True]}}, r"tensor 'w': shape \[True\]"),
        ({"w": {**W, "shape": [1.0]}}, r"tensor 'w': shape \[1.0\]"),
        ({"w": {**W, "shape": [10**30]}}, r"shape \[1000.*0000\] is no list of up to 16 sizes"),
        ({"w": {**W, "shape": [10**400]}}, "is no list of up to 16 sizes"),
        ({"w": {**W, "shape": [2**62] * 16}}, "bits, its offsets give 4 bytes"),
        ({"w": {**W, "shape": [1] * 17}}, "is no list of up to 16 sizes"),
        ({"w": {**W, "shape": ["x" * 10**6]}}, r"shape \['xxx.*xxx'\] is no list"),
        ({"w": {**W, "data_offsets": [0, 2**63]}}, "are no pair of sizes"),
        (b'{"w": {"dtype": "F32", "shape": [1e999]}}', "it has 1e999, which is no number"),
        ({"w": {**W, "data_offsets": [4, 0]}}, "needs 32 bits, its offsets give -4 bytes"),
        ({"w": {**W, "data_offsets": [0]}}, "no pair of sizes"),
        ({"w": {**W, "data_offsets": [1, 5]}}, "starts at byte"),
        ({"w": W, "v": W}, "starts at byte"),
    ],
)
def test_broken_header(tmp_path: Path, header: object, message: str) -> None:
    path = make(tmp_path / "bad.safetensors", header, bytes(4))
    with pytest.raises(FormatError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        SafetensorsFile(tmp_path / "none.safetensors")
    (tmp_path / "huge").write_bytes(b"\xff" * 16)
    with pytest.raises(FormatError, match="claims a header of"):
        SafetensorsFile(tmp_path / "huge")
