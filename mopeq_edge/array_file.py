"""Artifacts of named arrays: safetensors with a format name, a version, and the same bytes for the same input."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mopeq_edge.atomic import atomic_write
from mopeq_edge.errors import FormatError, shown
from mopeq_edge.json_file import parse_json
from mopeq_edge.regular_file import regular_size

_TYPES = ("F64", "F32", "I64", "I32")
"""Of the arrays that we write."""

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


def read_arrays(
    path: Path, format_name: str, version: str, again: str, only: Callable[[str], bool] = lambda _: True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(info, arrays) of what :func:`write_arrays` wrote; ``only`` those whose name it is given and likes.

    Raises :class:`FormatError` for anything else; ``again`` says how to make the file anew.
    """
    with _opened(path, format_name, version, again) as (info, file):
        return info, {key: _array(file, key) for key in file.keys() if only(key)}  # noqa: SIM118


def read_info(path: Path, format_name: str, version: str, again: str) -> dict[str, Any]:
    """The plain values of :func:`read_arrays` alone."""
    with _opened(path, format_name, version, again) as (info, _):
        return info


@contextmanager
def _opened(path: Path, format_name: str, version: str, again: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """(info, the open file); what goes wrong while it is open is a :class:`FormatError`."""
    what = format_name.removeprefix("mopeq-edge ")
    try:
        regular_size(path)
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if (metadata.get("format"), metadata.get("version")) != (format_name, version):
                raise FormatError(
                    f"{path}: expected '{format_name}' version {version}, found "
                    f"{shown(metadata.get('format'))} version {shown(metadata.get('version'))}; {again}"
                )
            info = parse_json(metadata["info"].encode())
            if not isinstance(info, dict):
                raise ValueError(f"its info is {shown(info)}, expected an object")
            yield info, file
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise FormatError(f"{path}: cannot be read as {what} ({error}); {again}") from None


def _array(file: Any, key: str) -> npt.NDArray[Any]:
    kind = file.get_slice(key).get_dtype()
    if kind not in _TYPES:
        raise ValueError(f"'{key}' is of type {kind}, expected one of {', '.join(_TYPES)}")
    array: npt.NDArray[Any] = file.get_tensor(key)
    if not np.isfinite(array).all():
        raise ValueError(f"'{key}' holds a number that is none")
    return array


@contextmanager
def refusing(path: Path, format_name: str, again: str) -> Iterator[None]:
    """Turns what a reader stumbles over in (info, arrays) of another form into a :class:`FormatError`.

    For plain look-ups and comparisons alone: nothing in the block may grow with a number from the file.
    """
    what = format_name.removeprefix("mopeq-edge ")
    try:
        yield
    except KeyError as error:
        raise FormatError(f"{path}: not {what} as mopeq-edge writes it ({error} is missing); {again}") from None
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise FormatError(f"{path}: not {what} as mopeq-edge writes it ({error}); {again}") from None
