"""Tiny random checkpoints of families that no converter of ours knows."""

from __future__ import annotations

from pathlib import Path

from ..builders import edit_json
from .families import VOCAB, save


def build_lfm2_moe(directory: Path, dtype: str) -> Path:
    """No converter of ours: short convolutions beside attention, a dense first layer, tied embeddings."""
    from transformers import Lfm2MoeConfig, Lfm2MoeForCausalLM

    config = Lfm2MoeConfig(
        **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 32, "num_dense_layers": 1, "max_position_embeddings": 256},
        **{"layer_types": ["conv", "full_attention", "conv"], "norm_topk_prob": True},
        **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
    )
    return save(Lfm2MoeForCausalLM(config), directory, dtype)


def build_dots1(directory: Path, dtype: str) -> Path:
    """No converter of ours: a sigmoid router with groups, a shared expert, a dense first layer."""
    from transformers import Dots1Config, Dots1ForCausalLM

    config = Dots1Config(
        **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1, "norm_topk_prob": True},
        **{"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5, "max_position_embeddings": 256},
        **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
    )
    save(Dots1ForCausalLM(config), directory, dtype)
    # released files say so; transformers knows no other and leaves it out
    edit_json(directory / "config.json", scoring_func="sigmoid")
    return directory


def build_hunyuan_moe(directory: Path, dtype: str) -> Path:
    """No converter of ours, and llama.cpp's script loads its tokenizer trusting the directory's code."""
    from transformers import HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM

    config = HunYuanMoEV1Config(
        **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 2, "moe_topk": 1},
        **{"max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
    )
    save(HunYuanMoEV1ForCausalLM(config), directory, dtype)
    # as in the released file: by layer
    edit_json(directory / "config.json", moe_intermediate_size=[32], moe_topk=[1], num_shared_expert=[1])
    return directory
