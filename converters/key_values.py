"""Key-values that all families share, in the words of the ``gguf`` package.

Which keys exist, how they are called and typed is gguf-py's business: its writer collects them, nothing is written
with it. Order and choice are those of llama.cpp's ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from converters.model_card import check_model_card
from converters.rope_settings import require_needed, rope_of
from mopeq_edge.errors import SourceError, shown
from mopeq_edge.gguf_file import KV, ValueType
from mopeq_edge.gguf_layout import layout
from mopeq_edge.source.converter import Config
from mopeq_edge.source.model import SourceTensor

# (names of one number in config.json, newest first; the writer's method)
_SIZES: Sequence[tuple[tuple[str, ...], str]] = (
    (("num_hidden_layers", "n_layer"), "add_block_count"),
    (("max_position_embeddings", "n_positions"), "add_context_length"),
    (("hidden_size", "n_embd"), "add_embedding_length"),
    (("intermediate_size", "n_inner"), "add_feed_forward_length"),
    (("num_attention_heads", "n_head"), "add_head_count"),
    (("num_key_value_heads",), "add_head_count_kv"),
)
_AFTER_ROPE: Sequence[tuple[tuple[str, ...], str]] = (
    (("rms_norm_eps", "norm_eps"), "add_layer_norm_rms_eps"),
    (("layer_norm_eps", "layer_norm_epsilon"), "add_layer_norm_eps"),
    (("num_local_experts", "num_experts", "n_routed_experts"), "add_expert_count"),
    (("num_experts_per_tok",), "add_expert_used_count"),
    (("n_group",), "add_expert_group_count"),
    (("topk_group",), "add_expert_group_used_count"),
)

_ROPE_SCALING: Mapping[str, Any] = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}
_ROPE_SCALING_NUMBERS: Sequence[tuple[tuple[str, ...], str]] = (
    (("factor",), "add_rope_scaling_factor"),
    (("original_max_position_embeddings",), "add_rope_scaling_orig_ctx_len"),
    (("extrapolation_factor",), "add_rope_scaling_yarn_ext_factor"),
    (("attention_factor", "attn_factor"), "add_rope_scaling_yarn_attn_factor"),
    (("beta_fast",), "add_rope_scaling_yarn_beta_fast"),
    (("beta_slow",), "add_rope_scaling_yarn_beta_slow"),
)


def need_number(config: Config, key: str) -> int:
    """The positive whole number under ``key``, or :class:`SourceError`."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise SourceError(
            f"config.json has {key} {shown(value)}, expected a positive number; use the one of these weights"
        )
    return value


def with_defaults(config: Config, assumed: Mapping[str, Any], rope_theta: float = 10000.0) -> dict[str, Any]:
    """``config`` with what transformers assumes where it says nothing. A rope's own settings come before the theta."""
    return {"rope_theta": rope_theta, **assumed, **{key: value for key, value in config.items() if value is not None}}


def start_writer(
    directory: Path, architecture: str, tensors: Sequence[SourceTensor], chat_template: str | None = None
) -> Any:
    """A ``gguf.GGUFWriter`` with what describes the model: architecture, type, name, size, licence, authors.

    ``chat_template`` is for a family whose checkpoints have none.
    """
    writer = gguf.GGUFWriter(path=None, arch=architecture)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for tensor in tensors:
        # Only for the number of parameters in the model's size label
        writer.add_tensor_info(tensor.name, tuple(reversed(tensor.shape)), np.dtype(np.float32), tensor.n_weights * 4)
    total, shared, expert, n_expert = writer.get_total_parameter_count()
    writer.add_type(gguf.GGUFType.MODEL)
    check_model_card(directory)
    try:
        metadata = gguf.Metadata.load(None, directory, None, total)
        metadata.name = metadata.name or directory.resolve().name
        metadata.size_label = metadata.size_label or gguf.size_label(total, shared, expert, n_expert)
        _add_repetition_penalty(metadata, directory)
        metadata.set_gguf_meta_model(writer)
    except Exception as error:
        # A bad model card raises whatever the YAML reader and gguf's guesses about it raise
        reason = " ".join(str(error).split())
        raise SourceError(
            f"{directory}: its README.md or JSON files cannot be read as a model card: {reason}"
        ) from None
    return writer


