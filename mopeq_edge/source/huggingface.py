"""A Hugging Face checkpoint as a :class:`Source`: its tensors under GGUF names, read piece by piece."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mopeq_edge.errors import FormatError, SourceError
from mopeq_edge.ggml.library import bf16_to_f32, f32_to_bf16
from mopeq_edge.ggml.types import BF16, F16, F32, MXFP4, GgmlType
from mopeq_edge.gguf_file import KV
from mopeq_edge.source.checkpoint import CONFIG, Checkpoint, read_config
from mopeq_edge.source.converter import Converter, Converters, Part, Recipe, architecture_name, find_converter
from mopeq_edge.source.model import Bytes, Floats, SourceTensor, mark_mtp, require_finite
from mopeq_edge.source.quantized import as_weights
from mopeq_edge.source.remote import RemoteDirectory
from mopeq_edge.source.shard import WEIGHT_DTYPES
from mopeq_edge.source.tied import without_copies

STORED_AS: Mapping[str, GgmlType] = {"BF16": BF16, "F16": F16, "F32": F32, "F64": F32, "MXFP4": MXFP4, "FP8": BF16}
"""How a matrix of each checkpoint type is stored in a GGUF."""

_SAME_BYTES = ("BF16", "F16", "F32", "MXFP4")
"""Types whose bytes are the GGUF's."""

FILE_TYPES: Mapping[GgmlType, int] = {F32: 0, F16: 1, BF16: 32, MXFP4: 38}
"""``general.file_type`` of a file whose matrices are of one type (``llama_ftype``)."""

