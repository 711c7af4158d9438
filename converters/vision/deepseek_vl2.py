"""DeepSeek-VL2: SigLIP, four neighbouring patches to one token, and the vectors that divide rows and views.

Names and settings: DeepSeek's ``modeling_deepseek_vl_v2.py``, ``siglip_vit.py`` and ``processing_deepseek_vl_v2.py``.
Its classes assume what config.json leaves out. The pooling head of SigLIP is in the files and is not computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.key_values import need_number
from converters.onnx_graph import Value
from converters.vision.blocks import attention, gelu, gelu_tanh, patches
from converters.vision.settings import check, colour, part, processor_settings
from converters.vision.weights import Weights
from mopeq_edge.errors import SourceError
from mopeq_edge.vision.description import TILES, Prompt, Tiles

ROOT = ("vision.", "projector.", "image_newline", "view_seperator", "tile_indicators")

_VISION: Mapping[str, Any] = {
    **{"image_size": 384, "patch_size": 16, "width": 1024, "layers": 24, "heads": 16, "mlp_ratio": 4},
    "class_token": False,
}
_PROJECTOR: Mapping[str, Any] = {
    **{"projector_type": "downsample_mlp_gelu", "input_dim": 1152, "n_embed": 2048, "depth": 2, "mlp_ratio": 1},
    **{"downsample_ratio": 2, "token_pooling": False},
}
_PROCESSOR: Mapping[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_token": "<image>"}
_EPS = 1e-6
_MOST_TILED = 2
"""The released processor cuts pictures into tiles if there are no more than this."""


@dataclass(frozen=True)
class Tower:
    """The settings that the graph follows from."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    ff: int
    n_embd: int
    inner: int
    """Width between the linear layers of the projector."""
    depth: int
    """Linear layers of the projector."""
    down: int
    """So many patches in a row become one token."""
    layout: Tiles
    prompt: Prompt
    kind: str = TILES
    unused: tuple[str, ...] = ("vision.attn_pool.",)

    @property
    def n_side(self) -> int:
        """Patches of a tile's side."""
        return self.image_size // self.patch_size