def add_text_parameters(
    writer: Any,
    config: Config,
    file_type: int,
    extras: Sequence[tuple[str, Any]] = (),
    head_lengths: tuple[int, int] | None = None,
) -> None:
    """Sizes, rope, norms and experts of a decoder, then ``file_type`` and the family's own ``extras``.

    An extra is a method of the writer and its argument. ``head_lengths`` are the key's and the value's where
    config.json has a ``head_dim`` that means something else.
    """
    _add_numbers(writer, config, _SIZES)
    _add_rope(writer, config)
    _add_numbers(writer, config, _AFTER_ROPE)
    if (scoring := config.get("scoring_func")) is not None:
        writer.add_expert_gating_func(_gating_function(scoring))
    if (head_dim := config.get("head_dim")) is not None:
        key_length, value_length = head_lengths or (head_dim, head_dim)
        writer.add_key_length(key_length)
        writer.add_value_length(value_length)
    writer.add_file_type(file_type)
    for method, value in extras:
        getattr(writer, method)(value)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def as_kvs(writer: Any) -> dict[str, KV]:
    """What the writer collected, in its order. Raises :class:`SourceError` for a value that its key cannot hold."""
    kvs: dict[str, KV] = {}
    for key, value in writer.kv_data[0].items():
        kind = ValueType(int(value.type))
        sub: ValueType | None = None
        if kind is ValueType.ARRAY:
            sub = ValueType(int(value.sub_type or gguf.GGUFValueType.get_type(value.value[0])))
        kvs[key] = KV(kind, list(value.value) if sub is not None else value.value, sub)
        try:
            layout({key: kvs[key]}, [])
            if kind is ValueType.FLOAT32 and not math.isfinite(value.value):
                raise ValueError
        except (struct.error, TypeError, ValueError, AttributeError, OverflowError):
            raise SourceError(
                f"the checkpoint's files give {shown(value.value)} for '{key}', expected {kind.name}; "
                "use the files of these weights"
            ) from None
    return kvs


def _gating_function(name: object) -> Any:
    if name not in ("softmax", "sigmoid"):
        raise SourceError(f"config.json has scoring_func {name!r}, expected softmax or sigmoid; not supported yet")
    return gguf.ExpertGatingFuncType[str(name).upper()]


def _add_numbers(writer: Any, config: Config, table: Sequence[tuple[tuple[str, ...], str]]) -> None:
    for names, method in table:
        value = next((config[name] for name in names if config.get(name) is not None), None)
        if value is not None:
            getattr(writer, method)(value)


def _add_rope(writer: Any, config: Config) -> None:
    kind, rope = rope_of(config)
    if kind not in ("default", *_ROPE_SCALING):
        raise SourceError(f"config.json has rope type '{kind}', expected default, linear or yarn; not supported yet")
    if kind in _ROPE_SCALING:
        require_needed(kind, rope)
        writer.add_rope_scaling_type(_ROPE_SCALING[kind])
        _add_numbers(writer, rope, _ROPE_SCALING_NUMBERS if kind == "yarn" else _ROPE_SCALING_NUMBERS[:1])
    if (sections := rope.get("mrope_section")) is not None:
        writer.add_rope_dimension_sections(_sections(sections))
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is not None:
        writer.add_rope_freq_base(theta)


def _sections(found: object) -> list[int]:
    """Rotary pairs for time, height, width and something else: always four numbers in a GGUF."""
    if not isinstance(found, list) or len(found) > 4 or not all(type(n) is int and n >= 0 for n in found):
        raise SourceError(f"config.json has mrope_section {found!r}, expected up to four numbers of rotary pairs")
    return [*found, *(0 for _ in range(4 - len(found)))]


def _add_repetition_penalty(metadata: Any, directory: Path) -> None:
    # The released gguf package does not know transformers' name for it yet, the one that llama.cpp uses does
    path = directory / "generation_config.json"
    if metadata.sampling_penalty_repeat is None and path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            return
        if isinstance(found, dict):
            metadata.sampling_penalty_repeat = found.get("repetition_penalty")
