"""Families that llama.cpp loads and computes as another model: no GGUF of such a checkpoint would be right.

They are refused by name, with the reason, rather than called unknown: the advice for an unknown family is to let
llama.cpp convert it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from converters.tensor_table import Shapes
from mopeq_edge.errors import SourceError
from mopeq_edge.gguf_file import KV
from mopeq_edge.source.converter import Config, Converter, Recipe
from mopeq_edge.source.model import SourceTensor

_PHIMOE = (
    "PhiMoE has layer norms, and weighs its two experts one after the other (sparsemixer); llama.cpp's phimoe computes "
    "RMS norms and the softmax of both, scaled to one"
)

REASONS: Mapping[str, tuple[str, str]] = {
    "PhiMoEForCausalLM": ("phimoe", _PHIMOE),
    "PhimoeForCausalLM": ("phimoe", _PHIMOE),
}
"""GGUF architecture and what differs, by the name in config.json: the released one's and transformers' own."""


def refused(architecture: str, reason: str) -> Converter:
    """A converter that raises :class:`SourceError` before anything is read."""

    def recipes(_: Config, __: Shapes) -> list[Recipe]:
        raise SourceError(
            f"{reason}, so no GGUF of this checkpoint would be right; choose a model of another family, or give "
            "llama.cpp's own GGUF of it to quantize what llama.cpp makes of it"
        )

    def key_values(
        directory: Path, config: Config, tensors: Sequence[SourceTensor], file_type: int, pre: str | None
    ) -> dict[str, KV]:
        raise SourceError(reason)

    return Converter(architecture, recipes, key_values)


REFUSED: Mapping[str, Converter] = {name: refused(*reason) for name, reason in REASONS.items()}
