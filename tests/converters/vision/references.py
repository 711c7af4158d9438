"""Vision sides in torch: towers of transformers with a checkpoint's weights, the rest from the equations."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from mopeq_edge.vision.crops import Cropped
from mopeq_edge.vision.session import Floats

Tensors = Mapping[str, torch.Tensor]
_TEXT = ("language.", "model.transformer.blocks.", "model.transformer.ff_out.", "model.transformer.wte.embedding")


def weights(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """config.json, and every tensor of the vision side in float32."""
    config = json.loads((directory / "config.json").read_text())
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            seen = [name for name in file.keys() if not name.startswith(_TEXT)]  # noqa: SIM118
            found |= {name: file.get_tensor(name).float() for name in seen}
    return config, found


def _fill(model: torch.nn.Module, found: Mapping[str, torch.Tensor]) -> None:
    """Every parameter is given, and every given one is a parameter."""
    missing, unexpected = model.load_state_dict(dict(found), strict=False)
    assert not unexpected
    assert all("position_ids" in name for name in missing), missing


def siglip(directory: Path) -> Any:
    """transformers' SigLIP tower with the weights of a DeepSeek-VL2; its own last norm, no head."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config, tensors = weights(directory)
    said = config["vision_config"]
    width = said["width"]
    settings = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=int(width * said["mlp_ratio"]),
        num_hidden_layers=said["layers"],
        num_attention_heads=said.get("heads", 16),
        image_size=said.get("image_size", 384),
        patch_size=said["patch_size"],
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        vision_use_head=False,
    )
    model = SiglipVisionModel(settings).eval()
    prefix = "vision_model." if any(n.startswith("vision_model.") for n, _ in model.named_parameters()) else ""
    own = {
        "embeddings.patch_embedding": "patch_embed.proj",
        "post_layernorm": "norm",
        **{
            f"encoder.layers.{i}.{theirs}": f"blocks.{i}.{ours}"
            for i in range(said["layers"])
            for theirs, ours in (
                *(("layer_norm1", "norm1"), ("layer_norm2", "norm2"), ("self_attn.out_proj", "attn.proj")),
                *(("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")),
            )
        },
    }
    found = {f"{t}.{kind}": tensors[f"vision.{o}.{kind}"] for t, o in own.items() for kind in ("weight", "bias")}
    found["embeddings.position_embedding.weight"] = tensors["vision.pos_embed"][0]
    for i in range(said["layers"]):
        for kind in ("weight", "bias"):
            parts = tensors[f"vision.blocks.{i}.attn.qkv.{kind}"].chunk(3)
            for which, part in zip("qkv", parts, strict=True):
                found[f"encoder.layers.{i}.self_attn.{which}_proj.{kind}"] = part
    _fill(model, {prefix + name: value for name, value in found.items()})
    return model


