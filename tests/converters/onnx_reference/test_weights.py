"""Weights of every type and layout: the same numbers as a stock F32 file of what they stand for."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import gguf
import numpy as np
import pytest

from converters.onnx_reference import ReferenceResult, run_reference
from converters.onnx_reference.weights import Weights
from mopeq_edge.expert_groups.layout import ExpertGroup, Types
from mopeq_edge.ggml.types import BY_NAME, F32
from mopeq_edge.imatrix import Entry, Imatrix
from mopeq_edge.source.gguf import GGUFSource
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.split import read_parts, split_kvs, split_layouts

from ...builders import write_quantized_gguf
from ...expert_groups.architectures import ARCHITECTURES, N_VOCAB, Architecture
from ...expert_groups.regroup import by_turns, regroup
from ...expert_groups.test_in_llama_cpp import dequantized, some_tokens, write_stock

MIX = ("Q2_K", "Q3_K", "Q4_K")
STACK_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "BF16")
"""Taken by turns; the others, of which some take long to make, are for smaller matrices."""

MATRIX_TYPES = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "IQ4_NL", "MXFP4", "TQ1_0"),
    *("TQ2_0", "Q4_1", "Q5_0", "Q5_1", "F16"),
)


def same(one: ReferenceResult, other: ReferenceResult) -> None:
    """Bit for bit: the same numbers went through the same operations."""
    assert one.logits.std() > 0.01
    assert np.array_equal(one.logits, other.logits)
    assert set(one.routed) == set(other.routed)
    for layer, routed in one.routed.items():
        assert np.array_equal(routed.ids, other.routed[layer].ids)
        assert np.array_equal(routed.weights, other.routed[layer].weights)


def flat_imatrix(source: HuggingFaceSource, names: list[str]) -> Imatrix:
    """All columns weigh the same; some types cannot be made without one."""
    stacks = [tensor for tensor in source.tensors if tensor.name in names]
    entries = {
        t.name: Entry(np.ones((t.n_matrices, t.n_in), np.float32), np.ones(t.n_matrices, np.float32)) for t in stacks
    }
    return Imatrix(entries, ("text",), 1, 4)


@pytest.fixture(
    params=["olmoe", "gpt-oss", "deepseek2, experts by group, gate and up in one"],
    ids=["olmoe", "biases", "gate and up in one"],
)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.mark.runtime
def test_groups_of_one_type_are_the_stock_file(architecture: Architecture, tmp_path: Path) -> None:
    whole = write_stock(tmp_path / "stock", architecture, ["Q4_K"])[0]
    regroup([whole], tmp_path / "groups.gguf", by_turns(3))
    tokens = some_tokens(40)
    same(run_reference(whole, tokens), run_reference(tmp_path / "groups.gguf", tokens))


@pytest.mark.runtime
def test_groups_of_several_types_are_the_file_of_what_they_hold(architecture: Architecture, tmp_path: Path) -> None:
    stock = write_stock(tmp_path / "stock", architecture, MIX)
    regroup(stock, tmp_path / "mix.gguf", by_turns(3))
    exact = dequantized(tmp_path / "mix.gguf", tmp_path / "f32.gguf", architecture)
    tokens = some_tokens(40)
    mixed = run_reference(tmp_path / "mix.gguf", tokens)
    same(mixed, run_reference(exact, tokens))
    assert not np.array_equal(mixed.logits, run_reference(stock[0], tokens).logits)


@pytest.mark.runtime
def test_every_type_of_the_bundled_model(tiny_source: HuggingFaceSource, tmp_path: Path) -> None:
    """Stacks and attention in all types; what the F32 file holds, libggml says."""
    stacks = [tensor.name for tensor in tiny_source.tensors if tensor.projection]
    matrices = [t.name for t in tiny_source.tensors if ".attn_" in t.name and len(t.shape) == 2]
    types: Types = {
        **{name: BY_NAME[kind] for name, kind in zip(stacks, cycle(STACK_TYPES), strict=False)},
        **{name: BY_NAME[kind] for name, kind in zip(matrices, MATRIX_TYPES, strict=True)},
        "token_embd.weight": BY_NAME["Q5_K"],
        "output.weight": BY_NAME["Q6_K"],
    }
    write_quantized_gguf(tiny_source, types, tmp_path / "quantized.gguf", flat_imatrix(tiny_source, matrices))
    quantized = GGUFSource(tmp_path / "quantized.gguf")
    assert {tensor.type.name for tensor in quantized.tensors} == {*STACK_TYPES, *MATRIX_TYPES, "F32"}
    write_quantized_gguf(quantized, {t.name: F32 for t in quantized.tensors}, tmp_path / "f32.gguf")
    tokens = np.random.default_rng(0).integers(0, 4096, 48)
    same(run_reference(tmp_path / "quantized.gguf", tokens), run_reference(tmp_path / "f32.gguf", tokens))


@pytest.mark.runtime
def test_experts_of_a_stack_in_several_types(tiny_source: HuggingFaceSource, tmp_path: Path) -> None:
    """Each matrix of each expert, against gguf-py's reader and the map as the document describes it."""
    name = "blk.2.ffn_down_exps.weight"
    groups = tuple(
        ExpertGroup(BY_NAME[kind], tuple(range(first, 16, 3))) for first, kind in enumerate(("Q3_K", "IQ4_NL", "Q6_K"))
    )
    write_quantized_gguf(tiny_source, {name: groups}, tmp_path / "groups.gguf")
    weights = Weights(read_parts(tmp_path / "groups.gguf"))
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "groups.gguf").tensors}
    rows = found["blk.2.ffn_down_exps.map"].data
    for expert in range(16):
        group = int(np.argmax(rows[expert] >= 0))
        part = found[f"blk.2.ffn_down_exps.{group}.weight"]
        expected = gguf.quants.dequantize(part.data[rows[expert, group]], part.tensor_type)
        assert np.array_equal(weights.expert(name, expert), expected)
    assert weights.shapes[name] == (256, 256, 16)


