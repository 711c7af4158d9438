"""Key-values that shape the computation: the same number in either width, everything else is a difference."""

from __future__ import annotations

from typing import Any

import pytest

from mopeq_edge.gguf_file import KV, ValueType
from mopeq_edge.gguf_layout import string, uint32
from mopeq_edge.source.padded import ExpertPadding
from mopeq_edge.validate.key_values import check_key_values


def f32(value: float) -> KV:
    return KV(ValueType.FLOAT32, value)


def array(*values: Any) -> KV:
    return KV(ValueType.ARRAY, list(values), ValueType.FLOAT32)


SOURCE = {
    "general.architecture": string("olmoe"),
    "general.name": string("one"),
    "olmoe.block_count": uint32(2),
    "olmoe.epsilon": f32(1e-5),
    "olmoe.factors": array(1.0, 0.1),
    "olmoe.norm": KV(ValueType.BOOL, True),
    "tokenizer.ggml.model": string("gpt2"),
}


def test_what_does_not_count() -> None:
    more = {"general.name": string("two"), "mopeq.version": string("1"), "quantize.imatrix.file": string("x")}
    # as a file has it after a round trip
    numbers = {"olmoe.epsilon": f32(9.999999747378752e-06), "olmoe.factors": array(1.0, 0.10000000149011612)}
    wide = {"olmoe.block_count": KV(ValueType.UINT64, 2), "tokenizer.ggml.model": string("llama")}
    [check] = check_key_values({**SOURCE, **more, **numbers, **wide}, SOURCE, None)
    assert check.passed
    assert check.looked_at == "5 keys"


@pytest.mark.parametrize(
    ("key", "kv", "message"),
    [
        ("olmoe.block_count", uint32(3), "olmoe.block_count: is 3, the source has 2"),
        ("olmoe.epsilon", f32(1.1e-5), "olmoe.epsilon: is 1.1e-05, the source has 1e-05"),
        ("olmoe.factors", array(1.0), "olmoe.factors: is [1.0], the source has [1.0, 0.1]"),
        ("olmoe.norm", KV(ValueType.BOOL, False), "olmoe.norm: is False, the source has True"),
        ("olmoe.norm", uint32(1), "olmoe.norm: is 1, the source has True"),
        ("olmoe.norm", None, "olmoe.norm: is missing, the source has True"),
        ("olmoe.rope.scaling.factor", f32(4.0), "olmoe.rope.scaling.factor: is 4.0, the source has no such key"),
        ("general.architecture", string("llama"), "general.architecture: is 'llama', the source has 'olmoe'"),
    ],
)
def test_what_is_named(key: str, kv: KV | None, message: str) -> None:
    kvs = {k: v for k, v in {**SOURCE, key: kv}.items() if v is not None}
    assert [(check.passed, check.message) for check in check_key_values(kvs, SOURCE, None)] == [(False, message)]


def test_the_padded_width() -> None:
    source = {**SOURCE, "olmoe.feed_forward_length": uint32(160)}
    padded = {**SOURCE, "olmoe.feed_forward_length": uint32(256)}
    padding = ExpertPadding("olmoe.feed_forward_length", 160, 256)
    assert [check.passed for check in check_key_values(padded, source, padding)] == [True]
    assert [check.passed for check in check_key_values(padded, source, None)] == [False]
