"""A GGUF as a source: the same weights as the checkpoint it was made of, quantized ones as gguf-py decodes them."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from mopeq_edge.errors import FormatError, SourceError
from mopeq_edge.ggml.types import BF16, BY_NAME, F16, F32, GgmlType
from mopeq_edge.gguf_file import read_header
from mopeq_edge.gguf_layout import string, uint32
from mopeq_edge.source.gguf import GGUFSource
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.source.model import SourceTensor

from ..builders import write_gguf, write_raw_gguf

ARCHITECTURE = {"general.architecture": string("olmoe")}
UP = "blk.0.ffn_up_exps.weight"


def one_tensor(path: Path, kind: GgmlType, raw: bytes, shape: tuple[int, ...], name: str = UP) -> GGUFSource:
    kvs = {**ARCHITECTURE, "olmoe.expert_count": uint32((*shape, 1, 1)[2])}
    write_raw_gguf(path, kvs, [("output_norm.weight", (1,), F32, bytes(4)), (name, shape, kind, raw)])
    return GGUFSource(path)


def test_the_same_as_the_checkpoint(tiny_source: HuggingFaceSource, bf16_gguf: Path, tmp_path: Path) -> None:
    source = GGUFSource(bf16_gguf)
    assert (source.kind, source.architecture, source.files) == ("gguf", "olmoe", (bf16_gguf,))
    assert source.tensors == tiny_source.tensors
    assert source.warnings == ()
    for tensor in source.tensors:
        last = tensor.n_matrices - 1
        assert np.array_equal(source.read(tensor, last), tiny_source.read(tensor, last))
        part = slice(tensor.n_out // 2, tensor.n_out)
        assert np.array_equal(source.read(tensor, 0, part), tiny_source.read(tensor, 0, part))
        assert np.array_equal(source.read_stored(tensor, last, part), tiny_source.read_stored(tensor, last, part))
    write_gguf(source, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == bf16_gguf.read_bytes()


@pytest.mark.parametrize(("kind", "dtype"), [(F32, "<f4"), (F16, "<f2"), (BY_NAME["F64"], "<f8")])
def test_plain_types(tmp_path: Path, kind: GgmlType, dtype: str) -> None:
    values = np.arange(24, dtype=dtype).reshape(2, 3, 4) - 7.5
    source = one_tensor(tmp_path / "m.gguf", kind, values.tobytes(), (4, 3, 2))
    tensor = source.tensors[1]
    assert tensor == SourceTensor(UP, (4, 3, 2), kind)
    for expert in range(2):
        assert np.array_equal(source.read(tensor, expert), values[expert].astype("<f4"))
        assert source.read_stored(tensor, expert, slice(1, 3)).tobytes() == values[expert, 1:].tobytes()


@pytest.mark.runtime
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS", "IQ2_XXS", "MXFP4"])
def test_quantized_types(tmp_path: Path, name: str) -> None:
    """Dequantized by libggml; gguf-py's own decoder gives the answer."""
    from mopeq_edge.ggml.library import load_ggml

    kind = BY_NAME[name]
    weights = np.random.default_rng(3).standard_normal((6, 512), dtype=np.float32)
    blocks = load_ggml().quantize(kind, weights, np.ones(512, np.float32))
    source = one_tensor(tmp_path / "m.gguf", kind, blocks.tobytes(), (512, 3, 2))
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    got = source.read(source.tensors[1], 1, slice(0, 2))
    assert np.abs(got - expected[3:5]).max() <= 1e-6 * np.abs(expected).max()
    assert source.read_stored(source.tensors[1], 1, slice(2, 3)).tobytes() == blocks[5].tobytes()
    (warning,) = source.warnings
    assert f"100.0% of the weights are already quantized ({name} 100.0%)" in warning


def test_warning_counts_weights(tmp_path: Path) -> None:
    q8, q4 = BY_NAME["Q8_0"], BY_NAME["Q4_0"]
    tensors = [
        ("token_embd.weight", (32, 1), F32, bytes(128)),
        ("output.weight", (32, 2), q8, bytes(68)),
        (UP, (32, 1, 5), q4, bytes(90)),
    ]
    write_raw_gguf(tmp_path / "m.gguf", {**ARCHITECTURE, "olmoe.expert_count": uint32(5)}, tensors)
    (warning,) = GGUFSource(tmp_path / "m.gguf").warnings
    assert "87.5% of the weights are already quantized (Q4_0 62.5%, Q8_0 25.0%)" in warning
    assert "quantizing again adds to it" in warning


def test_nan_in_an_expert(tmp_path: Path) -> None:
    values = np.zeros((3, 2, 2), dtype="<f4")
    values[2, 1, 0] = np.nan
    source = one_tensor(tmp_path / "m.gguf", F32, values.tobytes(), (2, 2, 3))
    tensor = source.tensors[1]
    source.read(tensor, 1)
    for read in (source.read, source.read_stored):
        with pytest.raises(SourceError, match=r"'blk.0.ffn_up_exps.weight', expert 2: 1 of 4 weights are NaN"):
            read(tensor, 2)


@pytest.mark.runtime
def test_broken_scale_of_a_block(tmp_path: Path) -> None:
    block = np.float16(np.inf).tobytes() + bytes([1] * 32)
    source = one_tensor(tmp_path / "m.gguf", BY_NAME["Q8_0"], block * 2, (32, 1, 2))
    with pytest.raises(SourceError, match=r"expert 1: 32 of 32 weights are NaN or infinite"):
        source.read_stored(source.tensors[1], 1)


def test_wrong_places(tmp_path: Path) -> None:
    source = one_tensor(tmp_path / "m.gguf", F32, bytes(16), (2, 1, 2))
    with pytest.raises(IndexError, match="no matrix 2 of 2"):
        source.read(source.tensors[1], 2)
    with pytest.raises(ValueError, match="contiguous"):
        source.read(source.tensors[1], 0, slice(0, 1, 2))


def test_no_model(tmp_path: Path) -> None:
    write_raw_gguf(tmp_path / "m.gguf", {"general.type": string("imatrix")}, [])
    with pytest.raises(SourceError, match=r"has no general.architecture"):
        GGUFSource(tmp_path / "m.gguf")


def test_experts_already_in_groups(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="a file of the per-expert layout"):
        one_tensor(tmp_path / "m.gguf", F32, bytes(16), (2, 1, 2), "blk.0.ffn_up_exps.0.weight")


def test_four_axes(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"shape \[2, 1, 1, 2\], expected 3 axes at most"):
        one_tensor(tmp_path / "m.gguf", F32, bytes(16), (2, 1, 1, 2))
    assert one_tensor(tmp_path / "m.gguf", F32, bytes(16), (2, 1, 2, 1)).tensors[1].shape == (2, 1, 2)


def test_truncated(bf16_gguf: Path, tmp_path: Path) -> None:
    raw = bf16_gguf.read_bytes()
    header = read_header(bf16_gguf)
    for size in (0, 3, 100, header.data_start - 1, header.data_start, len(raw) // 2, len(raw) - 64):
        (tmp_path / "cut.gguf").write_bytes(raw[:size])
        with pytest.raises(FormatError, match=r"truncated GGUF|not a GGUF|can hold"):
            GGUFSource(tmp_path / "cut.gguf")


def test_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    source = one_tensor(path, BF16, bytes(8), (2, 1, 2))
    path.write_bytes(path.read_bytes()[:-32])
    with pytest.raises(FormatError, match="changed while it was read"):
        source.read(source.tensors[1], 1)
