"""Text as the windows of tokens that llama.cpp will see."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mopeq_edge.binding import LlamaModel, Tokens
from mopeq_edge.evaluate.chunks import cut_text
from mopeq_edge.gguf_file import KV
from mopeq_edge.gguf_layout import layout


def token_windows(kvs: Mapping[str, KV], text: str, n_ctx: int, n_chunks: int | None) -> Tokens:
    """``text`` cut as llama-imatrix cuts it: int32 [n_windows, n_ctx].

    The tokenizer is llama.cpp's, loaded from the key-values alone, so these are the tokens of the finished
    file. Raises :class:`MopeqError` when the text does not fill one window.
    """
    with vocabulary(kvs) as model:
        return cut_text(model, text, n_ctx, n_chunks)


@contextmanager
def vocabulary(kvs: Mapping[str, KV]) -> Iterator[LlamaModel]:
    """llama.cpp's tokenizer for a file with ``kvs``."""
    with tempfile.TemporaryDirectory(prefix="mopeq-edge-") as folder:
        path = Path(folder) / "vocabulary.gguf"
        path.write_bytes(layout(kvs, []).header)
        with LlamaModel(path, vocab_only=True) as model:
            yield model


def split_text(text: str, held_out: float) -> tuple[str, str]:
    """(text to calibrate on, held-out tail): the tail is about ``held_out`` of the text, cut at a line end."""
    at = int(len(text) * (1.0 - held_out))
    end = text.rfind("\n", 0, at) + 1 or at
    return text[:end], text[end:]