def read_tower(directory: Path, config: Mapping[str, Any]) -> Tower:
    """The settings of a checkpoint. Raises :class:`SourceError` for what is not computed here."""
    check({"tile_tag": "2D", **config}, {"tile_tag": "2D"})
    vision, projector = part(config, "vision_config", _VISION), part(config, "projector_config", _PROJECTOR)
    check(vision, {"class_token": False}, "vision_config")
    check(projector, {"projector_type": "downsample_mlp_gelu", "token_pooling": False}, "projector_config")
    where = processor_settings(directory, ("processor_config.json", "preprocessor_config.json"))
    said = {"candidate_resolutions": [[384, 384]], **config, **_PROCESSOR, **where}
    size, patch, down = (
        need_number(settings, key)
        for settings, key in ((vision, "image_size"), (vision, "patch_size"), (projector, "downsample_ratio"))
    )
    width, heads = need_number(vision, "width"), need_number(vision, "heads")
    if width % heads or size < patch:
        raise SourceError(
            f"config.json has vision_config with width {width}, heads {heads}, image_size {size} and patch_size "
            f"{patch}, expected whole heads and a patch; use the config.json of these weights"
        )
    candidates = _candidates(said["candidate_resolutions"], size)
    if said.get("global_view_pos", "head") not in ("head", "tail"):
        raise SourceError(f"config.json has global_view_pos {said['global_view_pos']!r}, expected 'head' or 'tail'")
    n_embd = need_number(projector, "n_embed")
    text_width = part(config, "language_config", {"hidden_size": 4096})["hidden_size"]
    if n_embd != text_width:
        raise SourceError(
            f"config.json has n_embed {n_embd} in projector_config, but hidden_size {text_width} in language_config; "
            "use the config.json of these weights"
        )
    ratio = vision["mlp_ratio"]
    if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 < ratio < 1000:
        raise SourceError(f"config.json has mlp_ratio {ratio!r} in vision_config, expected a number")
    return Tower(
        image_size=size,
        patch_size=patch,
        width=width,
        heads=heads,
        down=down,
        n_embd=n_embd,
        layers=need_number(vision, "layers"),
        ff=int(width * ratio),
        inner=n_embd * need_number(projector, "mlp_ratio"),
        # one layer that narrows and one that ends are always there
        depth=max(2, need_number(projector, "depth")),
        layout=Tiles(
            side=size,
            rows=-(-(size // patch) // down),
            candidates=candidates,
            most_tiled=_MOST_TILED,
            whole_first=said.get("global_view_pos", "head") == "head",
            mean=colour(said, "image_mean"),
            std=colour(said, "image_std"),
        ),
        prompt=Prompt("<|User|>: ", "\n\n<|Assistant|>:", str(said["image_token"]), f"{said['image_token']}\n"),
    )


def build(tower: Tower, weights: Weights) -> None:
    """Add the graph: ``pixels`` [1, 3, side, side] to ``embeddings`` [rows², n_embd]; the two vectors [n_embd]."""
    graph, width, n_side = weights.graph, tower.width, tower.n_side
    pixels = graph.input("pixels", [1, 3, tower.image_size, tower.image_size])
    x = patches(graph, pixels, tower.patch_size, n_side)
    area = 3 * tower.patch_size**2
    name = "vision.patch_embed.proj"
    embed = weights.numbers(f"{name}.weight", (width, 3, tower.patch_size, tower.patch_size)).reshape(width, area)
    bias = weights.vector(f"{name}.bias", width)
    x = weights.product(x, f"{name}.weight", embed, bias, narrow=False)
    places = weights.numbers("vision.pos_embed", (1, n_side * n_side, width))[0]
    x = graph.add("Add", x, graph.constant(places))
    for layer in range(tower.layers):
        x = _block(tower, weights, x, f"vision.blocks.{layer}.")
    x = weights.norm(x, "vision.norm", width, _EPS)
    graph.output(_project(tower, weights, x), "embeddings", [tower.layout.rows**2, tower.n_embd])
    for vector in ("image_newline", "view_seperator"):
        graph.output(weights.vector(vector, tower.n_embd), vector, [tower.n_embd])


def _block(tower: Tower, weights: Weights, x: Value, name: str) -> Value:
    graph, width = weights.graph, tower.width
    qkv = weights.linear(weights.norm(x, f"{name}norm1", width, _EPS), f"{name}attn.qkv", 3 * width, width)
    q, k, v = (graph.slice(qkv, at * width, (at + 1) * width) for at in range(3))
    mixed = attention(graph, q, k, v, tower.heads, width // tower.heads)
    x = graph.add("Add", x, weights.linear(mixed, f"{name}attn.proj", width, width))
    inner = weights.linear(weights.norm(x, f"{name}norm2", width, _EPS), f"{name}mlp.fc1", tower.ff, width)
    return graph.add("Add", x, weights.linear(gelu_tanh(graph, inner), f"{name}mlp.fc2", width, tower.ff))


def _project(tower: Tower, weights: Weights, x: Value) -> Value:
    """[rows², n_embd]: zeros fill the last row and column, then squares of patches lie channel by channel."""
    graph, down, rows, width = weights.graph, tower.down, tower.layout.rows, tower.width
    missing = rows * down - tower.n_side
    x = graph.reshape(x, tower.n_side, tower.n_side, width)
    if missing:
        x = graph.add("Pad", x, graph.integers(0, 0, 0, missing, missing, 0))
    x = graph.add("Transpose", graph.reshape(x, rows, down, rows, down, width), perm=[0, 2, 4, 1, 3])
    x = graph.reshape(x, rows * rows, width * down * down)
    n_in = width * down * down
    for layer in range(tower.depth):
        last = layer == tower.depth - 1
        n_out = tower.n_embd if last else tower.inner
        # a curve has a number of its own between two layers
        x = weights.linear(x, f"projector.layers.{2 * layer}", n_out, n_in)
        x, n_in = x if last else gelu(graph, x), n_out
    return x


def _candidates(found: Any, size: int) -> tuple[tuple[int, int], ...]:
    pairs = found if isinstance(found, list) else []
    good = [
        (pair[0], pair[1])
        for pair in pairs
        if isinstance(pair, list) and len(pair) == 2 and all(type(x) is int and x > 0 and x % size == 0 for x in pair)
    ]
    if not good or len(good) != len(pairs) or good[0][0] != size:
        raise SourceError(
            f"candidate_resolutions {str(found)[:60]}: expected pairs of multiples of {size}, the first of width "
            f"{size}; use the config.json and processor_config.json of these weights"
        )
    return tuple(good)
