"""Our quantizers against llama-quantize, byte by byte, and our dequantizers against gguf-py's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from mopeq_edge.emit import emit
from mopeq_edge.errors import RuntimeMissingError
from mopeq_edge.ggml.library import Ggml, bf16_to_f32, load_ggml
from mopeq_edge.ggml.types import BF16, BY_NAME, F16_MAX, F32, NEEDS_IMATRIX, QUANTIZABLE, WIDE, GgmlType
from mopeq_edge.gguf_file import KV, read_header
from mopeq_edge.imatrix import Entry, Imatrix, read_imatrix, write_imatrix
from mopeq_edge.plan.artifact import tensor_type_lines
from mopeq_edge.progress import SilentProgress
from mopeq_edge.runtime.tools import run_tool
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.source.model import SourceTensor

from ..builders import write_gguf

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

pytestmark = pytest.mark.runtime

UNWEIGHTED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
"""Types that go another way in libggml where there is no imatrix."""

NOT_IN_GGUF_PY = frozenset({"NVFP4", "Q1_0", "Q2_0"})


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    return load_ggml()


class Blocks:
    """The last block of a source with a few of its experts, again and again: block n is for the n-th of ``kinds``.

    Building the tables of the IQ types takes seconds, so all types go into one file. llama-quantize looks at one
    tensor at a time and does not mind that this is no model.
    """

    def __init__(self, whole: HuggingFaceSource, experts: Sequence[int], kinds: Sequence[str]) -> None:
        self._whole, self._experts = whole, experts
        self.path, self.kind, self.architecture = whole.path, whole.kind, whole.architecture
        self.kvs: Mapping[str, KV] = whole.kvs
        self.warnings: tuple[str, ...] = ()
        self.files = whole.files
        self._originals: dict[str, SourceTensor] = {}
        found: list[SourceTensor] = []
        self.types: dict[str, GgmlType] = {}
        for n, kind in enumerate(kinds):
            for t in (t for t in whole.tensors if t.layer == 3):
                name = t.name.replace("blk.3.", f"blk.{n}.")
                self._originals[name] = t
                found.append(SourceTensor(name, (*t.shape[:2], len(experts)) if _is_stack(t) else t.shape, t.type))
                self.types[name] = BY_NAME[kind] if t.quantizable else t.type
        self.tensors = tuple(found)

    def read(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Floats:
        return self._whole.read(*self._of(tensor, matrix), rows)

    def read_stored(self, tensor: SourceTensor, matrix: int = 0, rows: slice | None = None) -> Bytes:
        return self._whole.read_stored(*self._of(tensor, matrix), rows)

    def _of(self, tensor: SourceTensor, matrix: int) -> tuple[SourceTensor, int]:
        return self._originals[tensor.name], self._experts[matrix] if _is_stack(tensor) else matrix

    def imatrix(self, whole: Imatrix) -> Imatrix:
        """The part of the model's statistics that belongs to these tensors."""
        entries = {}
        for tensor in self.tensors:
            entry = whole.entries.get(self._originals[tensor.name].name)
            if entry is not None:
                pick = self._experts if _is_stack(tensor) else slice(None)
                entries[tensor.name] = Entry(entry.sums[pick], entry.counts[pick])
        return replace(whole, entries=entries)


def _is_stack(tensor: SourceTensor) -> bool:
    return len(tensor.shape) == 3


@pytest.fixture(scope="module")
def whole_imatrix(bf16_gguf: Path, calibration_text: str, tmp_path_factory: pytest.TempPathFactory) -> Imatrix:
    """llama-imatrix's statistics of a few hundred tokens, with our prior for the experts that none reached."""
    folder = tmp_path_factory.mktemp("imatrix")
    (folder / "text.txt").write_text(calibration_text[:8000], encoding="utf-8")
    options: list[str | Path] = ["-c", "128", "--chunks", "4", "--no-ppl", "-o", folder / "theirs.gguf"]
    run_tool("llama-imatrix", ["-m", bf16_gguf, "-f", folder / "text.txt", *options])
    return read_imatrix(folder / "theirs.gguf")


@pytest.fixture(scope="module")
def experts(whole_imatrix: Imatrix) -> list[int]:
    """An expert of the last block that tokens reached, and one that none did."""
    never = [n for n in range(16) if f"blk.3.ffn_up_exps.weight[{n}]" in whole_imatrix.unrouted]
    return [next(n for n in range(16) if n not in never), never[0]]


