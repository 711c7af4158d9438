"""Text as the tokens that llama.cpp will see, cut into windows as llama-imatrix cuts them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mopeq_edge.binding import LlamaModel
from mopeq_edge.errors import CalibrationError
from mopeq_edge.gguf_file import KV
from mopeq_edge.gguf_layout import layout

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Text:
    """Windows of text: ``windows`` [n_windows, n_ctx] token ids."""

    windows: Tokens
    n_vocab: int


def read_text(path: Path) -> str:
    """The text in ``path``. Raises :class:`CalibrationError` if it is missing, empty or not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read as UTF-8 text ({error}); give a plain text file") from None
    if not text.strip():
        raise CalibrationError(f"{path}: the text is empty; give some hundred kB of text like that the model will see")
    return text


def tokenize(kvs: Mapping[str, KV], text: str) -> tuple[Tokens, int, int | None]:
    """(token ids, vocabulary size, BOS id or None if windows do not start with it), by llama.cpp's tokenizer.

    The tokenizer is loaded from the key-values alone, so the tokens are those of the finished file.
    """
    with tempfile.TemporaryDirectory(prefix="mopeq-edge-") as folder:
        path = Path(folder) / "vocabulary.gguf"
        path.write_bytes(layout(kvs, []).header)
        with LlamaModel(path, vocab_only=True) as model:
            tokens = model.tokenize(text, add_special=True)
            return tokens, model.n_vocab, model.bos if model.add_bos else None


def cut_windows(tokens: Tokens, n_ctx: int, bos: int | None, *, first: int = 0, count: int | None = None) -> Tokens:
    """Windows ``first`` to ``first + count`` [n_windows, n_ctx]; the incomplete tail is dropped.

    Each window is a text of its own: its first token is replaced by BOS where the model wants one.
    Raises :class:`CalibrationError` when not one window is left.
    """
    available = len(tokens) // n_ctx
    last = available if count is None else min(available, first + count)
    if last <= first:
        raise CalibrationError(
            f"text of {len(tokens)} tokens: has {available} windows of {n_ctx}, expected more than {first}; "
            "give more text or a smaller --ctx"
        )
    windows = np.array(tokens[first * n_ctx : last * n_ctx], dtype=np.int32).reshape(-1, n_ctx)
    if bos is not None:
        windows[:, 0] = bos
    return windows