def projected(tensors: Tensors, features: torch.Tensor) -> torch.Tensor:
    """[n_tiles, rows², n_embd] of SigLIP's features [n_tiles, n_side², width], a patch at a time.

    A token is four patches in a square, of each channel the upper left, upper right, lower left and lower right;
    patches beyond the edge are zero. Then linear, x Φ(x), linear.
    """
    n_tiles, n_patches, width = features.shape
    side = math.isqrt(n_patches)
    rows = (side + 1) // 2
    tokens = torch.zeros(n_tiles, rows * rows, width, 4)
    for y in range(side):
        for x in range(side):
            tokens[:, (y // 2) * rows + x // 2, :, 2 * (y % 2) + x % 2] = features[:, y * side + x]
    first, last = ((tensors[f"projector.layers.{i}.weight"], tensors[f"projector.layers.{i}.bias"]) for i in (0, 2))
    inner = tokens.reshape(n_tiles, rows * rows, 4 * width) @ first[0].T + first[1]
    curved = inner * torch.distributions.Normal(0.0, 1.0).cdf(inner)
    return curved @ last[0].T + last[1]


def vl2_picture(directory: Path, pixels: Floats, columns: int, rows: int) -> Floats:
    """[n_tokens, n_embd] of tiles [1 + columns · rows, 3, side, side], a token at a time."""
    _, tensors = weights(directory)
    with torch.no_grad():
        features = siglip(directory)(torch.from_numpy(pixels)).last_hidden_state
        seen = projected(tensors, features).numpy()
    newline, separator = (tensors[name].numpy() for name in ("image_newline", "view_seperator"))
    n = math.isqrt(seen.shape[1])
    found = []
    for y in range(n):
        found += [*(seen[0][y * n + x] for x in range(n)), newline]
    found.append(separator)
    for y in range(rows * n):
        for x in range(columns * n):
            tile = 1 + (y // n) * columns + x // n
            found.append(seen[tile][(y % n) * n + x % n])
        found.append(newline)
    return np.stack(found)


def text_logits(model: Any, parts: list[Any]) -> Floats:
    """[n, n_vocab] of transformers' text model: tokens [n] through its embedding, embeddings [n, n_embd] as they
    are.
    """
    inner = model.model
    with torch.no_grad():
        rows = [
            torch.from_numpy(part) if part.ndim == 2 else inner.embed_tokens(torch.from_numpy(part.astype(np.int64)))
            for part in parts
        ]
        hidden = inner(inputs_embeds=torch.cat(rows)[None], use_cache=False).last_hidden_state
        found: Floats = model.lm_head(hidden)[0].float().numpy()
    return found


def clip(directory: Path) -> Any:
    """transformers' CLIP tower with the weights of a MolmoE; the norm behind its layers is not looked at."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config, tensors = weights(directory)
    vit = config["vision_backbone"]
    settings = CLIPVisionConfig(
        hidden_size=vit["image_emb_dim"],
        intermediate_size=vit["image_mlp_dim"],
        num_hidden_layers=vit["image_num_layers"],
        num_attention_heads=vit["image_num_heads"],
        image_size=vit["image_default_input_size"][0],
        patch_size=vit["image_patch_size"],
        hidden_act="quick_gelu",
        layer_norm_eps=vit["image_norm_eps"],
    )
    model = CLIPVisionModel(settings).eval()
    prefix = "vision_model." if any(n.startswith("vision_model.") for n, _ in model.named_parameters()) else ""
    root, side = "model.vision_backbone.image_vit.", vit["image_patch_size"]
    patch = tensors[f"{root}patch_embedding.weight"].reshape(-1, side, side, 3).permute(0, 3, 1, 2)
    found = {
        "embeddings.class_embedding": tensors[f"{root}class_embedding"],
        "embeddings.position_embedding.weight": tensors[f"{root}positional_embedding"],
        "embeddings.patch_embedding.weight": patch,
        **{f"post_layernorm.{kind}": torch.ones(vit["image_emb_dim"]) for kind in ("weight", "bias")},
    }
    names = {
        **{"attention_norm": "layer_norm1", "ffn_norm": "layer_norm2", "attention.wo": "self_attn.out_proj"},
        **{f"attention.w{which}": f"self_attn.{which}_proj" for which in "qkv"},
        **{"feed_forward.w1": "mlp.fc1", "feed_forward.w2": "mlp.fc2"},
    }
    for kind in ("weight", "bias"):
        found[f"pre_layrnorm.{kind}"] = tensors[f"{root}pre_ln.{kind}"]
        for i in range(vit["image_num_layers"]):
            for ours, theirs in names.items():
                own = tensors[f"{root}transformer.resblocks.{i}.{ours}.{kind}"]
                found[f"encoder.layers.{i}.{theirs}.{kind}"] = own
    _fill(model, {prefix + name: value for name, value in found.items()})
    return model


def molmo_crops(directory: Path, pixels: Floats, masks: Floats) -> Floats:
    """[n_crops, tokens², n_embd] of crops [n, 3, side, side] and masks [n, patches], a token at a time.

    x = both layers of a patch + a vector of padding; of four x the mean asks, softmax(q kᵀ / √d) v in each head
    answers; then W₂ (silu(W₁ y) · W₃ y).
    """
    config, tensors = weights(directory)
    vit, root = config["vision_backbone"], "model.vision_backbone."
    heads, side = vit["image_num_heads"], vit["image_default_input_size"][0] // vit["image_patch_size"]

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        bias = tensors.get(f"{root}{name}.bias")
        y = x @ tensors[f"{root}{name}.weight"].T
        return y if bias is None else y + bias

    found = []
    with torch.no_grad():
        hidden = clip(directory)(torch.from_numpy(pixels), output_hidden_states=True).hidden_states[1:]
        both = torch.cat([hidden[layer] for layer in config["vit_layers"]], dim=-1)[:, 1:]
        for crop, mask in zip(both, masks, strict=True):
            x = crop.clone()
            for i, share in enumerate(mask):
                if share == 0:
                    x[i] += tensors[f"{root}pad_embed"][0]
                elif share < 1:
                    x[i] += tensors[f"{root}pad_embed"][1]
            rows = []
            for row in range(0, side, 2):
                for column in range(0, side, 2):
                    at = row * side + column
                    four = x[[at, at + 1, at + side, at + side + 1]]
                    q = linear("image_pooling_2d.wq", four.mean(0)).reshape(heads, -1)
                    k, v = (linear(f"image_pooling_2d.{w}", four).reshape(4, heads, -1) for w in ("wk", "wv"))
                    scores = torch.einsum("hd,khd->hk", q, k) / math.sqrt(q.shape[-1])
                    rows.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v).reshape(-1))
            y = linear("image_pooling_2d.wo", torch.stack(rows))
            gate = linear("image_projector.w1", y)
            found.append(linear("image_projector.w2", gate * gate.sigmoid() * linear("image_projector.w3", y)))
    return torch.stack(found).numpy()


def molmo_picture(directory: Path, place: Cropped) -> Floats:
    """[n_tokens, n_embd] of a picture in crops, a token at a time: of a crop those that are two tokens from its edge,
    or at the picture's.
    """
    config, tensors = weights(directory)
    seen = molmo_crops(directory, place.pixels, place.masks)
    n, width = math.isqrt(seen.shape[1]), seen.shape[2]
    crops, own = seen.reshape(-1, n, n, width), n - 4
    grid = np.zeros((own * place.rows + 4, own * place.columns + 4, width), np.float32)
    for y in range(len(grid)):
        for x in range(grid.shape[1]):
            row = min(max((y - 2) // own, 0), place.rows - 1)
            column = min(max((x - 2) // own, 0), place.columns - 1)
            grid[y, x] = crops[1 + row * place.columns + column][y - own * row, x - own * column]
    added = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    table, first = tensors["model.transformer.wte.new_embedding"].numpy(), config["embedding_size"]
    rows = {token["content"]: table[token["id"] - first] for token in added if token["id"] >= first}
    found = []
    for view in (crops[0], grid):
        found.append(rows["<im_start>"])
        for line in view:
            found += [*(line + rows["<im_patch>"]), rows["<im_col>"]]
        found.append(rows["<im_end>"])
    return np.stack(found)
