"""Tied embeddings: what config.json says times what the files have, decided as transformers decides it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from converters import CONVERTERS
from mopeq_edge.errors import SourceError
from mopeq_edge.source import tied
from mopeq_edge.source.checkpoint import Checkpoint
from mopeq_edge.source.open import open_source

from ..builders import write_gguf, write_safetensors
from .families import logits
from .tied import BUILDERS, COPY, NEEDS_OUTPUT, NONE, OTHER, build_tied, names, say


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(
    ("says", "head"), [(True, NONE), (True, COPY), (True, OTHER), (False, COPY), (False, OTHER), (None, OTHER)]
)
def test_what_is_written(name: str, says: bool | None, head: str, tmp_path: Path) -> None:
    directory = build_tied(name, tmp_path / "model", says, head, "bfloat16")
    embedding, output = names(directory)
    files = load_file(directory / "model.safetensors")
    source = open_source(directory, CONVERTERS, pre="gpt-2")
    tensors = {tensor.name: tensor for tensor in source.tensors}
    expected = None if head != OTHER and says and name not in NEEDS_OUTPUT else files.get(output, files[embedding])
    assert ("output.weight" in tensors) == (expected is not None)
    if expected is not None:
        assert tensors["output.weight"].shape == tuple(expected.shape)[::-1]
        assert np.array_equal(source.read(tensors["output.weight"]), expected.float().numpy())
    assert np.array_equal(source.read(tensors["token_embd.weight"]), files[embedding].float().numpy())
    lines = {
        COPY: f" and '{output}' has the numbers of '{embedding}'; the GGUF has them once",
        OTHER: f", but '{output}' differs from '{embedding}'; it is kept, as transformers does",
    }
    said = f"{directory}: config.json has tie_word_embeddings true"
    line = lines.get(head) if says and not (head == COPY and name in NEEDS_OUTPUT) else None
    found = [warning for warning in source.warnings if "tie_word_embeddings" in warning]
    assert found == ([] if line is None else [said + line])


@pytest.mark.parametrize("name", BUILDERS)
def test_an_output_matrix_that_is_missing(name: str, tmp_path: Path) -> None:
    """transformers makes a random one."""
    directory = build_tied(name, tmp_path / "model", False, NONE, "bfloat16")
    for says in (False, None):
        say(directory, says)
        with pytest.raises(SourceError) as caught:
            open_source(directory, CONVERTERS, pre="gpt-2")
        assert str(caught.value) == (
            f"{directory}: tensor '{names(directory)[1]}' (the output matrix: config.json does not have "
            "tie_word_embeddings true) is missing; download the whole checkpoint again"
        )


@pytest.mark.runtime
@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(("says", "head"), [(True, NONE), (True, COPY), (True, OTHER)])
def test_same_logits_as_transformers(name: str, says: bool, head: str, tmp_path: Path) -> None:
    from mopeq_edge.binding import LlamaModel

    directory = build_tied(name, tmp_path / "model", says, head)
    write_gguf(open_source(directory, CONVERTERS, pre="gpt-2"), tmp_path / "model.gguf")
    tokens = np.random.default_rng(0).integers(0, 4096, 24).tolist()
    expected = logits(BUILDERS[name][1](directory), tokens)
    with LlamaModel(tmp_path / "model.gguf", n_threads=1, plain=True) as llama:
        got = llama.logits(tokens)
    assert expected.std() > 0.5
    assert np.abs(got - expected).max() < 1e-4 * expected.std()


def test_a_difference_in_the_last_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared in parts, also across types; another shape is another matrix."""
    values = np.arange(15, dtype="<f4").reshape(5, 3)
    other = values.copy()
    other[4, 2] += 1
    write_safetensors(
        tmp_path / "model.safetensors",
        {
            "a": ("F32", (5, 3), values.tobytes()),
            "b": ("F64", (5, 3), values.astype("<f8").tobytes()),
            "c": ("F32", (5, 3), other.tobytes()),
            "d": ("F32", (3, 5), values.tobytes()),
        },
    )
    checkpoint = Checkpoint(tmp_path)
    for at_once in (1, 6, 2**22):
        monkeypatch.setattr(tied, "AT_ONCE", at_once)
        assert [tied.same_numbers(checkpoint, "a", name) for name in "abcd"] == [True, True, False, False]
