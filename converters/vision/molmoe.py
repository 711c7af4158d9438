"""MolmoE: CLIP, two of its layers side by side, four neighbouring patches pooled by attention, and a SwiGLU.

Names and settings: Ai2's ``modeling_molmoe.py``, ``config_molmoe.py`` and ``image_preprocessing_molmo.py``. The
released code has QuickGELU whatever ``image_mlp_activations`` says. Rows of ``wte.new_embedding`` are part of the file:
text embeddings of tokens that the GGUF leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.key_values import need_number
from converters.molmoe import NEW_EMBEDDING, VISION, in_olmoe_words
from converters.onnx_graph import Floats, Value
from converters.vision.blocks import attention, patches, quick_gelu, silu
from converters.vision.settings import check, colour, part, processor_settings
from converters.vision.weights import Tensors, Weights
from mopeq_edge.errors import SourceError
from mopeq_edge.source.checkpoint import read_json_object
from mopeq_edge.vision.description import CROPS, Crops, Prompt

ROOT = (VISION,)
VIT = f"{VISION}image_vit."
BLOCKS = f"{VIT}transformer.resblocks."
TOKENS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>")
"""In the order of the rows of ``picture_tokens``."""

_VIT: Mapping[str, Any] = {
    **{"image_model_type": "openai", "image_default_input_size": [336, 336], "image_patch_size": 14},
    **{"image_emb_dim": 1024, "image_num_heads": 16, "image_num_key_value_heads": 16, "image_head_dim": 64},
    **{"image_mlp_dim": 4096, "image_num_pos": 577, "image_norm_eps": 1e-5},
}
_MODEL: Mapping[str, Any] = {
    **{"image_padding_embed": "pad_and_partial_pad", "image_pooling_h": 2, "image_pooling_w": 2},
    **{"image_projector": "mlp", "use_cls_feature": False},
}
_PROCESSOR: Mapping[str, Any] = {
    **{"max_crops": 12, "overlap_margins": [4, 4]},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


PROMPT = Prompt(" User: ", " Assistant:", "", "")


@dataclass(frozen=True)
class Tower:
    """The settings that the graph follows from."""

    width: int
    heads: int
    ff: int
    eps: float
    layers: tuple[int, ...]
    """Layers, from 0, whose outputs lie side by side."""
    n_embd: int
    inner: int
    """Width inside the projector."""
    n_new: int
    """Rows of the further embedding."""
    rows: tuple[int, ...]
    """Of these those of :data:`TOKENS`."""
    layout: Crops
    unused: tuple[str, ...]
    """Beginnings of the names of tensors that nothing computes: layers behind the last whose output is used."""
    prompt: Prompt = PROMPT
    kind: str = CROPS

    @property
    def n_side(self) -> int:
        """Patches of a crop's side."""
        return self.layout.side // self.layout.patch


