"""config.json, tokenizer files and GGUF numbers from a stranger, on a checkpoint that is whole but for one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from converters import CONVERTERS, vocabulary
from mopeq_edge.errors import MopeqError
from mopeq_edge.gguf_file import KV, ValueType
from mopeq_edge.gguf_layout import string, uint32
from mopeq_edge.memory.model import model_of_gguf
from mopeq_edge.memory.predict import predict
from mopeq_edge.memory.repack import Cpu
from mopeq_edge.memory.settings import Settings
from mopeq_edge.source.open import open_source
from mopeq_edge.split import read_parts
from tools.fuzz import seeds


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(seeds.safetensors_bytes(seeds.checkpoint_shapes()))
    (tmp_path / "config.json").write_text(json.dumps(dict(seeds.CONFIG)))
    (tmp_path / "tokenizer.json").write_text(json.dumps(seeds.tokenizer_json()))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(seeds.TOKENIZER_CONFIG)))
    return tmp_path


def refused(directory: Path) -> str:
    said = outcome(directory)
    assert said is not None
    assert said.isprintable()
    return said


def outcome(directory: Path) -> str | None:
    """The error of opening it, None for none."""
    try:
        open_source(directory, CONVERTERS, "gpt-2")
    except MopeqError as error:
        return str(error)
    return None


def test_as_it_is(checkpoint: Path) -> None:
    source = open_source(checkpoint, CONVERTERS, "gpt-2")
    assert [t.shape for t in source.tensors if t.projection == "up"] == [(32, 32, 4)]
    assert len(source.kvs["tokenizer.ggml.tokens"].value) == seeds.VOCAB


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 10**12}, "num_hidden_layers 1000000000000, expected no more than there are tensors"),
    ({"num_hidden_layers": -1}, "num_hidden_layers -1, expected a positive number"),
    ({"num_hidden_layers": "1"}, "num_hidden_layers '1', expected a positive number"),
    ({"num_hidden_layers": True}, "num_hidden_layers True, expected a positive number"),
    ({"num_hidden_layers": [1]}, "num_hidden_layers [1], expected a positive number"),
    ({"num_hidden_layers": 1.0}, "num_hidden_layers 1.0, expected a positive number"),
    ({"num_hidden_layers": 10**4000}, "num_hidden_layers 1000"),
    # a second for the names of 57,600 matrices, until the product was looked at
    ({"num_hidden_layers": 300, "num_experts": 64}, "num_hidden_layers times num_experts 19200, expected no more"),
    ({"num_experts": 10**6}, "num_experts 1000000, expected no more"),
    ({"hidden_size": 10**30}, "asks for"),
    ({"vocab_size": 2**31}, "asks for"),
    ({"rope_theta": 1e300}, "olmoe.rope.freq_base"),
    ({"rope_theta": 10**400}, "olmoe.rope.freq_base"),
    ({"rms_norm_eps": 10**400}, "attention.layer_norm_rms_epsilon"),
    ({"rms_norm_eps": 1e300}, "attention.layer_norm_rms_epsilon"),
    ({"rms_norm_eps": float("inf")}, "attention.layer_norm_rms_epsilon"),
    ({"rms_norm_eps": float("nan")}, "attention.layer_norm_rms_epsilon"),
    ({"max_position_embeddings": 2**40}, "olmoe.context_length"),
    ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope type ['yarn'], expected a name"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 10**400, "original_max_position_embeddings": 2}}, "factor 1000"),
    ({"architectures": [["x"]]}, "names no architecture"),
    ({"architectures": ["\x1b[2JMoe"]}, "names no architecture"),
    ({"architectures": ["x" * 1000]}, "names no architecture"),
    ({"quantization_config": []}, "quantization_config []"),
]


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_config(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    change, message = CONFIGS[number]
    tokenizer = vocabulary.load_tokenizer(checkpoint)
    monkeypatch.setattr(vocabulary, "load_tokenizer", lambda _: tokenizer)
    (checkpoint / "config.json").write_text(json.dumps({**seeds.CONFIG, **change}))
    assert message in refused(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "\x00", "[1]", "7"])
def test_json_of_another_form(checkpoint: Path, name: str, text: str) -> None:
    """generation_config.json may be anything: what it has is optional."""
    (checkpoint / name).write_text(text)
    said = outcome(checkpoint)
    assert said.isprintable() if said is not None else name in ("generation_config.json", "tokenizer_config.json")


TOKENIZERS: list[tuple[str, dict[str, Any]]] = [
    ("tokenizer.json", {"post_processor": [1]}),
    ("tokenizer.json", {"post_processor": {"type": "Sequence", "processors": [1]}}),
    ("tokenizer.json", {"added_tokens": 3}),
    ("tokenizer.json", {"added_tokens": [{"id": "x"}]}),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}}),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 2**31}, "merges": []}}),
    ("tokenizer.json", {"model": None}),
    ("tokenizer_config.json", {"chat_template": {"a": 1}}),
    ("tokenizer_config.json", {"chat_template": 5}),
    ("tokenizer_config.json", {"eos_token": {"content": [1]}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}),
    ("tokenizer_config.json", {"added_tokens_decoder": 3}),
]


@pytest.mark.parametrize("number", range(len(TOKENIZERS)))
def test_tokenizer(checkpoint: Path, number: int) -> None:
    """Refused in one line or, where transformers and gguf overlook it, taken; never anything else."""
    name, change = TOKENIZERS[number]
    path = checkpoint / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    said = outcome(checkpoint)
    if said is None:
        assert name == "tokenizer_config.json"
    else:
        assert said.isprintable()
        assert said.startswith((str(checkpoint), "the checkpoint's files"))


def test_a_panic_of_the_tokenizers_package(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no Exception, as Ctrl-C is none; that one has to go through."""
    from transformers import AutoTokenizer

    panic = type("PanicException", (BaseException,), {})
    for error in (panic("index out of bounds"), KeyboardInterrupt()):

        def load(*_: Any, what: BaseException = error, **__: Any) -> Any:
            raise what

        monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
        if isinstance(error, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                vocabulary.load_tokenizer(checkpoint)
        else:
            assert "its tokenizer cannot be loaded (index out of bounds)" in refused(checkpoint)


GGUFS: list[tuple[dict[str, KV], str]] = [
    ({"olmoe.attention.head_count": string("2")}, "attention.head_count' is '2', expected a whole number"),
    ({"olmoe.attention.head_count": KV(ValueType.ARRAY, ["x"], ValueType.STRING)}, r"attention.head_count' is ['x']"),
    ({"olmoe.attention.head_count": KV(ValueType.INT32, -2)}, "attention.head_count' is -2"),
    ({"olmoe.attention.head_count": uint32(2**32 - 1)}, "attention.head_count' is 4294967295"),
    ({"olmoe.block_count": uint32(0)}, "expected blocks 0 to -1"),
    ({"olmoe.nextn_predict_layers": uint32(1)}, "has 0 blocks, expected 1 to 512"),
    ({"olmoe.expert_used_count": uint32(0)}, "make no graph"),
    ({"olmoe.context_length": KV(ValueType.BOOL, True)}, "context_length' is True"),
    ({"tokenizer.ggml.tokens": uint32(5)}, "vocab_size' is missing"),
    ({"split.count": KV(ValueType.UINT64, 2**40)}, "split.count is 1099511627776, expected a number of files"),
    ({"split.count": KV(ValueType.ARRAY, [2], ValueType.UINT16)}, "split.count is [2], expected a number of files"),
    ({"split.count": KV(ValueType.UINT16, 2), "split.no": string("0")}, "is file 0 (from 0) of 2"),
]


@pytest.mark.parametrize("number", range(len(GGUFS)))
def test_numbers_of_a_gguf(tmp_path: Path, number: int) -> None:
    change, message = GGUFS[number]
    path = tmp_path / "m.gguf"
    path.write_bytes(seeds.gguf_bytes({**seeds.model_kvs(), **change}, seeds.model_specs("F32")))
    with pytest.raises(MopeqError) as caught:
        predict(model_of_gguf(read_parts(path)), Settings(), Cpu("x86_64", frozenset()))
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
