"""Which types a tensor may get."""

from __future__ import annotations

import itertools

import pytest

from mopeq_edge.errors import FormatError, PlanError
from mopeq_edge.ggml.types import BY_NAME, NEEDS_IMATRIX, QUANTIZABLE, GgmlType
from mopeq_edge.plan.candidates import DEFAULT_TYPES, FLOORS, TYPE_SETS, candidates, parse_floors, parse_types
from mopeq_edge.source.model import SourceTensor
from mopeq_edge.source.roles import Role

ALL = tuple(BY_NAME[name] for name in QUANTIZABLE)
BF16, F32 = BY_NAME["BF16"], BY_NAME["F32"]


def names(types: tuple[GgmlType, ...]) -> list[str]:
    return [t.name for t in types]


def test_parse_types() -> None:
    assert names(parse_types("Q4_K,q2_k")) == ["Q2_K", "Q4_K"]
    assert names(parse_types(" k ")) == ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"]
    assert names(parse_types("K,iq4_nl,Q4_K")) == ["Q2_K", "Q3_K", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K", "Q8_0"]
    assert set(names(parse_types("all"))) == set(QUANTIZABLE) - {"F16", "BF16"}
    assert set(names(parse_types("default"))) == set(DEFAULT_TYPES)
    for text in TYPE_SETS:
        found = parse_types(text)
        assert all(a.bpw <= b.bpw for a, b in itertools.pairwise(found))
        assert len(set(found)) == len(found)
    # The order in which they are given changes nothing
    assert parse_types("Q8_0,IQ4_NL,Q4_0,Q4_K") == parse_types("Q4_K,Q4_0,IQ4_NL,Q8_0,Q8_0")


def test_types_that_cannot_be() -> None:
    with pytest.raises(PlanError, match=r"--types Q4_K,Q8_1: cannot quantize to Q8_1"):
        parse_types("Q4_K,Q8_1")
    for text in ("", " , "):
        with pytest.raises(PlanError, match="cannot quantize to nothing"):
            parse_types(text)
    with pytest.raises(FormatError, match="type 'Q4_K_M': unknown"):
        parse_types("Q4_K_M")


def test_parse_floors() -> None:
    assert parse_floors([]) == FLOORS
    found = parse_floors(["attention=Q3_K", "output=5.5", "expert=3"])
    assert found[Role.ATTENTION] == 3.4375
    assert found[Role.OUTPUT] == 5.5
    assert found[Role.EXPERT] == 3
    assert found[Role.EMBEDDING] == FLOORS[Role.EMBEDDING]
    # The defaults are not changed
    assert FLOORS[Role.ATTENTION] == 4
    assert Role.EXPERT not in FLOORS


@pytest.mark.parametrize("item", ["attention", "attention=", "nothing=3", "=3", ""])
def test_floors_that_are_none(item: str) -> None:
    with pytest.raises((PlanError, FormatError)) as caught:
        parse_floors([item])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("item", ["attention=Q9_K", "attention=-3", "attention=nan"])
def test_floors_of_no_type(item: str) -> None:
    with pytest.raises((PlanError, FormatError), match=r"attention|unknown GGUF type"):
        parse_floors([item])


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("blk.0.attn_q.weight", Role.ATTENTION),
        ("blk.0.ffn_up_shexp.weight", Role.SHARED_EXPERT),
        ("blk.0.ffn_up.weight", Role.DENSE_FFN),
        ("output.weight", Role.OUTPUT),
        ("token_embd.weight", Role.EMBEDDING),
        ("blk.0.other.weight", Role.OTHER),
    ],
)
def test_what_every_token_passes_has_a_floor(name: str, role: Role) -> None:
    tensor = SourceTensor(name, (256, 256), BF16)
    assert tensor.role is role
    found = candidates(tensor, ALL, has_imatrix=True)
    assert min(t.bpw for t in found) == 4.25
    assert set(found) == {t for t in ALL if t.bpw >= 4 and t.bpw < 16} | {BF16}
    low = candidates(tensor, ALL, has_imatrix=True, floors={})
    assert min(low, key=lambda t: t.bpw).name == "Q1_0"


