"""Qwen3-VL-MoE, text side: Qwen3-MoE under another prefix, with packed experts stored as [n_in, n_out] and a rope for
time, height and width.

Tensor names: the released checkpoints' (``Qwen3VLMoeForConditionalGeneration``), llama.cpp's ``qwen3vlmoe``. What sees
pictures is llama.cpp's ``mmproj`` file and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.key_values import add_text_parameters, as_kvs, need_number, start_writer, with_defaults
from converters.qwen3_moe import LAYER, ONLY, sizes
from converters.rope_settings import check_rope
from converters.tensor_table import Experts, Shapes, Tables, check_only, decoder_rows, recipes_of
from converters.vocabulary import add_bpe_vocabulary
from mopeq_edge.errors import SourceError
from mopeq_edge.gguf_file import KV
from mopeq_edge.source.converter import Config, Converter, Recipe, Skeleton
from mopeq_edge.source.model import SourceTensor

ARCHITECTURE = "qwen3vlmoe"
PREFIX = "model.language_model."

_EXPERTS = Experts("mlp.experts", dict.fromkeys(("down", "gate", "up"), ""), packed=True, single=False, transposed=True)
_ASSUMED: Mapping[str, Any] = {
    **{"max_position_embeddings": 128000, "num_key_value_heads": 16, "rms_norm_eps": 1e-6},
    **{"intermediate_size": 5632, "moe_intermediate_size": 1408, "num_experts": 60, "num_experts_per_tok": 4},
}
_SECTIONS = (24, 20, 20)
_DEEPSTACK = (8, 16, 24)
"""Layers of the vision model whose states go into the first blocks of the text model."""


def recipes(config: Config, shapes: Shapes) -> list[Recipe]:
    """Recipes of the text model in the order of ``shapes``."""
    text = _text_config(config)
    check_only(text, ONLY, "Qwen3-VL-MoE")
    check_rope(text, ARCHITECTURE, "Qwen3-VL-MoE")
    return recipes_of(
        Tables(
            "a Qwen3-VL-MoE",
            # not the text's settings: the whole model says whether it is tied
            decoder_rows(config, shapes, decoder=PREFIX),
            lambda _: LAYER,
            _EXPERTS,
            sizes(text),
            need_number(text, "num_hidden_layers"),
            layers_prefix=f"{PREFIX}layers.",
            skipped=("model.visual.",),
        ),
        shapes,
    )


def key_values(
    directory: Path, config: Config, tensors: Sequence[SourceTensor], file_type: int, pre: str | None
) -> dict[str, KV]:
    """Key-values as llama.cpp's converter writes them."""
    text = _text_config(config)
    vision = config.get("vision_config")
    deepstack = vision.get("deepstack_visual_indexes", _DEEPSTACK) if isinstance(vision, Mapping) else _DEEPSTACK
    if not isinstance(deepstack, (list, tuple)):
        raise SourceError(f"config.json has deepstack_visual_indexes {deepstack!r}, expected a list of layers")
    extras = [
        ("add_expert_feed_forward_length", need_number(text, "moe_intermediate_size")),
        ("add_num_deepstack_layers", len(deepstack)),
    ]
    writer = start_writer(directory, ARCHITECTURE, tensors)
    add_text_parameters(writer, text, file_type, extras)
    add_bpe_vocabulary(writer, directory, need_number(text, "vocab_size"), pre)
    return as_kvs(writer)


def skeleton(directory: Path, _: Config) -> tuple[Any, Any]:
    """The decoder alone, without the vision model."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeTextModel

    config = Qwen3VLMoeConfig.from_pretrained(directory).text_config
    config._attn_implementation = "sdpa"
    return config, Qwen3VLMoeTextModel(config)


QWEN3_VL_MOE = Converter(ARCHITECTURE, recipes, key_values, Skeleton(skeleton, prefix=PREFIX))


def _text_config(config: Config) -> dict[str, Any]:
    """The text settings with what transformers' ``Qwen3VLMoeTextConfig`` assumes where they say nothing."""
    found = config.get("text_config")
    if not isinstance(found, Mapping):
        raise SourceError("config.json has no text_config; use the config.json of these weights")
    text = with_defaults(found, _ASSUMED, rope_theta=500000.0)
    if text.get("num_local_experts") is not None:
        text["num_experts"] = text["num_local_experts"]
    if text.get("head_dim") is None:
        text["head_dim"] = need_number(text, "hidden_size") // need_number(text, "num_attention_heads")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    return {**text, "rope_parameters": {"mrope_section": list(_SECTIONS), **rope}}
