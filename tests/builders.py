"""Make small models for tests: random OLMoE checkpoints in every file layout, and GGUF files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mopeq_edge.emit import emit
from mopeq_edge.expert_groups.layout import Types
from mopeq_edge.ggml.library import load_ggml
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.gguf_file import KV
from mopeq_edge.gguf_layout import layout
from mopeq_edge.imatrix import Imatrix
from mopeq_edge.progress import SilentProgress
from mopeq_edge.source.model import Source

TOKENIZER_FROM = Path(__file__).parent.parent / "examples" / "tiny-olmoe"
EXAMPLE_TEXT = TOKENIZER_FROM / "calibration.txt"


def write_gguf(source: Source, path: Path) -> None:
    """Write ``source`` as it is stored."""
    place = layout(source.kvs, [(t.name, t.shape, t.type) for t in source.tensors])
    with path.open("wb") as file:
        file.write(place.header)
        for tensor in source.tensors:
            for matrix in range(tensor.n_matrices):
                file.write(source.read_stored(tensor, matrix).tobytes())
            file.write(b"\0" * (-file.tell() % place.alignment))
    assert path.stat().st_size == place.file_size


def write_quantized_gguf(source: Source, types: Types, path: Path, imatrix: Imatrix | None = None) -> None:
    """Write ``source`` with the tensors in ``types`` so, the others as they are stored.

    A stack may have any groups, also several of one type: ``{"blk.0.ffn_up_exps.weight": (ExpertGroup(BY_NAME["Q3_K"],
    (0, 2)), ExpertGroup(BY_NAME["Q3_K"], (1, 3)))}``. Needs libggml.
    """
    every = {t.name: types.get(t.name, t.type) for t in source.tensors}
    emit(source, every, source.kvs, imatrix, load_ggml(), path, threads=2, progress=SilentProgress())


def write_raw_gguf(
    path: Path, kvs: Mapping[str, KV], tensors: Sequence[tuple[str, tuple[int, ...], GgmlType, bytes]]
) -> None:
    """Write a GGUF of (name, ggml shape, type, bytes)."""
    place = layout(kvs, [tensor[:3] for tensor in tensors])
    data = b"".join(raw + b"\0" * (-len(raw) % place.alignment) for *_, raw in tensors)
    path.write_bytes(place.header + data)


def build_olmoe(
    directory: Path,
    *,
    hidden: int = 64,
    ff: int = 32,
    n_layer: int = 2,
    n_expert: int = 8,
    n_used: int = 2,
    n_head: int = 4,
    vocab: int = 4100,
    context: int = 256,
    dtype: str = "bfloat16",
    packed: bool = False,
    n_shards: int = 1,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Save a random OLMoE under ``directory`` and return it.

    ``dtype`` is bfloat16, float16 or float32; ``packed`` keeps a layer's experts in two tensors as transformers 5
    does in memory, else there is one tensor for each matrix; more than one shard comes with an index. The
    tokenizer is the bundled model's, so ``vocab`` must be 4096 or more. ``config`` goes into config.json.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(seed)
    settings = OlmoeConfig(
        **{"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": ff, "num_hidden_layers": n_layer},
        **{"num_attention_heads": n_head, "num_key_value_heads": n_head, "max_position_embeddings": context},
        **{"num_experts": n_expert, "num_experts_per_tok": n_used, "rms_norm_eps": 1e-5},
        **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **config},
    )
    settings.architectures = ["OlmoeForCausalLM"]
    model = OlmoeForCausalLM(settings)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        noise = torch.randn_like(value)
        # Large enough for logits and routers that differ by more than rounding
        value = 1 + 0.1 * noise if "norm" in name else noise * (0.5 if "mlp.gate." in name else 0.08)
        tensors.update({name: value} if packed else _unpacked(name, value, ff))
    tensors = {name: value.to(getattr(torch, dtype)).contiguous() for name, value in tensors.items()}
    directory.mkdir(parents=True, exist_ok=True)
    settings.dtype = dtype
    settings.save_pretrained(directory)
    if n_shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        _save_shards(directory, tensors, n_shards)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER_FROM / name, directory / name)
    return directory


def _unpacked(name: str, value: Any, ff: int) -> dict[str, Any]:
    prefix, _, last = name.rpartition(".")
    if last not in ("gate_up_proj", "down_proj"):
        return {name: value}
    found: dict[str, Any] = {}
    for expert, matrix in enumerate(value):
        if last == "down_proj":
            found[f"{prefix}.{expert}.down_proj.weight"] = matrix
        else:
            found[f"{prefix}.{expert}.gate_proj.weight"] = matrix[:ff]
            found[f"{prefix}.{expert}.up_proj.weight"] = matrix[ff:]
    return found


def _save_shards(directory: Path, tensors: dict[str, Any], n_shards: int) -> None:
    """Neighbours go to different shards, so that every stack is spread over all of them."""
    from safetensors.torch import save_file

    placement: dict[str, str] = {}
    for shard in range(n_shards):
        file = f"model-{shard + 1:05}-of-{n_shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::n_shards])
        save_file(part, directory / file, metadata={"format": "pt"})
        placement.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": placement}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of the object in ``path``; None removes one."""
    found = json.loads(path.read_text()) if path.exists() else {}
    found.update(changes)
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, Sequence[int], bytes]]) -> None:
    """Write (dtype, shape, bytes) by name, without the library: for files that it would refuse to write."""
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(raw)]}
        at += len(raw)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(raw for *_, raw in tensors.values()))


def bf16(values: Any) -> bytes:
    """Bytes of float32 ``values`` that BF16 holds exactly."""
    bits = np.asarray(values, dtype="<f4").view("<u4")
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype("<u2").tobytes()
