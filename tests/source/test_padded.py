"""Padded experts: every read against a tensor padded by hand, and the same logits in llama.cpp."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import CONVERTERS
from mopeq_edge.binding import LlamaModel
from mopeq_edge.ggml.library import f32_to_bf16, load_ggml
from mopeq_edge.ggml.types import BF16, BY_NAME, F32, MXFP4, NEEDS_IMATRIX, QUANTIZABLE, GgmlType
from mopeq_edge.gguf_file import KV, ValueType
from mopeq_edge.gguf_layout import uint32
from mopeq_edge.imatrix import Entry, Imatrix
from mopeq_edge.source.model import SourceTensor
from mopeq_edge.source.open import open_source
from mopeq_edge.source.padded import ExpertPadding, PaddedSource, expert_padding

from ..builders import build_olmoe, write_quantized_gguf
from ..converters.families import FAMILIES

N_EXPERT, HIDDEN = 3, 64
KEY = "deepseek2.expert_feed_forward_length"


class ArraySource:
    """Tensors in memory: ``arrays`` [n_matrices, n_out, n_in] by name, or stored bytes of a type."""

    path, kind, architecture = Path("model"), "gguf", "deepseek2"
    warnings: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    def __init__(self, arrays: Mapping[str, Any], types: Mapping[str, GgmlType], width: int, **kvs: KV) -> None:
        self.arrays = {name: np.asarray(value, dtype=np.float32) for name, value in arrays.items()}
        self.kvs = {KEY: uint32(width), **kvs}
        self.tensors = tuple(
            SourceTensor(name, tuple(reversed(np.shape(value))), types.get(name, BF16))
            for name, value in arrays.items()
        )

    def read(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Any:
        return self.arrays[tensor.name].reshape(-1, tensor.n_out, tensor.n_in)[matrix][rows or slice(None)]

    def read_stored(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Any:
        values = np.ascontiguousarray(self.read(tensor, matrix, rows))
        if tensor.type is F32:
            return values.view("u1")
        return f32_to_bf16(values).view("u1") if tensor.type is BF16 else load_ggml().quantize(tensor.type, values)


def arrays(width: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (10, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, width),
        "blk.1.ffn_gate_inp.weight": (N_EXPERT, HIDDEN),
        "blk.1.ffn_gate_exps.weight": (N_EXPERT, width, HIDDEN),
        "blk.1.ffn_up_exps.weight": (N_EXPERT, width, HIDDEN),
        "blk.1.ffn_down_exps.weight": (N_EXPERT, HIDDEN, width),
        "blk.1.ffn_down_exps.bias": (N_EXPERT, HIDDEN),
        "blk.1.ffn_gate_exps.bias": (N_EXPERT, width),
        "blk.1.ffn_gate_shexp.weight": (2 * width, HIDDEN),
        "blk.1.ffn_down_shexp.weight": (HIDDEN, 2 * width),
        "blk.2.ffn_gate_up_exps.weight": (N_EXPERT, 2 * width, HIDDEN),
        "blk.2.ffn_gate_up_exps.bias": (N_EXPERT, 2 * width),
        "blk.2.ffn_down_exps.weight": (N_EXPERT, HIDDEN, width),
    }
    values = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    # what BF16 holds exactly
    return {name: np.round(value * 32) / 32 for name, value in values.items()}


def by_hand(name: str, value: Any, width: int, padded: int) -> Any:
    more = padded - width
    if "ffn_gate_up_exps" in name:
        axis = value.ndim - 1 if name.endswith("bias") else 1
        halves = [np.take(value, range(half * width, (half + 1) * width), axis) for half in (0, 1)]
        spare = [(0, 0)] * value.ndim
        spare[axis] = (0, more)
        return np.concatenate([np.pad(half, spare) for half in halves], axis)
    if name == "blk.1.ffn_gate_shexp.weight":
        return np.concatenate([value, np.zeros((2 * more, HIDDEN))])
    if name == "blk.1.ffn_down_shexp.weight":
        return np.concatenate([value, np.zeros((HIDDEN, 2 * more))], axis=1)
    if name in ("blk.1.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight"):
        return np.concatenate([value, np.zeros((N_EXPERT, more, HIDDEN))], axis=1)
    if name == "blk.1.ffn_gate_exps.bias" or "ffn_down_exps.weight" in name:
        return np.concatenate([value, np.zeros((*value.shape[:-1], more))], axis=-1)
    return value


@pytest.mark.parametrize("width", [192, 160])
def test_reads_are_those_of_a_tensor_padded_by_hand(width: int) -> None:
    values = arrays(width)
    source = ArraySource(values, {"blk.1.ffn_gate_exps.bias": F32}, width)
    padding = expert_padding(source)
    assert padding == ExpertPadding(KEY, width, 256, shared=True)
    padded = PaddedSource(source, padding)
    assert padded.kvs == {KEY: uint32(256)}
    for tensor, own in zip(padded.tensors, source.tensors, strict=True):
        whole = by_hand(tensor.name, values[tensor.name], width, 256)
        assert tensor.shape == tuple(reversed(whole.shape)), tensor.name
        assert tensor.type is own.type
        matrices = whole.reshape(tensor.n_matrices, tensor.n_out, tensor.n_in)
        n = tensor.n_out
        for rows in (None, slice(0, 1), slice(n - 1, n), slice(n // 3, n // 3 * 2 + 1), slice(100, 300), slice(2, 2)):
            for matrix in range(tensor.n_matrices):
                expected = matrices[matrix][rows or slice(None)]
                found = padded.read(tensor, matrix, rows)
                assert found.dtype == np.float32
                assert found.shape == expected.shape
                assert (found == expected).all(), (tensor.name, rows)
                stored = padded.read_stored(tensor, matrix, rows)
                numbers = load_ggml().dequantize(tensor.type, stored, tensor.n_in)
                assert numbers.shape == expected.shape
                assert (numbers == expected).all(), (tensor.name, rows)


@pytest.mark.parametrize("name", [*QUANTIZABLE, "F32"])
def test_bytes_of_zeros_are_zeros_in_every_type(name: str) -> None:
    kind = BY_NAME[name]
    stored = np.zeros((2, kind.nbytes(512)), dtype=np.uint8)
    assert (load_ggml().dequantize(kind, stored, 512) == 0).all()


def test_blocks_are_kept_bit_for_bit() -> None:
    values = {name: value for name, value in arrays(192).items() if name.startswith("blk.1")}
    source = ArraySource(values, {"blk.1.ffn_down_exps.weight": MXFP4}, 192)
    padded = PaddedSource(source, ExpertPadding(KEY, 192, 256, shared=True))
    tensor = next(t for t in padded.tensors if "down_exps.weight" in t.name)
    own = next(t for t in source.tensors if t.name == tensor.name)
    stored = padded.read_stored(tensor, 1)
    assert stored.shape == (HIDDEN, 256 // 32 * 17)
    assert (stored[:, : 192 // 32 * 17] == source.read_stored(own, 1)).all()
    assert not stored[:, 192 // 32 * 17 :].any()


@pytest.mark.parametrize("name", [n for n in QUANTIZABLE if BY_NAME[n].is_quantized])
def test_quantizers_keep_rows_of_zeros_and_take_columns_that_weigh_nothing(name: str) -> None:
    kind, ggml, rng = BY_NAME[name], load_ggml(), np.random.default_rng(0)
    if kind.block_size < 256:
        pytest.skip("fits rows that are not padded")
    values = np.zeros((5, 512), dtype=np.float32)
    values[:4, :320] = rng.normal(size=(4, 320))
    weights = np.zeros(512, dtype=np.float32)
    weights[:320] = rng.uniform(0.1, 1, 320)
    found = ggml.dequantize(kind, ggml.quantize(kind, values, weights), 512)
    assert np.isfinite(found).all()
    assert (found[4] == 0).all()
    # as good as with columns that weigh as much as the others
    error, other = (
        float((weights * (ggml.dequantize(kind, ggml.quantize(kind, values, own), 512) - values) ** 2)[:4].sum())
        for own in (weights, np.where(weights > 0, weights, weights.max()).astype(np.float32))
    )
    assert error <= 1.02 * other
    if name in NEEDS_IMATRIX:
        assert error > 0


def test_an_imatrix_gets_columns_that_weigh_nothing() -> None:
    values = arrays(192)
    source = ArraySource(values, {}, 192)
    by_name = {t.name: t for t in source.tensors}
    padding = ExpertPadding(KEY, 192, 256, shared=True)
    rng = np.random.default_rng(0)
    entries = {
        t.name: Entry(rng.uniform(size=(t.n_matrices, t.n_in)).astype(np.float32), np.full(t.n_matrices, 7, np.float32))
        for t in source.tensors
    }
    made = padding.imatrix(Imatrix(entries, ("text",), 1, 7), by_name)
    assert made is not None
    for tensor in PaddedSource(source, padding).tensors:
        sums, before = made.entries[tensor.name].sums, entries[tensor.name].sums
        assert sums.shape == (tensor.n_matrices, tensor.n_in)
        if "gate_up" not in tensor.name:
            assert (sums[:, : before.shape[1]] == before).all()
            assert not sums[:, before.shape[1] :].any()
        assert (made.entries[tensor.name].counts == 7).all()
    assert padding.imatrix(None, by_name) is None


@pytest.mark.parametrize(
    ("width", "found"),
    [(256, None), (1408, 1536), (896, 1024), (704, 768), (2880, 3072), (129, 256), (128, 256), (127, None), (0, None)],
)
def test_what_is_padded_and_to_what(width: int, found: int | None) -> None:
    shape = (N_EXPERT, HIDDEN, width)
    source = ArraySource({"blk.0.ffn_down_exps.weight": np.zeros(shape)}, {}, width)
    padding = expert_padding(source)
    assert (padding.padded if padding is not None else None) == found


def test_no_padding_without_one_width_in_the_key_values() -> None:
    values = {"blk.0.ffn_down_exps.weight": np.zeros((2, HIDDEN, 192)), "blk.0.ffn_up.weight": np.zeros((7, HIDDEN))}
    assert expert_padding(ArraySource(values, {}, 192)) is not None
    assert expert_padding(ArraySource(values, {}, 160)) is None
    by_layer = KV(ValueType.ARRAY, [192], ValueType.UINT32)
    assert expert_padding(ArraySource(values, {}, 192, **{KEY: by_layer})) is None
    assert expert_padding(ArraySource({"blk.0.ffn_up.weight": np.zeros((192, HIDDEN))}, {}, 192)) is None
    other = ArraySource(values, {}, 192)
    other.architecture = "unheard-of"
    assert expert_padding(other) is None


MODELS = {**{name: build for name, (build, _) in FAMILIES.items()}, "olmoe": lambda d, t: build_olmoe(d, dtype=t)}


@pytest.mark.runtime
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"mixtral-tied", "granite-moe-tied", "deepseek-v2-lite"}))
def test_llama_cpp_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    source = open_source(MODELS[name](tmp_path / "model", "bfloat16"), CONVERTERS, "gpt-2")
    shared = name.startswith("deepseek")
    suffix = "feed_forward_length" if name[:3] in ("mix", "olm", "gra") else "expert_feed_forward_length"
    key = f"{source.architecture}.{suffix}"
    padding = ExpertPadding(key, int(source.kvs[key].value), 256, shared)
    found = []
    for own in (source, PaddedSource(source, padding)):
        path = tmp_path / f"{len(found)}.gguf"
        write_quantized_gguf(own, {t.name: F32 for t in own.tensors}, path)
        with LlamaModel(path, n_ctx=64, n_threads=1, plain=True) as model:
            found.append(model.logits(np.arange(5, 53)))
    assert found[0].std() > 0.1
    assert np.abs(found[1] - found[0]).max() < 1e-5 * found[0].std()
