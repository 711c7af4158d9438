"""Key-values that no bundled checkpoint has: rope scaling, model cards, odd generation settings."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from converters.key_values import add_text_parameters, as_kvs, need_number, start_writer
from mopeq_edge.errors import SourceError
from mopeq_edge.ggml.types import F32
from mopeq_edge.gguf_file import KV, ValueType
from mopeq_edge.source.model import SourceTensor

CONFIG = {"num_hidden_layers": 2, "hidden_size": 8, "rms_norm_eps": 1e-5, "rope_theta": 5e5}
TENSORS = [SourceTensor("token_embd.weight", (2000, 1000), F32)]


def parameters(**config: Any) -> dict[str, Any]:
    writer = gguf.GGUFWriter(path=None, arch="x")
    add_text_parameters(writer, {**CONFIG, **config}, 32)
    return {key.removeprefix("x."): kv.value for key, kv in as_kvs(writer).items()}


def described(directory: Path) -> dict[str, Any]:
    return {key: kv.value for key, kv in as_kvs(start_writer(directory, "x", TENSORS)).items()}


def test_sizes() -> None:
    assert parameters(n_group=4, topk_group=2, head_dim=16) == {
        "general.architecture": "x",
        "block_count": 2,
        "embedding_length": 8,
        "rope.freq_base": 5e5,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "expert_group_count": 4,
        "expert_group_used_count": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "general.file_type": 32,
        "general.quantization_version": 2,
    }


def test_rope() -> None:
    old = parameters(rope_scaling={"type": "linear", "factor": 2.0})
    new = parameters(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    assert (old["rope.scaling.type"], old["rope.scaling.factor"], old["rope.freq_base"]) == ("linear", 2.0, 5e5)
    assert (new["rope.scaling.type"], new["rope.scaling.factor"], new["rope.freq_base"]) == ("linear", 2.0, 1e4)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 16.0}
    found = parameters(rope_parameters=yarn)
    assert found["rope.scaling.original_context_length"] == 512
    assert found["rope.scaling.yarn_beta_fast"] == 16.0
    with pytest.raises(SourceError, match="rope type 'llama3', expected default, linear or yarn"):
        parameters(rope_scaling={"rope_type": "llama3", "factor": 8.0})
    for broken in ({"rope_type": "linear"}, {"rope_type": "yarn", "factor": 2.0}):
        with pytest.raises(SourceError, match=r"config.json has a rope of type .* without"):
            parameters(rope_scaling=broken)


def test_rope_sections() -> None:
    def found(sections: object) -> Any:
        return parameters(rope_parameters={"mrope_section": sections, "rope_theta": 1e6})["rope.dimension_sections"]

    assert (found([24, 20, 20]), found([8, 4, 4, 2]), found([])) == ([24, 20, 20, 0], [8, 4, 4, 2], [0, 0, 0, 0])
    for bad in ([1, 2, 3, 4, 5], [1.5], [-1], "24", 24):
        with pytest.raises(SourceError, match=r"config.json has mrope_section .*, expected up to four numbers"):
            found(bad)


def test_model_card(tmp_path: Path) -> None:
    assert described(tmp_path / "Some-MoE-v2")["general.name"] == "Some MoE v2"
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- no\n---\n# A model\n")
    found = start_writer(tmp_path, "x", TENSORS)
    kvs = as_kvs(found)
    assert kvs["general.license"] == KV(ValueType.STRING, "apache-2.0")
    assert kvs["general.languages"] == KV(ValueType.ARRAY, ["no"], ValueType.STRING)
    assert kvs["general.size_label"].value == "2.0M"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(SourceError, match="cannot be read as a model card") as caught:
        described(tmp_path)
    assert "\n" not in str(caught.value)


def test_sampling(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"temperature": 0.5, "top_k": 20, "repetition_penalty": 1.25}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    found = described(tmp_path)
    assert found["general.sampling.temp"] == 0.5
    assert found["general.sampling.top_k"] == 20
    assert found["general.sampling.penalty_repeat"] == 1.25


def test_values_of_another_type(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"give 'eight' for 'x.embedding_length', expected UINT32"):
        parameters(hidden_size="eight")
    (tmp_path / "generation_config.json").write_text('{"temperature": "warm"}')
    with pytest.raises(SourceError, match=r"give 'warm' for 'general.sampling.temp', expected FLOAT32"):
        described(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "README.md").write_text("---\ndatasets: 3\nbase_model: {a: 1}\ntags: 4\nname: 7\n---\n")
    with pytest.raises(SourceError):
        described(tmp_path)


@pytest.mark.parametrize("value", [None, 0, -1, 1.5, "4", True])
def test_need_number(value: object) -> None:
    with pytest.raises(SourceError, match="num_experts"):
        need_number({"num_experts": value}, "num_experts")
