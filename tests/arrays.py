"""A source of random weights that exist only in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mopeq_edge.emit import WEIGHTS_AT_ONCE
from mopeq_edge.errors import SourceError
from mopeq_edge.ggml.types import BY_NAME, F32
from mopeq_edge.gguf_file import KV
from mopeq_edge.gguf_layout import string
from mopeq_edge.source.model import SourceTensor

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

KVS: Mapping[str, KV] = {"general.architecture": string("olmoe"), "general.name": string("made up")}


class ArraySource:
    """A source of random BF16 and F32 matrices. ``broken`` names a matrix that cannot be read."""

    path = Path("memory")
    kind = "huggingface"
    architecture = "olmoe"
    kvs = KVS
    warnings: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    def __init__(self, broken: tuple[str, int] | None = None) -> None:
        self.tensors = (
            SourceTensor("token_embd.weight", (96, 41), BY_NAME["BF16"]),
            SourceTensor("blk.0.attn_norm.weight", (33,), F32),
            # One matrix is more than one piece of work
            SourceTensor("blk.0.attn_q.weight", (512, WEIGHTS_AT_ONCE // 512 * 2 + 17), BY_NAME["BF16"]),
            SourceTensor("blk.0.ffn_up_exps.weight", (96, 7, 9), BY_NAME["BF16"]),
            SourceTensor("blk.0.ffn_gate_inp.weight", (96, 9), F32),
        )
        self.broken = broken
        rng = np.random.default_rng(4)
        self.values = {
            t.name: (rng.standard_normal((t.n_matrices, t.n_out, t.n_in), dtype=np.float32).view("<u4") & 0xFFFF0000)
            for t in self.tensors
        }

    def read(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Floats:
        if (tensor.name, matrix) == self.broken:
            raise SourceError(f"{tensor.name}, expert {matrix}: broken")
        return self.values[tensor.name].view(np.float32)[matrix, rows or slice(None)]

    def read_stored(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Bytes:
        values = self.read(tensor, matrix, rows).view("<u4")
        return (values if tensor.type is F32 else (values >> 16).astype("<u2")).view(np.uint8)
