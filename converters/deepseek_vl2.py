"""DeepSeek-VL2 (Tiny, Small and the one without a name), text side: what sees pictures is left out.

The text model is one of three: without latent attention the DeepSeek of ``deepseek2-ocr`` (Tiny), with it the one of
DeepSeek-V2 (Small) or, if a bias takes part in the choice of experts, of DeepSeek-V3 (the largest). All are named as
these are, behind ``language.``. The released config.json has a ``model_type`` but no ``architectures``, and of the text
settings (``language_config``) those alone that differ from what DeepSeek's own class for them assumes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from converters import deepseek_ocr, deepseek_v2
from converters.deepseek_tensors import Place
from converters.key_values import need_number
from converters.tensor_table import Shapes
from mopeq_edge.errors import SourceError
from mopeq_edge.gguf_file import KV
from mopeq_edge.source.converter import Config, Converter, Latent, Recipe, Skeleton
from mopeq_edge.source.model import SourceTensor

PLACE = Place("language.", ("vision.", "projector.", "image_newline", "view_seperator", "tile_indicators"))

_ASSUMED: Mapping[str, Any] = {
    **{"vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "moe_intermediate_size": 1407},
    **{"num_hidden_layers": 30, "num_attention_heads": 32, "num_key_value_heads": 32, "use_mla": True},
    **{"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    **{"routed_scaling_factor": 1.0, "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False},
    **{"moe_layer_freq": 1, "first_k_dense_replace": 0, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    **{"rope_theta": 10000.0, "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False},
}
"""What DeepSeek's ``DeepseekV2Config`` assumes; transformers' class of that name assumes other numbers."""

_OF_ANOTHER = ("architectures", "auto_map", "model_type")
_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")


def text_settings(config: Config) -> dict[str, Any]:
    """``language_config`` with what it leaves out; a key that is there and null stays so."""
    found = config.get("language_config")
    if not isinstance(found, Mapping):
        raise SourceError("config.json has no language_config; use the config.json of these weights")
    text = {**_ASSUMED, **found}
    if text["use_mla"] is False:
        # the sizes of latent attention are 0 or null there, although all of a head is turned
        rope_dim = need_number(text, "hidden_size") // need_number(text, "num_attention_heads")
        return {**{key: value for key, value in text.items() if key not in _LATENT}, "qk_rope_head_dim": rope_dim}
    # transformers' V3 assumes groups and a further layer, DeepSeek's class here knows neither
    return {"n_group": 1, "topk_group": 1, **text, "num_nextn_predict_layers": 0}


def left_out(_: Config, shapes: Shapes) -> list[str]:
    """How many tensors see pictures, by the first part of their names."""
    seeing = Counter(name.partition(".")[0] for name in shapes if name.startswith(PLACE.skipped))
    if not seeing:
        return []
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(seeing.items()))
    return [f"{seeing.total()} tensors that see pictures are left out ({kinds}); the GGUF holds the text side"]


def _plain_recipes(config: Config, shapes: Shapes) -> list[Recipe]:
    return deepseek_ocr.recipes(text_settings(config), shapes, PLACE)


def _plain_key_values(
    directory: Path, config: Config, tensors: Sequence[SourceTensor], file_type: int, pre: str | None
) -> dict[str, KV]:
    return deepseek_ocr.key_values(directory, text_settings(config), tensors, file_type, pre, chat_template=None)


def _plain_skeleton(directory: Path, config: Config) -> tuple[Any, Any]:
    return deepseek_ocr.skeleton(directory, text_settings(config))


def _latent_recipes(version: deepseek_v2.Version, config: Config, shapes: Shapes) -> list[Recipe]:
    return deepseek_v2.recipes(version, text_settings(config), shapes, PLACE)


def _latent_key_values(
    version: deepseek_v2.Version,
    directory: Path,
    config: Config,
    tensors: Sequence[SourceTensor],
    file_type: int,
    pre: str | None,
) -> dict[str, KV]:
    return deepseek_v2.key_values(version, directory, text_settings(config), tensors, file_type, pre)


def _latent_skeleton(version: deepseek_v2.Version, _: Path, config: Config) -> tuple[Any, Any]:
    """transformers has these decoders as models of their own."""
    from transformers import DeepseekV2Config, DeepseekV2Model, DeepseekV3Config, DeepseekV3Model

    known: Mapping[str, tuple[Any, Any]] = {
        deepseek_v2.V2.name: (DeepseekV2Config, DeepseekV2Model),
        deepseek_v2.V3.name: (DeepseekV3Config, DeepseekV3Model),
    }
    of_config, of_model = known[version.name]
    text = of_config.from_dict({key: value for key, value in text_settings(config).items() if key not in _OF_ANOTHER})
    return text, of_model(text)


PREFIX = f"{PLACE.prefix}model."
PLAIN = Converter(
    deepseek_ocr.ARCHITECTURE,
    _plain_recipes,
    _plain_key_values,
    Skeleton(_plain_skeleton, prefix=PREFIX),
    left_out,
)
GREEDY, CORRECTED = (
    Converter(
        deepseek_v2.ARCHITECTURE,
        partial(_latent_recipes, version),
        partial(_latent_key_values, version),
        Skeleton(partial(_latent_skeleton, version), prefix=PREFIX, latent=Latent()),
        left_out,
    )
    for version in (deepseek_v2.V2, deepseek_v2.V3)
)


def choose(config: Config) -> Converter:
    """The converter of the text model that ``language_config`` describes."""
    text = text_settings(config)
    if text["use_mla"] is False:
        return PLAIN
    return CORRECTED if text["topk_method"] == "noaux_tc" else GREEDY
