"""A small random dense llama, as a model of transformers and as the GGUF that llama.cpp makes of such a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..conftest import EXAMPLE

HEADS, KV_HEADS, HEAD_DIM = 3, 1, 16
PAIRED = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
"""Rows of one head of q or k in llama.cpp's order: those that rope turns together are neighbours."""


def random_llama(*, vocab: int = 4096, ff: int = 96, layers: int = 2, tied: bool = True, seed: int = 0) -> Any:
    """Hidden size 48, three heads of 16 that share one of keys and values; float64."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{"vocab_size": vocab, "hidden_size": 48, "intermediate_size": ff, "num_hidden_layers": layers},
        **{"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM},
        **{"max_position_embeddings": 512, "rms_norm_eps": 1e-3, "tie_word_embeddings": tied},
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn_like(value)
            value.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
    return model


def write_dense_gguf(model: Any, path: Path, *, pre: str = "smollm", extra: dict[str, Any] | None = None) -> None:
    """Write ``model`` in F32 with the bundled model's vocabulary. ``extra``: more tensors by GGUF name."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Random")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokenizer = json.loads((EXAMPLE / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    control = [token.startswith("<|") for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if special else gguf.TokenType.NORMAL for special in control])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{{ messages }}")
    names = {
        **{"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
        **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"},
        **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
        **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
    }
    for name, value in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module == "lm_head" and config.tie_word_embeddings:
            continue
        if module.startswith("model.layers."):
            _, _, layer, rest = module.split(".", 3)
            target = f"blk.{layer}.{names[rest]}.weight"
            if rest in ("self_attn.q_proj", "self_attn.k_proj"):
                value = torch.cat([head[PAIRED] for head in value.split(HEAD_DIM)])
        else:
            target = f"{names[module]}.weight"
        writer.add_tensor(target, value.float().numpy())
    for target, value in (extra or {}).items():
        writer.add_tensor(target, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
