"""How checkpoints of each model family become GGUF tensors and key-values.

One module a family; this table is the only place that knows them all.
"""

from converters.olmoe import OLMOE
from mopeq_edge.source.converter import Converter

CONVERTERS: dict[str, Converter] = {
    "OlmoeForCausalLM": OLMOE,
}
"""Converters by the first name in ``architectures`` of a checkpoint's ``config.json``."""
