"""Random OLMoE checkpoints of any size, written tensor by tensor: for memory and speed alone."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tools.bench.models import EXAMPLE, Shape

POOL = 2**24
"""Random weights that are drawn; a tensor is a stretch of them that begins where its name says."""


def write_olmoe_checkpoint(directory: Path, shape: Shape, n_vocab: int) -> int:
    """A Hugging Face directory in BF16, a shard for each block. Returns the bytes of its weights.

    The tokenizer is the bundled model's, so ``n_vocab`` must be 4096 or more.
    """
    directory.mkdir(parents=True)
    pool = _bf16(0.05 * np.random.default_rng(0).standard_normal(POOL, dtype=np.float32))
    shards = [_ends(shape, n_vocab), *(_block(shape, layer) for layer in range(shape.n_layer))]
    placement: dict[str, str] = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        _write_shard(directory / name, shard, pool)
        placement.update(dict.fromkeys(shard, name))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placement}))
    config = json.loads((EXAMPLE / "config.json").read_text()) | {
        **{"hidden_size": shape.n_embd, "intermediate_size": shape.n_ff, "num_hidden_layers": shape.n_layer},
        **{"num_experts": shape.n_expert, "num_experts_per_tok": shape.n_used, "vocab_size": n_vocab},
        **{"num_attention_heads": shape.n_head, "num_key_value_heads": shape.n_head},
    }
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, directory / name)
    return 2 * sum(math.prod(size) for shard in shards for size in shard.values())


def _ends(shape: Shape, n_vocab: int) -> dict[str, tuple[int, ...]]:
    table = (n_vocab, shape.n_embd)
    return {"lm_head.weight": table, "model.embed_tokens.weight": table, "model.norm.weight": (shape.n_embd,)}


def _block(shape: Shape, layer: int) -> dict[str, tuple[int, ...]]:
    embd, ff = shape.n_embd, shape.n_ff
    prefix = f"model.layers.{layer}."
    found: dict[str, tuple[int, ...]] = {}
    for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
        found[f"{prefix}{name}.weight"] = (embd,)
    for name in ("q", "k", "v", "o"):
        found[f"{prefix}self_attn.{name}_proj.weight"] = (embd, embd)
    found[f"{prefix}mlp.gate.weight"] = (shape.n_expert, embd)
    for expert in range(shape.n_expert):
        for name, size in (("gate", (ff, embd)), ("up", (ff, embd)), ("down", (embd, ff))):
            found[f"{prefix}mlp.experts.{expert}.{name}_proj.weight"] = size
    return found


def _write_shard(path: Path, shapes: Mapping[str, tuple[int, ...]], pool: npt.NDArray[np.uint16]) -> None:
    header, at = {}, 0
    for name, size in shapes.items():
        end = at + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, size in shapes.items():
            left, start = math.prod(size), zlib.crc32(name.encode()) % len(pool)
            if len(size) == 1:
                file.write(_bf16(np.ones(size, dtype=np.float32)).tobytes())
                continue
            while left:
                piece = pool[start : start + left]
                file.write(piece.tobytes())
                left, start = left - len(piece), 0


def _bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    return (values.view(np.uint32) >> np.uint32(16)).astype("<u2")
