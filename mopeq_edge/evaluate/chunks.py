"""Text into windows of tokens, cut as ``llama-perplexity`` and ``llama-imatrix`` cut it.

The one difference: those tools want text for two windows, here one is enough.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from mopeq_edge.binding import Tokens
from mopeq_edge.errors import MopeqError

Positions = Literal["second-half", "all"]
"""Which positions of a window count."""


class Tokenizer(Protocol):
    """What the cutting needs of a model."""

    @property
    def add_bos(self) -> bool: ...

    @property
    def bos(self) -> int: ...

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = False) -> Tokens: ...


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; a final newline is dropped, line ends are kept as they are.

    Raises :class:`MopeqError` if it cannot be read or is not UTF-8.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise MopeqError(f"{path}: cannot be read ({error.strerror}); give a text file") from None
    except UnicodeDecodeError as error:
        raise MopeqError(f"{path}: not UTF-8 (at byte {error.start}); save the text as UTF-8") from None
    return text.removesuffix("\n")


def windows(tokens: Tokens, n_ctx: int, *, n_chunks: int | None = None, bos: int | None = None) -> Tokens:
    """Cut ``tokens`` [n_tokens] into whole windows, int32 [n_windows, n_ctx]; the rest is dropped.

    At most ``n_chunks`` windows, all if None. ``bos`` takes the place of each window's first token, None
    leaves it: every window is then a text that begins as the model expects. Raises :class:`MopeqError` if
    there are too few tokens for one window, or a size is out of range.
    """
    if n_ctx < 2:
        raise MopeqError(f"a window of {n_ctx} tokens predicts nothing; give 2 or more")
    if n_chunks is not None and n_chunks < 1:
        raise MopeqError(f"{n_chunks} windows measure nothing; give 1 or more")
    n_windows = len(tokens) // n_ctx
    if not n_windows:
        raise MopeqError(
            f"the text has {len(tokens)} tokens, too few for one window of {n_ctx}; "
            "give a longer text or a shorter context"
        )
    if n_chunks is not None:
        n_windows = min(n_windows, n_chunks)
    cut = tokens[: n_windows * n_ctx].reshape(n_windows, n_ctx).astype(np.int32)
    if bos is not None:
        cut[:, 0] = bos
    return cut


def cut_text(tokenizer: Tokenizer, text: str, n_ctx: int, n_chunks: int | None = None) -> Tokens:
    """Tokenize ``text`` and cut it with :func:`windows`, int32 [n_windows, n_ctx]."""
    tokens = tokenizer.tokenize(text, add_special=True)
    return windows(tokens, n_ctx, n_chunks=n_chunks, bos=tokenizer.bos if tokenizer.add_bos else None)


def first_counted(n_ctx: int, positions: Positions) -> int:
    """The first position of a window that counts.

    Positions count from here up to ``n_ctx`` - 2: the last one has no next token in its window.
    ``second-half`` is ``llama-perplexity``'s way, so that every counted token has context.
    """
    return n_ctx // 2 if positions == "second-half" else 0
