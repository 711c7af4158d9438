"""The KV cache: its cells, and their bytes by layer. Facts: ``src/llama-kv-cache.cpp`` and ``-iswa.cpp``."""

from __future__ import annotations

from dataclasses import dataclass

from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.gguf_file import pad
from mopeq_edge.memory.model import Hyperparameters
from mopeq_edge.memory.settings import CONTEXT_STEP, Resolved, Settings

ROTATED_HEAD = 64
"""A quantized cache is rotated by Hadamard matrices of at least this size, where the heads are multiples of it."""


@dataclass(frozen=True)
class LayerCache:
    """One layer's part: K of [n_embd_k, cells, streams], V alike (0 with MLA, whose V is a part of K)."""

    layer: int
    window: bool
    n_embd_k: int
    n_embd_v: int
    cells: int
    nbytes: int


@dataclass(frozen=True)
class KVCache:
    """The whole cache. ``cells`` are those of one stream, ``window_cells`` of one with a sliding window (or 0)."""

    layers: tuple[LayerCache, ...]
    cells: int
    window_cells: int
    n_stream: int
    rotate_k: int
    """Size of the rotation of K and Q, 0 for none."""
    rotate_v: int

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def cells_of(self, layer: int) -> int:
        return self.layers[layer].cells


def kv_cache(hparams: Hyperparameters, settings: Settings, resolved: Resolved) -> KVCache:
    """The cache that llama.cpp makes; a layer with a sliding window keeps the window and one batch."""
    cells = resolved.n_ctx_seq
    window = min(cells, hparams.n_swa * (resolved.n_seq if resolved.unified else 1) + resolved.n_ubatch)
    window_cells = cells if settings.swa_full else pad(window, CONTEXT_STEP)
    layers = tuple(
        _layer(hparams, settings, resolved, layer, window_cells if hparams.swa[layer] else cells)
        for layer in range(hparams.n_layer)
    )
    return KVCache(
        layers,
        cells,
        window_cells if any(hparams.swa) else 0,
        resolved.n_stream,
        _rotation(settings.cache_type_k, hparams.head_k, largest=True),
        0 if hparams.is_mla else _rotation(settings.cache_type_v, hparams.head_v, largest=False),
    )


def _layer(hparams: Hyperparameters, settings: Settings, resolved: Resolved, layer: int, cells: int) -> LayerCache:
    n_embd_k = hparams.head_k * hparams.n_head_kv[layer]
    n_embd_v = 0 if hparams.is_mla else hparams.head_v * hparams.n_head_kv[layer]
    rows = cells * resolved.n_stream
    nbytes = settings.cache_type_k.nbytes(n_embd_k) * rows + settings.cache_type_v.nbytes(n_embd_v) * rows
    return LayerCache(layer, hparams.swa[layer], n_embd_k, n_embd_v, cells, nbytes)


def _rotation(kind: GgmlType, head: int, *, largest: bool) -> int:
    """The side of the rotation matrix: for K the largest power of two that divides the head, for V the smallest."""
    if not kind.is_quantized or head % ROTATED_HEAD:
        return 0
    size = ROTATED_HEAD
    while largest and head % (2 * size) == 0:
        size *= 2
    return size
