"""What goes through a model as one: a window of text, or a prompt with pictures, which may have any length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mopeq_edge.binding import Floats, Tokens

PICTURE = -1
"""In the place of a token: here stands an embedding of a picture."""


@dataclass(frozen=True)
class Window:
    """``tokens`` [n_tokens]: ids, or :data:`PICTURE`; ``embeddings()`` has what stands there, in order [n, n_embd]."""

    tokens: Tokens
    embeddings: Callable[[], Floats] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def seen(self) -> npt.NDArray[np.bool_]:
        """Which positions are of pictures."""
        found: npt.NDArray[np.bool_] = self.tokens == PICTURE
        return found

    @property
    def predicts_text(self) -> npt.NDArray[np.bool_]:
        """Which positions are followed by a token of text, known or to come: what the model has logits for.

        The last position of a picture predicts the text behind it; none predicts a position of a picture.
        """
        return np.append(self.tokens[1:] != PICTURE, True)


def text_windows(tokens: Tokens) -> list[Window]:
    """Windows of text [n_windows, n_ctx]."""
    return [Window(row) for row in tokens]
