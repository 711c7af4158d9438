"""Vision sides in torch: towers of transformers with a checkpoint's weights, the rest from the equations."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from mopeq_edge.vision.session import Floats

Tensors = Mapping[str, torch.Tensor]


def weights(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """config.json, and every tensor in float32."""
    config = json.loads((directory / "config.json").read_text())
    return config, {name: value.float() for name, value in load_file(directory / "model.safetensors").items()}


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
