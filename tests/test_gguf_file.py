"""Headers: golden bytes by hand, gguf-py's reader and writer on the other side, and hostile files."""

import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mopeq_edge import gguf_file
from mopeq_edge.errors import FormatError
from mopeq_edge.ggml.types import BY_NAME, F16, F32
from mopeq_edge.gguf_file import KV, TensorInfo, ValueType, pad, read_header
from mopeq_edge.gguf_layout import layout, padded_nbytes, string, uint32

from .builders import write_raw_gguf

# One key-value and two tensors, alignment 32, byte by byte
GOLDEN = b"".join(
    [
        *(b"GGUF", b"\x03\0\0\0", b"\x02\0\0\0\0\0\0\0", b"\x01\0\0\0\0\0\0\0"),
        *(b"\x01\0\0\0\0\0\0\0", b"k", b"\x04\0\0\0", b"\x07\0\0\0"),
        *(b"\x01\0\0\0\0\0\0\0", b"a", b"\x02\0\0\0", b"\x02\0\0\0\0\0\0\0", b"\x01\0\0\0\0\0\0\0"),
        *(b"\0\0\0\0", b"\0\0\0\0\0\0\0\0"),
        *(b"\x01\0\0\0\0\0\0\0", b"b", b"\x01\0\0\0", b"\x20\0\0\0\0\0\0\0"),
        *(b"\x08\0\0\0", b"\x20\0\0\0\0\0\0\0"),
        b"\0" * 13,
        *(b"\0\0\x80\x3f\0\0\0\x40", b"\0" * 24),
        *(b"\x01" * 34, b"\0" * 30),
    ]
)
DATA_START = len(GOLDEN) - 96


