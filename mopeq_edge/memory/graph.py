"""The shapes of a compute graph, in ggml's terms: enough to know what its buffers take, nothing is computed.

Tensors have ggml's four dimensions ``ne`` and strides ``nb`` in bytes. Nodes come in the order in which llama.cpp
adds them, because the allocator's result depends on it. Facts: ``ggml/src/ggml.c``.
"""

from __future__ import annotations

from collections.abc import Sequence

from mopeq_edge.ggml.types import BY_NAME, F32, I32, GgmlType

I64 = BY_NAME["I64"]

Dims = tuple[int, int, int, int]


class Tensor:
    """One tensor of a graph; equal only to itself.

    ``name`` is that of weights, else empty. ``root`` is the tensor whose memory a view looks into. ``external`` tensors
    (weights, the KV cache) have memory of their own. ``output`` keeps its memory to the end of the graph.
    """

    __slots__ = ("external", "name", "nb", "ne", "op", "output", "root", "sources", "type")

    def __init__(
        self,
        kind: GgmlType,
        ne: Sequence[int],
        op: str = "",
        sources: Sequence[Tensor] = (),
        *,
        nb: Dims | None = None,
        root: Tensor | None = None,
        external: bool = False,
        name: str = "",
    ) -> None:
        self.type, self.name = kind, name
        self.ne: Dims = (*ne, *(1,) * (4 - len(ne)))  # type: ignore[assignment]
        self.nb: Dims = nb if nb is not None else strides(kind, self.ne)
        self.op, self.sources, self.root, self.external = op, tuple(sources), root, external
        self.output = False

    @property
    def nbytes(self) -> int:
        """Bytes from the first element to the last, as ggml counts them."""
        ne, nb = self.ne, self.nb
        if self.type.block_size == 1:
            return self.type.type_size + sum((n - 1) * stride for n, stride in zip(ne, nb, strict=True))
        return ne[0] * nb[0] // self.type.block_size + sum((ne[i] - 1) * nb[i] for i in (1, 2, 3))

    @property
    def n_elements(self) -> int:
        return self.ne[0] * self.ne[1] * self.ne[2] * self.ne[3]

    @property
    def contiguous(self) -> bool:
        """Whether elements follow one another; strides of dimensions of one element do not matter."""
        expected = self.type.type_size
        for i in range(4):
            if self.ne[i] != 1 and self.nb[i] != expected:
                return False
            expected = self.type.nbytes(self.ne[0]) if i == 0 else expected * self.ne[i]
        return True


def strides(kind: GgmlType, ne: Dims) -> Dims:
    """Strides of a contiguous tensor, in bytes."""
    row = kind.nbytes(ne[0])
    return (kind.type_size, row, row * ne[1], row * ne[1] * ne[2])


class Graph:
    """Nodes and leafs in the order of ``ggml_build_forward_expand``: sources first, from left to right."""

    def __init__(self) -> None:
        self.nodes: list[Tensor] = []
        self.leafs: list[Tensor] = []
        self._seen: set[Tensor] = set()

    def add(self, tensor: Tensor) -> Tensor:
        """Append ``tensor`` after everything that it needs and that is not there yet."""
        stack = [(tensor, iter(tensor.sources))]
        if tensor in self._seen:
            return tensor
        self._seen.add(tensor)
        while stack:
            current, sources = stack[-1]
            for source in sources:
                if source not in self._seen:
                    self._seen.add(source)
                    stack.append((source, iter(source.sources)))
                    break
            else:
                stack.pop()
                (self.nodes if current.op else self.leafs).append(current)
        return tensor


def new_input(kind: GgmlType, *ne: int) -> Tensor:
    """Something that is filled before the graph runs: token ids, masks."""
    return Tensor(kind, ne)


def weight(kind: GgmlType, *ne: int, name: str = "") -> Tensor:
    """Something that is in memory already."""
    return Tensor(kind, ne, external=True, name=name)


