"""A DeepSeek-VL2 of a few million parameters in torch, to be trained: SigLIP's tower, the projector, the text model.

Names of parameters are those of the released checkpoints, so that :func:`save` has little to do. transformers has
these parts too; here they are written for minutes on two cores: any type of weights (BF16), attention without torch's
fused one (ten times as slow backward in BF16 on a CPU), all experts of a layer in one product, and of the last layer
only the rows that are asked for. Tests compare with transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, pad, silu

from mopeq_edge.vision.description import Tiles
from tools.sight_pictures import CANDIDATES, SIDE
from tools.sight_text import BEGIN, END
from tools.tiny_models import one_by_one
from tools.vision_sides import processor_file

_EPS = 1e-6


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model; those of the language model are in DeepSeek's words."""

    patch: int = 6
    width: int = 128
    tower_layers: int = 3
    tower_heads: int = 4
    hidden: int = 256
    ff: int = 256
    layers: int = 3
    heads: int = 4
    experts: int = 4
    used: int = 2
    shared: int = 1
    mlp_ratio: int = 3

    @property
    def n_side(self) -> int:
        """Patches of a tile's side; the last pixels are dropped."""
        return SIDE // self.patch

    @property
    def rows(self) -> int:
        """Tokens of a tile's side."""
        return -(-self.n_side // 2)


SIZES = Sizes()
LAYOUT = Tiles(SIDE, SIZES.rows, CANDIDATES, 2, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        weights = (q @ (k * q.shape[-1] ** -0.5).transpose(-1, -2)).softmax(dim=-1)
        mixed: Tensor = self.proj((weights @ v).transpose(1, 2).flatten(2))
        return mixed


class Mlp(nn.Module):
    def __init__(self, width: int, ff: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, ff), nn.Linear(ff, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(gelu(self.fc1(x), approximate="tanh"))
        return out


class Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(sizes.width, _EPS), nn.LayerNorm(sizes.width, _EPS)
        self.attn = Attention(sizes.width, sizes.tower_heads)
        self.mlp = Mlp(sizes.width, sizes.mlp_ratio * sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Tower(nn.Module):
    """SigLIP without its pooling head."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, sizes.width, sizes.patch, sizes.patch)})
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, sizes.n_side**2, sizes.width))
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.tower_layers))
        self.norm = nn.LayerNorm(sizes.width, _EPS)

    def forward(self, pixels: Tensor) -> Tensor:
        """[n, n_side², width] of ``pixels`` [n, 3, side, side]."""
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out


class Projector(nn.Module):
    """Four patches, channel by channel, to one token; zeros stand behind the last row and column."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.layers = nn.Sequential(
            nn.Linear(4 * sizes.width, sizes.hidden), nn.GELU(), nn.Linear(sizes.hidden, sizes.hidden)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[n, rows², hidden] of [n, n_side², width]."""
        n, rows = self.sizes.n_side, self.sizes.rows
        missing = 2 * rows - n
        x = pad(x.unflatten(1, (n, n)), (0, 0, 0, missing, 0, missing))
        x = x.unflatten(1, (rows, 2)).unflatten(3, (rows, 2)).permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)
        out: Tensor = self.layers(x)
        return out


class RmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.float().square().mean(dim=-1, keepdim=True) + _EPS).rsqrt().to(x.dtype) * self.weight


class SelfAttention(nn.Module):
    """Rotary attention; ``rows`` [n, m] ask, all answer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(sizes.hidden, sizes.hidden, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor, turn: Tensor, mask: Tensor, rows: Tensor | None) -> Tensor:
        own = x if rows is None else taken(x, rows)
        own_turn = turn if rows is None else taken(turn, rows)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, y in ((self.q_proj, own), (self.k_proj, x), (self.v_proj, x))
        )
        q, k = turned(q, own_turn), turned(k * q.shape[-1] ** -0.5, turn)
        weights = (q @ k.transpose(-1, -2) + mask).softmax(dim=-1)
        mixed: Tensor = self.o_proj((weights @ v).transpose(1, 2).flatten(2))
        return mixed


def taken(x: Tensor, rows: Tensor) -> Tensor:
    """[n, m, width] of [n, length, width]: the ``rows`` [n, m]."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """``x`` [n, heads, m, width], halves of a head turned by ``turn`` [n, m, width], cosines then sines."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = turn[:, None].chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class SwiGlu(nn.Module):
    def __init__(self, hidden: int, ff: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, ff, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(ff, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Experts(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(
            torch.randn(sizes.experts, 2 * sizes.ff, sizes.hidden) * (3 * sizes.hidden) ** -0.5
        )
        self.down_proj = nn.Parameter(torch.randn(sizes.experts, sizes.hidden, sizes.ff) * (3 * sizes.ff) ** -0.5)

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:
        """All experts of ``x`` [n, hidden], weighed with ``shares`` [n, experts], 0 for most."""
        gate, up = linear(x, self.gate_up_proj.flatten(0, 1)).unflatten(-1, (len(self.gate_up_proj), 2, -1)).unbind(-2)
        inner = silu(gate) * up * shares[..., None].to(x.dtype)
        return linear(inner.flatten(1), self.down_proj.transpose(0, 1).flatten(1))


class Moe(nn.Module):
    """The likeliest experts by a softmax over all, not normalized again, and a shared one."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.used = sizes.used
        self.gate = nn.Linear(sizes.hidden, sizes.experts, bias=False)
        self.experts = Experts(sizes)
        self.shared_experts = SwiGlu(sizes.hidden, sizes.ff * sizes.shared)
        self.routed: Tensor | None = None
        """Logits [n, experts] of the last call."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        self.routed = linear(flat.float(), self.gate.weight.float())
        shares = self.routed.softmax(dim=-1)
        least = shares.topk(self.used, dim=-1).values[:, -1:]
        mixed = self.experts(flat, shares * (shares >= least))
        return mixed.view_as(x) + self.shared_experts(x)


class DecoderLayer(nn.Module):
    def __init__(self, sizes: Sizes, dense: bool) -> None:
        super().__init__()
        self.self_attn = SelfAttention(sizes)
        self.mlp = SwiGlu(sizes.hidden, sizes.ff) if dense else Moe(sizes)
        self.input_layernorm, self.post_attention_layernorm = RmsNorm(sizes.hidden), RmsNorm(sizes.hidden)

    def forward(self, x: Tensor, turn: Tensor, mask: Tensor, rows: Tensor | None) -> Tensor:
        mixed = self.self_attn(self.input_layernorm(x), turn, mask, rows)
        x = mixed + (x if rows is None else taken(x, rows))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    def __init__(self, sizes: Sizes, n_vocab: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(n_vocab, sizes.hidden)
        self.layers = nn.ModuleList(DecoderLayer(sizes, dense=i == 0) for i in range(sizes.layers))
        self.norm = RmsNorm(sizes.hidden)
        # as large as what the projector makes
        nn.init.normal_(self.embed_tokens.weight, std=0.2)


class Language(nn.Module):
    def __init__(self, sizes: Sizes, n_vocab: int) -> None:
        super().__init__()
        self.head_dim = sizes.hidden // sizes.heads
        self.model = Decoder(sizes, n_vocab)
        self.lm_head = nn.Linear(sizes.hidden, n_vocab, bias=False)

    def forward(self, parts: Tensor, places: Tensor, sees: Tensor, rows: Tensor) -> Tensor:
        """Logits [n, m, n_vocab] at the ``rows`` [n, m] of embeddings [n, length, hidden] at ``places`` [n, length];
        ``sees`` [n, length, length] says which sees which.
        """
        rates = 10000.0 ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = places[..., None] * rates
        turn = torch.cat([angles.cos(), angles.sin()], dim=-1).to(parts.dtype)
        mask = torch.zeros(sees.shape, dtype=parts.dtype).masked_fill_(~sees, -1e9)
        x = parts
        for layer in self.model.layers[:-1]:
            x = layer(x, turn, mask[:, None], None)
        x = self.model.layers[-1](x, turn, taken(mask, rows)[:, None], rows)
        out: Tensor = self.lm_head(self.model.norm(x))
        return out


class Sight(nn.Module):
    """The whole model."""

    def __init__(self, sizes: Sizes, n_vocab: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.vision, self.projector = Tower(sizes), Projector(sizes)
        self.image_newline = nn.Parameter(0.1 * torch.randn(sizes.hidden))
        self.view_seperator = nn.Parameter(0.1 * torch.randn(sizes.hidden))
        self.language = Language(sizes, n_vocab)

    def see(self, pixels: Tensor) -> Tensor:
        """[n, tiles, rows², hidden] of ``pixels`` [n, tiles, 3, side, side]."""
        seen: Tensor = self.projector(self.vision(pixels.flatten(0, 1)))
        return seen.unflatten(0, pixels.shape[:2])

    def arrange(self, seen: Tensor, columns: int, rows: int) -> Tensor:
        """[n, n_tokens, hidden]: the whole, the separator, the tiles; each row ends with a newline."""
        n = self.sizes.rows
        grid = (
            seen[:, 1:].unflatten(1, (rows, columns)).unflatten(3, (n, n)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        )
        whole, parts = (self._with_newlines(view) for view in (seen[:, 0].unflatten(1, (n, n)), grid))
        separator = self.view_seperator.expand(len(seen), 1, -1)
        return torch.cat([whole, separator, parts], dim=1)

    def _with_newlines(self, view: Tensor) -> Tensor:
        ends = self.image_newline.expand(*view.shape[:2], 1, -1)
        return torch.cat([view, ends], dim=2).flatten(1, 2)


def checkpoint_config(sizes: Sizes, n_vocab: int) -> dict[str, Any]:
    """config.json in the words of the released ones."""
    text = {
        **{"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": n_vocab},
        **{"hidden_size": sizes.hidden, "intermediate_size": sizes.ff, "moe_intermediate_size": sizes.ff},
        **{"num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads, "num_key_value_heads": sizes.heads},
        **{"n_routed_experts": sizes.experts, "num_experts_per_tok": sizes.used, "n_shared_experts": sizes.shared},
        **{"use_mla": False, "q_lora_rank": None, "kv_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0},
        **{"v_head_dim": 0, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
        **{"bos_token_id": BEGIN, "eos_token_id": END, "max_position_embeddings": 1024, "torch_dtype": "bfloat16"},
    }
    vision = {
        **{"image_size": SIDE, "patch_size": sizes.patch, "width": sizes.width, "layers": sizes.tower_layers},
        **{"heads": sizes.tower_heads, "mlp_ratio": sizes.mlp_ratio, "model_type": "vision"},
    }
    return {
        **{"model_type": "deepseek_vl_v2", "tile_tag": "2D", "global_view_pos": "head", "torch_dtype": "bfloat16"},
        "candidate_resolutions": [list(candidate) for candidate in CANDIDATES],
        "language_config": text,
        "projector_config": {"model_type": "mlp_projector", "input_dim": sizes.width, "n_embed": sizes.hidden},
        "vision_config": vision,
    }


def save(model: Sight, out: Path) -> None:
    """Write config.json, processor_config.json and the weights in BF16 into the directory ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().to(torch.bfloat16) for name, value in model.state_dict().items()}
    save_file(dict(one_by_one(state)), out / "model.safetensors", metadata={"format": "pt"})
    config = checkpoint_config(model.sizes, model.language.lm_head.out_features)
    for name, content in (("config.json", config), processor_file(config)):
        (out / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.no_grad()
def load(directory: Path, sizes: Sizes = SIZES) -> Sight:
    """The model of ``sizes`` in ``directory``, in float32."""
    files = {name: value.float() for name, value in load_file(directory / "model.safetensors").items()}
    model = Sight(sizes, len(files["language.lm_head.weight"]))
    for name, own in model.state_dict().items():
        prefix = name.rpartition(".")[0]
        if name.endswith(".experts.gate_up_proj"):
            pairs = ([files[f"{prefix}.{e}.{which}_proj.weight"] for which in ("gate", "up")] for e in range(len(own)))
            found = torch.stack([torch.cat(pair) for pair in pairs])
        elif name.endswith(".experts.down_proj"):
            found = torch.stack([files[f"{prefix}.{e}.down_proj.weight"] for e in range(len(own))])
        else:
            found = files[name]
        own.copy_(found)
    return model.eval()