def header(*kvs: bytes, tensors: bytes = b"", n_tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, len(kvs)) + b"".join(kvs) + tensors


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def info(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def test_golden(tmp_path: Path) -> None:
    path = tmp_path / "golden.gguf"
    path.write_bytes(GOLDEN)
    found = read_header(path)
    q8 = BY_NAME["Q8_0"]
    assert found.kvs == {"k": KV(ValueType.UINT32, 7)}
    assert found.tensors == (TensorInfo("a", (2, 1), F32, 0), TensorInfo("b", (32,), q8, 32))
    assert (found.version, found.alignment, found.data_start, found.file_size) == (3, 32, DATA_START, len(GOLDEN))
    place = layout(found.kvs, [("a", (2, 1), F32), ("b", (32,), q8)])
    assert place.header == GOLDEN[:DATA_START]
    assert place.file_size == len(GOLDEN)
    assert place.tensors == found.tensors
    assert [padded_nbytes(t.shape, t.type) for t in found.tensors] == [32, 64]


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    """Only the padding behind the last tensor may be missing."""
    path = tmp_path / "cut.gguf"
    for size in range(len(GOLDEN) - 30):
        path.write_bytes(GOLDEN[:size])
        with pytest.raises(FormatError) as caught:
            read_header(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
    path.write_bytes(GOLDEN[: len(GOLDEN) - 30])
    read_header(path)


def test_every_byte_changed(tmp_path: Path) -> None:
    """A changed byte is either refused or read as something that lies within the file."""
    path = tmp_path / "bad.gguf"
    refused = 0
    for at in range(DATA_START):
        for flip in (0x01, 0x80, 0xFF):
            path.write_bytes(GOLDEN[:at] + bytes([GOLDEN[at] ^ flip]) + GOLDEN[at + 1 :])
            try:
                found = read_header(path)
            except FormatError:
                refused += 1
            else:
                assert all(found.data_start + t.offset + t.nbytes <= len(GOLDEN) for t in found.tensors)
    assert refused > DATA_START


KVS: dict[str, KV] = {
    "general.architecture": string("olmoe"),
    "u8": KV(ValueType.UINT8, 200),
    "i8": KV(ValueType.INT8, -100),
    "u16": KV(ValueType.UINT16, 60000),
    "i16": KV(ValueType.INT16, -30000),
    "u32": uint32(2**32 - 1),
    "i32": KV(ValueType.INT32, -(2**31)),
    "u64": KV(ValueType.UINT64, 2**64 - 1),
    "i64": KV(ValueType.INT64, -(2**63)),
    "f32": KV(ValueType.FLOAT32, 0.5),
    "f64": KV(ValueType.FLOAT64, 0.1),
    "yes": KV(ValueType.BOOL, True),
    "text": string("naïve 🚀\n"),
    "texts": KV(ValueType.ARRAY, ["a", "", "ü"], ValueType.STRING),
    "numbers": KV(ValueType.ARRAY, [1, -2, 3], ValueType.INT32),
    "bools": KV(ValueType.ARRAY, [True, False], ValueType.BOOL),
}


def test_gguf_py_reads_what_we_lay_out(tmp_path: Path) -> None:
    values = np.arange(6, dtype="<f4")
    write_raw_gguf(
        tmp_path / "m.gguf",
        KVS,
        [("w", (3, 2), F32, values.tobytes()), ("h", (5,), F16, values[:5].astype("<f2").tobytes())],
    )
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    for name, kv in KVS.items():
        field = reader.get_field(name)
        assert field is not None
        assert field.types[0] == int(kv.type)
        assert kv.sub_type is None or field.types[1] == int(kv.sub_type)
        assert field.contents() == kv.value
    assert [(t.name, t.shape.tolist()) for t in reader.tensors] == [("w", [3, 2]), ("h", [5])]
    assert np.array_equal(reader.tensors[0].data, values.reshape(2, 3))
    assert np.array_equal(reader.tensors[1].data, values[:5])


def write_with_gguf_py(path: Path, alignment: int) -> None:
    writer: Any = gguf.GGUFWriter(path, "olmoe")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for name, kv in KVS.items():
        if name != "general.architecture":
            kind, sub = gguf.GGUFValueType(kv.type), kv.sub_type and gguf.GGUFValueType(kv.sub_type)
            writer.add_key_value(name, kv.value, kind, sub)
    for n in (3, 40, 7):
        writer.add_tensor(f"w{n}", np.full((2, n), n, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_same_bytes_as_gguf_py(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "m.gguf"
    write_with_gguf_py(path, alignment)
    found = read_header(path)
    assert {name: kv for name, kv in found.kvs.items() if name != "general.alignment"} == KVS
    assert found.alignment == alignment
    place = layout(found.kvs, [(t.name, t.shape, t.type) for t in found.tensors])
    raw = path.read_bytes()
    assert place.header == raw[: found.data_start]
    assert place.file_size == len(raw)
    for tensor, n in zip(found.tensors, (3, 40, 7), strict=True):
        start = found.data_start + tensor.offset
        assert raw[start : start + tensor.nbytes] == np.full((2, n), n, "<f4").tobytes()


def test_bytes_that_are_no_utf8_survive(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    raw = header(key("token", 8, text(b"\xc3\x28")))
    path.write_bytes(raw + b"\0" * (-len(raw) % 32))
    found = read_header(path)
    assert layout(found.kvs, []).header == path.read_bytes()


def strings_header(texts: list[bytes], *more: bytes) -> bytes:
    """A header of the array 'k' of ``texts`` and the key-values ``more``."""
    return header(key("k", 9, struct.pack("<IQ", 8, len(texts)) + b"".join(map(text, texts))), *more)


@pytest.mark.parametrize("piece", [1, 7, 9, 100, 2**18])
def test_strings_across_the_pieces_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Of every length around those of a piece and of a group of the walk, with what lies behind them."""
    monkeypatch.setattr(gguf_file, "_READ_BYTES", piece)
    path, end = tmp_path / "m.gguf", key("end", 4, b"\7\0\0\0")
    for n in (0, 1, 2, 63, 64, 65, 130):
        texts = [bytes([97 + i % 26]) * (i * i % 23) for i in range(n)]
        raw = strings_header(texts, end)
        path.write_bytes(raw + b"\0" * (-len(raw) % 32))
        found = read_header(path)
        assert layout(found.kvs, []).header == path.read_bytes()
        assert found.kvs == {"k": KV(ValueType.ARRAY, [t.decode() for t in texts], ValueType.STRING), "end": uint32(7)}
        assert found.get("k") == [t.decode() for t in texts]
        # elements that were looked at are written as they were
        assert layout(found.kvs, []).header == path.read_bytes()
        for cut in range(max(0, len(raw) - 25), len(raw)):
            path.write_bytes(raw[:cut])
            with pytest.raises(FormatError, match=r"truncated GGUF|can hold"):
                read_header(path)


def test_a_piece_may_end_in_any_string_of_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strings are walked 64 at a time: also where the last of them lies across the end of what was read."""
    texts = [f"{n:x}" * (n % 5) for n in range(400)]
    path = tmp_path / "m.gguf"
    path.write_bytes(layout({"texts": KV(ValueType.ARRAY, texts, ValueType.STRING), "last": uint32(7)}, []).header)
    for piece in range(900, 2400):
        monkeypatch.setattr(gguf_file, "_READ_BYTES", piece)
        header = read_header(path)
        assert (header.get("texts"), header.get("last")) == (texts, 7)


def test_a_string_that_is_too_long_is_told_by_its_place(tmp_path: Path) -> None:
    for n in (0, 1, 63, 64, 200):
        raw = strings_header([b"abc"] * n + [b"x"])
        at = len(raw) - 9
        for length in (2, 2**31, 2**62, 2**63, 2**64 - 8, 2**64 - 1):
            (tmp_path / "bad.gguf").write_bytes(raw[:at] + struct.pack("<Q", length) + b"x")
            with pytest.raises(FormatError, match=f"length of element of 'k' is {length} at offset {at}, more than"):
                read_header(tmp_path / "bad.gguf")


def test_a_large_vocabulary_takes_no_more_memory_than_the_header(tmp_path: Path) -> None:
    """Read, written again, and refused for a fault behind it."""
    path, texts = tmp_path / "m.gguf", [b"token%06d" % i for i in range(100_000)]
    raw = strings_header(texts)
    path.write_bytes(raw + b"\0" * (-len(raw) % 32))
    (tmp_path / "bad.gguf").write_bytes(strings_header(texts, key("b", 99, b"")))
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="key 'b' has unknown value type 99"):
            read_header(tmp_path / "bad.gguf")
        found = read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1.3 * len(raw) + 1_000_000
    finally:
        tracemalloc.stop()
    assert layout(found.kvs, []).header == path.read_bytes()
    assert found.get("k")[54_321] == "token054321"


A = info("a", (1,), 0, 0)
HOSTILE = {
    "empty": (b"", "not a GGUF file"),
    "magic": (b"GGML" + bytes(60), "not a GGUF file"),
    "version 1": (header(version=1), "GGUF version 1, expected 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "GGUF version 50331648"),
    "many tensors": (header(n_tensors=2**63), "tensor count is 9223372036854775808 at offset 8"),
    "many keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40), "key-value count is 1099511627776"),
    "long key": (header(struct.pack("<Q", 2**62) + b"k"), "length of key is 4611686018427387904"),
    "long string": (header(key("k", 8, struct.pack("<Q", 2**63) + b"x")), "length of value of 'k'"),
    "long array": (header(key("k", 9, struct.pack("<IQ", 6, 2**61))), "length of 'k' is 2305843009213693952"),
    "many strings": (header(key("k", 9, struct.pack("<IQ", 8, 2**50))), "length of 'k'"),
    "value type": (header(key("k", 13, bytes(8))), "key 'k' has unknown value type 13"),
    "element type": (header(key("k", 9, struct.pack("<IQ", 99, 0))), "has unknown value type 99"),
    "nested array": (header(key("k", 9, struct.pack("<IQ", 9, 0))), "is an array of arrays"),
    "key twice": (header(key("k", 0, b"\1"), key("k", 0, b"\1")), "key 'k' appears twice"),
    "alignment 0": (header(key("general.alignment", 4, bytes(4))), "general.alignment is 0"),
    "alignment 48": (header(key("general.alignment", 4, b"\x30\0\0\0")), "general.alignment is 48"),
    "alignment text": (header(key("general.alignment", 8, text("32"))), "general.alignment is '32'"),
    "alignment list": (
        header(key("general.alignment", 9, struct.pack("<IQI", 4, 1, 32))),
        r"general.alignment is \[32\]",
    ),
    "alignment of another type": (
        header(key("general.alignment", 10, b"\x20" + bytes(7))),
        r"general.alignment is 32 \(UINT64\), expected .* \(UINT32\)",
    ),
    "huge alignment": (
        header(key("general.alignment", 4, struct.pack("<I", 2**31))),
        "general.alignment is 2147483648",
    ),
    "key without a letter": (header(key("", 0, b"\1")), "key '' at offset 32, expected printable UTF-8"),
    "key that is no UTF-8": (header(struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 1)), r"key '\\udcff' at"),
    "key with an escape": (header(key("\x1b[2J", 0, b"\1")), r"key '\\x1b\[2J' at offset 32, expected printable"),
    "key too long": (header(key("k" * 2**16, 0, b"\1")), r"key 'kkk.*kkk' is longer than 65535 bytes \(65536\)"),
    "name with a newline": (header(tensors=info("a\n", (1,), 0, 0), n_tensors=1), "tensor name 'a ' at offset"),
    "no name": (header(tensors=info("", (1,), 0, 0), n_tensors=1), "tensor name '' at offset"),
    "tensor twice": (header(tensors=A + info("a", (1,), 0, 32), n_tensors=2), "tensor 'a' appears twice"),
    "long name": (header(tensors=info("x" * 64, (1,), 0, 0), n_tensors=1), "is longer than 63 bytes"),
    "no axes": (header(tensors=info("a", (), 0, 0), n_tensors=1), "has 0 dimensions"),
    "five axes": (header(tensors=info("a", (1,) * 5, 0, 0), n_tensors=1), "has 5 dimensions"),
    "no elements": (header(tensors=info("a", (0,), 0, 0), n_tensors=1), r"shape \[0\] cannot have type F32"),
    "removed type": (header(tensors=info("a", (32,), 4, 0), n_tensors=1), "tensor 'a' has unknown type 4"),
    "newer type": (header(tensors=info("a", (32,), 4000, 0), n_tensors=1), "tensor 'a' has unknown type 4000"),
    "part of a block": (header(tensors=info("a", (33,), 8, 0), n_tensors=1), "whole blocks of 32"),
    "huge": (header(tensors=info("a", (2**63,) * 4, 0, 0), n_tensors=1), "truncated GGUF: tensor 'a' ends at"),
    "not at once": (header(tensors=info("a", (1,), 0, 32), n_tensors=1), "has offset 32, expected 0"),
    "overlap": (header(tensors=A + info("b", (1,), 0, 0), n_tensors=2), "has offset 0, expected 32"),
    "not aligned": (header(tensors=A + info("b", (1,), 0, 4), n_tensors=2), "has offset 4, expected 32"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(tmp_path: Path, name: str) -> None:
    raw, message = HOSTILE[name]
    path = tmp_path / "bad.gguf"
    # Data behind the header, so that nothing is refused just for being short
    path.write_bytes(raw + bytes(256) if len(raw) else raw)
    with pytest.raises(FormatError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_hostile_takes_no_memory_and_no_more_reads_than_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = tmp_path / "bad.gguf", []
    take = gguf_file._Cursor.take
    monkeypatch.setattr(gguf_file._Cursor, "take", lambda *args: calls.append(args[1]) or take(*args))
    for name, (raw, _) in HOSTILE.items():
        path.write_bytes(raw + bytes(256))
        calls.clear()
        tracemalloc.start()
        try:
            with pytest.raises(FormatError):
                read_header(path)
            assert tracemalloc.get_traced_memory()[1] < 10 * len(raw) + 500_000, name
        finally:
            tracemalloc.stop()
        assert len(calls) <= len(raw) + 256


LIMITED: dict[str, tuple[bytes, str]] = {
    "tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**15 + 1, 0), "tensor count is 32769 .* expected at most 32768"),
    "keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**12 + 1), "key-value count is 4097 .* expected at most 4096"),
    "array": (header(key("k", 9, struct.pack("<IQ", 0, 2**22 + 1))), "length of 'k' is 4194305 .* at most 4194304"),
    "arrays": (
        header(key("a", 9, struct.pack("<IQ", 0, 2**22) + bytes(2**22)), key("b", 9, struct.pack("<IQ", 0, 1))),
        "length of 'b' is 1 .* expected at most 0",
    ),
    "strings": (
        header(key("k", 9, struct.pack("<IQ", 8, 2**21 + 1))),
        "'k' has 2097153 strings at offset 49, expected at most 2097152",
    ),
    "string": (header(key("k", 8, struct.pack("<Q", 2**27))), "a header of at most 134217728 bytes"),
}


@pytest.mark.parametrize("name", LIMITED)
def test_limits_of_a_large_file(tmp_path: Path, name: str) -> None:
    """A gigabyte that takes no disk: large enough for every count, so that only the limits stop them."""
    raw, message = LIMITED[name]
    path = tmp_path / "large.gguf"
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(2**30)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=message):
            read_header(path)
        # a list of 4 million small numbers is 32 MiB and is there once while it is unpacked
        assert tracemalloc.get_traced_memory()[1] < (100_000_000 if name == "arrays" else 1_000_000)
    finally:
        tracemalloc.stop()


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(FormatError, match="it is no regular file"):
        read_header(tmp_path / "m.gguf")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        read_header(tmp_path / "none.gguf")
    with pytest.raises(FormatError, match="cannot be read"):
        read_header(tmp_path)


def test_names_that_llama_cpp_refuses_are_not_written() -> None:
    layout({}, [("x" * 63, (1,), F32)])
    with pytest.raises(FormatError, match="longer than 63 bytes"):
        layout({}, [("ü" * 32, (1,), F32)])


def test_pad() -> None:
    assert [pad(n, 32) for n in (0, 1, 31, 32, 33)] == [0, 32, 32, 32, 64]
