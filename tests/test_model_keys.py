"""Numbers of layers and experts against their limits and against the tensors."""

from __future__ import annotations

from pathlib import Path

import pytest

from mopeq_edge.errors import FormatError
from mopeq_edge.gguf_file import KV, ValueType
from mopeq_edge.gguf_layout import string, uint32
from mopeq_edge.model_keys import check_model_keys

GOOD = {
    "general.architecture": string("olmoe"),
    "olmoe.block_count": uint32(2),
    "olmoe.expert_count": uint32(4),
    "olmoe.expert_used_count": uint32(4),
}
TENSORS = [("token_embd.weight", (8, 9)), ("blk.1.attn_q.weight", (8, 8)), ("blk.1.ffn_up_exps.weight", (8, 8, 4))]


def test_what_fits() -> None:
    check_model_keys(Path("m"), GOOD, TENSORS)
    check_model_keys(Path("m"), {}, TENSORS)
    check_model_keys(Path("m"), {"general.architecture": string("olmoe")}, TENSORS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": uint32(1)}, r"general.architecture is 1 \(UINT32\), expected a short name"),
        ({"general.architecture": string("\x1b[2J")}, r"general.architecture is '\\x1b\[2J' \(STRING\)"),
        ({"general.architecture": string("x" * 65)}, "general.architecture is 'xxx"),
        (
            {"olmoe.block_count": uint32(2**32 - 1)},
            r"block_count is 4294967295 \(UINT32\), expected a number up to 512",
        ),
        ({"olmoe.block_count": string("2")}, r"block_count is '2' \(STRING\)"),
        ({"olmoe.block_count": KV(ValueType.BOOL, True)}, r"block_count is True \(BOOL\)"),
        ({"olmoe.block_count": KV(ValueType.INT32, -1)}, r"block_count is -1 \(INT32\)"),
        ({"olmoe.expert_count": KV(ValueType.ARRAY, [4], ValueType.UINT32)}, r"expert_count is \[4\] \(ARRAY\)"),
        ({"olmoe.expert_count": uint32(1025)}, "expert_count is 1025 .* expected a number up to 1024"),
        ({"olmoe.expert_count": uint32(3)}, "expert_used_count is 4, expected at most the 3"),
        ({"olmoe.expert_count": uint32(8)}, "'blk.1.ffn_up_exps.weight' has 4 experts, expected the 8"),
        ({"olmoe.block_count": uint32(1)}, "'blk.1.attn_q.weight': expected blocks 0 to 0 .* found 1"),
        ({"olmoe.nextn_predict_layers": uint32(3)}, "nextn_predict_layers is 3, expected at most the 2"),
    ],
)
def test_refused(change: dict[str, KV], message: str) -> None:
    with pytest.raises(FormatError, match=f"^m: .*{message}"):
        check_model_keys(Path("m"), {**GOOD, **change}, TENSORS)
