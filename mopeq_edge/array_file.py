"""Artifacts of named arrays: safetensors with a format name, a version, and the same bytes for the same input."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mopeq_edge.atomic import atomic_write
from mopeq_edge.errors import FormatError

Arrays = Mapping[str, npt.NDArray[Any]]


def write_arrays(path: Path, format_name: str, version: str, info: Mapping[str, Any], arrays: Arrays) -> None:
    """Write ``arrays`` and the plain values ``info`` under their format and version."""
    metadata = {"format": format_name, "version": version, "info": json.dumps(info, sort_keys=True)}
    raw = save({key: np.ascontiguousarray(value) for key, value in arrays.items()}, metadata=metadata)
    # the library writes metadata in an order that changes from call to call
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with atomic_write(path) as file:
        file.write(len(header).to_bytes(8, "little") + header + raw[end:])


def read_arrays(path: Path, format_name: str, version: str, again: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(info, arrays) of what :func:`write_arrays` wrote.

    Raises :class:`FormatError` for anything else; ``again`` says how to make the file anew.
    """
    what = format_name.removeprefix("mopeq-edge ")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if (metadata.get("format"), metadata.get("version")) != (format_name, version):
                raise FormatError(
                    f"{path}: expected '{format_name}' version {version}, found "
                    f"{metadata.get('format')!r} version {metadata.get('version')!r}; {again}"
                )
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return json.loads(metadata["info"]), arrays
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise FormatError(f"{path}: cannot be read as {what} ({error}); {again}") from None
