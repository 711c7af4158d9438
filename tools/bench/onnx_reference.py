"""Time and memory of the ONNX reference on a random model in the shape of DeepSeek-VL2-Tiny's text side.

One process runs a single block with experts and says by how much its resident memory grew at most; another runs the
whole file. Values do not matter: one matrix of a tensor is drawn, quantized and repeated.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import click
import numpy as np

from converters.onnx_reference.layers import check_tensors, embedding, make_parts
from converters.onnx_reference.read_settings import read_settings
from converters.onnx_reference.run import run_layer, run_reference
from converters.onnx_reference.weights import Weights
from mopeq_edge.atomic import atomic_write
from mopeq_edge.cli.console import available_threads, print_json
from mopeq_edge.ggml.library import load_ggml
from mopeq_edge.ggml.types import BY_NAME, F32, GgmlType
from mopeq_edge.gguf_file import KV, ValueType
from mopeq_edge.gguf_layout import TensorSpec, layout, uint32
from mopeq_edge.split import read_parts

EMBD, FF, DENSE, EXPERTS, USED, SHARED, HEADS, VOCAB = 1280, 896, 6848, 64, 6, 2, 10, 129280
ARCHITECTURE = "deepseek2-ocr"
DRAWN = 2048
REST = BY_NAME["Q4_K"]


def key_values(n_layer: int) -> dict[str, KV]:
    """Those that the reference reads; the file has no vocabulary."""
    sizes = {
        **{"block_count": n_layer, "context_length": 4096, "embedding_length": EMBD, "feed_forward_length": DENSE},
        **{"attention.head_count": HEADS, "leading_dense_block_count": 1, "expert_feed_forward_length": FF},
        **{"expert_count": EXPERTS, "expert_used_count": USED, "expert_shared_count": SHARED},
    }
    return {
        "general.architecture": KV(ValueType.STRING, ARCHITECTURE),
        f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon": KV(ValueType.FLOAT32, 1e-6),
        **{f"{ARCHITECTURE}.{key}": uint32(value) for key, value in sizes.items()},
    }


def tensor_specs(n_layer: int, n_vocab: int, kind: GgmlType, narrow: GgmlType) -> list[TensorSpec]:
    """Experts in ``kind``, other matrices in :data:`REST`, all in ``narrow`` where the blocks of these do not fit the
    rows; norms and routers in F32.
    """

    def matrix(name: str, *shape: int) -> TensorSpec:
        own = kind if len(shape) == 3 else REST
        return name, shape, own if own.fits(shape[0]) else narrow

    specs = [matrix(name, EMBD, n_vocab) for name in ("token_embd.weight", "output.weight")]
    specs.append(("output_norm.weight", (EMBD,), F32))
    for layer in range(n_layer):
        blk = f"blk.{layer}."
        specs += [(f"{blk}{name}_norm.weight", (EMBD,), F32) for name in ("attn", "ffn")]
        specs += [matrix(f"{blk}attn_{name}.weight", EMBD, EMBD) for name in ("q", "k", "v", "output")]
        if layer > 0:
            specs.append((f"{blk}ffn_gate_inp.weight", (EMBD, EXPERTS), F32))
        widths = {"": (DENSE, 0)} if layer == 0 else {"_exps": (FF, EXPERTS), "_shexp": (SHARED * FF, 0)}
        for suffix, (n_ff, n) in widths.items():
            stack = (n,) if n else ()
            specs += [matrix(f"{blk}ffn_{name}{suffix}.weight", EMBD, n_ff, *stack) for name in ("gate", "up")]
            specs.append(matrix(f"{blk}ffn_down{suffix}.weight", n_ff, EMBD, *stack))
    return specs


def write_model(path: Path, n_layer: int, n_vocab: int, kind: GgmlType, narrow: GgmlType) -> None:
    """Write the GGUF; of a long matrix some rows are drawn and repeated too."""
    specs = tensor_specs(n_layer, n_vocab, kind, narrow)
    plan = layout(key_values(n_layer), specs)
    with atomic_write(path) as file:
        file.write(plan.header)
        for name, shape, own in specs:
            rows = shape[1] if len(shape) > 1 else 1
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            values = rng.standard_normal((min(rows, DRAWN), shape[0]), dtype=np.float32) * np.float32(0.02)
            if len(shape) == 1:
                values += 1
            flat = np.ones(shape[0], dtype=np.float32)
            raw = values.tobytes() if own is F32 else load_ggml().quantize(own, values, flat).tobytes()
            raw = (raw * -(-rows // DRAWN))[: own.nbytes(rows * shape[0])]
            for _ in range(shape[2] if len(shape) == 3 else 1):
                file.write(raw)
            file.write(b"\0" * (-file.tell() % plan.alignment))


def measure_block(path: str, n_tokens: int, threads: int) -> None:
    """Run the first block with experts alone; print seconds, bytes of growth and the block's bytes in F32, as JSON."""
    headers = read_parts(Path(path))
    settings, weights = read_settings(*headers), Weights(headers)
    parts = make_parts(settings, threads)
    check_tensors(settings, parts, weights)
    tokens = np.random.default_rng(0).integers(0, settings.n_vocab, n_tokens)
    hidden = embedding(weights, tokens, 50.0)
    block = 4 * sum(info.n_weights for info in headers[0].tensors if info.name.startswith("blk.1."))
    # the kernel's mark of the most that was resident starts again from what is resident now
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _resident("VmRSS"), time.perf_counter()
    _, routed = run_layer(settings, parts, weights, 1, hidden)
    seconds = time.perf_counter() - start
    assert routed is not None
    growth = _resident("VmHWM") - before
    n_routed = len(np.unique(routed.ids))
    print(json.dumps({"seconds": seconds, "growth": growth, "block": block, "experts": n_routed}))


