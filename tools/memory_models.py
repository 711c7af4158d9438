"""Models to measure memory on: the bundled one, and random ones of other shapes, each stock and with expert groups."""

from __future__ import annotations

import random
from pathlib import Path

import click

from mopeq_edge.emit import emit
from mopeq_edge.expert_groups.layout import ExpertGroup, Grouping, Types
from mopeq_edge.ggml.library import load_ggml
from mopeq_edge.ggml.types import BF16, BY_NAME, F32, GgmlType
from mopeq_edge.gguf_file import KV, ValueType
from mopeq_edge.gguf_layout import string, uint32
from mopeq_edge.progress import SilentProgress
from mopeq_edge.source.gguf import GGUFSource
from mopeq_edge.source.model import SourceTensor
from tools.bench.models import Shape, with_vocabulary, write_random

BIG = Shape(n_layer=8, n_expert=48, n_embd=1024, n_ff=1024, n_used=8)
MIX = ("Q2_K", "Q3_K", "Q4_K")


def types_for(tensors: list[SourceTensor], expert: tuple[str, ...], rest: str) -> Types:
    """Experts in one type, or by thirds in several; other matrices in ``rest``."""
    types: dict[str, GgmlType | Grouping] = {}
    for tensor in tensors:
        if not tensor.quantizable:
            types[tensor.name] = tensor.type
        elif tensor.projection is None or len(expert) == 1:
            types[tensor.name] = BY_NAME[rest if tensor.projection is None else expert[0]]
        else:
            order = list(range(tensor.n_matrices))
            random.Random(tensor.name).shuffle(order)
            parts = [tuple(sorted(order[g :: len(expert)])) for g in range(len(expert))]
            types[tensor.name] = tuple(
                ExpertGroup(BY_NAME[name], part) for name, part in zip(expert, parts, strict=True)
            )
    return types


def windowed(n_vocab: int) -> tuple[dict[str, KV], list[SourceTensor]]:
    """gpt-oss's layout: grouped queries, biases, every other layer with a sliding window; about 0.6 B weights."""
    n_layer, embd, ff, n_expert, n_head, n_head_kv, head = 12, 1024, 512, 32, 16, 4, 64
    base = Shape(n_layer, n_expert, embd, ff).kvs
    kvs = {key: kv for key, kv in base.items() if not key.startswith("olmoe.")}
    kvs["general.architecture"] = string("gpt-oss")
    numbers = {
        **{"block_count": n_layer, "context_length": 65536, "embedding_length": embd, "feed_forward_length": ff},
        **{"attention.head_count": n_head, "attention.head_count_kv": n_head_kv, "attention.key_length": head},
        **{"attention.value_length": head, "attention.sliding_window": 128, "expert_count": n_expert},
        **{"expert_used_count": 4, "expert_feed_forward_length": ff},
    }
    kvs |= {f"gpt-oss.{key}": uint32(value) for key, value in numbers.items()}
    kvs["gpt-oss.attention.layer_norm_rms_epsilon"] = KV(ValueType.FLOAT32, 1e-5)
    kvs["gpt-oss.rope.freq_base"] = KV(ValueType.FLOAT32, 150000.0)
    kvs = with_vocabulary(kvs, n_vocab)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (embd, n_vocab),
        "output_norm.weight": (embd,),
        "output.weight": (embd, n_vocab),
    }
    for layer in range(n_layer):
        blk = f"blk.{layer}."
        shapes |= {f"{blk}{name}.weight": (embd,) for name in ("attn_norm", "post_attention_norm")}
        for name, size in (("q", n_head), ("k", n_head_kv), ("v", n_head_kv)):
            shapes |= {f"{blk}attn_{name}.weight": (embd, size * head), f"{blk}attn_{name}.bias": (size * head,)}
        shapes |= {f"{blk}attn_output.weight": (n_head * head, embd), f"{blk}attn_output.bias": (embd,)}
        shapes |= {f"{blk}attn_sinks.weight": (n_head,), f"{blk}ffn_gate_inp.weight": (embd, n_expert)}
        shapes |= {f"{blk}ffn_gate_inp.bias": (n_expert,), f"{blk}ffn_down_exps.bias": (embd, n_expert)}
        for name in ("gate", "up"):
            shapes |= {
                f"{blk}ffn_{name}_exps.weight": (embd, ff, n_expert),
                f"{blk}ffn_{name}_exps.bias": (ff, n_expert),
            }
        shapes[f"{blk}ffn_down_exps.weight"] = (ff, embd, n_expert)
    full = ("norm", "sinks", "bias", "gate_inp")
    tensors = [SourceTensor(n, s, F32 if any(word in n for word in full) else BF16) for n, s in shapes.items()]
    return kvs, tensors


def write_models(folder: Path, source: Path) -> list[Path]:
    """Write all into ``folder``: the bundled model as ``source`` (a BF16 GGUF) has it, and two random ones."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    tiny = GGUFSource(source)
    for name, expert in (("tiny", ("Q4_K",)), ("tiny-groups", MIX)):
        paths.append(folder / f"{name}.gguf")
        types = types_for(list(tiny.tensors), expert, "Q6_K")
        emit(tiny, types, tiny.kvs, None, load_ggml(), paths[-1], threads=1, progress=SilentProgress())
    kvs = with_vocabulary(BIG.kvs, 50000)
    tensors = BIG.tensors(len(kvs["tokenizer.ggml.tokens"].value))
    for name, expert in (("olmoe", ("Q4_K",)), ("olmoe-groups", MIX)):
        paths.append(folder / f"{name}.gguf")
        write_random(paths[-1], kvs, tensors, types_for(tensors, expert, "Q6_K"))
    kvs, tensors = windowed(30000)
    paths.append(folder / "gpt-oss.gguf")
    write_random(paths[-1], kvs, tensors, types_for(tensors, ("Q8_0",), "Q8_0"))
    return paths


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("source", type=click.Path(exists=True, path_type=Path))
def main(folder: Path, source: Path) -> None:
    """Write the models into FOLDER; SOURCE is the bundled model as a BF16 GGUF."""
    for path in write_models(folder, source):
        click.echo(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
