"""Some matrices of a tensor, seen as a tensor: what one task of a cluster works on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from mopeq_edge.gguf_file import KV
from mopeq_edge.imatrix import Entry, Imatrix
from mopeq_edge.source.model import Bytes, Floats, Source, SourceTensor


@dataclass(frozen=True)
class Part:
    """The matrices ``first`` to ``stop`` of ``whole``."""

    whole: SourceTensor
    first: int
    stop: int

    @property
    def n_matrices(self) -> int:
        return self.stop - self.first

    @property
    def n_weights(self) -> int:
        return self.whole.n_in * self.whole.n_out * self.n_matrices

    @property
    def tensor(self) -> SourceTensor:
        """The part as a tensor of the whole's name."""
        if self.n_matrices == self.whole.n_matrices:
            return self.whole
        return replace(self.whole, shape=(self.whole.n_in, self.whole.n_out, self.n_matrices))

    def imatrix(self, imatrix: Imatrix | None) -> Imatrix | None:
        """What ``imatrix`` says of these matrices and of nothing else."""
        if imatrix is None:
            return None
        entry = imatrix.entries.get(self.whole.name)
        own = {} if entry is None else {self.whole.name: self._of_entry(entry)}
        return replace(imatrix, entries=own, unrouted=())

    def _of_entry(self, entry: Entry) -> Entry:
        return Entry(entry.sums[self.first : self.stop], entry.counts[self.first : self.stop])


def parts_of(tensors: Iterable[SourceTensor], most_weights: int | None) -> list[Part]:
    """``tensors`` in parts of at most ``most_weights`` (one matrix at least), the largest first; None: whole, in order.

    A large part that starts last would keep one processor busy while all others wait.
    """
    if most_weights is None:
        return [Part(tensor, 0, tensor.n_matrices) for tensor in tensors]
    parts = []
    for tensor in tensors:
        at_once = max(1, most_weights // (tensor.n_in * tensor.n_out))
        bounds = [*range(0, tensor.n_matrices, at_once), tensor.n_matrices]
        parts += [Part(tensor, first, stop) for first, stop in pairwise(bounds)]
    return sorted(parts, key=lambda part: -part.n_weights)


class PartSource:
    """A source whose tensors are seen as ``part`` of them; only :attr:`Part.tensor` can be read."""

    def __init__(self, source: Source, part: Part) -> None:
        self._source, self._part = source, part
        self.path: Path = source.path
        self.kind: str = source.kind
        self.architecture: str = source.architecture
        self.kvs: Mapping[str, KV] = source.kvs
        self.tensors: tuple[SourceTensor, ...] = (part.tensor,)
        self.warnings: tuple[str, ...] = ()
        self.files: tuple[Path, ...] = source.files

    def read(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Floats:
        return self._source.read(self._part.whole, self._place(matrix), rows)

    def read_stored(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Bytes:
        return self._source.read_stored(self._part.whole, self._place(matrix), rows)

    def _place(self, matrix: int) -> int:
        if not 0 <= matrix < self._part.n_matrices:
            raise IndexError(f"{self._part.whole.name}: no matrix {matrix} of {self._part.n_matrices}")
        return self._part.first + matrix


def joined_in_order(parts: Sequence[Part]) -> dict[str, list[int]]:
    """By tensor, the numbers of its ``parts`` from its first matrix to its last."""
    found: dict[str, list[int]] = {}
    for number in sorted(range(len(parts)), key=lambda number: parts[number].first):
        found.setdefault(parts[number].whole.name, []).append(number)
    return found
