"""Weights that say where they are: a checkpoint whose every element is its own number, and reading that back.

The elements of all tensors of a checkpoint are numbered through, in order of the tensors' names. BF16 holds whole
numbers up to 256 only, so there one number takes three checkpoints, one for each digit to the base 256
(:func:`write_digit`); F32 holds the whole number (:func:`write_numbers`). No two elements have equal digits, so every
mistake in an element's place shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]

N_DIGITS, BASE = 3, 256
"""2^24 elements, which is also as far as F32 counts without gaps."""


def numbers_of(directory: Path) -> dict[str, Numbers]:
    """The number of every element, by the tensor's name and in its shape."""
    return _numbers({name: tuple(value.shape) for name, value in _load(directory).items()})


def write_digit(directory: Path, digit: int) -> None:
    """Replace every element by one digit of its number, 0 the lowest; names, shapes and types stay."""
    _rewrite(directory, lambda numbers: numbers // BASE**digit % BASE)


def write_numbers(directory: Path) -> None:
    """Replace every element by its number."""
    _rewrite(directory, lambda numbers: numbers)


def read_ggufs(paths: Sequence[Path]) -> list[dict[str, Numbers]]:
    """Whole numbers of every tensor in F32 or BF16, outermost axis first, of files that differ in weights alone.

    gguf's own reader finds the tensors. It takes its time for a vocabulary, so it reads the first file only, and what
    is before the weights must be the same in all.
    """
    tensors = gguf.GGUFReader(paths[0]).tensors
    files = [path.read_bytes() for path in paths]
    start = min(int(tensor.data_offset) for tensor in tensors)
    assert len({file[:start] for file in files}) == 1
    found: list[dict[str, Numbers]] = [{} for _ in files]
    for tensor in tensors:
        first, size = int(tensor.data_offset), int(tensor.n_bytes)
        for file, numbers in zip(files, found, strict=True):
            values = _floats(file[first : first + size], tensor.tensor_type)
            numbers[tensor.name] = values.astype(np.int64).reshape([int(n) for n in tensor.shape[::-1]])
            assert np.array_equal(numbers[tensor.name].reshape(-1), values), tensor.name
    return found


def _floats(raw: bytes, kind: gguf.GGMLQuantizationType) -> npt.NDArray[np.float32]:
    if kind is gguf.GGMLQuantizationType.F32:
        return np.frombuffer(raw, "<f4")
    assert kind is gguf.GGMLQuantizationType.BF16, kind
    return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")


def _numbers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Numbers]:
    found, first = {}, 0
    for name, shape in sorted(shapes.items()):
        found[name] = np.arange(first, first + math.prod(shape)).reshape(shape)
        first += math.prod(shape)
    assert first <= BASE**N_DIGITS
    return found


def _rewrite(directory: Path, code: Callable[[Numbers], Numbers]) -> None:
    import torch
    from safetensors.torch import save_file

    coded: dict[str, Any] = {}
    old = _load(directory)
    for name, numbers in _numbers({name: tuple(value.shape) for name, value in old.items()}).items():
        wanted = torch.from_numpy(code(numbers))
        coded[name] = wanted.to(old[name].dtype)
        assert torch.equal(coded[name].to(torch.int64), wanted), f"{old[name].dtype} cannot count so far"
    save_file(coded, directory / "model.safetensors", metadata={"format": "pt"})


def _load(directory: Path) -> Mapping[str, Any]:
    from safetensors.torch import load_file

    (path,) = directory.glob("*.safetensors")
    found: Mapping[str, Any] = load_file(path)
    return found
