"""config.json of MolmoE-1B-0924 and the three DeepSeek-VL2 as released, and of test-size models of the same kinds.

What the released files leave out is left out here too: DeepSeek-VL2's text settings are only those that differ from
the defaults of DeepSeek's own class, and there are no ``architectures``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOLMOE, TINY, SMALL, BASE = "molmoe-1b", "vl2-tiny", "vl2-small", "vl2-base"
MODELS = (MOLMOE, TINY, SMALL, BASE)

_MOLMOE: Mapping[str, Any] = {
    "architectures": ["OLMoForCausalLM"],
    "auto_map": {"AutoConfig": "config_molmoe.MolmoConfig", "AutoModelForCausalLM": "modeling_molmoe.MolmoForCausalLM"},
    "model_type": "molmo",
    **{"d_model": 2048, "n_heads": 16, "n_kv_heads": None, "n_layers": 16, "mlp_ratio": 1, "mlp_hidden_size": None},
    **{"moe_num_experts": 64, "moe_top_k": 8, "moe_shared_expert": False, "moe_interleave": False},
    **{"moe_dropless": True, "moe_mlp_impl": "sparse", "block_type": "moe", "activation_type": "swiglu"},
    **{"attention_layer_norm": True, "attention_layer_norm_with_affine": True, "layer_norm_type": "rms"},
    **{"layer_norm_with_affine": True, "layer_norm_eps": 1e-05, "bias_for_layer_norm": False, "include_bias": False},
    **{"rope": True, "rope_full_precision": True, "rope_impl": "llama", "rope_theta": 10000.0, "alibi": False},
    **{"max_sequence_length": 4096, "max_position_embeddings": 32768, "scale_logits": False, "weight_tying": False},
    **{"vocab_size": 50280, "embedding_size": 50304, "additional_vocab_size": 128, "clip_qkv": None},
    **{"multi_query_attention": None, "norm_after": False, "qkv_bias": False, "normalize_input_embeds": False},
    **{"image_pooling_2d": "attention-meanq", "image_projector": "mlp", "torch_dtype": "float32"},
    **{"image_padding_embed": "pad_and_partial_pad", "image_pooling_h": 2, "image_pooling_w": 2},
    **{"use_cls_feature": False, "vit_layers": [-2, -9]},
    "vision_backbone": {
        **{"image_model_type": "openai", "image_default_input_size": [336, 336], "image_patch_size": 14},
        **{"image_pos_patch_size": 14, "image_emb_dim": 1024, "image_num_heads": 16, "image_num_key_value_heads": 16},
        **{"image_num_layers": 23, "image_head_dim": 64, "image_mlp_dim": 4096, "image_num_pos": 577},
        **{"image_mlp_activations": "quick_gelu", "image_norm_eps": 1e-05},
    },
}
_TILES = tuple((width, height) for width in range(1, 10) for height in range(1, 10) if width * height <= 9)
"""Shapes of a picture in tiles of DeepSeek-VL2."""
_TEXT: Mapping[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "model_type": "deepseek_v2",
    **{"bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 1, "lm_head": True, "rm_head": False},
    **{"max_position_embeddings": 4096, "n_group": 1, "topk_group": 1, "n_shared_experts": 2, "q_lora_rank": None},
    **{"num_experts_per_tok": 6, "topk_method": "greedy", "torch_dtype": "bfloat16"},
}
_TEXTS: Mapping[str, Mapping[str, Any]] = {
    TINY: {
        **{"hidden_size": 1280, "intermediate_size": 6848, "moe_intermediate_size": 896, "n_routed_experts": 64},
        **{"num_attention_heads": 10, "num_key_value_heads": 10, "num_hidden_layers": 12, "vocab_size": 129280},
        **{"use_mla": False, "kv_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0},
    },
    SMALL: {
        **{"hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64},
        **{"num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 27},
    },
    BASE: {
        **{"hidden_size": 2560, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 72},
        **{"vocab_size": 129280, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True},
        "routed_scaling_factor": 2.0,
    },
}
_SHRUNK: Mapping[str, Mapping[str, Any]] = {
    MOLMOE: {
        **{"d_model": 64, "n_heads": 4, "n_layers": 2, "moe_num_experts": 8, "moe_top_k": 2},
        **{"max_sequence_length": 256, "vocab_size": 4096, "embedding_size": 4104, "additional_vocab_size": 8},
        "vision_backbone": {
            **_MOLMOE["vision_backbone"],
            **{"image_default_input_size": [24, 24], "image_patch_size": 2, "image_pos_patch_size": 2},
            **{"image_emb_dim": 32, "image_num_heads": 4, "image_num_key_value_heads": 4, "image_num_layers": 10},
            **{"image_head_dim": 8, "image_mlp_dim": 48, "image_num_pos": 145},
        },
    },
    TINY: {
        **{"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 3},
    },
    # 26 or 27 layers are what llama.cpp takes for a model with one matrix for the query
    SMALL: {
        **{"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 6},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 27},
    },
    BASE: {
        **{"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 9},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 3},
    },
}
_SHRUNK_TEXT: Mapping[str, Any] = {"vocab_size": 4104, "max_position_embeddings": 256, "num_experts_per_tok": 3}
_SHRUNK_VISION: Mapping[str, Any] = {"image_size": 44, "width": 32, "layers": 2, "heads": 4}
_SHRUNK_LATENT: Mapping[str, Any] = {
    **{"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 24}
}


def config_of(model: str, layers: int | None = None, shrink: bool = False) -> dict[str, Any]:
    """The config.json of ``model``; with ``layers`` of so many blocks, with ``shrink`` of a test-size model."""
    changes: dict[str, Any] = dict(_SHRUNK[model]) if shrink else {}
    if layers is not None:
        changes["n_layers" if model == MOLMOE else "num_hidden_layers"] = layers
    if model == MOLMOE:
        return {**_MOLMOE, **changes}
    vision: dict[str, Any] = {
        **{"layers": 27, "mlp_ratio": 3.7362, "model_name": "siglip_so400m_patch14_384", "model_type": "vision"},
        **{"patch_size": 14, "width": 1152},
    }
    projector: dict[str, Any] = {"model_type": "mlp_projector"}
    if shrink:
        changes |= _SHRUNK_TEXT if model == TINY else {**_SHRUNK_TEXT, **_SHRUNK_LATENT}
        vision |= _SHRUNK_VISION
        projector |= {"input_dim": vision["width"], "n_embed": changes["hidden_size"]}
    elif model != SMALL:
        projector["n_embed"] = _TEXTS[model]["hidden_size"]
    side = vision.get("image_size", 384)
    return {
        **{"model_type": "deepseek_vl_v2", "tile_tag": "2D", "global_view_pos": "head", "torch_dtype": "bfloat16"},
        "candidate_resolutions": [[side * width, side * height] for width, height in _TILES],
        "language_config": {**_TEXT, **_TEXTS[model], **changes},
        "projector_config": projector,
        "vision_config": vision,
    }