def same(op: str, a: Tensor, *others: Tensor) -> Tensor:
    """An op whose result has the shape of its first source: norms, additions, rope, activations."""
    return Tensor(a.type, a.ne, op, (a, *others))


def mul_mat(w: Tensor, x: Tensor) -> Tensor:
    """[w.ne1, x.ne1, x.ne2, x.ne3] of w [n_in, n_out] and x [n_in, ...]."""
    return Tensor(F32, (w.ne[1], *x.ne[1:]), "mul_mat", (w, x))


def mul_mat_id(w: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    """[n_out, n_used, n_tokens] of w [n_in, n_out, n_expert], x and ids [n_used, n_tokens]."""
    return Tensor(F32, (w.ne[1], ids.ne[0], x.ne[2]), "mul_mat_id", (w, x, ids))


def get_rows(a: Tensor, ids: Tensor) -> Tensor:
    kind = I32 if a.type is I32 else F32
    return Tensor(kind, (a.ne[0], ids.ne[0], ids.ne[1], ids.ne[2]), "get_rows", (a, ids))


def set_rows(a: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """``rows`` written into ``a``; the result is a view of it."""
    return Tensor(a.type, a.ne, "set_rows", (rows, ids, a), nb=a.nb, root=a.root or a)


def sum_rows(a: Tensor) -> Tensor:
    return Tensor(a.type, (1, *a.ne[1:]), "sum_rows", (a,))


def argsort_top_k(a: Tensor, k: int) -> Tensor:
    """The first ``k`` of a whole argsort, as a view."""
    order = Tensor(I32, a.ne, "argsort", (a,))
    return view(order, (k, *a.ne[1:]), order.nb[1:])


def concat(a: Tensor, b: Tensor) -> Tensor:
    """Along the first dimension."""
    return Tensor(a.type, (a.ne[0] + b.ne[0], *a.ne[1:]), "concat", (a, b))


def repeat(a: Tensor, *ne: int) -> Tensor:
    return Tensor(a.type, ne, "repeat", (a,))


def glu(gate: Tensor, up: Tensor) -> Tensor:
    """Gated activation of two tensors, e.g. SwiGLU."""
    return Tensor(gate.type, gate.ne, "glu", (gate, up))


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None = None) -> Tensor:
    """[head, n_head, n_tokens, n_stream] of q [head, n_tokens, n_head, n_stream]."""
    sources = (q, k, v, mask) if sinks is None else (q, k, v, mask, sinks)
    return Tensor(F32, (v.ne[0], q.ne[2], q.ne[1], q.ne[3]), "flash_attn_ext", sources)


def view(a: Tensor, ne: Sequence[int], nb: Sequence[int] = ()) -> Tensor:
    """A view with strides ``nb`` of the dimensions from the second on; those left out follow from the ones before."""
    full = (*ne, *(1,) * (4 - len(ne)))
    stride = [a.type.type_size, *nb]
    while len(stride) < 4:
        at = len(stride)
        stride.append(a.type.nbytes(full[0]) if at == 1 else stride[at - 1] * full[at - 1])
    return Tensor(a.type, ne, "view", (a,), nb=tuple(stride), root=a.root or a)  # type: ignore[arg-type]


def reshape(a: Tensor, *ne: int) -> Tensor:
    return Tensor(a.type, ne, "reshape", (a,), root=a.root or a)


def permute(a: Tensor, *axes: int) -> Tensor:
    """Dimension i of ``a`` becomes dimension ``axes[i]``."""
    ne, nb = [0] * 4, [0] * 4
    for i, axis in enumerate(axes):
        ne[axis], nb[axis] = a.ne[i], a.nb[i]
    return Tensor(a.type, ne, "permute", (a,), nb=tuple(nb), root=a.root or a)  # type: ignore[arg-type]


def cont(a: Tensor, *ne: int) -> Tensor:
    """A contiguous copy, in another shape if given."""
    return Tensor(a.type, ne or a.ne, "cont", (a,))
