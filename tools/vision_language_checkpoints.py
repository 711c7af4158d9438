"""Write a checkpoint with random weights that has the names, shapes and settings of a released vision-language model.

``python -m tools.vision_language_checkpoints vl2-small OUT --layers 2`` writes the first dense and one sparse layer of
DeepSeek-VL2-Small; without ``--layers`` all of it, with ``--shrink`` a test-size model. The vision side is complete
always. One chunk of a tensor is in memory at a time (a shard with ``--torch``); a tensor's numbers depend on its name
and the seed only. The tokenizer is the bundled one, filled up to the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tools.vision_language_configs import MODELS, MOLMOE, config_of
from tools.vision_sides import Shapes, molmoe_vision_shapes, processor_file, vl2_vision_shapes

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-olmoe"
CHUNK = 1 << 22
"""Weights that are made at once."""
DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}
PICTURE_TOKENS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>")

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Options:
    """What to write: ``dtype`` None is the released one; ``torch`` makes files of torch.save instead of safetensors."""

    model: str
    layers: int | None = None
    shrink: bool = False
    dtype: str | None = None
    torch: bool = False
    shard_bytes: int = 4 << 30
    seed: int = 0


def molmoe_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a MolmoE."""
    hidden, ff, n_expert = config["d_model"], config["mlp_ratio"] * config["d_model"] // 2, config["moe_num_experts"]
    shapes: Shapes = {
        "model.transformer.wte.embedding": (config["embedding_size"], hidden),
        "model.transformer.wte.new_embedding": (config["additional_vocab_size"], hidden),
        "model.transformer.ln_f.weight": (hidden,),
        "model.transformer.ff_out.weight": (config["embedding_size"], hidden),
        **molmoe_vision_shapes(config),
    }
    for layer in range(config["n_layers"]):
        block = f"model.transformer.blocks.{layer}."
        shapes |= {f"{block}{name}.weight": (hidden,) for name in ("attn_norm", "ff_norm", "q_norm", "k_norm")}
        shapes |= {f"{block}att_proj.weight": (3 * hidden, hidden), f"{block}attn_out.weight": (hidden, hidden)}
        shapes[f"{block}mlp.gate.weight"] = (n_expert, hidden)
        for e in range(n_expert):
            shapes |= _swiglu(f"{block}mlp.experts.{e}.", hidden, ff)
    return shapes


