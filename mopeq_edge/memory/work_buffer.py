"""The CPU backend's work buffer: what the greediest op of a graph takes for all threads.

Mostly activations, quantized to the type that the weights' kernel multiplies with. Facts: ``ggml_graph_plan`` in
``ggml/src/ggml-cpu/ggml-cpu.c``, ``work_size`` in ``repack.cpp``, and for groups of experts our patch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mopeq_edge.ggml.types import BF16, BY_NAME, F16, F32, GgmlType
from mopeq_edge.gguf_file import pad
from mopeq_edge.memory.graph import Graph, Tensor
from mopeq_edge.memory.model import StoredTensor
from mopeq_edge.memory.repack import Cpu, is_repacked

CACHE_LINE = 64
FLASH_TILE = 64
TILE_WORKSPACE = 512 * 1024
"""Per thread, for types that are multiplied by tiles."""

TILED_TYPES = frozenset(
    [
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"),
        *("IQ3_XXS", "IQ3_S", "IQ4_XS"),
    ]
)

_EIGHT_BITS: Mapping[str, str] = {"Q4_1": "Q8_1", "Q5_1": "Q8_1"}


def activation_type(kind: GgmlType) -> GgmlType:
    """What a kernel for weights of ``kind`` takes."""
    if kind in (F32, F16, BF16):
        return kind
    if kind.block_size == 256:
        return BY_NAME["Q8_K"]
    return BY_NAME[_EIGHT_BITS.get(kind.name, "Q8_0")]


class WorkBuffer:
    """``parts`` are the tensors of a file by the name that the graph has for them."""

    def __init__(self, parts: Callable[[Tensor], tuple[StoredTensor, ...]], cpu: Cpu, threads: int, repack: bool):
        self.parts, self.cpu, self.threads, self.repack = parts, cpu, threads, repack

    def size(self, graph: Graph) -> int:
        """Bytes for the greediest op of ``graph``."""
        largest = max((self._of(node) for node in graph.nodes), default=0)
        return largest + CACHE_LINE * self.threads if largest else 0

    def _of(self, node: Tensor) -> int:
        if node.op == "mul_mat":
            return self._mul_mat(node)
        if node.op == "mul_mat_id":
            return self._mul_mat_id(node)
        if node.op == "flash_attn_ext":
            return self._flash_attention(node)
        if node.op in ("soft_max", "rope"):
            return 4 * node.ne[0] * self.threads
        return 0

    def _activations(self, kind: GgmlType, x: Tensor) -> int:
        wanted = activation_type(kind)
        return 0 if wanted is x.type else wanted.nbytes(x.n_elements)

    def _tiles(self, kind: GgmlType) -> int:
        if not self.cpu.tiled or kind.name not in TILED_TYPES:
            return 0
        return 64 + self.threads * TILE_WORKSPACE

    def _copied(self, part: StoredTensor) -> bool:
        return self.repack and is_repacked(part, self.cpu)

    def _mul_mat(self, node: Tensor) -> int:
        weights, x = node.sources
        parts = self.parts(weights)
        if parts and self._copied(parts[0]):
            return self._activations(weights.type, x)
        return pad(self._activations(weights.type, x), 64) + self._tiles(weights.type)

    def _mul_mat_id(self, node: Tensor) -> int:
        weights, x, ids = node.sources
        parts = self.parts(weights)
        n_expert, n_chosen = weights.ne[2], ids.ne[0] * ids.ne[1]
        if len(parts) > 1:
            return self._grouped(parts, x, n_expert, n_chosen)
        if parts and self._copied(parts[0]):
            return pad(self._activations(weights.type, x), 8) + 8 * n_expert * (x.ne[2] + 1)
        activations = self._activations(weights.type, x)
        size = activations + 8 if activations else 0
        size += 8 * (n_expert + 1) + 8 * (n_expert * n_chosen + 1) + CACHE_LINE * (n_expert + 1)
        return pad(size, 64) + self._tiles(weights.type)

    def _grouped(self, parts: tuple[StoredTensor, ...], x: Tensor, n_expert: int, n_chosen: int) -> int:
        kinds = dict.fromkeys(activation_type(part.type) for part in parts)
        size = sum(pad(kind.nbytes(x.n_elements), 64) for kind in kinds if kind is not x.type)
        tiles = max(0 if self._copied(part) else self._tiles(part.type) for part in parts)
        pieces = (8 * (n_expert + 1), 8 * n_chosen, CACHE_LINE * n_expert, tiles)
        return size + sum(pad(piece, 64) for piece in pieces) + 64

    def _flash_attention(self, node: Tensor) -> int:
        q, k, v = node.sources[:3]
        head_k, head_v, tile = k.ne[0], v.ne[0], FLASH_TILE
        prefill = tile * head_k + 2 * tile * tile + tile * head_v + tile * head_v + tile * head_k
        decode = q.ne[2] * (2 + head_v) + head_k + 2 * head_v
        return 4 * self.threads * max(prefill, decode)
