"""Files with expert groups: what is read, and one error for every way in which a file can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from mopeq_edge.errors import FormatError
from mopeq_edge.expert_groups.layout import VERSION_KEY, ExpertGroup
from mopeq_edge.expert_groups.read import GroupedStack, read_groups
from mopeq_edge.ggml.types import BY_NAME, F16, F32, I32, GgmlType
from mopeq_edge.gguf_file import KV, ValueType, read_header
from mopeq_edge.gguf_layout import string, uint32

from ..builders import write_raw_gguf

I64 = BY_NAME["I64"]
UP = "blk.0.ffn_up_exps"
MAP = f"{UP}.map"


@dataclass
class File:
    """A small file with groups of 2, 1 and 2 experts, and a stack in one piece; tests change it before writing."""

    kvs: dict[str, KV] = field(
        default_factory=lambda: {"general.architecture": string("olmoe"), VERSION_KEY: uint32(1)}
    )
    tensors: dict[str, tuple[tuple[int, ...], GgmlType]] = field(
        default_factory=lambda: {
            f"{UP}.0.weight": ((4, 3, 2), F16),
            f"{UP}.1.weight": ((4, 3, 1), F32),
            f"{UP}.2.weight": ((4, 3, 2), F16),
            MAP: ((3, 5), I32),
            f"{UP}.bias": ((3, 5), F32),
            "blk.0.ffn_down_exps.weight": ((3, 4, 5), F16),
        }
    )
    rows: list[list[int]] = field(
        default_factory=lambda: [[0, -1, -1], [-1, -1, 1], [-1, -1, 0], [-1, 0, -1], [1, -1, -1]]
    )

    def write(self, path: Path) -> Path:
        tensors = []
        for name, (shape, kind) in self.tensors.items():
            raw = bytes(kind.nbytes(int(np.prod(shape))))
            if name == MAP:
                own = np.array(self.rows, dtype={4: "<i4", 8: "<i8"}[kind.type_size]).tobytes()
                raw = own if len(own) == len(raw) else raw
            tensors.append((name, shape, kind, raw))
        write_raw_gguf(path, self.kvs, tensors)
        return path


GROUPS = (ExpertGroup(F16, (0, 4)), ExpertGroup(F32, (3,)), ExpertGroup(F16, (2, 1)))


def test_read(tmp_path: Path) -> None:
    """Rows need not rise with the router id."""
    (stack,) = read_groups(read_header(File().write(tmp_path / "m.gguf")))
    assert stack == GroupedStack(f"{UP}.weight", (4, 3, 5), GROUPS)


def test_axes_of_one_may_be_missing(tmp_path: Path) -> None:
    """ggml drops them when it writes a file again."""
    file = File()
    file.tensors[f"{UP}.1.weight"] = ((4, 3), F32)
    assert read_groups(read_header(file.write(tmp_path / "m.gguf")))[0].groups == GROUPS


def test_the_order_of_tensors_does_not_matter(tmp_path: Path) -> None:
    file = File()
    file.tensors = dict(reversed(file.tensors.items()))
    assert read_groups(read_header(file.write(tmp_path / "m.gguf")))[0].groups == GROUPS


def test_a_stock_file(tmp_path: Path) -> None:
    file = File({"general.architecture": string("olmoe")}, {f"{UP}.weight": ((4, 3, 5), F16)})
    assert read_groups(read_header(file.write(tmp_path / "m.gguf"))) == ()


def version(kv: KV) -> Callable[[File], None]:
    return lambda file: file.kvs.update({VERSION_KEY: kv})


def without(*names: str) -> Callable[[File], None]:
    def change(file: File) -> None:
        for name in names:
            file.kvs.pop(name, None)
            file.tensors.pop(name, None)

    return change


def tensor(name: str, shape: tuple[int, ...], kind: GgmlType) -> Callable[[File], None]:
    return lambda file: file.tensors.update({name: (shape, kind)})


def entry(expert: int, *rows: int) -> Callable[[File], None]:
    return lambda file: file.rows.__setitem__(expert, list(rows))


def eight_groups(file: File) -> None:
    file.tensors = {f"{UP}.{g}.weight": ((4, 3, 1), F16) for g in range(8)} | {MAP: ((8, 8), I32)}
    file.rows = [[0 if e == g else -1 for g in range(8)] for e in range(8)]


def renamed(old: str, new: str) -> Callable[[File], None]:
    return lambda file: setattr(file, "tensors", {new if n == old else n: t for n, t in file.tensors.items()})


ALL = tuple(f"{UP}.{g}.weight" for g in range(3))

WRONG: list[tuple[str, Callable[[File], None], str]] = [
    ("unknown version", version(uint32(2)), rf"{VERSION_KEY} is 2 \(UINT32\), expected 1 \(UINT32\)"),
    ("version of another type", version(KV(ValueType.INT32, 1)), r"is 1 \(INT32\), expected 1 \(UINT32\)"),
    ("version as text", version(string("1")), r"is '1' \(STRING\), expected 1 \(UINT32\)"),
    ("no version", without(VERSION_KEY), rf"'{UP}\.0\.weight': expected the key '{VERSION_KEY}' .*, found none"),
    ("no version beside a map", without(VERSION_KEY, *ALL), rf"'{MAP}': expected the key"),
    ("version without groups", without(*ALL, MAP), r"is 1, but no tensor is in groups"),
    ("stack and groups", tensor(f"{UP}.weight", (4, 3, 5), F16), rf"'{UP}\.weight': expected either .* found both"),
    ("groups without map", without(MAP), rf"'{MAP}': expected an I32 map beside the groups, found none"),
    ("map without groups", without(*ALL), rf"'{MAP}': expected the groups '{UP}\.0\.weight' and on, found none"),
    ("gap", without(f"{UP}.1.weight"), rf"'{UP}\.1\.weight': expected groups 0 to 1, found \[0, 2\]"),
    ("no group 0", without(f"{UP}.0.weight"), rf"'{UP}\.0\.weight': expected groups 0 to 1, found \[1, 2\]"),
    ("leading zero", renamed(f"{UP}.2.weight", f"{UP}.02.weight"), r"without leading zeros, found '02'"),
    ("too many", eight_groups, rf"'{UP}\.weight': expected at most 7 groups, found 8"),
    ("n_in", tensor(f"{UP}.1.weight", (5, 3, 1), F32), r"\.1\.weight': expected shape \[4, 3, 'n'\] .*\[5, 3, 1\]"),
    ("n_out", tensor(f"{UP}.2.weight", (4, 2, 2), F16), r"\.2\.weight': expected shape \[4, 3, 'n'\] .*\[4, 2, 2\]"),
    ("four axes", tensor(f"{UP}.0.weight", (4, 3, 1, 2), F16), r"\.0\.weight': expected shape .*\[4, 3, 1, 2\]"),
    ("sum", tensor(f"{UP}.1.weight", (4, 3, 2), F32), rf"'{MAP}': expected 6 experts as in its groups, found 5"),
    ("map type", tensor(MAP, (3, 5), F32), rf"'{MAP}': expected I32 \[3, n_expert\] for 3 groups, found F32 \[3, 5\]"),
    ("map of I64", tensor(MAP, (3, 5), I64), rf"'{MAP}': expected I32 .* found I64 \[3, 5\]"),
    ("map on its side", tensor(MAP, (5, 3), I32), rf"'{MAP}': expected I32 \[3, n_expert\].*found I32 \[5, 3\]"),
    ("map of one axis", tensor(MAP, (15,), I32), rf"'{MAP}': expected I32 \[3, n_expert\].*found I32 \[15\]"),
    ("map of three axes", tensor(MAP, (3, 5, 1), I32), rf"'{MAP}': expected I32 .*found I32 \[3, 5, 1\]"),
    ("below -1", entry(1, -1, -2, 1), rf"'{MAP}': expected rows from -1 to 0 in group 1, found -2 for expert 1"),
    ("beyond", entry(4, 2, -1, -1), rf"'{MAP}': expected rows from -1 to 1 in group 0, found 2 for expert 4"),
    ("nowhere", entry(3, -1, -1, -1), rf"'{MAP}': expected expert 3 in exactly one group, found it in 0"),
    ("in two", entry(0, 0, -1, 0), rf"'{MAP}': expected expert 0 in exactly one group, found it in 2"),
    ("row twice", entry(4, 0, -1, -1), rf"'{MAP}': expected row 0 of group 0 once, found it for experts \[0, 4\]"),
    ("row left out", entry(4, -1, -1, 1), rf"'{MAP}': expected row 1 of group 2 once, found it for experts \[1, 4\]"),
]


@pytest.mark.parametrize(("change", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_what_is_rejected(tmp_path: Path, change: Callable[[File], None], message: str) -> None:
    file = File()
    change(file)
    path = file.write(tmp_path / "m.gguf")
    with pytest.raises(FormatError, match=message) as caught:
        read_groups(read_header(path))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
