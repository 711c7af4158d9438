"""Budgets in bytes, and the exact size of the file that a plan leads to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mopeq_edge.device_files import DeviceFile, total_bytes
from mopeq_edge.errors import PlanError
from mopeq_edge.gguf_file import KV
from mopeq_edge.gguf_layout import TensorSpec, layout
from mopeq_edge.source.model import Source, SourceTensor
from mopeq_edge.source.padded import unpadded
from mopeq_edge.units import GB, GIB, format_bytes


@dataclass(frozen=True)
class Budget:
    """The most bytes that a device shall load: exactly one of the first four."""

    gb: float | None = None
    gib: float | None = None
    bpw: float | None = None
    nbytes: int | None = None
    """Bytes, for a budget that follows from the memory that is asked for."""
    reserve: int = 0
    """Bytes kept back of GB or GiB; in bits per weight headers come on top anyway."""
    beside: tuple[DeviceFile, ...] = ()
    """Files that are loaded too: part of GB or GiB; bits per weight are the GGUF's, and these come on top."""

    def __post_init__(self) -> None:
        given = [value for value in (self.gb, self.gib, self.bpw, self.nbytes) if value is not None]
        if len(given) != 1 or not 0 < given[0] < (1e18 if self.nbytes is not None else 1e9):
            raise PlanError(
                "budget: give exactly one of --target-gb (1e9 bytes), --target-gib (2^30 bytes), "
                f"--target-bpw and --fits, as a positive number; found {given or 'none'}"
            )

    def file_bytes(self, header_bytes: int, tensors: Iterable[SourceTensor]) -> int:
        """Largest size of the finished GGUF, in bytes.

        bpw is llama.cpp's: bytes of tensor data times 8 over the number of weights; the header comes on top.
        """
        if self.nbytes is not None:
            return self.nbytes - self.reserve
        if self.gb is not None:
            return int(round(self.gb * GB, 3)) - self.reserve - total_bytes(self.beside)
        if self.gib is not None:
            return int(round(self.gib * GIB, 3)) - self.reserve - total_bytes(self.beside)
        assert self.bpw is not None
        return header_bytes + int(self.bpw * sum(t.n_weights for t in tensors) / 8)

    def limit(self, source: Source, kvs: Mapping[str, KV]) -> int:
        """The same for the file that ``source`` and ``kvs`` make; zeros that pad experts are no weights."""
        return self.file_bytes(source_header_bytes(source, kvs), unpadded(source).tensors)

    def whole(self, file_bytes: int) -> str:
        """The bytes of a GGUF and of the files that share its budget, in words; empty where there are none."""
        if self.bpw is not None or not self.beside:
            return ""
        return f", {file_bytes + total_bytes(self.beside)} with the files beside it"

    def __str__(self) -> str:
        kept = f" less {self.reserve} bytes for the headers of several files" if self.reserve else ""
        if self.bpw is None:
            kept += "".join(f" less {file.nbytes} bytes for {file.name}" for file in self.beside)
        if self.nbytes is not None:
            return f"{format_bytes(self.nbytes)}, all that --fits leaves for the file{kept}"
        if self.gb is not None:
            return f"{self.gb:g} GB{kept}"
        return f"{self.gib:g} GiB{kept}" if self.gib is not None else f"{self.bpw:g} bpw"


def header_bytes(kvs: Mapping[str, KV], specs: Iterable[TensorSpec]) -> int:
    """Bytes before the tensor data. The types in ``specs`` do not change it."""
    return len(layout(kvs, list(specs)).header)


def source_header_bytes(source: Source, kvs: Mapping[str, KV]) -> int:
    """The same for the source's own tensors: what a budget in bits per weight comes on top of."""
    return header_bytes(kvs, [(t.name, t.shape, t.type) for t in source.tensors])
