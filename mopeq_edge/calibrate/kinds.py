"""A watch that keeps the tokens of text and those of pictures apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mopeq_edge.calibrate.experts import HookedOutputs, Recorder
from mopeq_edge.calibrate.statistics import TEXT, VISION
from mopeq_edge.calibrate.windows import Window


@dataclass
class KindsRecorder(HookedOutputs):
    """Statistics of one window with pictures through one block; ``seen`` [n_tokens] says which are of pictures."""

    seen: Tensor
    text: Recorder = field(default_factory=Recorder)
    vision: Recorder = field(default_factory=Recorder)

    def by_kind(self) -> Mapping[str, Recorder]:
        """What was counted of each kind of tokens."""
        return {TEXT: self.text, VISION: self.vision}

    def route(self, index: Tensor, weights: Tensor, n_expert: int) -> tuple[Tensor, Tensor]:
        """As :meth:`Recorder.route`."""
        for own, rows in self._each(None):
            own.route(index[rows], weights[rows], n_expert)
        return index, weights

    def saw_input(
        self, name: str, x: Tensor, matrix: int = 0, n_matrices: int = 1, *, tokens: Tensor | None = None
    ) -> None:
        """As :meth:`Recorder.saw_input`."""
        for own, rows in self._each(tokens):
            own.saw_input(name, x[rows], matrix, n_matrices)

    def saw_gradient(
        self, name: str, x: Tensor, g: Tensor, matrix: int = 0, n_matrices: int = 1, *, tokens: Tensor | None = None
    ) -> None:
        """As :meth:`Recorder.saw_gradient`."""
        g = g.reshape(len(x), -1)
        for own, rows in self._each(tokens):
            own.saw_gradient(name, x[rows], g[rows], matrix, n_matrices)

    def _each(self, tokens: Tensor | None) -> Iterator[tuple[Recorder, Tensor]]:
        """Each kind's recorder with the rows that are its, of the ``tokens`` given, or of all; none without rows."""
        seen = self.seen if tokens is None else self.seen[tokens]
        for own, mask in ((self.text, ~seen), (self.vision, seen)):
            if len(rows := mask.nonzero().reshape(-1)):
                yield own, rows


def recorder_of(window: Window) -> Recorder | KindsRecorder:
    """What watches ``window``."""
    return Recorder() if window.embeddings is None else KindsRecorder(torch.from_numpy(window.seen))
