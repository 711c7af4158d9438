"""Random-weight models in the shape of OLMoE, as BF16 GGUF files, for speed and memory alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from converters import CONVERTERS
from mopeq_edge.atomic import atomic_write
from mopeq_edge.ggml.types import BF16, F32
from mopeq_edge.gguf_layout import TensorSpec, layout, uint32
from mopeq_edge.source.huggingface import open_huggingface

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-olmoe"


def write_random_olmoe(path: Path, *, n_layer: int, n_expert: int, n_embd: int, n_ff: int) -> int:
    """Write a BF16 GGUF with the bundled model's tokenizer. Returns its number of weights.

    One expert's matrix is drawn and repeated: the quantizers' speed does not depend on the values.
    """
    kvs = dict(open_huggingface(EXAMPLE, CONVERTERS, pre="gpt-2").kvs)
    n_vocab = len(kvs["tokenizer.ggml.tokens"].value)
    sizes = {"block_count": n_layer, "embedding_length": n_embd, "feed_forward_length": n_ff, "expert_count": n_expert}
    kvs.update({f"olmoe.{key}": uint32(value) for key, value in sizes.items()})
    specs: list[TensorSpec] = [
        ("output.weight", (n_embd, n_vocab), BF16),
        ("output_norm.weight", (n_embd,), F32),
        ("token_embd.weight", (n_embd, n_vocab), BF16),
    ]
    for layer in range(n_layer):
        blk = f"blk.{layer}."
        specs += [(f"{blk}{n}.weight", (n_embd,), F32) for n in ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm")]
        specs += [(f"{blk}attn_{n}.weight", (n_embd, n_embd), BF16) for n in ("q", "k", "v", "output")]
        specs.append((f"{blk}ffn_gate_inp.weight", (n_embd, n_expert), F32))
        specs += [(f"{blk}ffn_{n}_exps.weight", (n_embd, n_ff, n_expert), BF16) for n in ("gate", "up")]
        specs.append((f"{blk}ffn_down_exps.weight", (n_ff, n_embd, n_expert), BF16))
    plan = layout(kvs, specs)
    rng = np.random.default_rng(0)
    with atomic_write(path) as file:
        file.write(plan.header)
        for info in plan.tensors:
            n = int(np.prod(info.shape[:2]))
            values = rng.standard_normal(n, dtype=np.float32) * 0.02
            one = values if info.type is F32 else (values.view(np.uint32) >> np.uint32(16)).astype("<u2")
            for _ in range(info.n_weights // n):
                file.write(one.tobytes())
            file.write(b"\0" * (-info.nbytes % plan.alignment))
    return sum(info.n_weights for info in plan.tensors)
