"""What of a model decides how much memory it takes: hyperparameters and tensors, no weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mopeq_edge.errors import SourceError, shown
from mopeq_edge.expert_groups.layout import file_specs
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.gguf_file import KV, GGUFHeader
from mopeq_edge.gguf_layout import TensorSpec
from mopeq_edge.json_file import is_count
from mopeq_edge.model_keys import MAX_LAYERS, check_model_keys
from mopeq_edge.plan.artifact import Plan
from mopeq_edge.source.model import Source, SourceTensor

MAX_NUMBER = 2**31 - 1
"""Of any hyperparameter: what llama.cpp keeps in an int32."""

MAX_CHOSEN = 2**14
"""Experts that a token passes, in all blocks: each is a node of the graph. Models in use have 500."""

_GROUP = re.compile(r"_exps\.[0-9]+\.weight$")
_MAP_END = "_exps.map"
_LAYER = re.compile(r"^blk\.([0-9]+)\.")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as the file has it; a group of experts is one by itself. ``shape`` is ggml's ``ne``."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType

    @property
    def nbytes(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return self.type.nbytes(n)

    @property
    def layer(self) -> int | None:
        match = _LAYER.match(self.name)
        return int(match[1]) if match else None

    @property
    def stack(self) -> str:
        """The name of the stack that a group of experts is part of, else the tensor's own."""
        return _GROUP.sub("_exps.weight", self.name)

    @property
    def is_map(self) -> bool:
        """Whether it says which expert is in which group."""
        return self.name.endswith(_MAP_END)


@dataclass(frozen=True)
class Hyperparameters:
    """Numbers of a model, as llama.cpp reads them; tuples have an entry for each layer.

    ``head_k`` and ``head_v`` are the sizes of one head in the KV cache; with MLA the cache has one head and no V, and
    ``head_k_mla`` and ``head_v_mla`` are those of the attention itself (else 0).
    """

    architecture: str
    n_layer: int
    n_vocab: int
    n_embd: int
    n_ctx_train: int
    n_head: tuple[int, ...]
    n_head_kv: tuple[int, ...]
    head_k: int
    head_v: int
    n_rot: int
    n_swa: int
    swa: tuple[bool, ...]
    n_expert: int
    n_expert_used: int
    n_expert_groups: int
    n_dense_lead: int
    kv_lora: int
    head_k_mla: int
    head_v_mla: int
    n_deepstack: int
    keys: Mapping[str, KV]

    @property
    def is_mla(self) -> bool:
        return self.head_k_mla > 0 and self.head_v_mla > 0

    def number(self, key: str, default: float = 0.0) -> float:
        """The value of ``ARCHITECTURE.key``."""
        kv = self.keys.get(f"{self.architecture}.{key}")
        return float(kv.value) if kv is not None and isinstance(kv.value, (int, float)) else default


@dataclass(frozen=True)
class Model:
    """A model to be loaded. ``file_bytes`` is the whole file, header included; ``n_files`` how many it is in."""

    name: str
    hparams: Hyperparameters
    tensors: tuple[StoredTensor, ...]
    file_bytes: int
    n_files: int = 1

    def stacks(self) -> dict[str, tuple[StoredTensor, ...]]:
        """Tensors by the name that llama.cpp's graph knows them by: groups of experts under their stack."""
        found: dict[str, list[StoredTensor]] = {}
        for tensor in self.tensors:
            if not tensor.is_map:
                found.setdefault(tensor.stack, []).append(tensor)
        return {name: tuple(parts) for name, parts in found.items()}


def model_of_gguf(headers: tuple[GGUFHeader, ...]) -> Model:
    """The model in a GGUF of one or more files (:func:`mopeq_edge.split.read_parts`)."""
    tensors = tuple(StoredTensor(t.name, t.shape, t.type) for header in headers for t in header.tensors)
    first = headers[0]
    stacks = {tensor.stack for tensor in tensors if tensor.stack != tensor.name}
    check_model_keys(first.path, first.kvs, ((t.name, t.shape) for t in tensors if t.stack not in stacks))
    return Model(
        str(first.path),
        hyperparameters(str(first.path), first.kvs),
        tensors,
        sum(header.file_size for header in headers),
        len(headers),
    )


def model_of_source(source: Source) -> Model:
    """The GGUF that ``source`` would be as it is stored."""
    tensors = tuple(StoredTensor(t.name, t.shape, t.type) for t in source.tensors)
    return Model(str(source.path), hyperparameters(str(source.path), source.kvs), tensors, _size(source.kvs, tensors))


def model_of_plan(plan: Plan, kvs: Mapping[str, KV], name: str) -> Model:
    """The GGUF that ``plan`` would write, of a source with the key-values ``kvs``."""
    types = plan.type_of()
    sources = [SourceTensor(t.name, t.shape, types_as_stored(types[t.name])) for t in plan.tensors]
    tensors = tuple(StoredTensor(*spec) for spec in file_specs(sources, types))
    return Model(name, hyperparameters(name, plan.kvs(kvs)), tensors, plan.file_bytes)


