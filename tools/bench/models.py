"""Random-weight models in the shape of OLMoE, for speed and memory alone."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from converters import CONVERTERS
from mopeq_edge.atomic import atomic_write
from mopeq_edge.expert_groups.layout import Types, expert_map, file_layout
from mopeq_edge.ggml.library import load_ggml
from mopeq_edge.ggml.types import BF16, F32, GgmlType
from mopeq_edge.gguf_file import KV
from mopeq_edge.gguf_layout import uint32
from mopeq_edge.source.huggingface import open_huggingface
from mopeq_edge.source.model import SourceTensor

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-olmoe"


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; the tokenizer is the bundled model's."""

    n_layer: int
    n_expert: int
    n_embd: int
    n_ff: int
    n_used: int = 4
    n_head: int = 8

    @property
    def kvs(self) -> dict[str, KV]:
        kvs = dict(open_huggingface(EXAMPLE, CONVERTERS, pre="gpt-2").kvs)
        sizes = {
            **{"block_count": self.n_layer, "embedding_length": self.n_embd, "feed_forward_length": self.n_ff},
            **{"expert_count": self.n_expert, "expert_used_count": self.n_used},
            **{"attention.head_count": self.n_head, "attention.head_count_kv": self.n_head},
        }
        return kvs | {f"olmoe.{key}": uint32(value) for key, value in sizes.items()}

    def tensors(self, n_vocab: int) -> list[SourceTensor]:
        """In BF16, norms and routers in F32."""
        embd, ff, n = self.n_embd, self.n_ff, self.n_expert
        shapes: dict[str, tuple[int, ...]] = {
            "output.weight": (embd, n_vocab),
            "output_norm.weight": (embd,),
            "token_embd.weight": (embd, n_vocab),
        }
        for layer in range(self.n_layer):
            blk = f"blk.{layer}."
            shapes |= {f"{blk}{name}.weight": (embd,) for name in ("attn_norm", "ffn_norm")}
            shapes |= {f"{blk}attn_{name}_norm.weight": (embd,) for name in ("q", "k")}
            shapes |= {f"{blk}attn_{name}.weight": (embd, embd) for name in ("q", "k", "v", "output")}
            shapes[f"{blk}ffn_gate_inp.weight"] = (embd, n)
            shapes |= {f"{blk}ffn_{name}_exps.weight": (embd, ff, n) for name in ("gate", "up")}
            shapes[f"{blk}ffn_down_exps.weight"] = (ff, embd, n)
        full = {name for name, shape in shapes.items() if len(shape) == 1 or "ffn_gate_inp" in name}
        return [SourceTensor(name, shape, F32 if name in full else BF16) for name, shape in shapes.items()]


def write_random_olmoe(path: Path, shape: Shape, types: Types | None = None) -> int:
    """Write a GGUF in BF16, or with the tensors in ``types`` so. Returns its number of weights.

    One matrix of a tensor is drawn, quantized and repeated: the speed of quantizers and of kernels does not depend
    on the values. A tensor's values depend on its name alone: files of different types route alike.
    """
    kvs = shape.kvs
    return write_random(path, kvs, shape.tensors(len(kvs["tokenizer.ggml.tokens"].value)), types)


def write_random(path: Path, kvs: Mapping[str, KV], tensors: Sequence[SourceTensor], types: Types | None = None) -> int:
    """The same of any model: ``tensors`` as they are stored, or with those in ``types`` so."""
    every = {t.name: (types or {}).get(t.name, t.type) for t in tensors}
    plan = file_layout(kvs, tensors, every)
    with atomic_write(path) as file:
        file.write(plan.header)
        for tensor in tensors:
            kind = every[tensor.name]
            values = _values(tensor)
            if isinstance(kind, GgmlType):
                parts = [_matrix(values, kind) * tensor.n_matrices]
            else:
                parts = [_matrix(values, group.type) * len(group.experts) for group in kind]
                parts.append(expert_map(kind, tensor.n_matrices).tobytes())
            for part in parts:
                file.write(part + b"\0" * (-len(part) % plan.alignment))
    return sum(t.n_weights for t in tensors)


def with_vocabulary(kvs: Mapping[str, KV], n_vocab: int) -> dict[str, KV]:
    """``kvs`` with pairs of its tokens as further tokens and merges, up to ``n_vocab`` tokens."""
    tokens, kinds = kvs["tokenizer.ggml.tokens"], kvs["tokenizer.ggml.token_type"]
    merges = kvs["tokenizer.ggml.merges"]
    words, known, more = list(tokens.value), set(tokens.value), []
    plain = [word for word in words if word.isalpha() and word.isascii()]
    for left in plain:
        for right in plain:
            if len(words) >= n_vocab:
                break
            if left + right not in known:
                known.add(left + right)
                words.append(left + right)
                more.append(f"{left} {right}")
    added = len(words) - len(tokens.value)
    return {
        **kvs,
        "tokenizer.ggml.tokens": replace(tokens, value=words),
        "tokenizer.ggml.token_type": replace(kinds, value=[*kinds.value, *[1] * added]),
        "tokenizer.ggml.merges": replace(merges, value=[*merges.value, *more]),
    }


def _values(tensor: SourceTensor) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(zlib.crc32(tensor.name.encode()))
    values = rng.standard_normal(tensor.n_weights // tensor.n_matrices, dtype=np.float32)
    values = 1 + 0.1 * values if len(tensor.shape) == 1 else 0.02 * values
    return np.asarray(values, dtype=np.float32).reshape(-1, tensor.n_in)


def _matrix(values: npt.NDArray[np.float32], kind: GgmlType) -> bytes:
    if kind is F32:
        return values.tobytes()
    if kind is BF16:
        return (values.view(np.uint32) >> np.uint32(16)).astype("<u2").tobytes()
    flat = np.ones(values.shape[1], dtype=np.float32)
    return load_ggml().quantize(kind, values, flat).tobytes()
