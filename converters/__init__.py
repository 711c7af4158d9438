"""How checkpoints of each model family become GGUF tensors and key-values.

One module a family; this table is the only place that knows them all.
"""

from converters.deepseek_ocr import DEEPSEEK_OCR
from converters.deepseek_v2 import DEEPSEEK_V2, DEEPSEEK_V3
from converters.mixtral import MIXTRAL
from converters.olmoe import OLMOE
from mopeq_edge.source.converter import Converter

CONVERTERS: dict[str, Converter] = {
    "DeepseekOCRForCausalLM": DEEPSEEK_OCR,
    "DeepseekV2ForCausalLM": DEEPSEEK_V2,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
    "MixtralForCausalLM": MIXTRAL,
    "OlmoeForCausalLM": OLMOE,
}
"""Converters by the first name in ``architectures`` of a checkpoint's ``config.json``."""
