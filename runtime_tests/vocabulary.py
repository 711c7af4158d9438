"""Text to tokens and back, by the library or, where the binding does not fit it, by llama-server."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from runtime_tests.engines import Engines

Tokens = npt.NDArray[np.int32]


class Vocabulary(Protocol):
    """What :class:`mopeq_edge.binding.LlamaModel` has too."""

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = False) -> Tokens: ...

    def detokenize(self, tokens: npt.ArrayLike) -> str: ...


class ServerVocabulary:
    """llama-server's, which is started again where something else was needed in between."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = False) -> Tokens:
        """Token ids [n]."""
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return np.asarray(self._engines.server().post("/tokenize", body)["tokens"], np.int32)

    def detokenize(self, tokens: npt.ArrayLike) -> str:
        """The text of token ids [n]."""
        body = {"tokens": np.asarray(tokens).tolist()}
        return str(self._engines.server().post("/detokenize", body)["content"])
