"""Files of expert groups in the patched llama.cpp, compared with stock files and with dequantized weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import numpy.typing as npt
import pytest

from mopeq_edge.binding import LlamaModel
from mopeq_edge.ggml.library import load_ggml
from mopeq_edge.ggml.types import BY_NAME

from .architectures import ARCHITECTURES, N_VOCAB, Architecture, Floats, random_tensors, write_model
from .regroup import by_turns, regroup

pytestmark = pytest.mark.runtime

LENGTHS = (1, 7, 64, 600)
MIX = ("Q2_K", "Q3_K", "Q4_K")
Tokens = npt.NDArray[np.int32]


def quantizer(kind: str) -> Any:
    """The stacks in one type, by libggml."""

    def quantize(name: str, values: Floats) -> tuple[npt.NDArray[Any], gguf.GGMLQuantizationType]:
        blocks = load_ggml().quantize(BY_NAME[kind], values.reshape(-1, values.shape[-1]), None)
        return blocks.reshape(*values.shape[:-1], -1), gguf.GGMLQuantizationType[kind]

    return quantize


def write_stock(directory: Path, architecture: Architecture, kinds: Sequence[str]) -> list[Path]:
    """One stock file a type, all of the same weights."""
    directory.mkdir(exist_ok=True)
    paths = [directory / f"{kind}.gguf" for kind in kinds]
    tensors = random_tensors(architecture)
    for kind, path in zip(kinds, paths, strict=True):
        write_model(path, architecture, tensors, quantizer(kind))
    return paths


def dequantized(path: Path, out: Path, architecture: Architecture) -> Path:
    """The stock-layout file in float32 of what ``path`` (stock or grouped) holds, by gguf's own dequantization."""
    tensors: dict[str, Floats] = {}
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name, tensor in found.items():
        if name.endswith("_exps.map"):
            rows, stem = tensor.data, name.removesuffix(".map")
            parts = [plain(found[f"{stem}.{g}.weight"]) for g in range(rows.shape[1])]
            experts = [parts[int(np.argmax(row))][row.max()] for row in rows]
            tensors[f"{stem}.weight"] = np.stack(experts)
        elif not name.rpartition("_exps.")[2][:1].isdigit():
            tensors[name] = plain(tensor)
    write_model(out, architecture, tensors, lambda _, values: (values, gguf.GGMLQuantizationType.F32))
    return out


def plain(tensor: gguf.ReaderTensor) -> Floats:
    return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)


def some_tokens(length: int) -> Tokens:
    return np.random.default_rng(length).integers(0, N_VOCAB, length, dtype=np.int32)


def logits(path: Path, tokens: Tokens, *, threads: int = 1, steps: bool = False, **options: Any) -> Floats:
    with LlamaModel(path, n_ctx=640, n_threads=threads, **options) as model:
        return model.step_logits(tokens) if steps else model.logits(tokens)


@pytest.fixture(params=ARCHITECTURES, scope="module")
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.fixture(scope="module")
def stock(architecture: Architecture, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_stock(tmp_path_factory.mktemp("stock"), architecture, MIX)


@pytest.mark.parametrize(("kind", "n_groups"), [("Q3_K", 3), ("Q4_K", 7)])
def test_groups_of_one_type_give_the_stock_logits_bit_for_bit(
    stock: list[Path], tmp_path: Path, kind: str, n_groups: int
) -> None:
    whole = stock[MIX.index(kind)]
    regroup([whole], tmp_path / "groups.gguf", by_turns(n_groups))
    for length in LENGTHS:
        tokens = some_tokens(length)
        for threads in (1, 2):
            expected = logits(whole, tokens, threads=threads)
            assert expected.std() > 1e-3
            assert np.array_equal(expected, logits(tmp_path / "groups.gguf", tokens, threads=threads))
    few = some_tokens(40)
    assert np.array_equal(logits(whole, few, steps=True), logits(tmp_path / "groups.gguf", few, steps=True))


def test_mixed_types_are_as_near_to_their_weights_as_uniform_files_are(
    architecture: Architecture, stock: list[Path], tmp_path: Path
) -> None:
    regroup(stock, tmp_path / "mix.gguf", by_turns(3))
    tokens = some_tokens(64)

    def distance(path: Path) -> float:
        exact = logits(dequantized(path, tmp_path / "f32.gguf", architecture), tokens)
        return float(np.abs(logits(path, tokens) - exact).max())

    tolerance = max(distance(path) for path in stock)
    spread = float(np.abs(logits(stock[0], tokens) - logits(stock[2], tokens)).max())
    assert distance(tmp_path / "mix.gguf") <= 1.5 * tolerance < spread


def test_batch_and_token_by_token_agree_as_in_stock_files(stock: list[Path], tmp_path: Path) -> None:
    regroup(stock, tmp_path / "mix.gguf", by_turns(3))
    tokens = some_tokens(64)

    def difference(path: Path) -> float:
        return float(np.abs(logits(path, tokens) - logits(path, tokens, steps=True)).max())

    # plain and repacked kernels, many rows and one, round differently: no more so than in the uniform files
    assert difference(tmp_path / "mix.gguf") <= 2 * max(difference(path) for path in stock) + 1e-5