BESIDE_WEIGHTS = (
    *("config.json", "generation_config.json", "README.md"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja"),
)
"""Files of a checkpoint that shape the key-values."""


class HuggingFaceSource:
    """One checkpoint directory and the converter of its family; ``remote`` has the weights if the directory has not.

    Raises :class:`SourceError` or :class:`FormatError` for whatever is missing, damaged or not supported.
    """

    kind = "huggingface"

    def __init__(
        self, directory: Path, converter: Converter, pre: str | None = None, remote: RemoteDirectory | None = None
    ) -> None:
        self.path = directory
        self.architecture = converter.architecture
        self.skeleton = converter.skeleton
        self.config: Mapping[str, Any] = read_config(directory)
        self.checkpoint = Checkpoint(directory, self.config, remote)
        try:
            recipes = converter.recipes(self.config, self.checkpoint.shapes)
        except SourceError as error:
            raise SourceError(f"{directory}: {error}") from None
        for recipe in recipes:
            self._check(recipe)
        recipes, tied = without_copies(self.checkpoint, recipes)
        self.hf_tensor_of: Mapping[str, Recipe] = {recipe.name: recipe for recipe in recipes}
        """Where every tensor, by its GGUF name, comes from in the checkpoint."""
        self.tensors = tuple(SourceTensor(r.name, r.shape, self._type_of(r)) for r in recipes)
        lines = [*converter.left_out(self.config, self.checkpoint.shapes), *tied]
        self.warnings = (*(f"{directory}: {line}" for line in lines), *self._warnings())
        beside = [directory / name for name in BESIDE_WEIGHTS if (directory / name).is_file()]
        beside += sorted((directory / "additional_chat_templates").glob("*.jinja"))
        self.files: tuple[Path, ...] = (*beside, *self.checkpoint.files)
        self.kvs: Mapping[str, KV] = converter.key_values(directory, self.config, self.tensors, self._file_type(), pre)
        self.tensors = mark_mtp(self.tensors, self.architecture, self.kvs)

    def read(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Floats:
        raw, dtype = self._read_raw(tensor, matrix, rows)
        return require_finite(as_weights(dtype, raw), self.path, tensor, matrix)

    def read_stored(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Bytes:
        raw, dtype = self._read_raw(tensor, matrix, rows)
        values = require_finite(as_weights(dtype, raw), self.path, tensor, matrix)
        if STORED_AS[dtype] is tensor.type and dtype in _SAME_BYTES:
            return raw
        if tensor.type is F32:
            return values.astype("<f4").view("u1")
        rounded = f32_to_bf16(values)
        require_finite(bf16_to_f32(rounded), self.path, tensor, matrix)
        return rounded.astype("<u2").view("u1")

    def is_exact(self, tensor: SourceTensor) -> bool:
        """Whether :meth:`read_stored` has the numbers of :meth:`read`; a product with block scales is rounded."""
        dtypes = {self.checkpoint.dtype(part.tensor) for part in self.hf_tensor_of[tensor.name].parts}
        return tensor.type is F32 or dtypes <= set(_SAME_BYTES)

    def _read_raw(self, tensor: SourceTensor, matrix: int, rows: slice | None) -> tuple[Bytes, str]:
        """Bytes [n_rows, row bytes] as the checkpoint has them, in the GGUF's order of rows, and their type."""
        part = self.hf_tensor_of[tensor.name].parts[matrix]
        own = self._rows_of(part)
        start, stop, step = (rows or slice(None)).indices(len(own))
        if step != 1:
            raise ValueError(f"{tensor.name}: rows must be contiguous, got a step of {step}")
        picked, dtype = own[start : max(start, stop)], self.checkpoint.dtype(part.tensor)
        if part.transposed:
            return self._transposed(part, picked), dtype
        if part.heads is not None:
            whole = self.checkpoint.read_stored(part.tensor, own.start, own.stop)
            return whole[interleaved_halves(len(own), part.heads)[start:stop]], dtype
        last = picked[-1] + 1 if picked else picked.start
        raw = self.checkpoint.read_stored(part.tensor, picked.start, last)[:: picked.step]
        if part.columns is not None:
            numbers = raw.reshape(len(raw), self.checkpoint.shape(part.tensor)[-1], -1)[:, _columns_of(part)]
            raw = numbers.reshape(len(raw), numbers.shape[1] * numbers.shape[2])
        return np.ascontiguousarray(raw), dtype

    def _transposed(self, part: Part, picked: range) -> Bytes:
        """Columns of what the checkpoint has as [n_in, n_out], as rows; reads all of one expert, or of ``columns``."""
        *_, n_in, n_out = self.checkpoint.shape(part.tensor)
        columns = _columns_of(part)
        first, last, every = columns.indices(n_in)
        before = (part.expert or 0) * n_in
        stored = self.checkpoint.read_stored(part.tensor, before + first, before + last)[::every]
        numbers = stored.reshape(len(stored), n_out, -1)[:, picked.start : picked.stop : picked.step].swapaxes(0, 1)
        return np.ascontiguousarray(numbers).reshape(len(picked), len(stored) * numbers.shape[2])

    def _rows_of(self, part: Part) -> range:
        """Rows of ``part`` in its tensor seen as a matrix; columns if it is transposed."""
        shape = self.checkpoint.shape(part.tensor)
        first, n_rows = 0, math.prod(shape[:-1])
        if part.transposed:
            n_rows = shape[-1]
        elif part.expert is not None:
            n_rows = math.prod(shape[1:-1])
            first = part.expert * n_rows
        if part.rows is not None:
            return range(first + part.rows[0], first + part.rows[1], part.every)
        return range(first, first + n_rows)

    def _check(self, recipe: Recipe) -> None:
        """Every part has the shape that the recipe promises, and can be read as weights."""
        n_in, n_out = recipe.shape[0], math.prod(recipe.shape[1:2])
        n_matrices = math.prod(recipe.shape[2:])
        if len(recipe.parts) != n_matrices:
            raise ValueError(f"{recipe.name}: {len(recipe.parts)} parts for {n_matrices} matrices")
        expected = [n_out, n_in] if len(recipe.shape) > 1 else [n_in]
        for part in recipe.parts:
            shape, dtype = self.checkpoint.shape(part.tensor), self.checkpoint.dtype(part.tensor)
            if self._shape_of(part) != expected:
                which = "" if part.expert is None else f" for expert {part.expert}"
                raise SourceError(
                    f"{self.path}: tensor '{part.tensor}' has shape {list(shape)}, but {CONFIG} asks for "
                    f"{expected}{which}; use the {CONFIG} of these weights"
                )
            if dtype not in STORED_AS:
                raise FormatError(
                    f"{self.path}: tensor '{part.tensor}' has type {dtype}, expected {', '.join(WEIGHT_DTYPES)}; "
                    "use a checkpoint that is not quantized"
                )
            if STORED_AS[dtype].is_quantized and (part.transposed or part.columns is not None):
                raise ValueError(f"{recipe.name}: the columns of '{part.tensor}' are in blocks of {dtype}")

    def _shape_of(self, part: Part) -> list[int]:
        """Shape of what ``part`` picks; empty if the tensor has no such part."""
        shape = list(self.checkpoint.shape(part.tensor))
        if part.expert is not None:
            shape = shape[1:] if shape and part.expert < shape[0] else []
        if part.transposed:
            shape = shape[::-1]
        if part.rows is not None and shape:
            n_rows = len(range(*part.rows, part.every))
            shape = [n_rows, *shape[1:]] if part.rows[1] <= shape[0] else []
        if part.columns is not None and shape:
            n_in = len(range(shape[-1])[_columns_of(part)])
            shape = [*shape[:-1], n_in] if part.columns[1] <= shape[-1] else []
        return shape

    def _type_of(self, recipe: Recipe) -> GgmlType:
        if recipe.keep_f32 or len(recipe.shape) == 1:
            return F32
        types = {STORED_AS[self.checkpoint.dtype(part.tensor)] for part in recipe.parts}
        return types.pop() if len(types) == 1 else F32

    def _file_type(self) -> int:
        """By the type that holds most weights of matrices; MXFP4 if there is any, as llama.cpp's converter has it."""
        weights: Counter[GgmlType] = Counter()
        for tensor in self.tensors:
            if tensor.quantizable:
                weights[tensor.type] += tensor.n_weights
        if MXFP4 in weights:
            return FILE_TYPES[MXFP4]
        return FILE_TYPES[weights.most_common(1)[0][0]] if weights else FILE_TYPES[F32]

    def _warnings(self) -> list[str]:
        parts = {part.tensor for recipe in self.hf_tensor_of.values() for part in recipe.parts}
        doubles = [name for name in parts if self.checkpoint.dtype(name) == "F64"]
        return [f"{self.path}: {len(doubles)} tensors are stored as F64 and read as F32"] if doubles else []


def _columns_of(part: Part) -> slice:
    """What ``part`` picks along its last axis."""
    start, stop = part.columns or (None, None)
    return slice(start, stop, part.every if part.rows is None else 1)


def interleaved_halves(n_rows: int, heads: int) -> npt.NDArray[np.int64]:
    """[n_rows]: of each head, row i of the first half and row i of the second half in turn."""
    return np.arange(n_rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def open_huggingface(
    directory: Path,
    converters: Converters,
    pre: str | None = None,
    *,
    keep_mtp: bool = False,
    remote: RemoteDirectory | None = None,
) -> HuggingFaceSource:
    """Open a checkpoint with the converter for the architecture in its ``config.json``.

    ``pre`` overrides the name of the pre-tokenizer; ``keep_mtp`` keeps blocks that predict further tokens; ``remote``
    has the weights where the directory has not. Raises :class:`SourceError` for an architecture that is not in
    ``converters``, or has no such blocks.
    """
    name, converter = _chosen(directory, converters)
    if converter is None:
        raise SourceError(
            f"{directory}: unknown architecture '{name}', known are: {_listed(converters)}; "
            "convert it to a BF16 GGUF with llama.cpp and give that file instead"
        )
    if keep_mtp:
        if converter.with_mtp is None:
            raise SourceError(
                f"{directory}: llama.cpp has no blocks that predict further tokens for {name}; leave out --keep-mtp"
            )
        converter = converter.with_mtp
    return HuggingFaceSource(directory, converter, pre, remote)


def unknown_architecture(directory: Path, converters: Converters) -> str | None:
    """The architecture of a Mixture-of-Experts checkpoint that is not in ``converters``, or None if it is.

    Raises :class:`SourceError` for a dense model.
    """
    name, converter = _chosen(directory, converters)
    return name if converter is None else None


def _chosen(directory: Path, converters: Converters) -> tuple[str, Converter | None]:
    """The architecture and its converter. Raises :class:`SourceError` where there are neither converter nor experts."""
    config = read_config(directory)
    name = architecture_name(converters, config)
    if name is None:
        raise SourceError(f"{directory / CONFIG}: names no architecture; use the {CONFIG} of these weights")
    try:
        converter = find_converter(converters, name, config)
    except SourceError as error:
        raise SourceError(f"{directory}: {error}") from None
    if converter is None and not _mentions_experts(config):
        raise SourceError(
            f"{directory}: a dense model ({name}, no experts in {CONFIG}); mopeq-edge is for "
            f"Mixture-of-Experts models (known: {_listed(converters)}), use llama.cpp's own tools for this one"
        )
    return name, converter


def _listed(converters: Converters) -> str:
    return ", ".join(sorted(converters))


def _mentions_experts(config: Mapping[str, Any]) -> bool:
    """Whether a key about experts has a value: configurations of dense models of a family may say none, or 0."""
    return any(
        (value and ("expert" in key or "moe" in key)) or (isinstance(value, Mapping) and _mentions_experts(value))
        for key, value in config.items()
    )
