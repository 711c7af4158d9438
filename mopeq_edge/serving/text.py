"""Tokens to text as it becomes whole, up to a text that stops it."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class Writer:
    """Takes the bytes of one token after the other and gives the text that is certain.

    A character may be several tokens, and what may be the beginning of one of ``stops`` is kept back. White space at
    the beginning is dropped with ``strip``.
    """

    def __init__(self, stops: Sequence[str], *, strip: bool = False) -> None:
        self._stops, self._strip = tuple(stops), strip
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._kept = ""
        self.stopped = False

    def add(self, piece: bytes) -> str:
        """The text that is certain behind ``piece``; nothing more once :attr:`stopped`."""
        return self._take(self._decoder.decode(piece))

    def end(self) -> str:
        """What was kept back."""
        text = self._take(self._decoder.decode(b"", final=True))
        rest, self._kept = self._kept, ""
        return text + rest

    def _take(self, text: str) -> str:
        if self.stopped:
            return ""
        self._kept += text
        if self._strip:
            self._kept = self._kept.lstrip()
            self._strip = not self._kept
        found = [at for stop in self._stops if (at := self._kept.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._kept = self._kept[: min(found)], ""
            return text
        certain = len(self._kept) - self._maybe()
        text, self._kept = self._kept[:certain], self._kept[certain:]
        return text

    def _maybe(self) -> int:
        """Characters at the end that may be the beginning of a stop."""
        longest = max((len(stop) for stop in self._stops), default=0)
        for n in range(min(longest - 1, len(self._kept)), 0, -1):
            if any(stop.startswith(self._kept[-n:]) for stop in self._stops):
                return n
        return 0
