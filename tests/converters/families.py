"""A tiny random checkpoint of every family but OLMoE, with transformers' model of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..builders import TOKENIZER_FROM

VOCAB = 4100


def spread(model: Any) -> None:
    """Weights large enough for logits and routers that differ by more than rounding."""
    import torch

    torch.manual_seed(0)
    for name, value in model.named_parameters():
        noise = torch.randn_like(value)
        router = name.endswith(("gate.weight", "router.weight"))
        value.data = 1 + 0.1 * noise if "norm" in name else noise * (0.5 if router else 0.08)


def add_tokenizer(directory: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER_FROM / name, directory / name)
    return directory


def save(
    model: Any, directory: Path, dtype: str, as_in_memory: bool = False, louder: Mapping[str, float] | None = None
) -> Path:
    """Spread the weights of ``model`` and save it as transformers does, with the bundled tokenizer.

    ``as_in_memory`` keeps the experts of a layer in two tensors; ``louder`` multiplies parameters by the end of their
    names.
    """
    import torch
    from safetensors.torch import save_file

    spread(model)
    for end, factor in (louder or {}).items():
        for name, value in model.named_parameters():
            if name.endswith(end):
                value.data *= factor
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    if as_in_memory:
        names = {name for name, _ in model.named_parameters()}
        tensors = {name: value for name, value in model.state_dict().items() if name in names}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "generation_config.json").unlink(missing_ok=True)
    return add_tokenizer(directory)


def build_mixtral(directory: Path, dtype: str, **config: Any) -> Path:
    """Grouped queries, heads wider than the hidden size has room for."""
    from transformers import MixtralConfig, MixtralForCausalLM

    settings: dict[str, Any] = {
        **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 32},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2},
        **{"max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
        "sliding_window": None,
    }
    return save(MixtralForCausalLM(MixtralConfig(**{**settings, **config})), directory, dtype)


def build_tied_mixtral(directory: Path, dtype: str) -> Path:
    return build_mixtral(directory, dtype, tie_word_embeddings=True, num_key_value_heads=4, head_dim=16)


def build_granite_moe(directory: Path, dtype: str, **config: Any) -> Path:
    """Multipliers far from one, grouped queries."""
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    settings: dict[str, Any] = {
        **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2},
        **{"attention_multiplier": 0.4, "embedding_multiplier": 12, "residual_multiplier": 0.22},
        **{"logits_scaling": 0.7, "max_position_embeddings": 256},
        **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
    }
    return save(GraniteMoeForCausalLM(GraniteMoeConfig(**{**settings, **config})), directory, dtype)


def build_tied_granite_moe(directory: Path, dtype: str) -> Path:
    return build_granite_moe(directory, dtype, tie_word_embeddings=True, attention_multiplier=0.25)


def build_qwen2_moe(directory: Path, dtype: str) -> Path:
    """Biases, a shared expert of another width than the routed ones, grouped queries."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 32, "shared_expert_intermediate_size": 96, "max_position_embeddings": 256},
        **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
    )
    return save(Qwen2MoeForCausalLM(config), directory, dtype)


