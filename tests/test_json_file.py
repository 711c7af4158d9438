"""JSON within limits: what json.loads would take, or die of."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from mopeq_edge import json_file
from mopeq_edge.errors import FormatError
from mopeq_edge.json_file import MAX_DEPTH, is_count, is_number, load_json, parse_json, require
from mopeq_edge.regular_file import read_whole, regular_size


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "Expecting value"),
        (b"\xff", "utf-8"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' appears twice"),
        (b'{"a": {"b": 1, "b": 1}}', "'b' appears twice"),
        (b'{"a": NaN}', "it has NaN, which is no number"),
        (b"[-Infinity]", "it has -Infinity, which is no number"),
        (b"[1e999]", "it has 1e999, which is no number"),
        (b"[" + b"1" * 5000 + b"]", "4300 digits"),
        (nested(MAX_DEPTH + 2), f"nested more than {MAX_DEPTH} deep"),
        (nested(1_000_000), f"nested more than {MAX_DEPTH} deep"),
        (b'{"a":' * 100_000, f"nested more than {MAX_DEPTH} deep"),
    ],
)
def test_refused(raw: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_json(raw)
    assert not isinstance(caught.value, RecursionError)
    assert "\n" not in str(caught.value)


def test_taken() -> None:
    value = {"a": [1, -2.5, None, True, {"a": "ü"}], "b": {}, "c": 10**30}
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(nested(MAX_DEPTH)) is not None
    assert parse_json(b"[Infinity, 1e999]", finite=False) == [float("inf")] * 2


def test_many_values_are_counted_before_they_are_made() -> None:
    """Twelve megabytes would become a gigabyte of empty lists."""
    raw = b"[" + b"[],[]," * (json_file.MAX_VALUES // 3) + b"[]]"
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="values, expected at most 4194304"):
            parse_json(raw)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    """Nobody ever writes to the pipe: opening it would not return."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match="no regular file"):
            load_json(tmp_path / name)
    with pytest.raises(OSError, match="directory"):
        regular_size(tmp_path)
    (tmp_path / "file").write_bytes(b"1234")
    assert read_whole(tmp_path / "file", 4) == b"1234"
    with pytest.raises(FormatError, match="has 4 bytes, expected at most 3"):
        read_whole(tmp_path / "file", 3)


def test_numbers() -> None:
    assert [is_count(v) for v in (0, 5, 2**63 - 1)] == [True] * 3
    assert not any(is_count(v) for v in (-1, 2**63, True, 1.0, "1", None, [1]))
    assert [is_number(v) for v in (0, -1.5, 10**400)] == [True] * 3
    assert not any(is_number(v) for v in (True, float("nan"), float("inf"), "1", None))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([1], "expected an object, found list"),
        ({}, "'a' is missing"),
        ({"a": 1, "b": 2}, "'b' is not known"),
        ({"a": -1}, "a is -1"),
        ({"a": "x" * 10_000}, "a is 'xxx"),
    ],
)
def test_required_fields(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        require(fields, {"a": is_count})
    assert len(str(caught.value)) < 200
    assert require({"a": 3}, {"a": is_count}) == {"a": 3}
