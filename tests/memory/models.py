"""Models of llama.cpp's architectures whose weights are all zero: shapes alone, with the bundled tokenizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from converters import CONVERTERS
from mopeq_edge.ggml.types import F32
from mopeq_edge.gguf_file import KV, ValueType, read_header
from mopeq_edge.memory.model import Model, model_of_gguf
from mopeq_edge.source.huggingface import open_huggingface

from ..builders import TOKENIZER_FROM, write_raw_gguf
from ..expert_groups.architectures import (
    ARCHITECTURES,
    ATTENTION,
    COMMON_KEYS,
    DENSE,
    EXPERTS,
    N_EMBD,
    N_FF,
    N_LAYER,
    SHARED,
    Architecture,
)

N_VOCAB = 4096

ALL: Mapping[str, Architecture] = {
    **ARCHITECTURES,
    "deepseek": Architecture(
        "deepseek",
        {**ATTENTION, **EXPERTS, **SHARED},
        {
            **{"leading_dense_block_count": 1, "expert_shared_count": 1, "expert_feed_forward_length": N_FF},
            "expert_weights_scale": 1.0,
        },
        {**ATTENTION, **DENSE},
    ),
}
"""The architectures of the expert groups' tests and one more, whose checkpoints no converter reads."""


@cache
def tokenizer_kvs() -> Mapping[str, KV]:
    kvs = open_huggingface(TOKENIZER_FROM, CONVERTERS, pre="gpt-2").kvs
    return {key: kv for key, kv in kvs.items() if key.startswith("tokenizer.")}


def kv(value: Any) -> KV:
    for kind, type_ in ((bool, ValueType.BOOL), (int, ValueType.UINT32), (float, ValueType.FLOAT32)):
        if isinstance(value, kind):
            return KV(type_, value)
    return KV(ValueType.STRING, value)


def write_zeros(path: Path, name: str, **keys: Any) -> Path:
    """The architecture called ``name`` in the table of the expert groups' tests; ``keys`` replace its own."""
    own = ALL[name]
    common = {**COMMON_KEYS, "context_length": 131072, **own.keys, **keys}
    kvs = {"general.architecture": kv(own.name), **{f"{own.name}.{key}": kv(value) for key, value in common.items()}}
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (N_EMBD, N_VOCAB),
        "output_norm.weight": (N_EMBD,),
        "output.weight": (N_EMBD, N_VOCAB),
    }
    for layer in range(N_LAYER):
        parts = own.first_layer if layer == 0 and own.first_layer is not None else own.layer
        shapes |= {f"blk.{layer}.{key}": shape for key, shape in parts.items()}
    tensors = [(key, shape, F32, bytes(4 * math.prod(shape))) for key, shape in shapes.items()]
    write_raw_gguf(path, {**kvs, **tokenizer_kvs()}, tensors)
    return path


def model_of(path: Path) -> Model:
    return replace(model_of_gguf((read_header(path),)), name="model")
