"""Conversions that never ran: a GGUF of zeros, its plan, damages, routing and measurements, all of known numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mopeq_edge.artifacts import write_json
from mopeq_edge.calibrate.statistics import Routing, write_routing
from mopeq_edge.expert_groups.layout import Grouping, expert_map, file_layout, groups_of
from mopeq_edge.ggml.types import BF16, BY_NAME, F32, GgmlType
from mopeq_edge.gguf_file import KV, ValueType, pad
from mopeq_edge.gguf_layout import string, uint32
from mopeq_edge.imatrix import Imatrix
from mopeq_edge.output_kvs import IMATRIX_NAME, Provenance, output_kvs
from mopeq_edge.plan.artifact import KNAPSACK, PER_EXPERT, Plan, write_plan
from mopeq_edge.plan.per_expert import planned_tensor
from mopeq_edge.sensitivity.measure import TensorErrors
from mopeq_edge.sensitivity.table import SensitivityTable, write_table
from mopeq_edge.source.model import SourceTensor

KINDS = tuple(BY_NAME[name] for name in ("IQ2_XS", "Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q6_K"))
UNREACHED = 3
"""The expert of the first layer that no token reached."""
EVALUATION: dict[str, Any] = {
    **{"kld_mean_nats": 0.0123456, "kld_mean_standard_error_nats": 0.0004, "kld_median_nats": 0.003},
    **{"kld_p99_9_nats": 0.25, "kld_max_nats": 0.9, "same_top_fraction": 0.9321, "positions_count": 4096},
    **{"ppl_source_per_token": 21.5, "ppl_target_per_token": 21.9},
    **{"library": "llama.cpp 0", "text_sha256": "c" * 64, "source_sha256": "d" * 64},
}


@dataclass(frozen=True)
class Made:
    """``file`` with its work directory beside it, and what ``validate --json`` would say of it."""

    file: Path
    work: Path
    checks: Path
    plan: Plan
    table: SensitivityTable
    routing: Routing


def make(
    folder: Path,
    n_layer: int = 4,
    n_expert: int = 16,
    *,
    name: str = "model.gguf",
    title: str = "A model",
    n_rows: int = 256,
) -> Made:
    """A per-expert file, sparse on disk, with everything that convert leaves.

    Less than 256 ``n_rows`` of every expert's matrices make a small file, and shapes that no model has.
    """
    rng = np.random.default_rng(0)
    tensors = _tensors(n_layer, n_expert, n_rows)
    table = _table(tensors, rng)
    types: dict[str, GgmlType | Grouping] = {}
    for tensor in tensors:
        if tensor.projection is not None:
            # what hurts more gets more bits
            damage = table.errors[tensor.name].damage["fisher"][2]
            ranks = np.argsort(np.argsort(damage)) * len(KINDS) // n_expert
            types[tensor.name] = groups_of([KINDS[rank] for rank in ranks])
        else:
            types[tensor.name] = BY_NAME["Q6_K"] if tensor.quantizable else tensor.type
    source_kvs: dict[str, KV] = {
        "general.architecture": string("olmoe"),
        "general.name": string(title),
        "olmoe.block_count": uint32(n_layer),
        "olmoe.expert_count": uint32(n_expert),
        "olmoe.expert_used_count": uint32(2),
        **{f"olmoe.{key}": uint32(value) for key, value in _HPARAMS.items()},
        "olmoe.attention.layer_norm_rms_epsilon": KV(ValueType.FLOAT32, 1e-5),
        "tokenizer.ggml.tokens": KV(ValueType.ARRAY, [f"t{n}" for n in range(64)], ValueType.STRING),
    }
    imatrix = Imatrix({}, ("text.txt",), 0, 0)
    place = file_layout(output_kvs(source_kvs, 10, imatrix, IMATRIX_NAME, Provenance()), tensors, types)
    nbytes = {info.name: pad(info.nbytes, place.alignment) for info in place.tensors}
    planned = []
    for tensor in tensors:
        total = 0.0
        if tensor.quantizable:
            errors, kind = table.errors[tensor.name], types[tensor.name]
            groups = kind if isinstance(kind, tuple) else None
            for expert in range(tensor.n_matrices):
                own = kind if groups is None else next(g.type for g in groups if expert in g.experts)
                assert isinstance(own, GgmlType)
                total += float(errors.damage["fisher"][errors.types.index(own.name), expert])
        planned.append(planned_tensor(tensor, types[tensor.name], nbytes, total))
    plan = Plan(
        layout=PER_EXPERT,
        planner=KNAPSACK,
        sensitivity="fisher",
        unit="nats of KLD per token",
        budget_bytes=place.file_size + 1000,
        file_bytes=place.file_size,
        header_bytes=len(place.header),
        smallest_bytes=place.file_size // 2,
        largest_bytes=place.file_size * 4,
        damage=sum(t.damage for t in planned),
        gap=0.0001,
        quantized_with="activation",
        types=tuple(kind.name for kind in KINDS),
        made_from="e" * 64,
        tensors=tuple(planned),
        n_weights=sum(t.n_weights for t in tensors),
    )
    file, work = folder / name, folder / f"{name.removesuffix('.gguf')}.mopeq"
    place = file_layout(
        output_kvs(source_kvs, 10, imatrix, IMATRIX_NAME, Provenance("d" * 64, plan.sha256)), tensors, types
    )
    assert place.file_size == plan.file_bytes
    with file.open("wb") as out:
        out.write(place.header)
        for info in place.tensors:
            stack = types.get(info.name.removesuffix(".map") + ".weight")
            if info.name.endswith(".map") and isinstance(stack, tuple):
                out.seek(len(place.header) + info.offset)
                out.write(expert_map(stack, info.shape[1]).tobytes())
        out.truncate(place.file_size)
    routing = _routing(n_layer, n_expert, rng)
    write_plan(plan, work / "plan.json")
    write_table(table, work / "sensitivity-activation.safetensors")
    write_routing(routing, work / "routing.safetensors", "a" * 64)
    write_validation(work, plan, file)
    checks = folder / f"{name}.checks.json"
    rows = [
        {"layer": n, "tokens": 64, "same": 64 - n % 3, "ties": n % 3, "wrong": 0, "noise": 0.001 * (n + 1)}
        for n in range(n_layer)
    ]
    checks.write_text(json.dumps({"checks": [], "file_bytes": plan.file_bytes, "routing": rows}))
    return Made(file, work, checks, plan, table, routing)


def write_validation(work: Path, plan: Plan, file: Path, **changes: Any) -> None:
    """What convert would have written."""
    forecast = {"layout": "stock", "damage": 0.02, "file_bytes": plan.file_bytes, "ratio": 0.61, "coding_gain": 1.4}
    forecast |= {"damage_spread": 0.8, "routing_skew": 0.5, "sensitivity": "fisher", "measured_ratio": [0.5, 0.7]}
    body = {
        "budget_bytes": plan.budget_bytes,
        "evaluation": EVALUATION,
        "file_bytes": plan.file_bytes,
        "fits": None,
        "forecast": forecast,
        "imatrix": {"chosen": "activation", "kld": {}},
        "output": file.name,
        "plan_sha256": plan.sha256,
        "relative_sampling_error": 0.0,
        "vision": None,
    }
    write_json(work / "validation.json", "mopeq-edge validation", 1, {**body, **changes})


_HPARAMS = {
    **{"context_length": 4096, "embedding_length": 256, "feed_forward_length": 256, "attention.head_count": 4},
    **{"attention.head_count_kv": 4, "vocab_size": 64},
}


def _tensors(n_layer: int, n_expert: int, n_rows: int) -> list[SourceTensor]:
    found = [SourceTensor("token_embd.weight", (256, 64), BF16), SourceTensor("output.weight", (256, 64), BF16)]
    found.append(SourceTensor("output_norm.weight", (256,), F32))
    for n in range(n_layer):
        norms = ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm")
        found += [SourceTensor(f"blk.{n}.{norm}.weight", (256,), F32) for norm in norms]
        matrices = ("attn_q", "attn_k", "attn_v", "attn_output")
        found += [SourceTensor(f"blk.{n}.{matrix}.weight", (256, 256), BF16) for matrix in matrices]
        found.append(SourceTensor(f"blk.{n}.ffn_gate_inp.weight", (256, n_expert), F32))
        stack = (256, n_rows, n_expert)
        found += [SourceTensor(f"blk.{n}.ffn_{p}_exps.weight", stack, BF16) for p in ("gate", "up", "down")]
    return found


def _table(tensors: list[SourceTensor], rng: np.random.Generator) -> SensitivityTable:
    errors: dict[str, TensorErrors] = {}
    names = (*(kind.name for kind in KINDS), "BF16")
    bits = np.array([kind.bpw for kind in KINDS])
    hard: dict[int | None, Any] = {}
    for tensor in (t for t in tensors if t.quantizable):
        n = tensor.n_matrices
        if tensor.layer not in hard or len(hard[tensor.layer]) != n:
            hard[tensor.layer] = np.exp(rng.normal(0, 0.9, n))
        own = 1e-3 * hard[tensor.layer] * np.exp(rng.normal(0, 0.35, n)) * (1 + (tensor.layer or 0) / 30)
        damage = np.concatenate([4.0 ** -bits[:, None] * own, np.zeros((1, n))])
        variance = {"fisher": np.zeros_like(damage)}
        errors[tensor.name] = TensorErrors(names, {"fisher": damage}, variance, np.ones(n))
    return SensitivityTable(errors, {}, ("fisher",), "activation", (), None, "f" * 64)


def _routing(n_layer: int, n_expert: int, rng: np.random.Generator) -> Routing:
    counts = {n: np.round(np.exp(rng.normal(5, 0.8, n_expert))) for n in range(n_layer)}
    counts[0][UNREACHED] = 0
    return Routing(int(counts[0].sum() // 2), counts, {}, np.ones(64))
