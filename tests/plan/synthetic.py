"""A model and a sensitivity table that exist only in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mopeq_edge.ggml.types import BY_NAME, F32, GgmlType
from mopeq_edge.gguf_file import KV, ValueType
from mopeq_edge.gguf_layout import string, uint32
from mopeq_edge.plan.candidates import candidates
from mopeq_edge.sensitivity.measure import TensorErrors
from mopeq_edge.sensitivity.table import SensitivityTable
from mopeq_edge.source.model import SourceTensor

N_EXPERT = 4

KVS: Mapping[str, KV] = {
    "general.architecture": string("olmoe"),
    "olmoe.block_count": uint32(2),
    "olmoe.expert_count": uint32(N_EXPERT),
    "tokenizer.ggml.tokens": KV(ValueType.ARRAY, ["a", "bc", "ü"], ValueType.STRING),
}


def tensors(n_layer: int = 2, stored: str = "BF16") -> tuple[SourceTensor, ...]:
    """Every role that an OLMoE has, with odd sizes: a down projection whose rows take no 256-blocks."""
    kind = BY_NAME[stored]
    found = [SourceTensor("token_embd.weight", (256, 100), kind), SourceTensor("output.weight", (256, 100), kind)]
    for n in range(n_layer):
        found += [
            SourceTensor(f"blk.{n}.attn_norm.weight", (256,), F32),
            SourceTensor(f"blk.{n}.attn_q.weight", (256, 256), kind),
            SourceTensor(f"blk.{n}.attn_v.weight", (256, 64), kind),
            SourceTensor(f"blk.{n}.attn_v.bias", (63,), F32),
            SourceTensor(f"blk.{n}.ffn_gate_inp.weight", (256, N_EXPERT), F32),
            SourceTensor(f"blk.{n}.ffn_gate_exps.weight", (256, 96, N_EXPERT), kind),
            SourceTensor(f"blk.{n}.ffn_up_exps.weight", (256, 96, N_EXPERT), kind),
            SourceTensor(f"blk.{n}.ffn_down_exps.weight", (96, 256, N_EXPERT), kind),
        ]
    return tuple(found)


class MemorySource:
    """A :class:`mopeq_edge.source.model.Source` without weights: a planner may not read any."""

    path = Path("memory")
    kind = "huggingface"
    architecture = "olmoe"
    warnings: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    def __init__(self, has: Sequence[SourceTensor] | None = None, kvs: Mapping[str, KV] = KVS) -> None:
        self.tensors = tuple(has) if has is not None else tensors()
        self.kvs = kvs

    def read(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> npt.NDArray[np.float32]:
        raise AssertionError(f"{tensor.name} was read")

    def read_stored(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> npt.NDArray[np.uint8]:
        raise AssertionError(f"{tensor.name} was read")


def table(source: MemorySource, types: Sequence[GgmlType], scores: Sequence[str], seed: int = 0) -> SensitivityTable:
    """Damages that fall about fourfold a bit, differ between tensors and experts, and are 0 for the own type."""
    rng = np.random.default_rng(seed)
    errors: dict[str, TensorErrors] = {}
    for tensor in source.tensors:
        if not tensor.quantizable:
            continue
        kinds = candidates(tensor, types, has_imatrix=True, floors={})
        damage = {}
        for score in scores:
            expert = 10 ** rng.uniform(-3, 0, tensor.n_matrices)
            noise = rng.uniform(0.8, 1.25, (len(kinds), tensor.n_matrices))
            values = np.array([4.0**-kind.bpw for kind in kinds])[:, None] * expert * noise
            values[-1] = 0
            damage[score] = values
        variance = {score: np.zeros_like(values) for score, values in damage.items()}
        names = tuple(kind.name for kind in kinds)
        errors[tensor.name] = TensorErrors(names, damage, variance, np.ones(tensor.n_matrices))
    return SensitivityTable(errors, {}, tuple(scores), "activation", (), None, "f" * 64)
