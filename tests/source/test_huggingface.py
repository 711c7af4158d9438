"""A checkpoint under GGUF names: values against torch, the least bytes read, and damaged checkpoints refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mopeq_edge.source.shard as shard_module
from converters import CONVERTERS
from mopeq_edge.errors import FormatError, SourceError
from mopeq_edge.ggml.types import BF16, F16, F32
from mopeq_edge.source.checkpoint import SINGLE
from mopeq_edge.source.converter import Converter, Part, Recipe
from mopeq_edge.source.huggingface import HuggingFaceSource, open_huggingface
from mopeq_edge.source.model import SourceTensor, moe_shape

from ..builders import bf16, build_olmoe, edit_json, write_safetensors


def opened(directory: Path) -> HuggingFaceSource:
    return open_huggingface(directory, CONVERTERS, pre="gpt-2")


def named(source: HuggingFaceSource, name: str) -> SourceTensor:
    return next(tensor for tensor in source.tensors if tensor.name == name)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_olmoe(tmp_path_factory.mktemp("models") / "packed", packed=True)


@pytest.fixture
def copied(packed: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(packed, tmp_path / "copied"))


def save_with(directory: Path, **changes: torch.Tensor) -> None:
    tensors = load_file(directory / SINGLE)
    save_file({**tensors, **{name.replace("__", "."): value for name, value in changes.items()}}, directory / SINGLE)


def test_the_bundled_model(tiny_source: HuggingFaceSource, tiny_model: Path) -> None:
    shape = moe_shape(tiny_source)
    assert (shape.n_layer, shape.n_expert, shape.n_expert_used) == (4, 16, 4)
    weights = load_file(tiny_model / SINGLE)
    assert sum(t.n_weights for t in tiny_source.tensors) == sum(w.numel() for w in weights.values())
    up = named(tiny_source, "blk.2.ffn_up_exps.weight")
    assert (up.shape, up.type, up.n_matrices) == ((256, 256, 16), BF16, 16)
    expected = weights["model.layers.2.mlp.experts.11.up_proj.weight"]
    assert np.array_equal(tiny_source.read(up, 11), expected.float().numpy())
    assert tiny_source.read_stored(up, 11, slice(5, 9)).tobytes() == expected[5:9].view(torch.uint8).numpy().tobytes()


def test_a_router_in_bf16_becomes_f32_exactly(tiny_source: HuggingFaceSource, tiny_model: Path) -> None:
    router = named(tiny_source, "blk.1.ffn_gate_inp.weight")
    expected = load_file(tiny_model / SINGLE)["model.layers.1.mlp.gate.weight"].float().numpy()
    assert (router.type, router.shape) == (F32, (256, 16))
    stored = tiny_source.read_stored(router)
    assert stored.shape == (16, 1024)
    assert stored.tobytes() == expected.tobytes()
    norm = named(tiny_source, "blk.1.attn_norm.weight")
    assert norm.type is F32
    assert tiny_source.read(norm).shape == (1, 256)
    assert tiny_source.read_stored(norm).shape == (1, 1024)


def test_packed_experts(packed: Path) -> None:
    source, weights = opened(packed), load_file(packed / SINGLE)
    gate_up = weights["model.layers.1.mlp.experts.gate_up_proj"].float().numpy()
    down = weights["model.layers.1.mlp.experts.down_proj"].float().numpy()
    for name, expected in (("gate", gate_up[:, :32]), ("up", gate_up[:, 32:]), ("down", down)):
        tensor = named(source, f"blk.1.ffn_{name}_exps.weight")
        for expert in range(8):
            assert np.array_equal(source.read(tensor, expert), expected[expert])
            assert np.array_equal(source.read(tensor, expert, slice(3, 10)), expected[expert][3:10])
    assert source.hf_tensor_of["blk.1.ffn_up_exps.weight"].parts[5] == Part(
        "model.layers.1.mlp.experts.gate_up_proj", 5, (32, 64)
    )
    assert np.array_equal(source.checkpoint.read_f32("model.layers.1.mlp.experts.gate_up_proj", 5), gate_up[5])


def test_only_the_bytes_asked_for_are_read(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(packed)
    read: list[int] = []
    real = shard_module.read_bytes

    def counting(path: Path, offset: int, count: int) -> np.ndarray:
        read.append(count)
        return real(path, offset, count)

    monkeypatch.setattr(shard_module, "read_bytes", counting)
    source.read(named(source, "blk.0.ffn_up_exps.weight"), 3, slice(0, 4))
    assert read == [4 * 64 * 2]


@pytest.mark.parametrize(("dtype", "kind", "file_type"), [("float16", F16, 1), ("float32", F32, 0)])
def test_other_types(tmp_path: Path, dtype: str, kind: object, file_type: int) -> None:
    source = opened(build_olmoe(tmp_path / "m", dtype=dtype, n_layer=1))
    assert {t.type for t in source.tensors if t.quantizable} == {kind}
    assert source.kvs["general.file_type"].value == file_type
    assert {t.type for t in source.tensors if not t.quantizable} == {F32}


def test_mixed_types(copied: Path) -> None:
    """A stack whose experts differ in type is F32; F64 is rounded and said."""
    weights = load_file(copied / SINGLE)
    down = weights.pop("model.layers.0.mlp.experts.gate_up_proj")
    save_file({**weights, "model.layers.0.mlp.experts.gate_up_proj": down.double()}, copied / SINGLE)
    source = opened(copied)
    assert named(source, "blk.0.ffn_up_exps.weight").type is F32
    assert named(source, "blk.0.ffn_down_exps.weight").type is BF16
    assert source.warnings == (f"{copied}: 1 tensors are stored as F64 and read as F32",)
    assert np.array_equal(source.read(named(source, "blk.0.ffn_up_exps.weight"), 2), down[2, 32:].float().numpy())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_an_expert(copied: Path, bad: float) -> None:
    weights = load_file(copied / SINGLE)
    weights["model.layers.1.mlp.experts.down_proj"][6, 0, 3] = bad
    save_file(weights, copied / SINGLE)
    source = opened(copied)
    tensor = named(source, "blk.1.ffn_down_exps.weight")
    source.read(tensor, 5)
    for read in (source.read, source.read_stored):
        with pytest.raises(SourceError, match=r"'blk.1.ffn_down_exps.weight', expert 6: 1 of 2048 weights are NaN"):
            read(tensor, 6)


def test_nan_elsewhere(copied: Path) -> None:
    weights = load_file(copied / SINGLE)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, copied / SINGLE)
    source = opened(copied)
    with pytest.raises(SourceError, match=r"tensor 'output_norm.weight': 1 of 64 weights are NaN"):
        source.read_stored(named(source, "output_norm.weight"))


def test_a_number_beyond_f16_stays_what_it_is(copied: Path) -> None:
    weights = load_file(copied / SINGLE)
    weights["model.layers.1.mlp.experts.down_proj"][6, 0, 3] = 1e30
    save_file(weights, copied / SINGLE)
    source = opened(copied)
    tensor = named(source, "blk.1.ffn_down_exps.weight")
    expected = torch.tensor(1e30, dtype=torch.bfloat16)
    assert source.read(tensor, 6)[0, 3] == expected.float().item()
    assert source.read_stored(tensor, 6)[0, 6:8].tobytes() == expected.view(torch.uint16).numpy().tobytes()


def test_rows_with_a_step(tiny_source: HuggingFaceSource) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        tiny_source.read(named(tiny_source, "output.weight"), rows=slice(0, 4, 2))


def test_unknown_architecture(copied: Path) -> None:
    edit_json(copied / "config.json", architectures=["WeirdMoeForCausalLM"])
    with pytest.raises(SourceError, match=r"unknown architecture 'WeirdMoeForCausalLM', known are: .*OlmoeForCausalLM"):
        opened(copied)


def test_dense_checkpoint(tmp_path: Path) -> None:
    edit_json(tmp_path / "config.json", architectures=["LlamaForCausalLM"], num_hidden_layers=2)
    with pytest.raises(SourceError, match=r"a dense model \(LlamaForCausalLM, no experts"):
        opened(tmp_path)


@pytest.mark.parametrize("names", [None, [], "OlmoeForCausalLM", [3]])
def test_no_architecture(copied: Path, names: object) -> None:
    edit_json(copied / "config.json", architectures=names)
    with pytest.raises(SourceError, match="names no architecture"):
        opened(copied)


def test_quantized_checkpoint(copied: Path) -> None:
    save_with(copied, lm_head__weight=torch.zeros(4100, 64, dtype=torch.float8_e4m3fn))
    with pytest.raises(FormatError, match=r"tensor 'lm_head.weight' has type F8_E4M3, expected BF16, F16, F32"):
        opened(copied)


def test_shape_is_not_the_configs(copied: Path) -> None:
    save_with(copied, lm_head__weight=torch.zeros(4100, 32))
    with pytest.raises(
        SourceError, match=r"tensor 'lm_head.weight' has shape \[4100, 32\], but config.json asks for \[4100, 64\]"
    ):
        opened(copied)


def test_a_converter_cannot_promise_what_is_not_there(tmp_path: Path) -> None:
    edit_json(tmp_path / "config.json", architectures=["X"])
    write_safetensors(tmp_path / SINGLE, {"w": ("BF16", (2, 2, 2), bf16(range(8)))})

    def with_parts(*parts: Part) -> HuggingFaceSource:
        recipe = Recipe("blk.0.ffn_up_exps.weight", (2, 1, len(parts)), parts)
        return HuggingFaceSource(tmp_path, Converter("x", lambda config, shapes: [recipe], lambda *_: {}))

    source = with_parts(Part("w", 0, (1, 2)), Part("w", 1, (0, 1)))
    assert source.read(source.tensors[0], 0).tolist() == [[2, 3]]
    assert source.read_stored(source.tensors[0], 1).tobytes() == bf16([4, 5])
    for part in (Part("w", 2, (0, 1)), Part("w", 0, (2, 3)), Part("w", 0), Part("w")):
        with pytest.raises(SourceError, match=r"tensor 'w' has shape \[2, 2, 2\], but config.json asks for \[1, 2\]"):
            with_parts(part)


def test_transposed_parts(tmp_path: Path) -> None:
    """[n_expert, n_in, n_out] in the checkpoint: all of an expert, some of its columns, some rows of those."""
    edit_json(tmp_path / "config.json", architectures=["X"])
    write_safetensors(tmp_path / SINGLE, {"w": ("BF16", (2, 3, 4), bf16(range(24)))})
    stored = np.arange(24).reshape(2, 3, 4)

    def with_parts(n_out: int, *parts: Part) -> HuggingFaceSource:
        recipe = Recipe("blk.0.ffn_up_exps.weight", (3, n_out, len(parts)), parts)
        return HuggingFaceSource(tmp_path, Converter("x", lambda config, shapes: [recipe], lambda *_: {}))

    source = with_parts(4, *(Part("w", e, transposed=True) for e in range(2)))
    for e in range(2):
        assert source.read(source.tensors[0], e).tolist() == stored[e].T.tolist()
        assert source.read_stored(source.tensors[0], e, slice(1, 3)).tobytes() == bf16(stored[e].T[1:3].ravel())
    source = with_parts(2, *(Part("w", e, (2, 4), transposed=True) for e in range(2)))
    assert source.read(source.tensors[0], 1).tolist() == [[14, 18, 22], [15, 19, 23]]
    assert source.read(source.tensors[0], 1, slice(1, 2)).tolist() == [[15, 19, 23]]
    with pytest.raises(ValueError, match="contiguous"):
        source.read(source.tensors[0], 1, slice(0, 2, 2))
    for part in (Part("w", 2, (0, 2), transposed=True), Part("w", 0, (3, 5), transposed=True), Part("w", 0, (0, 2))):
        with pytest.raises(SourceError, match=r"tensor 'w' has shape \[2, 3, 4\], but config.json asks for \[2, 3\]"):
            with_parts(2, part)


@pytest.mark.parametrize(("code", "torch_type"), [("BF16", torch.bfloat16), ("F32", torch.float32)])
def test_a_transposed_piece(tmp_path: Path, code: str, torch_type: torch.dtype) -> None:
    """Rows 3 to 5 of a tensor [6, 4], transposed to [4, 2]: numbers move, their bytes do not."""
    edit_json(tmp_path / "config.json", architectures=["X"])
    whole = torch.randn(6, 4).to(torch_type)
    save_file({"w": whole}, tmp_path / SINGLE)

    def with_part(part: Part) -> HuggingFaceSource:
        recipe = Recipe("blk.0.attn_k_b.weight", (2, 4, 1), (part,))
        return HuggingFaceSource(tmp_path, Converter("x", lambda config, shapes: [recipe], lambda *_: {}))

    source = with_part(Part("w", transposed=True, columns=(3, 5)))
    tensor, expected = source.tensors[0], whole[3:5].T.contiguous()
    assert tensor.type.name == code
    assert np.array_equal(source.read(tensor), expected.float().numpy())
    assert np.array_equal(source.read(tensor, 0, slice(1, 3)), expected[1:3].float().numpy())
    assert source.read_stored(tensor, 0, slice(2, 4)).tobytes() == expected[2:].view(torch.uint8).numpy().tobytes()
    assert source.read(tensor, 0, slice(2, 2)).shape == (0, 2)
    for part in (
        *(Part("w", rows=(3, 5)), Part("w", transposed=True)),
        *(Part("w", transposed=True, columns=(5, 7)), Part("w", rows=(0, 2), transposed=True, columns=(3, 5))),
    ):
        with pytest.raises(SourceError, match=r"tensor 'w' has shape \[6, 4\], but config.json asks for \[4, 2\]"):
            with_part(part)
    with pytest.raises(ValueError, match="contiguous"):
        source.read(tensor, 0, slice(0, 4, 2))
