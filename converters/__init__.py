"""How checkpoints of each model family become GGUF tensors and key-values.

One module a family; this table is the only place that knows them all.
"""

from converters.deepseek_ocr import DEEPSEEK_OCR
from converters.deepseek_v2 import DEEPSEEK_V2, DEEPSEEK_V3
from converters.deepseek_vl2 import choose as choose_deepseek_vl2
from converters.gpt_oss import GPT_OSS
from converters.granite_moe import GRANITE_MOE
from converters.mixtral import MIXTRAL
from converters.molmoe import choose as choose_molmoe
from converters.olmoe import OLMOE
from converters.qwen2_moe import QWEN2_MOE
from converters.qwen3_moe import QWEN3_MOE
from converters.qwen3_vl_moe import QWEN3_VL_MOE
from converters.refused import REFUSED
from mopeq_edge.source.converter import Converters

CONVERTERS: Converters = {
    "DeepseekOCRForCausalLM": DEEPSEEK_OCR,
    "DeepseekV2ForCausalLM": DEEPSEEK_V2,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
    "DeepseekVLV2ForCausalLM": choose_deepseek_vl2,
    "deepseek_vl_v2": choose_deepseek_vl2,
    "GptOssForCausalLM": GPT_OSS,
    "GraniteMoeForCausalLM": GRANITE_MOE,
    "MixtralForCausalLM": MIXTRAL,
    "OLMoForCausalLM": choose_molmoe,
    "OlmoeForCausalLM": OLMOE,
    "Qwen2MoeForCausalLM": QWEN2_MOE,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "Qwen3VLMoeForConditionalGeneration": QWEN3_VL_MOE,
    **REFUSED,
}
"""Converters by the first name in ``architectures`` of a checkpoint's ``config.json``, or its ``model_type`` if it has
none; a function picks one by the rest of the settings."""