def types_as_stored(kind: Any) -> GgmlType:
    """A type for a stack in groups: its first group's, which nothing depends on."""
    return kind if isinstance(kind, GgmlType) else kind[0].type


def _size(kvs: Mapping[str, KV], tensors: Iterable[StoredTensor]) -> int:
    from mopeq_edge.gguf_layout import layout

    specs: list[TensorSpec] = [(t.name, t.shape, t.type) for t in tensors]
    return layout(kvs, specs).file_size


class _Reader:
    def __init__(self, name: str, kvs: Mapping[str, KV]) -> None:
        self.name, self.kvs = name, kvs
        arch = kvs.get("general.architecture")
        if arch is None or not isinstance(arch.value, str):
            raise SourceError(f"{name}: has no general.architecture; give a GGUF of a language model")
        self.architecture = arch.value

    def value(self, key: str) -> Any:
        kv = self.kvs.get(f"{self.architecture}.{key}")
        return None if kv is None else kv.value

    def number(self, key: str, default: int | None = None) -> int:
        value = self.value(key)
        if isinstance(value, list) and all(is_count(item, MAX_NUMBER) for item in value):
            value = max(value, default=None)
        if value is None:
            value = default
        if value is None:
            raise SourceError(f"{self.name}: key '{self.architecture}.{key}' is missing; convert the model again")
        if not is_count(value, MAX_NUMBER):
            raise SourceError(
                f"{self.name}: key '{self.architecture}.{key}' is {shown(value)}, expected a whole number; "
                "convert the model again"
            )
        return int(value)

    def layers(self, key: str, n_layer: int, default: int | None = None) -> tuple[int, ...]:
        value = self.value(key)
        number = self.number(key, default)
        if isinstance(value, list) and len(value) == n_layer:
            return tuple(value)
        return (number,) * n_layer


def hyperparameters(name: str, kvs: Mapping[str, KV]) -> Hyperparameters:
    """Read them from the key-values of a GGUF. Raises :class:`SourceError` for one that is missing."""
    read = _Reader(name, kvs)
    n_layer = read.number("block_count") - read.number("nextn_predict_layers", 0)
    if not 0 < n_layer <= MAX_LAYERS:
        raise SourceError(f"{name}: has {n_layer} blocks, expected 1 to {MAX_LAYERS}; convert the model again")
    n_used = read.number("expert_used_count", 0)
    if n_layer * n_used > MAX_CHOSEN:
        raise SourceError(
            f"{name}: has {n_layer} blocks with {n_used} experts used in each, expected at most {MAX_CHOSEN} together; "
            "convert the model again"
        )
    n_embd = read.number("embedding_length")
    n_head = read.layers("attention.head_count", n_layer)
    default_head = n_embd // max(n_head) if max(n_head) else 0
    tokens = kvs.get("tokenizer.ggml.tokens")
    n_vocab = len(tokens.value) if tokens is not None and isinstance(tokens.value, list) else read.number("vocab_size")
    n_swa = read.number("attention.sliding_window", 0)
    head_k = read.number("attention.key_length", default_head)
    return Hyperparameters(
        architecture=read.architecture,
        n_layer=n_layer,
        n_vocab=n_vocab,
        n_embd=n_embd,
        n_ctx_train=read.number("context_length", 0),
        n_head=n_head,
        n_head_kv=read.layers("attention.head_count_kv", n_layer, max(n_head)),
        head_k=head_k,
        head_v=read.number("attention.value_length", default_head),
        n_rot=read.number("rope.dimension_count", head_k),
        n_swa=n_swa,
        swa=_swa_layers(read, n_layer),
        n_expert=read.number("expert_count", 0),
        n_expert_used=n_used,
        n_expert_groups=read.number("expert_group_count", 0),
        n_dense_lead=read.number("leading_dense_block_count", 0),
        kv_lora=read.number("attention.kv_lora_rank", 0),
        head_k_mla=read.number("attention.key_length_mla", 0),
        head_v_mla=read.number("attention.value_length_mla", 0),
        n_deepstack=read.number("n_deepstack_layers", 0),
        keys=kvs,
    )


SWA_PERIOD: Mapping[str, int] = {"gpt-oss": 2}
"""Every so many layers one without a window, where llama.cpp gives an architecture windows by itself."""


def _swa_layers(read: _Reader, n_layer: int) -> tuple[bool, ...]:
    if read.architecture not in SWA_PERIOD:
        # the key alone does not make windows: most architectures that have it do not use it in llama.cpp
        return (False,) * n_layer
    pattern = read.value("attention.sliding_window_pattern")
    if isinstance(pattern, list) and len(pattern) >= n_layer:
        return tuple(bool(v) for v in pattern[:n_layer])
    period = pattern if isinstance(pattern, int) else SWA_PERIOD[read.architecture]
    return tuple(period == 0 or layer % period < period - 1 for layer in range(n_layer))