def tensor_bytes(path: Path) -> dict[str, tuple[str, bytes]]:
    """(type, bytes) by name. Not by gguf-py: it does not know Q2_0."""
    header, data = read_header(path), path.read_bytes()
    starts = [(t, header.data_start + t.offset) for t in header.tensors]
    return {t.name: (t.type.name, data[start : start + t.nbytes]) for t, start in starts}


TensorBytes = dict[str, tuple[str, bytes]]


def quantize_twice(blocks: Blocks, imatrix: Imatrix | None, folder: Path) -> tuple[TensorBytes, TensorBytes]:
    """What llama-quantize makes of ``blocks``, and what we do.

    Every type of ggml may be named in a --tensor-type-file. The file type (Q8_0) would decide only for tensors that
    it does not name: here, none.
    """
    write_gguf(blocks, folder / "bf16.gguf")
    (folder / "types.txt").write_text(tensor_type_lines({name: t.name for name, t in blocks.types.items()}))
    options: list[str | Path] = ["--tensor-type-file", folder / "types.txt"]
    if imatrix is not None:
        write_imatrix(imatrix, folder / "imatrix.gguf")
        options += ["--imatrix", folder / "imatrix.gguf"]
    run_tool("llama-quantize", [*options, folder / "bf16.gguf", folder / "theirs.gguf", "Q8_0", "2"])
    ours = folder / "ours.gguf"
    emit(blocks, blocks.types, blocks.kvs, imatrix, load_ggml(), ours, threads=2, progress=SilentProgress())
    return tensor_bytes(folder / "theirs.gguf"), tensor_bytes(ours)