def read_tower(directory: Path, config: Mapping[str, Any], checkpoint: Tensors) -> Tower:
    """The settings of a checkpoint. Raises :class:`SourceError` for what is not computed here."""
    check({**_MODEL, **config}, _MODEL)
    pooling = str(config.get("image_pooling_2d", "attention-meanq")).replace("_", "-")
    check({"image_pooling_2d": pooling}, {"image_pooling_2d": "attention-meanq"})
    said = {"vision_backbone": {}, **config}
    vit = part(said, "vision_backbone", _VIT)
    width, heads = need_number(vit, "image_emb_dim"), need_number(vit, "image_num_heads")
    same = {"image_model_type": "openai", "image_num_key_value_heads": heads, "image_head_dim": width // heads}
    check(vit, same, "vision_backbone")
    processor = {
        **_PROCESSOR,
        "base_image_input_size": vit["image_default_input_size"],
        **processor_settings(directory, ("preprocessor_config.json", "processor_config.json")),
    }
    text = in_olmoe_words(config)
    n_layers = len({name[len(BLOCKS) :].partition(".")[0] for name in checkpoint.shapes if name.startswith(BLOCKS)})
    check({"image_num_layers": n_layers, **vit}, {"image_num_layers": n_layers}, "vision_backbone")
    layers = _layers(config.get("vit_layers", [-2, -9]), n_layers)
    n_new = need_number(config, "additional_vocab_size")
    return Tower(
        width=width,
        heads=heads,
        ff=need_number(vit, "image_mlp_dim"),
        eps=float(vit["image_norm_eps"]),
        layers=layers,
        n_embd=text["hidden_size"],
        inner=text["intermediate_size"],
        n_new=n_new,
        rows=_rows(directory, text["vocab_size"], n_new),
        layout=_layout(vit, processor),
        unused=tuple(f"{BLOCKS}{layer}." for layer in range(max(layers) + 1, n_layers)),
    )


def build(tower: Tower, weights: Weights) -> None:
    """Add the graph: ``pixels`` [1, 3, side, side] and ``mask`` [patches] to ``embeddings`` [tokens², n_embd].

    ``mask`` is the share of each patch that is picture. ``picture_tokens`` [4, n_embd] are those of :data:`TOKENS`.
    """
    graph, layout, width = weights.graph, tower.layout, tower.width
    n_side, side = tower.n_side, layout.patch
    pixels = graph.input("pixels", [1, 3, layout.side, layout.side])
    mask = graph.input("mask", [n_side * n_side])
    name = f"{VIT}patch_embedding.weight"
    # the checkpoint has rows, columns and channels of a patch in that order
    embed = weights.numbers(name, (width, 3 * side * side)).reshape(width, side, side, 3).transpose(0, 3, 1, 2)
    embed = np.ascontiguousarray(embed.reshape(width, 3 * side * side))
    x = weights.product(patches(graph, pixels, side, n_side), name, embed, narrow=False)
    first: Floats = weights.numbers(f"{VIT}class_embedding", (width,))[None]
    x = graph.add("Concat", graph.constant(first), x, axis=0)
    x = graph.add("Add", x, weights.vector(f"{VIT}positional_embedding", n_side * n_side + 1, width))
    x = weights.norm(x, f"{VIT}pre_ln", width, tower.eps)
    outputs: dict[int, Value] = {}
    for layer in range(max(tower.layers) + 1):
        x = outputs[layer] = _block(tower, weights, x, f"{BLOCKS}{layer}.")
    both = graph.add("Concat", *(outputs[layer] for layer in tower.layers), axis=1)
    seen = graph.add("Slice", both, graph.integers(1), graph.integers(n_side * n_side + 1), graph.integers(0))
    pooled = _pool(tower, weights, _padded(tower, weights, seen, mask))
    graph.output(_project(tower, weights, pooled), "embeddings", [(n_side // 2) ** 2, tower.n_embd])
    tokens = weights.numbers(NEW_EMBEDDING, (tower.n_new, tower.n_embd))[list(tower.rows)]
    graph.output(graph.constant(tokens), "picture_tokens", [len(TOKENS), tower.n_embd])


def _block(tower: Tower, weights: Weights, x: Value, name: str) -> Value:
    graph, width = weights.graph, tower.width
    own = weights.norm(x, f"{name}attention_norm", width, tower.eps)
    q, k, v = (weights.linear(own, f"{name}attention.w{which}", width, width) for which in "qkv")
    mixed = attention(graph, q, k, v, tower.heads, width // tower.heads)
    x = graph.add("Add", x, weights.linear(mixed, f"{name}attention.wo", width, width))
    own = weights.norm(x, f"{name}ffn_norm", width, tower.eps)
    inner = quick_gelu(graph, weights.linear(own, f"{name}feed_forward.w1", tower.ff, width))
    return graph.add("Add", x, weights.linear(inner, f"{name}feed_forward.w2", width, tower.ff))


def _padded(tower: Tower, weights: Weights, seen: Value, mask: Value) -> Value:
    """One vector is added to patches that are all padding, another to those that are so in part, or below 0."""
    graph, wide = weights.graph, tower.width * len(tower.layers)
    column = graph.reshape(mask, -1, 1)
    empty = graph.add("Equal", column, graph.floats(0.0))
    partly = graph.add("And", graph.add("Less", column, graph.floats(1.0)), graph.add("Not", empty))
    vectors = weights.numbers(f"{VISION}pad_embed", (2, wide))
    for where, vector in ((empty, vectors[:1]), (partly, vectors[1:])):
        marked = graph.add("Cast", where, to=1)
        seen = graph.add("Add", seen, graph.add("Mul", marked, graph.constant(np.ascontiguousarray(vector))))
    return seen


def _pool(tower: Tower, weights: Weights, x: Value) -> Value:
    """[tokens², width]: four patches in a square are asked with their mean."""
    graph, half, wide = weights.graph, tower.n_side // 2, tower.width * len(tower.layers)
    squares = graph.add("Transpose", graph.reshape(x, half, 2, half, 2, wide), perm=[0, 2, 1, 3, 4])
    squares = graph.reshape(squares, half * half, 4, wide)
    mean = graph.reshape(graph.add("ReduceMean", squares, graph.integers(1), keepdims=0), -1, wide)
    four = graph.reshape(squares, -1, wide)
    name = f"{VISION}image_pooling_2d."
    q, k, v = (
        weights.linear(rows, f"{name}{which}", tower.width, wide)
        for which, rows in (("wq", mean), ("wk", four), ("wv", four))
    )
    mixed = attention(graph, q, k, v, tower.heads, tower.width // tower.heads, groups=half * half)
    return weights.linear(mixed, f"{name}wo", tower.width, tower.width)


def _project(tower: Tower, weights: Weights, x: Value) -> Value:
    graph, name = weights.graph, f"{VISION}image_projector."
    gate, up = (weights.linear(x, f"{name}{w}", tower.inner, tower.width, bias=False) for w in ("w1", "w3"))
    inner = graph.add("Mul", silu(graph, gate), up)
    return weights.linear(inner, f"{name}w2", tower.n_embd, tower.inner, bias=False)


def _layers(found: Any, n_layers: int) -> tuple[int, ...]:
    good = isinstance(found, list) and found and all(type(x) is int and -n_layers <= x < n_layers for x in found)
    if not good:
        raise SourceError(
            f"config.json has vit_layers {found!r} for {n_layers} layers of the vision side; use the config.json of "
            "these weights"
        )
    return tuple(x % n_layers for x in found)


def _layout(vit: Mapping[str, Any], processor: Mapping[str, Any]) -> Crops:
    size, margins = processor["base_image_input_size"], processor["overlap_margins"]
    patch = need_number(vit, "image_patch_size")
    sizes = [size, size] if isinstance(size, int) else size
    good = isinstance(sizes, list) and len(sizes) == 2 and type(sizes[0]) is int and sizes[0] == sizes[1] > 0
    good = good and isinstance(margins, list) and len(margins) == 2 and all(type(x) is int and x >= 0 for x in margins)
    n_side = sizes[0] // patch if good else 0
    if not good or n_side % 2 or margins[0] % 2 or n_side <= sum(margins) or n_side**2 + 1 != vit["image_num_pos"]:
        raise SourceError(
            f"the processor's settings have base_image_input_size {size!r} and overlap_margins {margins!r} for "
            f"patches of {patch} and {vit['image_num_pos']!r} positions, expected a square of an even number of "
            "patches with a position each and one more; use the files of these weights"
        )
    return Crops(
        side=sizes[0],
        patch=patch,
        most=need_number(processor, "max_crops"),
        margins=(margins[0], margins[1]),
        mean=colour(processor, "image_mean"),
        std=colour(processor, "image_std"),
    )


def _rows(directory: Path, n_vocab: int, n_new: int) -> tuple[int, ...]:
    """Rows of the further embedding for :data:`TOKENS`."""
    added = read_json_object(directory / "tokenizer.json").get("added_tokens", [])
    ids: dict[Any, Any] = {token.get("content"): token.get("id") for token in added if isinstance(token, dict)}
    for token in TOKENS:
        found = ids.get(token)
        if not isinstance(found, int) or not n_vocab <= found < n_vocab + n_new:
            raise SourceError(
                f"tokenizer.json has token {token} at {found!r}, expected {n_vocab} to {n_vocab + n_new - 1}; use the "
                "tokenizer.json of these weights, or give --text-only for the GGUF alone"
            )
    return tuple(ids[token] - n_vocab for token in TOKENS)
