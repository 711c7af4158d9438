"""Split GGUF files: ``NAME-00001-of-00003.gguf`` and so on, as llama-gguf-split writes and llama.cpp loads them.

The first file has all key-values, every file its number, the number of files and the number of all tensors, and those
of a plan its hash (parts of two plans can have tensors of the same names and sizes) and the hashes of its own
tensors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mopeq_edge import file_hashes
from mopeq_edge.atomic import check_output
from mopeq_edge.errors import FormatError, PlanError, SourceError, shown
from mopeq_edge.gguf_file import KV, GGUFHeader, TensorInfo, ValueType, pad, read_header
from mopeq_edge.gguf_layout import Layout, TensorSpec, layout, tensor_header_bytes
from mopeq_edge.json_file import is_count
from mopeq_edge.output_kvs import PLAN_KEY

NO, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
IN_EVERY_FILE = ("general.alignment", PLAN_KEY, *file_hashes.KEYS)
"""Key-values that files after the first repeat, where the first has them."""

MAX_FILES = 2**16 - 1
"""The largest number of files that the key can hold; a file's name has five digits."""

UNITS: Mapping[str, int] = {"K": 10**3, "M": 10**6, "G": 10**9}

_PART = re.compile(r"-([0-9]{5})-of-([0-9]{5})(?=\.gguf$)")


def split_kvs(number: int, n_files: int, n_tensors: int) -> dict[str, KV]:
    """Key-values of file ``number`` (from 0), in llama.cpp's types."""
    return {
        NO: KV(ValueType.UINT16, number),
        COUNT: KV(ValueType.UINT16, n_files),
        TENSORS: KV(ValueType.INT32, n_tensors),
    }


def part_paths(path: Path, n_files: int) -> list[Path]:
    """Names of the files that ``path``, such as ``out.gguf``, is split into."""
    stem = path.name.removesuffix(".gguf")
    return [path.with_name(f"{stem}-{i:05d}-of-{n_files:05d}.gguf") for i in range(1, n_files + 1)]


def whole_path(path: Path) -> Path:
    """``out.gguf`` of ``out-00001-of-00003.gguf``; any other path as it is."""
    return path.with_name(_PART.sub("", path.name))


def existing_parts(path: Path) -> list[Path]:
    """Files that have the name of a part of ``path``, of however many."""
    if not path.parent.is_dir():
        return []
    stem = path.name.removesuffix(".gguf")
    return sorted(
        found
        for found in path.parent.iterdir()
        if (match := _PART.search(found.name)) and found.name[: match.start()] == stem
    )


def check_parts(path: Path, inputs: Iterable[Path], *, force: bool) -> None:
    """:func:`check_output` for the parts that ``path`` will be written as, of which there may be any number."""
    inputs = tuple(inputs)
    check_output(path, inputs, force=True)
    for part in existing_parts(path):
        check_output(part, inputs, force=force)


def parse_size(text: str) -> int:
    """Bytes of ``--split-max-size``: a number, or one with K, M or G (powers of 1000), as llama-gguf-split has it."""
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].upper() in UNITS else (text, "")
    if not re.fullmatch(r"[0-9]+", number) or int(number) == 0:
        raise PlanError(
            f"--split-max-size {text}: expected a whole number of bytes, or with K, M or G: 4G is 4e9 bytes"
        )
    return int(number) * UNITS.get(unit, 1)


def split_layouts(kvs: Mapping[str, KV], specs: Sequence[TensorSpec], max_bytes: int) -> tuple[Layout, ...]:
    """Lay out ``specs`` in their order in files of at most ``max_bytes`` each, header and padding included.

    Each file takes what fits. llama-gguf-split counts tensor data alone, so its files may be larger than asked for.
    Raises :class:`PlanError` for key-values or a tensor that no file has room for.
    """
    alignment = layout(kvs, []).alignment
    keys = [dict(kvs), _repeated(kvs)]
    heads = [layout({**some, **split_kvs(0, 1, len(specs))}, []).header_end for some in keys]
    if pad(heads[0], alignment) > max_bytes:
        raise _too_large("the header with the vocabulary", pad(heads[0], alignment), max_bytes)
    files: list[list[TensorSpec]] = [[]]
    head, data = heads[0], 0
    for spec in specs:
        info = TensorInfo(*spec, 0)
        name_bytes, nbytes = tensor_header_bytes(info, kvs), pad(info.nbytes, alignment)
        if pad(head + name_bytes, alignment) + data + nbytes > max_bytes:
            files.append([])
            head, data = heads[1], 0
            alone = pad(head + name_bytes, alignment) + nbytes
            if alone > max_bytes:
                raise _too_large(f"tensor '{info.name}' ({info.type.name})", alone, max_bytes)
        files[-1].append(spec)
        head, data = head + name_bytes, data + nbytes
    if len(files) > MAX_FILES:
        raise PlanError(f"--split-max-size {max_bytes}: makes {len(files)} files, at most {MAX_FILES} are possible")
    return tuple(
        layout({**keys[min(at, 1)], **split_kvs(at, len(files), len(specs))}, part) for at, part in enumerate(files)
    )


