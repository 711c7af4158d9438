"""The exact bytes of a file whose tensors change their types one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mopeq_edge.expert_groups.layout import VERSION, VERSION_KEY, Grouping, file_layout, file_specs
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.gguf_file import KV, TensorInfo, pad
from mopeq_edge.gguf_layout import encode_kv, tensor_header_bytes, uint32
from mopeq_edge.source.model import SourceTensor


class FileBytes:
    """Sums that :meth:`change` keeps up to date; laying out the whole file for each step would take a second."""

    def __init__(
        self, kvs: Mapping[str, KV], tensors: Iterable[SourceTensor], types: Mapping[str, GgmlType | Grouping]
    ) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        place = file_layout(kvs, self._tensors.values(), types)
        self._alignment, self._kvs = place.alignment, kvs
        self._version = len(encode_kv(VERSION_KEY, uint32(VERSION)))
        self._parts = {name: self._part(name, types[name]) for name in self._tensors}
        self._grouped = {name for name in self._tensors if not isinstance(types[name], GgmlType)}
        self._infos = sum(infos for infos, _ in self._parts.values())
        self._data = sum(data for _, data in self._parts.values())
        self._rest = place.header_end - self._infos - (self._version if self._grouped else 0)

    def change(self, name: str, kind: GgmlType | Grouping) -> None:
        """Give the tensor ``name`` another type, or groups."""
        before, after = self._parts[name], self._part(name, kind)
        self._infos += after[0] - before[0]
        self._data += after[1] - before[1]
        self._parts[name] = after
        (self._grouped.discard if isinstance(kind, GgmlType) else self._grouped.add)(name)

    @property
    def total(self) -> int:
        """Bytes of the whole file."""
        header = self._rest + self._infos + (self._version if self._grouped else 0)
        return pad(header, self._alignment) + self._data

    def _part(self, name: str, kind: GgmlType | Grouping) -> tuple[int, int]:
        """(bytes of the tensor infos, of the padded data)"""
        specs = file_specs([self._tensors[name]], {name: kind})
        infos = [TensorInfo(part, shape, own, 0) for part, shape, own in specs]
        return sum(tensor_header_bytes(info, self._kvs) for info in infos), sum(
            pad(i.nbytes, self._alignment) for i in infos
        )