def build_qwen3_moe(directory: Path, dtype: str, packed: bool = False, **config: Any) -> Path:
    """Grouped queries, heads wider than the hidden size has room for, norms of q and k that differ by channel."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    settings: dict[str, Any] = {
        **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 32, "norm_topk_prob": True, "max_position_embeddings": 256},
        **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**settings, **config}))
    return save(model, directory, dtype, as_in_memory=packed)


def build_packed_qwen3_moe(directory: Path, dtype: str) -> Path:
    return build_qwen3_moe(directory, dtype, packed=True, tie_word_embeddings=True)


def build_qwen3_vl_moe(directory: Path, dtype: str, layers: int = 2) -> Path:
    """A vision model beside it, experts stored as released: [n_in, n_out], neither square nor of the other's shape."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = {
        **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2},
        **{"head_dim": 32, "moe_intermediate_size": 96, "max_position_embeddings": 256},
        **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [6, 5, 5]},
    }
    vision = {
        **{"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64},
        **{"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    }
    special = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = Qwen3VLMoeConfig(
        text_config=text, vision_config=vision, **{key: VOCAB - 4 + at for at, key in enumerate(special)}
    )
    save(Qwen3VLMoeForConditionalGeneration(config), directory, dtype)
    tensors = load_file(directory / "model.safetensors")
    for name, expected in (("gate_up_proj", (8, 64, 192)), ("down_proj", (8, 96, 64))):
        for key in [key for key in tensors if key.endswith(f"mlp.experts.{name}")]:
            value = tensors[key]
            tensors[key] = (value if value.shape == expected else value.transpose(1, 2)).contiguous()
            assert tensors[key].shape == torch.Size(expected)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def build_gpt_oss(directory: Path, dtype: str) -> Path:
    """Sinks, biases, windows shorter than the text, gates beyond the limit of the activation, yarn whose ramp has ends
    that are whole dimensions, as llama.cpp rounds them.
    """
    from transformers import GptOssConfig, GptOssForCausalLM

    yarn = {"rope_type": "yarn", "rope_theta": 1.5e5, "factor": 4.0, "original_max_position_embeddings": 64}
    config = GptOssConfig(
        **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 32},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 3},
        **{"sliding_window": 8, "max_position_embeddings": 256, "rope_parameters": {**yarn, "truncate": True}},
        **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
    )
    louder = {"sinks": 12.0, "router.bias": 4.0, "experts.gate_up_proj": 6.0, "_bias": 6.0}
    return save(GptOssForCausalLM(config), directory, dtype, louder=louder)


def build_mxfp4_gpt_oss(directory: Path, dtype: str) -> Path:
    """The same with the experts as released: random codes, and scales that make gates of both sides of the limit."""
    import torch
    from safetensors.torch import load_file, save_file

    build_gpt_oss(directory, dtype)
    generator = torch.Generator().manual_seed(1)
    files = load_file(directory / "model.safetensors")
    for name in [name for name in files if name.endswith(("gate_up_proj", "down_proj"))]:
        n_expert, n_in, n_out = files.pop(name).shape
        shape = (n_expert, n_out, n_in // 32)
        files[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        files[f"{name}_scales"] = torch.randint(120, 126, shape, generator=generator, dtype=torch.uint8)
    save_file(files, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": plain}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def build_deepseek_ocr(directory: Path, dtype: str) -> Path:
    """A dense first layer, shared experts."""
    import torch

    from tools.tiny_models import DEEPSEEK, Shape, make_model
    from tools.tiny_models import save as save_released

    shape = Shape(DEEPSEEK, layers=3, experts=6, used=2, hidden=64, ff=32, shared=2, window=64)
    model = make_model(shape)
    spread(model)
    directory.mkdir(parents=True)
    save_released(model, shape, directory, getattr(torch, dtype))
    return add_tokenizer(directory)


YARN = {
    **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 0.707},
}


def _latent_settings(**config: Any) -> dict[str, Any]:
    """Sizes that all differ where they may, a dense first layer, yarn."""
    return {
        **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32},
        **{"num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 4, "num_key_value_heads": 4},
        **{"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "max_position_embeddings": 256},
        **{"q_lora_rank": 48, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 24},
        **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "rope_parameters": YARN, **config},
    }


def _save_latent(model: Any, directory: Path, dtype: str) -> Path:
    import torch

    spread(model)
    model.to(getattr(torch, dtype))
    for name, value in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            # as released: in float32 beside matrices in BF16
            value.data = 0.3 * torch.randn(value.shape)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    return add_tokenizer(directory)


def build_deepseek_v2(directory: Path, dtype: str, **config: Any) -> Path:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    settings = _latent_settings(routed_scaling_factor=1.5, **config)
    return _save_latent(DeepseekV2ForCausalLM(DeepseekV2Config(**settings)), directory, dtype)


def build_deepseek_v2_lite(directory: Path, dtype: str) -> Path:
    """One matrix for the query, which llama.cpp takes for granted in 26 layers; no yarn."""
    plain = {"rope_type": "default", "rope_theta": 2e4}
    own = {"q_lora_rank": None, "num_hidden_layers": 26, "first_k_dense_replace": 24, "rope_parameters": plain}
    return build_deepseek_v2(directory, dtype, **own)


def build_deepseek_v3(directory: Path, dtype: str, **config: Any) -> Path:
    """Chooses in groups, with a bias; a layer that predicts a further token."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    own = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    settings = _latent_settings(**{**own, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, **config})
    _save_latent(DeepseekV3ForCausalLM(DeepseekV3Config(**settings)), directory, dtype)
    _add_predicting_layer(directory / "model.safetensors", settings["num_hidden_layers"])
    return directory


def _add_predicting_layer(weights: Path, n_layer: int) -> None:
    """Behind the last block a copy of it, with what joins it to the others."""
    import torch
    from safetensors.torch import load_file, save_file

    files = load_file(weights)
    last, own = f"model.layers.{n_layer - 1}.", f"model.layers.{n_layer}."
    more = {own + name.removeprefix(last): value.clone() for name, value in files.items() if name.startswith(last)}
    shapes = {**dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), (64,)), "eh_proj": (64, 128)}
    shapes |= dict.fromkeys(("embed_tokens", "shared_head.head"), (VOCAB, 64))
    dtype = files["model.embed_tokens.weight"].dtype
    more |= {f"{own}{name}.weight": 0.1 * torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    save_file({**files, **more}, weights, metadata={"format": "pt"})


def causal_model(directory: Path) -> Any:
    """What transformers opens by itself."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager").eval()


def qwen3_vl_moe_model(directory: Path) -> Any:
    """The whole model; what it does with text alone is asked of it."""
    import torch
    from transformers import Qwen3VLMoeForConditionalGeneration

    return Qwen3VLMoeForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def mxfp4_gpt_oss_model(directory: Path) -> Any:
    """transformers' model without kernels, its experts filled from the files by transformers' own conversion."""
    import torch
    from safetensors.torch import load_file
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    config = GptOssConfig.from_pretrained(directory)
    del config.quantization_config
    config._experts_implementation = "eager"
    model = GptOssForCausalLM(config)
    files = load_file(directory / "model.safetensors")
    for name in [name.removesuffix("_blocks") for name in files if name.endswith("_blocks")]:
        blocks, scales = files.pop(f"{name}_blocks"), files.pop(f"{name}_scales")
        files[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    model.load_state_dict({name: value.float() for name, value in files.items()})
    return model.eval()


def deepseek_ocr_model(directory: Path) -> Any:
    """The decoder inside DeepSeek-OCR-2, its packed experts filled from the files."""
    import torch
    from safetensors.torch import load_file

    from tools.tiny_models import DEEPSEEK, Shape, make_model

    config = json.loads((directory / "config.json").read_text())
    shape = Shape(
        DEEPSEEK,
        layers=config["num_hidden_layers"],
        experts=config["n_routed_experts"],
        used=config["num_experts_per_tok"],
        hidden=config["hidden_size"],
        ff=config["moe_intermediate_size"],
        shared=config["n_shared_experts"],
        window=64,
    )
    model = make_model(shape).eval()
    files = load_file(directory / "model.safetensors")
    for name, value in model.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            own = name.removesuffix("gate_up_proj")
            parts = [[files[f"{own}{e}.{w}_proj.weight"] for w in ("gate", "up")] for e in range(len(value))]
            value.data = torch.stack([torch.cat(pair) for pair in parts]).float()
        elif name.endswith("experts.down_proj"):
            own = name.removesuffix("down_proj")
            value.data = torch.stack([files[f"{own}{e}.down_proj.weight"] for e in range(len(value))]).float()
        else:
            value.data = files[name].float()
    return model


def logits(model: Any, tokens: list[int]) -> Any:
    """float32 logits [n_tokens, n_vocab]."""
    import torch

    with torch.no_grad():
        found = model(torch.tensor([tokens]))
        return (found if isinstance(found, torch.Tensor) else found.logits)[0].numpy()


FAMILIES: Mapping[str, tuple[Callable[[Path, str], Path], Callable[[Path], Any]]] = {
    "mixtral": (build_mixtral, causal_model),
    "mixtral-tied": (build_tied_mixtral, causal_model),
    "granite-moe": (build_granite_moe, causal_model),
    "granite-moe-tied": (build_tied_granite_moe, causal_model),
    "qwen2-moe": (build_qwen2_moe, causal_model),
    "qwen3-moe": (build_qwen3_moe, causal_model),
    "qwen3-moe-packed-tied": (build_packed_qwen3_moe, causal_model),
    "qwen3-vl-moe": (build_qwen3_vl_moe, qwen3_vl_moe_model),
    "gpt-oss": (build_gpt_oss, causal_model),
    "gpt-oss-mxfp4": (build_mxfp4_gpt_oss, mxfp4_gpt_oss_model),
    "deepseek-ocr": (build_deepseek_ocr, deepseek_ocr_model),
    "deepseek-v2": (build_deepseek_v2, causal_model),
    "deepseek-v2-lite": (build_deepseek_v2_lite, causal_model),
    "deepseek-v3": (build_deepseek_v3, causal_model),
}
"""How to write one, ``build(directory, dtype)``, and transformers' float32 model of the directory."""
