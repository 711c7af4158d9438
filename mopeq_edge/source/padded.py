"""Experts of an awkward width, padded with zeros to whole blocks of the K- and IQ-types.

The down matrix of an expert has rows as long as the expert is wide, and llama.cpp's types of about 2 to 4 bits per
weight come in blocks of 256. Where the width is no multiple of that (896, 1408, 2880), neurons of zeros make it one:
rows of gate and up, columns of down. They change nothing, because act(0) * 0 = 0 meets a column of zeros; a quantizer
keeps a row of zeros exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mopeq_edge.gguf_file import KV
from mopeq_edge.imatrix import Entry, Imatrix
from mopeq_edge.source.model import Bytes, Floats, Source, SourceTensor

BLOCK = 256
"""Weights in a block of the K- and IQ-types (ggml's ``QK_K``)."""

MOST = 2
"""Times as wide as it was: beyond that even the smallest types take more bytes than 32-wide types without padding."""


@dataclass(frozen=True)
class Width:
    """Where a GGUF architecture has the width of its experts: the key, and whether shared experts have it too.

    Shared experts are then ``expert_shared_count`` times as wide.
    """

    key: str
    shared: bool = False


WIDTHS: Mapping[str, Width] = {
    "olmoe": Width("feed_forward_length"),
    "llama": Width("feed_forward_length"),
    "granitemoe": Width("feed_forward_length"),
    "qwen2moe": Width("expert_feed_forward_length"),
    "qwen3moe": Width("expert_feed_forward_length"),
    "qwen3vlmoe": Width("expert_feed_forward_length"),
    "deepseek2": Width("expert_feed_forward_length", shared=True),
    "deepseek2-ocr": Width("expert_feed_forward_length", shared=True),
    "gpt-oss": Width("expert_feed_forward_length"),
}
"""Architectures whose tensors llama.cpp shapes by one width for all layers."""

_EXPERTS = re.compile(r"blk\.[0-9]+\.ffn_(gate|up|gate_up|down)_(exps|shexp)\.(weight|bias)$")


@dataclass(frozen=True)
class Axis:
    """Which axis of a tensor (ggml's ``ne``) runs over neurons: ``parts`` runs of ``real`` that become ``padded``."""

    number: int
    parts: int
    real: int
    padded: int


@dataclass(frozen=True)
class ExpertPadding:
    """``width`` neurons of an expert become ``padded``; ``key`` says it in the GGUF. ``shared``: see :class:`Width`."""

    key: str
    width: int
    padded: int
    shared: bool = False

    def axis(self, tensor: SourceTensor) -> Axis | None:
        """The axis of ``tensor`` that grows; None if it stays as it is."""
        match = _EXPERTS.match(tensor.name)
        if match is None or (match[2] == "shexp" and not self.shared):
            return None
        number = 0 if match[1] == "down" or match[3] == "bias" else 1
        if match[1] == "down" and match[3] == "bias":
            return None
        halves = 2 if match[1] == "gate_up" else 1
        experts = tensor.shape[number] // (halves * self.width) if match[2] == "shexp" else 1
        # neurons of several shared experts are one run: zeros behind the last one do for all
        return Axis(number, halves, experts * self.width, experts * self.padded)

    def tensor(self, tensor: SourceTensor) -> SourceTensor:
        """``tensor`` as the padded model has it."""
        axis = self.axis(tensor)
        if axis is None:
            return tensor
        shape = list(tensor.shape)
        shape[axis.number] = axis.parts * axis.padded
        return replace(tensor, shape=tuple(shape))

    def kvs(self, kvs: Mapping[str, KV]) -> dict[str, KV]:
        """``kvs`` with the padded width, in the same bytes."""
        return {
            name: KV(kv.type, self.padded) if name == self.key and kv.sub_type is None else kv
            for name, kv in kvs.items()
        }

    def imatrix(self, imatrix: Imatrix | None, tensors: Mapping[str, SourceTensor]) -> Imatrix | None:
        """``imatrix`` for the padded rows of ``tensors`` (the unpadded, by name): what is never used weighs nothing."""
        if imatrix is None:
            return None
        entries = dict(imatrix.entries)
        for name in entries.keys() & tensors.keys():
            axis = self.axis(tensors[name])
            if axis is not None and axis.number == 0 and entries[name].sums.shape[1] == axis.parts * axis.real:
                entries[name] = Entry(pad_rows(entries[name].sums, axis), entries[name].counts)
        return replace(imatrix, entries=entries)


def expert_padding(source: Source) -> ExpertPadding | None:
    """How the experts of ``source`` would be padded; None where there is nothing to gain or no way to say it.

    The width must be a number in the key-values (:data:`WIDTHS`), and every tensor of experts have it.
    """
    known = WIDTHS.get(source.architecture)
    kv = source.kvs.get(f"{source.architecture}.{known.key}") if known is not None else None
    if known is None or kv is None or not isinstance(kv.value, int) or kv.value <= 0:
        return None
    width = kv.value
    padding = ExpertPadding(f"{source.architecture}.{known.key}", width, -(-width // BLOCK) * BLOCK, known.shared)
    found = [(t, axis) for t in source.tensors if (axis := padding.axis(t)) is not None]
    whole = all(axis.real > 0 and t.shape[axis.number] == axis.parts * axis.real for t, axis in found)
    return padding if found and whole and width < padding.padded <= MOST * width else None


def unpadded(source: Source) -> Source:
    """What ``source`` is without padding."""
    return source.source if isinstance(source, PaddedSource) else source


def pad_rows(values: Floats, axis: Axis) -> Floats:
    """``values`` [n, parts * real] with zeros behind each part: [n, parts * padded]."""
    padded = np.zeros((len(values), axis.parts, axis.padded), dtype=values.dtype)
    padded[:, :, : axis.real] = values.reshape(len(values), axis.parts, axis.real)
    return padded.reshape(len(values), axis.parts * axis.padded)


class PaddedSource:
    """``source`` with its experts padded. Reads nothing that the source does not have."""

    def __init__(self, source: Source, padding: ExpertPadding) -> None:
        self.source, self.padding = source, padding
        self.tensors = tuple(padding.tensor(t) for t in source.tensors)
        self.kvs: Mapping[str, KV] = padding.kvs(source.kvs)
        self._unpadded = {t.name: t for t in source.tensors}

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def kind(self) -> str:
        return self.source.kind

    @property
    def architecture(self) -> str:
        return self.source.architecture

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.source.warnings

    @property
    def files(self) -> tuple[Path, ...]:
        return self.source.files

    def read(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Floats:
        own = self._unpadded[tensor.name]
        axis = self.padding.axis(own)
        if axis is None:
            return self.source.read(own, matrix, rows)
        if axis.number == 0:
            return pad_rows(self.source.read(own, matrix, rows), axis)
        padded = np.zeros((len(range(tensor.n_out)[rows or slice(None)]), tensor.n_in), dtype=np.float32)
        for place, real in _rows(axis, tensor.n_out, rows):
            padded[place] = self.source.read(own, matrix, real)
        return padded

    def read_stored(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Bytes:
        own = self._unpadded[tensor.name]
        axis = self.padding.axis(own)
        if axis is None:
            return self.source.read_stored(own, matrix, rows)
        # bytes of zeros are zeros in every type: the scale of a block is 0
        if axis.number == 0:
            in_bytes = replace(axis, real=own.type.nbytes(axis.real), padded=own.type.nbytes(axis.padded))
            return _pad_bytes(self.source.read_stored(own, matrix, rows), in_bytes)
        n_rows = len(range(tensor.n_out)[rows or slice(None)])
        padded = np.zeros((n_rows, own.type.nbytes(own.n_in)), dtype=np.uint8)
        for place, real in _rows(axis, tensor.n_out, rows):
            padded[place] = self.source.read_stored(own, matrix, real)
        return padded


def _pad_bytes(stored: Bytes, axis: Axis) -> Bytes:
    padded = np.zeros((len(stored), axis.parts, axis.padded), dtype=np.uint8)
    padded[:, :, : axis.real] = stored.reshape(len(stored), axis.parts, axis.real)
    return padded.reshape(len(stored), axis.parts * axis.padded)


def _rows(axis: Axis, n_out: int, rows: slice | None) -> list[tuple[slice, slice]]:
    """(where in the result, which rows of the source) of every part of ``rows`` that is not zeros."""
    start, stop, _ = (rows or slice(None)).indices(n_out)
    found = []
    for part in range(axis.parts):
        first, last = part * axis.padded, part * axis.padded + axis.real
        low, high = max(start, first), min(stop, last)
        if low < high:
            shift = part * (axis.padded - axis.real)
            found.append((slice(low - start, high - start), slice(low - shift, high - shift)))
    return found
