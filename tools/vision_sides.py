"""Names and shapes of what sees pictures in MolmoE and DeepSeek-VL2, as released.

Sources: DeepSeek's ``modeling_deepseek_vl_v2.py`` and ``siglip_vit.py``, Ai2's ``modeling_molmoe.py``. DeepSeek's
classes assume settings that config.json does not have; so does this table. DeepSeek-VL2's checkpoint also has the
pooling head of SigLIP, which nothing computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]

_SIGLIP: Mapping[str, Any] = {"image_size": 384, "patch_size": 16, "width": 1024, "layers": 24, "mlp_ratio": 4}
_PROJECTOR: Mapping[str, Any] = {
    **{"projector_type": "downsample_mlp_gelu", "input_dim": 1152, "n_embed": 2048, "depth": 2, "mlp_ratio": 1},
    "downsample_ratio": 2,
}


def vl2_vision_shapes(config: Mapping[str, Any]) -> Shapes:
    """The tower with its head, the projector and the two vectors of the layout."""
    vision, projector = {**_SIGLIP, **config["vision_config"]}, {**_PROJECTOR, **config["projector_config"]}
    width, ff, side = vision["width"], int(vision["width"] * vision["mlp_ratio"]), vision["patch_size"]
    shapes: Shapes = {
        "vision.pos_embed": (1, (vision["image_size"] // side) ** 2, width),
        **_linear("vision.patch_embed.proj", width, 3, side, side),
        **_norm("vision.norm", width),
    }
    for layer in range(vision["layers"]):
        block = f"vision.blocks.{layer}."
        shapes |= {**_norm(f"{block}norm1", width), **_norm(f"{block}norm2", width)}
        shapes |= {**_linear(f"{block}attn.qkv", 3 * width, width), **_linear(f"{block}attn.proj", width, width)}
        shapes |= {**_linear(f"{block}mlp.fc1", ff, width), **_linear(f"{block}mlp.fc2", width, ff)}
    pool = "vision.attn_pool."
    shapes |= {f"{pool}latent": (1, 1, width), **_linear(f"{pool}q", width, width), **_norm(f"{pool}norm", width)}
    shapes |= {**_linear(f"{pool}kv", 2 * width, width), **_linear(f"{pool}proj", width, width)}
    shapes |= {**_linear(f"{pool}mlp.fc1", ff, width), **_linear(f"{pool}mlp.fc2", width, ff)}
    n_embd = projector["n_embed"]
    inner = n_embd * projector["mlp_ratio"]
    shapes |= _linear("projector.layers.0", inner, projector["input_dim"] * projector["downsample_ratio"] ** 2)
    shapes |= _linear("projector.layers.2", n_embd, inner)
    return {**shapes, "image_newline": (n_embd,), "view_seperator": (n_embd,)}


def molmoe_vision_shapes(config: Mapping[str, Any]) -> Shapes:
    """The tower, its pooling and the projector."""
    vit, root = config["vision_backbone"], "model.vision_backbone."
    width, ff, side = vit["image_emb_dim"], vit["image_mlp_dim"], vit["image_patch_size"]
    pooled, inner = width * len(config["vit_layers"]), config["mlp_ratio"] * config["d_model"] // 2
    tower = f"{root}image_vit."
    shapes: Shapes = {
        f"{tower}class_embedding": (width,),
        f"{tower}positional_embedding": (vit["image_num_pos"], width),
        f"{tower}patch_embedding.weight": (width, 3 * side * side),
        **_norm(f"{tower}pre_ln", width),
    }
    for layer in range(vit["image_num_layers"]):
        block = f"{tower}transformer.resblocks.{layer}."
        for which in ("wq", "wk", "wv", "wo"):
            shapes |= _linear(f"{block}attention.{which}", width, width)
        shapes |= {**_norm(f"{block}attention_norm", width), **_norm(f"{block}ffn_norm", width)}
        shapes |= {**_linear(f"{block}feed_forward.w1", ff, width), **_linear(f"{block}feed_forward.w2", width, ff)}
    for which in ("wq", "wk", "wv"):
        shapes |= _linear(f"{root}image_pooling_2d.{which}", width, pooled)
    return {
        **shapes,
        **_linear(f"{root}image_pooling_2d.wo", width, width),
        f"{root}image_projector.w1.weight": (inner, width),
        f"{root}image_projector.w2.weight": (config["d_model"], inner),
        f"{root}image_projector.w3.weight": (inner, width),
        f"{root}pad_embed": (2, pooled),
    }


def _linear(name: str, n_out: int, *n_in: int) -> Shapes:
    return {f"{name}.weight": (n_out, *n_in), f"{name}.bias": (n_out,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def processor_file(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and content of the file of a release that says how pictures are prepared."""
    if "vision_backbone" not in config:
        return "processor_config.json", {
            **{"add_special_token": False, "candidate_resolutions": config["candidate_resolutions"]},
            **{"downsample_ratio": 2, "ignore_id": -100, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
            **{"image_token": "<image>", "mask_prompt": False, "normalize": True, "pad_token": "<｜▁pad▁｜>"},
            **{"patch_size": 14, "processor_class": "DeepseekVLV2Processor", "sft_format": "deepseek"},
        }
    vit = config["vision_backbone"]
    tokens = (vit["image_default_input_size"][0] // vit["image_patch_size"] + 1) // 2
    return "preprocessor_config.json", {
        **{"base_image_input_size": vit["image_default_input_size"], "do_normalize": True, "image_padding_mask": True},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        **{"image_patch_size": vit["image_patch_size"], "image_processor_type": "MolmoImageProcessor"},
        **{"image_token_length_h": tokens, "image_token_length_w": tokens, "max_crops": 12, "overlap_margins": [4, 4]},
        "processor_class": "MolmoProcessor",
    }
