"""What llama.cpp takes beside its buffers. Measured, not derived: see docs/memory.md for the command."""

from __future__ import annotations

from mopeq_edge.memory.graph import Graph
from mopeq_edge.memory.model import Hyperparameters
from mopeq_edge.memory.settings import Resolved

PROGRAM_FILE_BYTES = 15_400_000
"""Resident pages of llama-server's program and libraries, CPU build, x86-64 Linux."""

PROGRAM_BYTES = 5_800_000
"""Heap and stacks of an idle llama-server with next to no vocabulary."""

BYTES_PER_TOKEN_OF_VOCABULARY = 275
"""A token of the vocabulary with its merge, in llama.cpp's tables."""

BYTES_PER_CELL = 190
"""A cell of the KV cache in use: position, sequences, and what finds them."""

BYTES_PER_NODE = 1700
"""A node of the graph: llama.cpp keeps three graphs of each, the scheduler's copies and hash tables."""

CUDA_CONTEXT_BYTES = 350_000_000
"""CUDA's own memory on the GPU. An assumption: it was not measured, and differs by device and driver."""


def program_bytes(hparams: Hyperparameters, resolved: Resolved, graph: Graph) -> int:
    """Anonymous memory of the process beside weights, cache and buffers."""
    cells = resolved.n_ctx
    return (
        PROGRAM_BYTES
        + BYTES_PER_TOKEN_OF_VOCABULARY * hparams.n_vocab
        + BYTES_PER_CELL * cells
        + BYTES_PER_NODE * len(graph.nodes)
    )
