"""docs/expert-groups.md: its example, computed again and written, and the reader's limits that it states."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from mopeq_edge.expert_groups.layout import (
    MAX_GROUPS,
    VERSION,
    VERSION_KEY,
    ExpertGroup,
    expert_map,
    file_layout,
    groups_of,
)
from mopeq_edge.expert_groups.read import read_groups
from mopeq_edge.ggml.types import BF16, BY_NAME
from mopeq_edge.gguf_file import pad, read_header
from mopeq_edge.gguf_layout import encode_kv, encode_tensor, string, uint32
from mopeq_edge.source.model import SourceTensor

DOCUMENT = (Path(__file__).parent.parent.parent / "docs" / "expert-groups.md").read_text(encoding="utf-8")
STACK = SourceTensor("blk.0.ffn_up_exps.weight", (32, 2, 4), BF16)
Q4_0, Q8_0 = BY_NAME["Q4_0"], BY_NAME["Q8_0"]
GROUPS = (ExpertGroup(Q4_0, (1, 3)), ExpertGroup(Q8_0, (0, 2)))
KVS = {"general.architecture": string("olmoe")}


def hex_of(name: str) -> bytes:
    block = re.search(rf"^```hex {name}\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert block is not None
    return bytes.fromhex(block[1])


def test_the_example_is_what_the_code_writes() -> None:
    assert groups_of([Q8_0, Q4_0, Q8_0, Q4_0]) == GROUPS
    place = file_layout(KVS, [STACK], {STACK.name: GROUPS})
    assert hex_of("version") == encode_kv(VERSION_KEY, uint32(VERSION))
    assert hex_of("infos") == b"".join(encode_tensor(info) for info in place.tensors)
    assert hex_of("map") == expert_map(GROUPS, 4).tobytes()
    assert hex_of("version") in place.header
    assert hex_of("infos") in place.header
    table = re.findall(r"^\| `(blk\S+)` \| \[(.*?)\] \| (\w+) \| (\d+) \| (\d+) \| (\d+) \|$", DOCUMENT, re.MULTILINE)
    assert [
        (i.name, ", ".join(map(str, i.shape)), i.type.name, str(i.offset), str(i.nbytes), str(pad(i.nbytes, 32)))
        for i in place.tensors
    ] == table


def test_the_bytes_of_the_example_are_read(tmp_path: Path) -> None:
    """A file put together from the document's bytes."""
    place = file_layout(KVS, [STACK], {STACK.name: GROUPS})
    header = place.header[: place.header_end - len(hex_of("version") + hex_of("infos"))]
    header += hex_of("version") + hex_of("infos")
    data = bytes(256) + hex_of("map")
    (tmp_path / "m.gguf").write_bytes(header + bytes(-len(header) % 32) + data)
    (stack,) = read_groups(read_header(tmp_path / "m.gguf"))
    assert (stack.name, stack.shape, stack.groups) == (STACK.name, STACK.shape, GROUPS)
    by_hand = np.array([[-1, 0], [0, -1], [-1, 1], [1, -1]], dtype="<i4")
    assert hex_of("map") == by_hand.tobytes()


def test_numbers_in_the_text() -> None:
    assert f"1 ≤ G ≤ {MAX_GROUPS}" in DOCUMENT
    assert f"more than {MAX_GROUPS} groups" in DOCUMENT
    assert f"`{VERSION_KEY}`, UINT32, value {VERSION}" in DOCUMENT


@pytest.mark.parametrize("name", re.findall(r"`(mopeq_edge\.\S+\.read)\.(\w+)\(", DOCUMENT))
def test_named_functions_exist(name: tuple[str, str]) -> None:
    from importlib import import_module

    assert callable(getattr(import_module(name[0]), name[1]))