def bytes_alone(kvs: Mapping[str, KV], spec: TensorSpec) -> int:
    """Bytes of a file, not the first, that holds nothing but one tensor."""
    return layout({**_repeated(kvs), **split_kvs(1, 2, 1)}, [spec]).file_size


def _repeated(kvs: Mapping[str, KV]) -> dict[str, KV]:
    return {key: kvs[key] for key in IN_EVERY_FILE if key in kvs}


def _too_large(what: str, needed: int, max_bytes: int) -> PlanError:
    return PlanError(f"--split-max-size {max_bytes}: {what} alone needs a file of {needed} bytes; raise the size")


def whole_name(path: Path) -> str:
    """The name of ``path`` before it was split: ``out.gguf`` of ``out-00001-of-00003.gguf``."""
    return _PART.sub("", path.name)


def gguf_parts(path: Path) -> list[Path]:
    """All files of a GGUF: itself, or every ``-0000i-of-0000n`` part of a split one."""
    match = _PART.search(path.name)
    if match is None:
        return [path]
    return part_paths(path.with_name(path.name[: match.start()] + ".gguf"), int(match[2]))


def read_parts(path: Path) -> tuple[GGUFHeader, ...]:
    """The header of a GGUF, or of every file of a split one, given the first.

    Raises :class:`SourceError` for another file than the first, or one that is missing, and :class:`FormatError` for
    files that do not belong together.
    """
    first = read_header(path)
    n_files = first.get(COUNT)
    if n_files is None:
        return (first,)
    if not is_count(n_files, MAX_FILES):
        raise FormatError(f"{path}: {COUNT} is {shown(n_files)}, expected a number of files; download it again")
    if n_files < 2:
        return (first,)
    paths = gguf_parts(path)
    if first.get(NO) != 0:
        raise SourceError(
            f"{path}: is file {first.get(NO)} (from 0) of {n_files} of a split GGUF; give the first, {paths[0].name}"
        )
    if len(paths) != n_files or paths[0] != path:
        raise SourceError(
            f"{path}: the first of {n_files} files of a split GGUF, expected a name that ends in "
            f"-00001-of-{n_files:05d}.gguf; give the files the names that they were made with"
        )
    missing = next((part.name for part in paths if not part.is_file()), None)
    if missing is not None:
        raise SourceError(f"{path}: the first of {n_files} files, {missing} is missing beside it; download it too")
    headers = (first, *(read_header(part) for part in paths[1:]))
    for number, header in enumerate(headers):
        if (header.get(NO), header.get(COUNT)) != (number, n_files):
            raise FormatError(
                f"{header.path}: is file {header.get(NO)} of {header.get(COUNT)} by its own word, expected {number} of "
                f"{n_files} (counted from 0); the files are of different models, download them again"
            )
        # what llama-gguf-split cut has the key in the first file alone
        if PLAN_KEY in header.kvs and header.get(PLAN_KEY) != first.get(PLAN_KEY):
            raise FormatError(
                f"{header.path}: {PLAN_KEY} is {header.get(PLAN_KEY)}, expected {first.get(PLAN_KEY)} as in "
                f"{path.name}; the files are of different models, download them again"
            )
    names = [info.name for header in headers for info in header.tensors]
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice or len(names) != first.get(TENSORS):
        found = f"tensor '{twice[0]}' twice" if twice else f"{len(names)} tensors"
        raise FormatError(
            f"{path}: its {n_files} files have {found}, expected {first.get(TENSORS)} different ones ({TENSORS}); "
            "the files are of different models, download them again"
        )
    return headers
