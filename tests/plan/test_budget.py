"""Budgets by hand: GB, GiB and bits per weight."""

from __future__ import annotations

from typing import Any

import pytest

from mopeq_edge.errors import PlanError
from mopeq_edge.ggml.types import BY_NAME, F32
from mopeq_edge.gguf_layout import layout
from mopeq_edge.plan.budget import Budget, header_bytes
from mopeq_edge.source.model import SourceTensor

from .synthetic import KVS, tensors

NO_TENSORS: tuple[SourceTensor, ...] = ()


@pytest.mark.parametrize(
    ("gb", "wanted"),
    [
        (1.0, 1_000_000_000),
        (4, 4_000_000_000),
        (0.008, 8_000_000),
        (0.0000001, 100),
        # As typed, not as binary floating point has it: cut off, these would be a byte short
        (4.1, 4_100_000_000),
        (32.3, 32_300_000_000),
        (0.007123457, 7_123_457),
        # A part of a byte does not fit
        (0.0000000019, 1),
    ],
)
def test_gb(gb: float, wanted: int) -> None:
    assert Budget(gb=gb).file_bytes(123, tensors()) == wanted


def test_every_number_of_bytes_can_be_asked_for() -> None:
    for n in (1, 999_999_999, 1_234_567_891, 123_456_789_012, *range(29_000_000, 29_000_200)):
        assert Budget(gb=n / 1e9).file_bytes(0, NO_TENSORS) == n
        assert Budget(gib=n / 2**30).file_bytes(0, NO_TENSORS) == n


@pytest.mark.parametrize(("gib", "wanted"), [(1.0, 1_073_741_824), (0.5, 536_870_912), (3.3, 3_543_348_019)])
def test_gib(gib: float, wanted: int) -> None:
    assert Budget(gib=gib).file_bytes(123, tensors()) == wanted


def test_bpw() -> None:
    matrices = [SourceTensor("a.weight", (256, 10), BY_NAME["BF16"]), SourceTensor("b.weight", (100,), F32)]
    # 2660 weights at 4.5 bits are 1496.25 bytes; the header comes on top
    assert Budget(bpw=4.5).file_bytes(1000, matrices) == 2496
    assert Budget(bpw=8).file_bytes(0, matrices) == 2660


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"gb": 1.0, "gib": 1.0},
        {"gb": 1.0, "bpw": 4.0},
        {"gb": 0.0},
        {"bpw": -1.0},
        {"gib": float("nan")},
        {"gb": float("inf")},
        {"gb": 1e9},
    ],
)
def test_refused(given: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="give exactly one of --target-gb") as caught:
        Budget(**given)
    assert "\n" not in str(caught.value)


def test_in_words() -> None:
    assert [str(b) for b in (Budget(gb=4.5), Budget(gib=0.25), Budget(bpw=3))] == ["4.5 GB", "0.25 GiB", "3 bpw"]


def test_the_header_does_not_depend_on_the_types() -> None:
    has = tensors()
    sizes = set()
    for name in ("F32", "BF16", "Q8_0", "Q4_0"):
        specs = [(t.name, t.shape, BY_NAME[name] if t.quantizable else t.type) for t in has]
        sizes.add(header_bytes(KVS, specs))
        assert header_bytes(KVS, iter(specs)) == len(layout(KVS, specs).header)
    assert len(sizes) == 1
    assert sizes.pop() % 32 == 0