def measure_file(path: str, n_tokens: int, threads: int) -> None:
    """Run all of the file; print seconds and the most bytes that were resident, as JSON."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, n_tokens)
    start = time.perf_counter()
    run_reference(Path(path), tokens, threads=threads)
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": _resident("VmHWM")}))


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {key}; this needs Linux")


def in_child(function: str, path: Path, n_tokens: int, threads: int) -> dict[str, Any]:
    """What one of the two functions above prints in a process of its own."""
    code = f"from tools.bench.onnx_reference import {function}; {function}({str(path)!r}, {n_tokens}, {threads})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@click.command()
@click.option("--layers", default=12, show_default=True, help="Blocks; the first is dense.")
@click.option("--tokens", default=64, show_default=True, help="Tokens of the text.")
@click.option("--type", "kind", default="Q4_K", show_default=True, help="Type of the experts.")
@click.option("--narrow", default="IQ4_NL", show_default=True, help="Type where the blocks of the other do not fit.")
@click.option("--threads", default=available_threads, help="Threads (default: every CPU).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(layers: int, tokens: int, kind: str, narrow: str, threads: int, as_json: bool) -> None:
    """Measure one block, then the whole file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_model(path, layers, VOCAB, BY_NAME[kind], BY_NAME[narrow])
        result = {
            "file": path.stat().st_size,
            "one_block": in_child("measure_block", path, tokens, threads),
            "all": in_child("measure_file", path, tokens, threads),
        }
    if as_json:
        print_json(result)
        return
    block, every = result["one_block"], result["all"]
    click.echo(f"{kind}, {narrow}: file {result['file']:,} bytes, {tokens} tokens, {threads} threads")
    share = block["growth"] / block["block"]
    click.echo(
        f"block     {block['seconds']:7.1f} s  {block['growth'] / 2**20:7.0f} MiB more at the most, {share:.2f} of the "
        f"{block['block'] / 2**20:.0f} MiB that it has in F32 ({block['experts']} experts routed to)"
    )
    click.echo(f"all       {every['seconds']:7.1f} s  {every['peak'] / 2**20:7.0f} MiB resident at the most")


if __name__ == "__main__":
    main()