def test_long_matrices_are_read_in_pieces(bf16_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Weights(read_parts(bf16_gguf))
    whole = weights.whole("token_embd.weight")
    monkeypatch.setattr("converters.onnx_reference.weights.AT_ONCE", 256 * 1000)
    monkeypatch.setattr("converters.onnx_reference.run.HEAD_WEIGHTS", 256 * 999)
    assert np.array_equal(whole, weights.whole("token_embd.weight"))
    assert np.array_equal(whole[17:3000], weights.rows("token_embd.weight", 17, 2983))
    pieces = run_reference(bf16_gguf, [1, 2, 3]).logits
    monkeypatch.undo()
    # the sums of a row may be cut in other places
    np.testing.assert_allclose(pieces, run_reference(bf16_gguf, [1, 2, 3]).logits, rtol=0, atol=1e-4)


def test_a_split_file_is_read_from_its_first_part(bf16_gguf: Path, tmp_path: Path) -> None:
    header = read_parts(bf16_gguf)[0]
    specs = [(info.name, info.shape, info.type) for info in header.tensors]
    raw = bf16_gguf.read_bytes()
    data = {i.name: raw[header.data_start + i.offset :][: i.nbytes] for i in header.tensors}
    places = split_layouts(header.kvs, specs, 12_000_000)
    assert len(places) > 1
    for at, place in enumerate(places):
        path = tmp_path / f"model-{at + 1:05d}-of-{len(places):05d}.gguf"
        body = bytearray(place.file_size)
        body[: len(place.header)] = place.header
        for info in place.tensors:
            start = len(place.header) + info.offset
            body[start : start + info.nbytes] = data[info.name]
        path.write_bytes(body)
    first = tmp_path / f"model-00001-of-{len(places):05d}.gguf"
    assert read_parts(first)[0].get("split.count") == split_kvs(0, len(places), 1)["split.count"].value
    same(run_reference(first, [5, 6, 7, 8]), run_reference(bf16_gguf, [5, 6, 7, 8]))


@pytest.mark.runtime
def test_only_experts_that_are_routed_to_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_stock(tmp_path / "stock", ARCHITECTURES["olmoe"], ["Q4_K"])[0]
    asked: set[tuple[str, int]] = set()
    original = Weights.expert

    def watched(self: Weights, stack: str, expert: int) -> object:
        asked.add((stack, expert))
        return original(self, stack, expert)

    monkeypatch.setattr(Weights, "expert", watched)
    result = run_reference(path, np.array([N_VOCAB - 1]))
    expected = {
        (f"blk.{layer}.ffn_{name}_exps.weight", int(expert))
        for layer, routed in result.routed.items()
        for expert in routed.ids[0]
        for name in ("gate", "up", "down")
    }
    assert asked == expected
    assert len(expected) == 2 * 3 * 3
