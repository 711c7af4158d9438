"""What ggml's graph allocator needs for a graph: the size of its compute buffer, to the byte.

Memory of a tensor is free again after its last reader; some ops take over the memory of a source. The allocator takes
the smallest hole that is large enough, or grows. Facts: ``ggml/src/ggml-alloc.c``. One buffer of unlimited size is
assumed, as the CPU's and CUDA's are.
"""

from __future__ import annotations

from collections import Counter

from mopeq_edge.gguf_file import pad
from mopeq_edge.memory.graph import Graph, Tensor

CPU_ALIGNMENT = 32
CUDA_ALIGNMENT = 128

IN_PLACE = frozenset(
    [
        *("fill", "scale", "add", "add_id", "sub", "mul", "div", "sqr", "sqrt", "log", "unary", "rope"),
        *("rms_norm", "clamp", "soft_max"),
    ]
)
"""Ops that may write over a source of their own layout."""


class _Holes:
    """Free space of the buffer as [offset, size], by offset; the last one has no end."""

    def __init__(self) -> None:
        self.holes: list[list[int]] = [[0, 2**62]]
        self.peak = 0

    def take(self, size: int) -> int:
        fitting = [hole for hole in self.holes[:-1] if hole[1] >= size]
        # of equal holes the later one
        best = min(reversed(fitting), key=lambda hole: hole[1]) if fitting else self.holes[-1]
        offset = best[0]
        best[0] += size
        best[1] -= size
        if best[1] == 0:
            self.holes.remove(best)
        self.peak = max(self.peak, offset + size)
        return offset

    def give(self, offset: int, size: int) -> None:
        if size == 0:
            return
        at = next((i for i, hole in enumerate(self.holes) if hole[0] > offset), len(self.holes))
        self.holes.insert(at, [offset, size])
        if at + 1 < len(self.holes) and offset + size == self.holes[at + 1][0]:
            self.holes[at][1] += self.holes.pop(at + 1)[1]
        if at > 0 and sum(self.holes[at - 1]) == offset:
            self.holes[at - 1][1] += self.holes.pop(at)[1]


class _Allocation:
    def __init__(self, graph: Graph, alignment: int) -> None:
        self.alignment = alignment
        self.holes = _Holes()
        self.offsets: dict[Tensor, int] = {}
        """Where tensors are that hold memory now."""
        self.placed: set[Tensor] = set()
        self.children: Counter[Tensor] = Counter()
        self.views: Counter[Tensor] = Counter()
        for leaf in graph.leafs:
            self.place(leaf)
        for node in graph.nodes:
            if node.root is not None:
                self.views[node.root] += 1
            self.children.update(node.sources)
        for node in graph.nodes:
            self.place(node)
            for source in node.sources:
                self.release(source)

    def size(self, tensor: Tensor) -> int:
        return pad(tensor.nbytes, self.alignment)

    def place(self, tensor: Tensor) -> None:
        if tensor.external or tensor.root is not None or tensor in self.placed:
            return
        self.placed.add(tensor)
        if tensor.op in IN_PLACE:
            for source in tensor.sources:
                if self.can_take_over(tensor, source):
                    self.offsets[tensor] = self.offsets.pop(source)
                    return
        self.offsets[tensor] = self.holes.take(self.size(tensor))

    def can_take_over(self, tensor: Tensor, source: Tensor) -> bool:
        """A source that nothing else reads, that is no view and looks alike in memory."""
        return (
            source in self.offsets
            and not source.output
            and (source.type, source.ne, source.nb) == (tensor.type, tensor.ne, tensor.nb)
            and self.children[source] == 1
            and self.views[source] == 0
        )

    def release(self, source: Tensor) -> None:
        self.children[source] -= 1
        if self.children[source] or self.views[source]:
            return
        owner = source
        if source.root is not None:
            owner = source.root
            self.views[owner] -= 1
            if self.views[owner] or self.children[owner]:
                return
        if owner in self.offsets and not owner.output:
            self.holes.give(self.offsets.pop(owner), self.size(owner))


def buffer_size(graph: Graph, alignment: int = CPU_ALIGNMENT) -> int:
    """Bytes of the compute buffer of ``graph``."""
    return _Allocation(graph, alignment).holes.peak