def vl2_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a DeepSeek-VL2."""
    # what the released settings leave out
    text = {
        **{"num_hidden_layers": 30, "num_attention_heads": 32, "vocab_size": 102400, "use_mla": True},
        **{"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
        **config["language_config"],
    }
    hidden, ff, n_expert = text["hidden_size"], text["moe_intermediate_size"], text["n_routed_experts"]
    shapes: Shapes = {
        **vl2_vision_shapes(config),
        "language.model.embed_tokens.weight": (text["vocab_size"], hidden),
        "language.model.norm.weight": (hidden,),
        "language.lm_head.weight": (text["vocab_size"], hidden),
    }
    for layer in range(text["num_hidden_layers"]):
        block = f"language.model.layers.{layer}."
        shapes |= {f"{block}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shapes |= {f"{block}self_attn.{name}.weight": shape for name, shape in _attention(text).items()}
        if layer < text["first_k_dense_replace"]:
            shapes |= _swiglu(f"{block}mlp.", hidden, text["intermediate_size"])
            continue
        shapes[f"{block}mlp.gate.weight"] = (n_expert, hidden)
        if text["topk_method"] == "noaux_tc":
            shapes[f"{block}mlp.gate.e_score_correction_bias"] = (n_expert,)
        shapes |= _swiglu(f"{block}mlp.shared_experts.", hidden, ff * text["n_shared_experts"])
        for e in range(n_expert):
            shapes |= _swiglu(f"{block}mlp.experts.{e}.", hidden, ff)
    return shapes


def _attention(text: Mapping[str, Any]) -> Shapes:
    hidden, n_head = text["hidden_size"], text["num_attention_heads"]
    if not text["use_mla"]:
        return {f"{which}_proj": (hidden, hidden) for which in "qkvo"}
    latent, key, rope = text["kv_lora_rank"], text["qk_nope_head_dim"], text["qk_rope_head_dim"]
    return {
        "q_proj": (n_head * (key + rope), hidden),
        "kv_a_proj_with_mqa": (latent + rope, hidden),
        "kv_a_layernorm": (latent,),
        "kv_b_proj": (n_head * (key + text["v_head_dim"]), latent),
        "o_proj": (hidden, n_head * text["v_head_dim"]),
    }


def _swiglu(prefix: str, hidden: int, ff: int) -> Shapes:
    return {
        f"{prefix}gate_proj.weight": (ff, hidden),
        f"{prefix}up_proj.weight": (ff, hidden),
        f"{prefix}down_proj.weight": (hidden, ff),
    }


def chunks(name: str, shape: tuple[int, ...], seed: int) -> Iterator[Floats]:
    """The numbers of a tensor in float32, some at a time; large enough for logits that differ by more than rounding."""
    generator = np.random.default_rng((seed, zlib.crc32(name.encode())))
    centre, spread = 0.0, 0.64 / math.sqrt(shape[-1])
    if name.endswith(".bias"):
        spread = 0.1
    if ("norm" in name or name.endswith(("ln_f.weight", "pre_ln.weight"))) and not name.endswith(".bias"):
        centre, spread = 1.0, 0.1
    elif name.endswith("e_score_correction_bias"):
        spread = 0.3
    elif name.endswith("gate.weight"):
        spread = 4 / math.sqrt(shape[-1])
    for start in range(0, total := math.prod(shape), CHUNK):
        noise = generator.standard_normal(min(CHUNK, total - start), dtype=np.float32)
        yield centre + np.float32(spread) * noise


def write_checkpoint(out: Path, options: Options) -> Path:
    """Write config.json, tokenizer and weights into the new directory ``out``; shard by shard, and return it."""
    config = config_of(options.model, options.layers, options.shrink)
    shapes = molmoe_shapes(config) if options.model == MOLMOE else vl2_shapes(config)
    dtype = options.dtype or ("float32" if options.model == MOLMOE else "bfloat16")
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    name, content = processor_file(config)
    (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _write_tokenizer(out, config)
    shards = list(_shards(shapes, DTYPES[dtype][1], options.shard_bytes))
    stem, ending = ("pytorch_model", "bin") if options.torch else ("model", "safetensors")
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.{ending}" for i in range(len(shards))]
    names = names if len(shards) > 1 else [f"{stem}.{ending}"]
    write = _write_torch if options.torch else write_weights
    for name, shard in zip(names, shards, strict=True):
        write(out / name, shard, dtype, options.seed)
    if len(shards) > 1:
        placement = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        (out / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placement}))
    return out


def _shards(shapes: Shapes, size: int, limit: int) -> Iterator[Shapes]:
    own: Shapes = {}
    used = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * size
        if own and used + nbytes > limit:
            yield own
            own, used = {}, 0
        own[name] = shape
        used += nbytes
    yield own


def write_weights(path: Path, shapes: Shapes, dtype: str, seed: int) -> None:
    """A safetensors file of ``shapes``, a chunk at a time."""
    kind, size = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * size
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for chunk in chunks(name, shape, seed):
                # without the lower half of its bits a number is one of BF16
                kept = chunk if dtype == "float32" else (chunk.view("<u4") >> 16).astype("<u2")
                file.write(kept.tobytes())


def _write_torch(path: Path, shapes: Shapes, dtype: str, seed: int) -> None:
    import torch

    def tensor(name: str, shape: tuple[int, ...]) -> Any:
        values = np.concatenate(list(chunks(name, shape, seed)))
        if dtype == "bfloat16":
            values = (values.view("<u4") & 0xFFFF0000).view("<f4")
        return torch.from_numpy(values).reshape(shape).to(getattr(torch, dtype))

    torch.save({name: tensor(name, shape) for name, shape in shapes.items()}, path)


def _write_tokenizer(out: Path, config: Mapping[str, Any]) -> None:
    """The bundled one with a token for every row, and MolmoE's that stand for pictures behind them."""
    text = config.get("language_config", config)
    n_vocab = text.get("embedding_size", text.get("vocab_size", 102400))
    tokenizer = json.loads((EXAMPLE / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    vocab |= {f"|<EXTRA_TOKENS_{number}>|": number for number in range(len(vocab), n_vocab)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    if config.get("additional_vocab_size"):
        further = enumerate(PICTURE_TOKENS, n_vocab)
        tokenizer["added_tokens"] += [{"id": number, "content": token, **flags} for number, token in further]
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (out / "tokenizer_config.json").write_bytes((EXAMPLE / "tokenizer_config.json").read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("out", type=Path, help="a directory that does not exist yet")
    parser.add_argument("--layers", type=int, help="the first so many blocks only")
    parser.add_argument("--shrink", action="store_true", help="a test-size model")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: as released")
    parser.add_argument("--torch", action="store_true", help="files of torch.save")
    parser.add_argument("--shard-gb", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists")
    own = {key: getattr(args, key) for key in ("model", "layers", "shrink", "dtype", "torch", "seed")}
    write_checkpoint(args.out, Options(**own, shard_bytes=int(args.shard_gb * 1e9)))


if __name__ == "__main__":
    main()
