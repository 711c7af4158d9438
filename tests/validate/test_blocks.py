"""The table of scales against what gguf (or libggml, for what gguf lacks) makes of blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mopeq_edge.ggml.types import BY_NAME, QUANTIZABLE, GgmlType
from mopeq_edge.validate.blocks import SCALES, bad_scales, has_scales
from mopeq_edge.validate.weights import dequantize

WEIGHTS = ("F32", *QUANTIZABLE)
NAN = {"F16": [0x01, 0x7E], "BF16": [0xC1, 0x7F], "F32": [0, 0, 0xC0, 0x7F], "E8M0": [0xFF], "UE4M3": [0x7F]}
INFINITE = {"F16": [0x00, 0xFC], "BF16": [0x80, 0x7F], "F32": [0, 0, 0x80, 0xFF]}
ONE = {"F16": [0x00, 0x3C], "BF16": [0x80, 0x3F], "F32": [0, 0, 0x80, 0x3F], "E8M0": [127], "UE4M3": [0x38]}

Bytes = npt.NDArray[np.uint8]


def random_blocks(kind: GgmlType, n: int) -> Bytes:
    """Anything but for the scales, which are 1."""
    blocks = np.random.default_rng(0).integers(0, 256, (n, kind.type_size), dtype=np.uint8)
    for scale in SCALES.get(kind.name, ()):
        one = ONE[scale.number.name]
        blocks[:, scale.offset : scale.offset + len(one)] = one
    if kind.name == "IQ1_M":
        set_iq1_m(blocks, 0x3C00)
    return blocks


def set_iq1_m(blocks: Bytes, bits: int) -> None:
    """Put the nibbles of an F16 where four words have their highest bits."""
    words = blocks[:, 48:].copy().view("<u2")
    for i in range(4):
        words[:, i] = (words[:, i] & 0x0FFF) | ((bits >> 4 * i & 0xF) << 12)
    blocks[:, 48:] = words.view(np.uint8)


def values(kind: GgmlType, blocks: Bytes) -> Any:
    """Weights by block."""
    return dequantize(kind, blocks, kind.block_size)


@pytest.mark.runtime
@pytest.mark.parametrize("name", WEIGHTS)
def test_nothing_else_in_a_block_can_be_wrong(name: str) -> None:
    kind = BY_NAME[name]
    assert has_scales(kind)
    blocks = random_blocks(kind, 64)
    assert bad_scales(kind, blocks) is None
    assert np.isfinite(values(kind, blocks)).all()
    # zeros are what a lost piece of a file is made of
    assert bad_scales(kind, np.zeros((3, kind.type_size), np.uint8)) is None


@pytest.mark.runtime
@pytest.mark.parametrize("bits", [NAN, INFINITE])
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_scale_is_found_and_counts(name: str, bits: dict[str, list[int]]) -> None:
    kind = BY_NAME[name]
    for scale in SCALES.get(name, ()):
        if scale.number.name not in bits:
            continue
        blocks = random_blocks(kind, 9)
        wrong = bits[scale.number.name]
        blocks[[4, 7], scale.offset : scale.offset + len(wrong)] = wrong
        found = bad_scales(kind, blocks)
        assert found is not None
        assert (found.n_blocks, found.block, found.scale) == (2, 4, scale.name)
        assert found.found == ("infinite" if bits is INFINITE else "NaN")
        if name in ("MXFP4", "NVFP4"):
            continue  # llama.cpp and gguf make numbers of them, which the formats say are none
        with np.errstate(all="ignore"):
            finite = np.isfinite(values(kind, blocks)).all(axis=1)
        # a NaN times a zero is a NaN; an infinite one can meet no zero in all of a block
        assert finite.tolist() == [i not in (4, 7) for i in range(9)]


@pytest.mark.parametrize(("bits", "what"), [(0x7E01, "NaN"), (0xFC00, "infinite"), (0x7BFF, None), (0x1234, None)])
def test_the_scale_of_iq1_m(bits: int, what: str | None) -> None:
    kind = BY_NAME["IQ1_M"]
    blocks = random_blocks(kind, 5)
    one = blocks[3:4].copy()
    set_iq1_m(one, bits)
    blocks[3:4] = one
    found = bad_scales(kind, blocks)
    assert (found.found if found else None) == what
    assert found is None or (found.block, found.n_blocks, found.scale) == (3, 1, "d")
    with np.errstate(all="ignore"):
        assert np.isfinite(values(kind, blocks)).all() == (what is None)


def test_the_first_bad_block_is_named() -> None:
    kind = BY_NAME["Q4_K"]
    blocks = random_blocks(kind, 6)
    blocks[2, 2:4] = NAN["F16"]
    blocks[5, 0:2] = NAN["F16"]
    found = bad_scales(kind, blocks)
    assert found is not None
    assert (found.n_blocks, found.block, found.scale) == (2, 2, "dmin")


def test_integers_have_none() -> None:
    kind = BY_NAME["I32"]
    assert not has_scales(kind)
    assert bad_scales(kind, np.full((4, 4), 0xFF, np.uint8)) is None