@pytest.fixture(scope="module")
def with_imatrix(
    tiny_source: HuggingFaceSource,
    experts: list[int],
    whole_imatrix: Imatrix,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[TensorBytes, TensorBytes]:
    blocks = Blocks(tiny_source, experts, QUANTIZABLE)
    return quantize_twice(blocks, blocks.imatrix(whole_imatrix), tmp_path_factory.mktemp("with"))


@pytest.fixture(scope="module")
def without_imatrix(
    tiny_source: HuggingFaceSource, experts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TensorBytes, TensorBytes]:
    return quantize_twice(Blocks(tiny_source, experts, UNWEIGHTED), None, tmp_path_factory.mktemp("without"))


def compare(theirs: TensorBytes, ours: TensorBytes, block: int, kind: str) -> None:
    assert theirs.keys() == ours.keys()
    prefix = f"blk.{block}."
    matrices = set()
    for name in (name for name in ours if name.startswith(prefix)):
        assert theirs[name][0] == ours[name][0]
        assert theirs[name][1] == ours[name][1], f"{name} as {ours[name][0]} differs"
        if ours[name][0] == kind:
            matrices.add(name.removeprefix(prefix))
    stacks = {f"ffn_{p}_exps.weight" for p in ("gate", "up", "down")}
    assert matrices == stacks | {f"attn_{p}.weight" for p in ("q", "k", "v", "output")}


@pytest.mark.parametrize("kind", QUANTIZABLE)
def test_the_bytes_are_llama_quantizes(with_imatrix: tuple[TensorBytes, TensorBytes], kind: str) -> None:
    compare(*with_imatrix, QUANTIZABLE.index(kind), kind)


@pytest.mark.parametrize("kind", UNWEIGHTED)
def test_without_an_imatrix_too(without_imatrix: tuple[TensorBytes, TensorBytes], kind: str) -> None:
    compare(*without_imatrix, UNWEIGHTED.index(kind), kind)


def weights(n_rows: int, n_in: int, seed: int = 0) -> Floats:
    """Rows of very different sizes, with outliers, and a row of zeros."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((n_rows, n_in)) * 10.0 ** rng.uniform(-3, 1, (n_rows, 1))
    values[rng.random((n_rows, n_in)) < 0.01] *= 10
    values[-1] = 0
    return values.astype(np.float32)


def by_gguf_py(kind: str, blocks: Bytes) -> Floats:
    with np.errstate(all="ignore"):
        return np.asarray(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]), dtype=np.float32)


def nvfp4(blocks: Bytes) -> Floats:
    """64 weights: 4 scales (unsigned, 4 bits of exponent, 3 of mantissa, halved), then 4 x 8 bytes of E2M1 pairs."""
    values = np.array([0, 1, 2, 3, 4, 6, 8, 12], dtype=np.float32)
    values = np.concatenate([values, -values])
    parts = blocks.reshape(-1, 36)
    exponent, mantissa = parts[:, :4] >> 3 & 15, parts[:, :4] & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent.astype(int) - 7)
    scales = np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal) / 2
    codes = parts[:, 4:].reshape(-1, 4, 8)
    found = np.concatenate([values[codes & 15], values[codes >> 4]], axis=2) * scales[:, :, None]
    return found.astype(np.float32).reshape(len(blocks), -1)


def q1_0(blocks: Bytes) -> Floats:
    """128 weights: a float16, then a bit each: minus or plus."""
    parts = blocks.reshape(-1, 18)
    scale = parts[:, :2].copy().view(np.float16).astype(np.float32)
    signs = np.unpackbits(parts[:, 2:], axis=1, bitorder="little").astype(np.float32) * 2 - 1
    return (signs * scale).reshape(len(blocks), -1)


def q2_0(blocks: Bytes) -> Floats:
    """64 weights: a float16, then two bits each: -1, 0, 1 or 2 times it."""
    parts = blocks.reshape(-1, 18)
    scale = parts[:, :2].copy().view(np.float16).astype(np.float32)
    codes = parts[:, 2:, None] >> np.array([0, 2, 4, 6], dtype=np.uint8) & 3
    return ((codes.reshape(len(parts), 64).astype(np.float32) - 1) * scale).reshape(len(blocks), -1)


DECODERS = {"NVFP4": nvfp4, "Q1_0": q1_0, "Q2_0": q2_0}
"""Written here from the layout of the blocks, for what gguf-py cannot do."""


@pytest.mark.parametrize("kind", QUANTIZABLE)
def test_dequantize_is_gguf_pys(ggml: Ggml, kind: str) -> None:
    of = BY_NAME[kind]
    rows = weights(12, 768)
    blocks = ggml.quantize(of, rows, np.linspace(0.1, 3, 768, dtype=np.float32))
    assert blocks.shape == (12, of.nbytes(768))
    found = ggml.dequantize(of, blocks, 768)
    assert (found.shape, found.dtype) == ((12, 768), np.float32)
    wanted = DECODERS[kind](blocks) if kind in NOT_IN_GGUF_PY else by_gguf_py(kind, blocks)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=0)
    # It is the matrix, and not only the same mistake twice: one bit keeps the direction, eight keep all of it.
    cosine = (found * rows).sum() / np.linalg.norm(found) / np.linalg.norm(rows)
    assert cosine > (0.5 if of.bpw < 2.3 else 0.85 if of.bpw < 4 else 0.99)
    assert (found[-1] == 0).all()


@pytest.mark.parametrize("kind", [k for k in QUANTIZABLE if k not in NOT_IN_GGUF_PY])
def test_dequantize_any_bytes(ggml: Ggml, kind: str) -> None:
    """Codes that the quantizer would not choose: all of the grids and all of the signs."""
    of = BY_NAME[kind]
    blocks = np.random.default_rng(1).integers(0, 256, (40, of.nbytes(512)), dtype=np.uint8)
    found = ggml.dequantize(of, blocks, 512)
    wanted = by_gguf_py(kind, blocks)
    finite = np.isfinite(wanted)
    assert finite.mean() > 0.5
    np.testing.assert_array_equal(np.isfinite(found), finite)
    np.testing.assert_allclose(found[finite], wanted[finite], rtol=1e-6, atol=1e-30)


def test_gguf_py_has_the_rest() -> None:
    def lacks(kind: str) -> bool:
        try:
            by_gguf_py(kind, np.zeros((1, BY_NAME[kind].nbytes(256)), dtype=np.uint8))
        except (NotImplementedError, KeyError):
            return True
        return False

    # A gguf-py that learns one of these should take over its test.
    assert {kind for kind in QUANTIZABLE if lacks(kind)} <= NOT_IN_GGUF_PY


def test_the_imatrix_decides(ggml: Ggml) -> None:
    rows = np.random.default_rng(0).standard_normal((8, 256), dtype=np.float32)
    first = np.where(np.arange(256) % 2 == 0, 100, 1).astype(np.float32)
    for kind in ("Q2_K", "Q4_K", "IQ2_S", "IQ3_XXS", "IQ4_XS"):
        of = BY_NAME[kind]
        errors = []
        for weighting in (first, first[::-1].copy()):
            found = ggml.dequantize(of, ggml.quantize(of, rows, weighting), 256)
            errors.append((((found - rows) ** 2) * first).sum())
        assert errors[0] < errors[1]


def test_rows_are_independent(ggml: Ggml) -> None:
    """What the threads of emit rely on."""
    rows, weighting = weights(6, 512, seed=2), np.linspace(1, 2, 512, dtype=np.float32)
    for kind in QUANTIZABLE:
        whole = ggml.quantize(BY_NAME[kind], rows, weighting)
        parts = [ggml.quantize(BY_NAME[kind], rows[i : i + 2], weighting) for i in (0, 2, 4)]
        np.testing.assert_array_equal(whole, np.concatenate(parts))
        # Not only of contiguous rows
        np.testing.assert_array_equal(ggml.quantize(BY_NAME[kind], rows[::2], weighting), whole[::2])


def test_f32_and_bf16(ggml: Ggml) -> None:
    rows = weights(3, 64)
    np.testing.assert_array_equal(ggml.dequantize(F32, ggml.quantize(F32, rows), 64), rows)
    cut = bf16_to_f32((rows.view(np.uint32) >> 16).astype(np.uint16))
    np.testing.assert_array_equal(ggml.dequantize(BF16, ggml.quantize(BF16, cut), 64), cut)


@pytest.mark.parametrize(
    ("kind", "shape", "imatrix", "message"),
    [
        ("Q4_K", (2, 96), None, "Q4_K: rows of 96 weights are not whole blocks of 256"),
        ("Q4_0", (2, 40), None, "Q4_0: rows of 40 weights are not whole blocks of 32"),
        ("Q4_K", (2, 256), 128, r"imatrix of shape \(128,\) for rows of 256"),
    ],
)
def test_what_does_not_fit(ggml: Ggml, kind: str, shape: tuple[int, int], imatrix: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ggml.quantize(BY_NAME[kind], weights(*shape), None if imatrix is None else np.ones(imatrix, np.float32))


def test_weights_that_every_type_holds(ggml: Ggml) -> None:
    """Up to F16's largest number all stay finite; beyond it F16 does not, and only the wide types do at any size."""
    rows = weights(4, 512)
    rows[1, 7], rows[2, 300] = F16_MAX, -F16_MAX
    rows[3] = np.where(np.arange(512) % 3, F16_MAX, -F16_MAX)
    for kind in QUANTIZABLE:
        of = BY_NAME[kind]
        assert of.holds(F16_MAX)
        found = ggml.dequantize(of, ggml.quantize(of, rows, np.ones(512, np.float32)), 512)
        assert np.isfinite(found).all(), kind
    f16 = BY_NAME["F16"]
    assert not f16.holds(65536)
    assert np.isinf(ggml.dequantize(f16, ggml.quantize(f16, np.full((1, 32), 65536, np.float32)), 32)).all()
    largest = np.full((1, 32), 1e38, np.float32)
    for kind in WIDE:
        of = BY_NAME[kind]
        assert of.holds(1e38)
        np.testing.assert_allclose(ggml.dequantize(of, ggml.quantize(of, largest), 32), largest, rtol=2**-8)


def test_a_library_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "libggml-base.so"
    path.write_text("no library")
    with pytest.raises(RuntimeMissingError, match="cannot be loaded"):
        Ggml(str(path))


def test_types_that_need_an_imatrix_are_known(ggml: Ggml) -> None:
    """libggml ends the process when these get none, so nothing may ask for that."""
    assert {"IQ1_S", "IQ2_XXS", "IQ2_XS"} <= NEEDS_IMATRIX
    for kind in set(QUANTIZABLE) - NEEDS_IMATRIX:
        of: GgmlType = BY_NAME[kind]
        assert ggml.quantize(of, weights(2, 256)).shape == (2, of.nbytes(256))