def test_an_expert_has_all() -> None:
    tensor = SourceTensor("blk.0.ffn_up_exps.weight", (256, 64, 8), BF16)
    found = candidates(tensor, ALL, has_imatrix=True)
    assert set(found) == {t for t in ALL if t.name != "F16"}
    assert found[-1] is BF16
    assert all(a.bpw <= b.bpw for a, b in itertools.pairwise(found))
    assert candidates(tensor, ALL[::-1], has_imatrix=True) == found


def test_only_what_was_asked_for() -> None:
    tensor = SourceTensor("blk.0.ffn_up_exps.weight", (256, 64, 8), BF16)
    assert names(candidates(tensor, parse_types("Q4_K,Q2_K"), has_imatrix=True)) == ["Q2_K", "Q4_K", "BF16"]


def test_weights_beyond_f16() -> None:
    """They leave a tensor in F32 or BF16; up to F16's largest number nothing changes."""
    tensor = SourceTensor("blk.0.ffn_up_exps.weight", (256, 64, 8), F32)
    assert candidates(tensor, ALL, has_imatrix=True, largest=65504) == candidates(tensor, ALL, has_imatrix=True)
    assert names(candidates(tensor, ALL, has_imatrix=True, largest=65505)) == ["BF16", "F32"]
    own = SourceTensor("blk.0.ffn_up_exps.weight", (256, 64, 8), BY_NAME["MXFP4"])
    assert names(candidates(own, ALL, has_imatrix=True, largest=1e30)) == ["MXFP4"]


def test_without_an_imatrix() -> None:
    tensor = SourceTensor("blk.0.ffn_up_exps.weight", (256, 64, 8), BF16)
    found = candidates(tensor, ALL, has_imatrix=False)
    assert not {t.name for t in found} & NEEDS_IMATRIX
    assert {t.name for t in candidates(tensor, ALL, has_imatrix=True)} - set(names(found)) == NEEDS_IMATRIX


def test_only_whole_blocks() -> None:
    for n_in, blocks in ((96, {32}), (64, {32, 64}), (128, {32, 64, 128}), (896, {32, 64, 128}), (40, set())):
        tensor = SourceTensor("blk.0.ffn_down_exps.weight", (n_in, 256, 8), BF16)
        found = candidates(tensor, ALL, has_imatrix=True)
        assert {t.block_size for t in found[:-1]} == blocks
        assert found[-1] is BF16


def test_never_larger_than_its_own() -> None:
    tensor = SourceTensor("blk.0.ffn_up_exps.weight", (256, 64, 8), BY_NAME["Q4_0"])
    found = candidates(tensor, ALL, has_imatrix=True)
    assert found[-1].name == "Q4_0"
    assert max(t.bpw for t in found[:-1]) < 4.5
    # A source in F32 may become F16 or BF16 only if that was asked for
    tensor = SourceTensor("blk.0.ffn_up_exps.weight", (256, 64, 8), F32)
    assert names(candidates(tensor, parse_types("Q8_0,BF16"), has_imatrix=True)) == ["Q8_0", "BF16", "F32"]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_norm.weight", (256,)),
        ("blk.0.attn_q_norm.weight", (256, 16)),
        ("blk.0.ffn_gate_inp.weight", (256, 64)),
        ("blk.0.exp_probs_b.bias", (64,)),
        ("blk.0.attn_q.bias", (256,)),
        ("blk.0.ffn_up_exps.bias", (256, 64)),
        ("blk.0.attn_sinks.weight", (256,)),
    ],
)
def test_what_keeps_its_type(name: str, shape: tuple[int, ...]) -> None:
    assert candidates(SourceTensor(name, shape, F32), ALL, has_imatrix=True) == (F32,)
