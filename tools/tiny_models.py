"""Tiny Mixture-of-Experts models of several shapes, started from the bundled one's weights, and their files.

``olmoe`` has routed experts in every layer. ``deepseek`` is the plain-attention DeepSeek (``deepseek2-ocr`` in GGUF): a
dense first layer, then routed and shared experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM
from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-olmoe"
OLMOE, DEEPSEEK = "olmoe", "deepseek"
ARCHITECTURES = (OLMOE, DEEPSEEK)
HEAD_DIM = 64


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; ``shared`` experts and the dense first layer are the ``deepseek`` kind's only."""

    architecture: str
    layers: int
    experts: int
    used: int
    hidden: int
    ff: int
    shared: int
    window: int


class DeepseekTextLM(nn.Module):
    """transformers has this text model inside a vision-language one only: here with an output matrix."""

    def __init__(self, config: DeepseekOcr2TextConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DeepseekOcr2TextModel(config)
        self.model.set_experts_implementation("eager")
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [batch, window, vocabulary] of ``input_ids`` [batch, window]."""
        logits: Tensor = self.lm_head(self.model(input_ids=input_ids, use_cache=False).last_hidden_state)
        return logits


def teacher() -> Any:
    """The bundled model in float32."""
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    return model


def load_tokenizer() -> Tokenizer:
    """The bundled model's."""
    return Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))


def make_model(shape: Shape) -> nn.Module:
    """A model of ``shape`` in float32 with random weights; the vocabulary is the bundled tokenizer's."""
    sizes: dict[str, Any] = {
        **{"vocab_size": load_tokenizer().get_vocab_size(), "hidden_size": shape.hidden},
        **{"num_attention_heads": shape.hidden // HEAD_DIM, "num_key_value_heads": shape.hidden // HEAD_DIM},
        **{"max_position_embeddings": 4 * shape.window, "rms_norm_eps": 1e-5, "num_hidden_layers": shape.layers},
        **{"num_experts_per_tok": shape.used, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
        **{"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    }
    if shape.architecture == OLMOE:
        config = OlmoeConfig(num_experts=shape.experts, intermediate_size=shape.ff, **sizes)
        return OlmoeForCausalLM(config)
    layer_types = ["dense"] + ["sparse"] * (shape.layers - 1)
    text = DeepseekOcr2TextConfig(
        n_routed_experts=shape.experts,
        n_shared_experts=shape.shared,
        moe_intermediate_size=shape.ff,
        # as wide as the experts that a token sees in the other layers
        intermediate_size=shape.ff * (shape.used + shape.shared),
        mlp_layer_types=layer_types,
        head_dim=HEAD_DIM,
        **sizes,
    )
    text._attn_implementation = "sdpa"
    return DeepseekTextLM(text)


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """Logits [batch, window, vocabulary] of ``tokens`` [batch, window]."""
    found = model(tokens)
    logits: Tensor = found if isinstance(found, Tensor) else found.logits
    return logits


def routers(model: nn.Module) -> Iterator[nn.Module]:
    """The routers, layer by layer; each returns its logits [n_tokens, n_expert] first."""
    return (module for name, module in model.named_modules() if name.endswith(".mlp.gate"))


@torch.no_grad()
def start_from_bundled(model: nn.Module, noise: float, seed: int) -> None:
    """Start from the bundled model: what has its shape is copied, experts and routers are repeated in turn.

    Layer i takes layer i mod 4, expert e takes expert e mod 16; ``noise`` times their root mean square is added
    to experts and routers as Gaussian noise, so that copies differ. What fits nothing stays random.
    """
    own, found = dict(model.named_parameters()), dict(teacher().named_parameters())
    n_layer = 1 + max(int(name.split(".")[2]) for name in found if name.startswith("model.layers."))
    generator = torch.Generator().manual_seed(seed)
    for name, value in own.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(int(parts[2]) % n_layer)
        other = found.get(".".join(parts))
        if other is None or other.shape[1:] != value.shape[1:]:
            continue
        if ".experts." in name or name.endswith(".mlp.gate.weight"):
            value.copy_(other[torch.arange(len(value)) % len(other)])
            value.add_(torch.randn(value.shape, generator=generator) * value.square().mean().sqrt(), alpha=noise)
        elif other.shape == value.shape:
            value.copy_(other)


def save(model: Any, shape: Shape, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config.json and weights into the directory ``out``, named as checkpoints of the kind are."""
    model.to(dtype)
    if shape.architecture == OLMOE:
        model.config.architectures = ["OlmoeForCausalLM"]
        model.save_pretrained(out)
        return
    state = {name: value.detach() for name, value in model.state_dict().items()}
    save_file(dict(one_by_one(state)), out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(_deepseek_config(model.config), indent=2, sort_keys=True) + "\n")


def one_by_one(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Packed experts as one tensor for each matrix of each expert, as DeepSeek's checkpoints have them."""
    for name, value in state.items():
        prefix = name.rpartition(".")[0]
        if name.endswith(".experts.gate_up_proj"):
            for e, pair in enumerate(value):
                gate, up = pair.chunk(2)
                yield f"{prefix}.{e}.gate_proj.weight", gate.contiguous()
                yield f"{prefix}.{e}.up_proj.weight", up.contiguous()
        elif name.endswith(".experts.down_proj"):
            yield from ((f"{prefix}.{e}.down_proj.weight", down.contiguous()) for e, down in enumerate(value))
        else:
            yield name, value.contiguous()


def _deepseek_config(config: DeepseekOcr2TextConfig) -> dict[str, Any]:
    """In the words of the released configurations of the kind, which know more attention variants."""
    taken = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "bos_token_id"),
        *("eos_token_id", "tie_word_embeddings", "attention_bias", "n_routed_experts", "n_shared_experts"),
        *("num_experts_per_tok", "moe_intermediate_size", "routed_scaling_factor"),
    )
    return {
        **{name: getattr(config, name) for name in taken},
        **{"architectures": ["DeepseekOCRForCausalLM"], "model_type": "DeepseekOCR"},
        **{"use_mla": False, "q_lora_rank": None, "kv_lora_rank": None, "qk_nope_head_dim": 0, "v_head_dim": 0},
        **{"qk_rope_head_dim": HEAD_DIM, "first_k_dense_replace": 1, "moe_layer_freq": 1, "rope_theta": 10000.0},
        **{"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "n_group": 1, "topk_group": 1},
    }
