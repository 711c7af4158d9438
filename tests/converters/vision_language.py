"""Test-size vision-language checkpoints as released, and the same weights as the model that their text side is.

Names and settings of the other model are written down here once more, independently of the converters.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tools.vision_language_checkpoints import Options, write_checkpoint
from tools.vision_language_configs import BASE, MOLMOE, SMALL, TINY

from .families import causal_model

Tensors = dict[str, Any]

_SETTINGS = (
    *("hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "first_k_dense_replace"),
    *("max_position_embeddings", "vocab_size", "n_group", "topk_group", "topk_method", "bos_token_id", "eos_token_id"),
)
_LATENT_SETTINGS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu"}


def build(model: str, directory: Path, dtype: str, **options: Any) -> Path:
    return write_checkpoint(directory, Options(model, shrink=True, dtype=dtype, **options))


def renamed(directory: Path, into: Path) -> Path:
    """The text side of ``directory`` as a checkpoint of the model that llama.cpp and transformers know."""
    from safetensors.torch import load_file, save_file

    config = json.loads((directory / "config.json").read_text())
    rename = _molmoe_as_olmoe if config["model_type"] == "molmo" else _vl2_as_deepseek
    settings, tensors = rename(config, load_file(directory / "model.safetensors"))
    into.mkdir(parents=True)
    save_file({name: value.clone() for name, value in tensors.items()}, into / "model.safetensors", {"format": "pt"})
    (into / "config.json").write_text(json.dumps(settings))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / name, into / name)
    if config["model_type"] == "molmo":
        _without_picture_tokens(into / "tokenizer.json")
    return into


def _molmoe_as_olmoe(config: Mapping[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    settings = {
        **{"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_size": 64, "intermediate_size": 32},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8},
        **{"num_experts_per_tok": 2, "max_position_embeddings": 256, "vocab_size": 4104, "norm_topk_prob": False},
        **{**_COMMON, "rms_norm_eps": 1e-5},
    }
    assert (config["d_model"], config["n_layers"], config["embedding_size"]) == (64, 2, 4104)
    names = {
        "model.transformer.wte.embedding": "model.embed_tokens.weight",
        "model.transformer.ln_f.weight": "model.norm.weight",
        "model.transformer.ff_out.weight": "lm_head.weight",
    }
    inside = {
        **{"attn_out": "self_attn.o_proj", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"},
        **{"attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm"},
    }
    found: Tensors = {}
    for name, value in tensors.items():
        if name in names:
            found[names[name]] = value
        elif name.startswith("model.transformer.blocks."):
            layer, _, rest = name.removeprefix("model.transformer.blocks.").partition(".")
            own = f"model.layers.{layer}."
            if rest == "att_proj.weight":
                q, k, v = value[:64], value[64:128], value[128:]
                found |= {
                    f"{own}self_attn.{which}_proj.weight": part for which, part in zip("qkv", (q, k, v), strict=True)
                }
            elif rest.startswith("mlp."):
                found[own + rest] = value
            else:
                found[f"{own}{inside[rest.removesuffix('.weight')]}.weight"] = value
    return settings, found


def _vl2_as_deepseek(config: Mapping[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    text = config["language_config"]
    settings = {**_COMMON, **{key: text[key] for key in _SETTINGS}}
    if "use_mla" in text:
        settings |= {"architectures": ["DeepseekOCRForCausalLM"], "model_type": "DeepseekOCR", "use_mla": False}
        settings |= {"qk_rope_head_dim": 16, "scoring_func": "softmax", "routed_scaling_factor": 1.0}
    else:
        settings |= {key: text[key] for key in _LATENT_SETTINGS}
        version = "v3" if text["topk_method"] == "noaux_tc" else "v2"
        settings |= {"architectures": [f"Deepseek{version.upper()}ForCausalLM"], "model_type": f"deepseek_{version}"}
        settings |= {"routed_scaling_factor": 2.0 if version == "v3" else 1.0, "norm_topk_prob": version == "v3"}
        settings |= {"num_nextn_predict_layers": 0, "scoring_func": "sigmoid" if version == "v3" else "softmax"}
    prefix = "language."
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return settings, found


def _without_picture_tokens(path: Path) -> None:
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < 4104]
    path.write_text(json.dumps(tokenizer))


def renamed_model(directory: Path) -> Any:
    """transformers' float32 model with the same weights, opened as it opens that model."""
    return causal_model(renamed(directory, directory.with_name(f"{directory.name}-renamed")))


def plain_model(directory: Path) -> Any:
    """The decoder inside DeepSeek-OCR-2, its packed experts filled from the files."""
    from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig

    from tools.tiny_models import DeepseekTextLM

    text = json.loads((directory / "config.json").read_text())["language_config"]
    keys = [key for key in _SETTINGS if key not in ("first_k_dense_replace", "topk_method")]
    settings = DeepseekOcr2TextConfig(
        **{key: text[key] for key in keys},
        mlp_layer_types=["dense", "sparse", "sparse"],
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    settings._attn_implementation = "sdpa"
    return fill_plain(DeepseekTextLM(settings).eval(), directory)


def fill_plain(model: Any, directory: Path) -> Any:
    """``model`` with the text weights of the DeepSeek-VL2 in ``directory``."""
    import torch
    from safetensors.torch import load_file

    files = {
        name.removeprefix("language."): value for name, value in load_file(directory / "model.safetensors").items()
    }
    for name, value in model.named_parameters():
        own = name.rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            pairs = [[files[f"{own}.{e}.{w}_proj.weight"] for w in ("gate", "up")] for e in range(len(value))]
            value.data = torch.stack([torch.cat(pair) for pair in pairs]).float()
        elif name.endswith("experts.down_proj"):
            value.data = torch.stack([files[f"{own}.{e}.down_proj.weight"] for e in range(len(value))]).float()
        else:
            value.data = files[name].float()
    return model


VISION_LANGUAGE: Mapping[str, tuple[Callable[[Path, str], Path], Callable[[Path], Any]]] = {
    MOLMOE: (partial(build, MOLMOE), renamed_model),
    TINY: (partial(build, TINY), plain_model),
    SMALL: (partial(build, SMALL), renamed_model),
    BASE: (partial(build, BASE), renamed_model),
}
"""As in ``FAMILIES``; llama.cpp's own converter knows none of these."""
