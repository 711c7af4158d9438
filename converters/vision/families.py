"""Vision sides that are known here, by what config.json says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.vision import deepseek_vl2, molmoe
from converters.vision.weights import Tensors, Weights


@dataclass(frozen=True)
class Family:
    """How a vision side is read and built.

    What ``read`` gives has ``kind``, ``n_embd``, ``layout`` and ``prompt`` of the description, and ``unused``: what
    the names of tensors begin with that nothing computes.
    """

    name: str
    prefixes: tuple[str, ...]
    """What the names of its tensors begin with."""
    read: Callable[[Path, Mapping[str, Any], Tensors], Any]
    build: Callable[[Any, Weights], None]


DEEPSEEK_VL2 = Family(
    "DeepSeek-VL2",
    deepseek_vl2.ROOT,
    lambda directory, config, _: deepseek_vl2.read_tower(directory, config),
    deepseek_vl2.build,
)
MOLMOE = Family("MolmoE", molmoe.ROOT, molmoe.read_tower, molmoe.build)

FAMILIES: Mapping[str, Family] = {
    "DeepseekVLV2ForCausalLM": DEEPSEEK_VL2,
    "deepseek_vl_v2": DEEPSEEK_VL2,
    "OLMoForCausalLM": MOLMOE,
}


def find_family(config: Mapping[str, Any]) -> Family | None:
    """The vision side of a checkpoint by the first of its ``architectures`` or its ``model_type``; None if unknown."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    return FAMILIES.get(first or str(config.get("model_type")))
