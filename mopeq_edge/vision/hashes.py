"""Hashes that a vision file carries of itself and of its weights, so that any later reader can tell what changed.

The metadata of the ONNX file have them under :data:`KEY`, as JSON: ``graph`` is BLAKE2b of 128 bits, in hex, over the
ONNX file with 32 zeros in its own place, ``tensors`` the same over the data of each tensor in the file beside. What
lies between the tensors there is zeros, and behind them is what the description says (``made_from``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mopeq_edge.errors import FormatError, shown
from mopeq_edge.file_hashes import UNKNOWN, hash_of, new_hash
from mopeq_edge.json_file import Check, parse_json, require
from mopeq_edge.progress import Step
from mopeq_edge.vision.description import KEY as DESCRIPTION
from mopeq_edge.vision.description import read_description, weights_file
from mopeq_edge.vision.graph_file import GraphFile, StoredTensor

KEY, FORMAT, VERSION = "mopeq.hashes", "mopeq-edge hashes", 1


def unsealed(tensors: Mapping[str, str]) -> str:
    """The JSON of the hashes of ``tensors``, with zeros for that of the graph."""
    return json.dumps({"format": FORMAT, "version": VERSION, "graph": UNKNOWN, "tensors": tensors}, sort_keys=True)


def sealed(raw: bytes) -> bytes:
    """The ONNX file ``raw``, which has :func:`unsealed`, with its own hash."""
    return _with_hash(raw, UNKNOWN, _digest(raw))


def tensor_hashes(weights: Path, stored: tuple[StoredTensor, ...]) -> dict[str, str]:
    """The hash of each of ``stored``, as the file ``weights`` has it."""
    found = {}
    with weights.open("rb") as file:
        for tensor in stored:
            file.seek(tensor.offset)
            found[tensor.name] = hash_of(file, tensor.nbytes)
    return found


@dataclass(frozen=True)
class Recorded:
    """What a graph says of itself and its weights."""

    graph: str
    tensors: Mapping[str, str]


def recorded(graph: GraphFile) -> Recorded | None:
    """The hashes in ``graph``; None for one that has none. Raises :class:`FormatError` for what are no hashes."""
    text = graph.metadata.get(KEY)
    if text is None:
        return None
    try:
        fields = parse_json(text.encode("utf-8", "surrogatepass"))
        if isinstance(fields, dict) and fields.get("format") == FORMAT and fields.get("version") != VERSION:
            raise ValueError(f"version {shown(fields.get('version'))} is not known, expected {VERSION}")
        found = require(fields, _CHECKS)
    except ValueError as error:
        raise FormatError(f"{graph.path}: '{KEY}' cannot be read ({error}); copy the file again") from None
    return Recorded(found["graph"], found["tensors"])


def damage(graph: GraphFile, said: Recorded, step: Step) -> Iterator[tuple[Path, str]]:
    """What differs of ``graph`` and of the file beside it: (file, tensor), with words for what is no tensor's data."""
    step.advance(len(graph.raw))
    if graph.raw.count(_own(said.graph)) != 1 or _digest(_with_hash(graph.raw, said.graph, UNKNOWN)) != said.graph:
        yield graph.path, "graph and description"
    beside = weights_file(graph.path)
    try:
        made_from = read_description(graph.metadata.get(DESCRIPTION), str(graph.path)).made_from.encode()
        with beside.open("rb") as file:
            for tensor in graph.stored:
                if any(file.read(tensor.offset - file.tell())):
                    yield beside, f"padding before {tensor.name}"
                if hash_of(file, tensor.nbytes, step) != said.tensors.get(tensor.name):
                    yield beside, tensor.name
            if file.read(len(made_from) + 1) != made_from:
                yield beside, "end of the file"
    except OSError as error:
        raise FormatError(f"{beside}: cannot be read ({error.strerror}); copy it again") from None


def _digest(raw: bytes) -> str:
    found = new_hash()
    found.update(raw)
    return found.hexdigest()


def _own(value: str) -> bytes:
    """Where the graph's own hash stands in its JSON, which is in the file as it is."""
    return f'"graph": "{value}"'.encode()


def _with_hash(raw: bytes, old: str, new: str) -> bytes:
    return raw.replace(_own(old), _own(new))


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and len(value) == len(UNKNOWN) and set(value) <= set("0123456789abcdef")


_CHECKS: dict[str, Check] = {
    "format": lambda value: value == FORMAT,
    "graph": _is_hash,
    "tensors": lambda value: isinstance(value, dict) and all(map(_is_hash, value.values())),
    "version": lambda value: value == VERSION,
}
