"""Write a checkpoint in the form of DeepSeek-V3 of any size that takes next to no space: files with holes.

``python -m tools.sparse_checkpoint DIR`` writes 61 layers of 256 experts, 100 billion weights in BF16 (200 GB to look
at, about 2 GB on disk). Names, shapes, shards, index and a vocabulary of 129,280 tokens are real. Weights are zeros but
for matrices that are no experts and for the rows that ``--sample-rows`` of the same number measures, whose scale
differs from expert to expert: a measurement by rows finds a model there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mopeq_edge.sensitivity.sample import SINGLE_MATRIX, drawn_rows

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-olmoe"
WHOLE = 2**23
"""Weights up to which a matrix that is no expert's is filled."""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Size:
    """Sizes of a model; ``n_vocab`` is 4096 or more, ``sample_rows`` have numbers, a shard is ``shard_bytes`` large."""

    n_layer: int = 61
    n_expert: int = 256
    hidden: int = 2048
    ff: int = 1024
    n_head: int = 16
    n_vocab: int = 129_280
    sample_rows: int = 4
    shard_bytes: int = 2 * 10**9

    @property
    def config(self) -> dict[str, object]:
        """As config.json has it; every layer has experts, and no block predicts further tokens."""
        return {
            **{"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16"},
            **{"hidden_size": self.hidden, "intermediate_size": 2 * self.ff, "moe_intermediate_size": self.ff},
            **{"num_hidden_layers": self.n_layer, "n_routed_experts": self.n_expert, "n_shared_experts": 1},
            **{"num_attention_heads": self.n_head, "num_key_value_heads": self.n_head, "vocab_size": self.n_vocab},
            **{"q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
            **{"v_head_dim": 128, "first_k_dense_replace": 0, "moe_layer_freq": 1, "num_nextn_predict_layers": 0},
            **{"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc"},
            **{"scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5},
            **{"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 4096},
            **{"attention_bias": False, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1},
        }

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor, in the order of the shards."""
        embd, table = self.hidden, (self.n_vocab, self.hidden)
        yield from {"lm_head.weight": table, "model.embed_tokens.weight": table, "model.norm.weight": (embd,)}.items()
        for layer in range(self.n_layer):
            block = f"model.layers.{layer}."
            yield from {f"{block}{name}_layernorm.weight": (embd,) for name in ("input", "post_attention")}.items()
            yield from {f"{block}self_attn.{name}.weight": shape for name, shape in self._attention.items()}.items()
            yield f"{block}mlp.gate.weight", (self.n_expert, embd)
            yield f"{block}mlp.gate.e_score_correction_bias", (self.n_expert,)
            for owner in ("shared_experts", *(f"experts.{expert}" for expert in range(self.n_expert))):
                for name, shape in (("gate", (self.ff, embd)), ("up", (self.ff, embd)), ("down", (embd, self.ff))):
                    yield f"{block}mlp.{owner}.{name}_proj.weight", shape

    @property
    def _attention(self) -> Shapes:
        return {
            **{"q_a_proj": (768, self.hidden), "q_a_layernorm": (768,), "q_b_proj": (self.n_head * 192, 768)},
            **{"kv_a_proj_with_mqa": (576, self.hidden), "kv_a_layernorm": (512,)},
            **{"kv_b_proj": (self.n_head * 256, 512), "o_proj": (self.hidden, self.n_head * 128)},
        }


def write_sparse_checkpoint(directory: Path, size: Size) -> int:
    """Write the checkpoint. Returns the number of its weights."""
    directory.mkdir(parents=True)
    shards: list[Shapes] = [{}]
    nbytes = 0
    for name, shape in size.shapes():
        own = 2 * math.prod(shape)
        if nbytes + own > size.shard_bytes and shards[-1]:
            shards.append({})
            nbytes = 0
        shards[-1][name] = shape
        nbytes += own
    placement: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(directory / file, shard, size.sample_rows)
        placement.update(dict.fromkeys(shard, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placement}))
    (directory / "config.json").write_text(json.dumps(size.config))
    (directory / "tokenizer_config.json").write_bytes((EXAMPLE / "tokenizer_config.json").read_bytes())
    _write_tokenizer(directory / "tokenizer.json", size.n_vocab)
    return sum(math.prod(shape) for shard in shards for shape in shard.values())


def _write_shard(path: Path, shapes: Shapes, sample_rows: int) -> None:
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.truncate(8 + len(raw) + at)
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.flush()
        for name, shape in shapes.items():
            start = 8 + len(raw) + header[name]["data_offsets"][0]
            for first, values in _content(name, shape, sample_rows):
                os.pwrite(file.fileno(), values.tobytes(), start + 2 * first * shape[-1])


def _content(name: str, shape: tuple[int, ...], sample_rows: int) -> Iterator[tuple[int, npt.NDArray[np.uint16]]]:
    """(first row, BF16 rows) of what is not zero."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) == 1:
        yield 0, _bf16(np.ones(shape, dtype=np.float32))
        return
    scale = 0.02 * 2 ** rng.uniform(-1, 1)
    expert = re.search(r"\.experts\.(\d+)\.", name)
    if not expert and math.prod(shape) <= WHOLE:
        yield 0, _bf16(scale * rng.standard_normal(shape, dtype=np.float32))
        return
    number = int(expert[1]) if expert else 0
    # those that sensitivity draws
    rows = drawn_rows(shape[0], sample_rows * (1 if expert else SINGLE_MATRIX), seed=shape[0] + number)
    for row in np.sort(rows):
        yield int(row), _bf16(scale * rng.standard_normal((1, shape[1]), dtype=np.float32))


def _bf16(values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint16]:
    return (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype("<u2")


def _write_tokenizer(path: Path, n_vocab: int) -> None:
    """The bundled tokenizer with pairs of its tokens as further tokens."""
    found = json.loads((EXAMPLE / "tokenizer.json").read_text())
    vocab, merges = found["model"]["vocab"], found["model"]["merges"]
    plain = [word for word in vocab if word.isalpha() and word.isascii()]
    number = max(*vocab.values(), *(token["id"] for token in found["added_tokens"])) + 1
    for pair in ((left, right) for left in plain for right in plain):
        if number == n_vocab:
            break
        if "".join(pair) not in vocab:
            vocab["".join(pair)] = number
            merges.append(list(pair) if isinstance(merges[0], list) else " ".join(pair))
            number += 1
    path.write_text(json.dumps(found))


def main() -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    sizes = {"n_layer": "--layers", "n_expert": "--experts", "hidden": "--hidden", "ff": "--ff", "n_vocab": "--vocab"}
    for field, option in (*sizes.items(), ("sample_rows", "--sample-rows"), ("shard_bytes", "--shard-bytes")):
        parser.add_argument(option, dest=field, type=int, default=getattr(Size(), field))
    given = vars(parser.parse_args())
    weights = write_sparse_checkpoint(given.pop("directory"), Size(**given))
    print(f"{weights:,} weights")


if __name__ == "__main__":
    main()
