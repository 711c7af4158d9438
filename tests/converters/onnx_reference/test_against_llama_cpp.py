"""The reference and llama.cpp on the same F32 file: llama.cpp with an F32 cache, no flash attention, nothing repacked.

Every family of ours, then architectures with settings that the families do not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from converters import CONVERTERS
from converters.onnx_reference import run_reference
from mopeq_edge.binding import LlamaModel
from mopeq_edge.evaluate.divergence import compare
from mopeq_edge.ggml.types import F32
from mopeq_edge.source.open import open_source

from ...builders import write_quantized_gguf
from ...expert_groups.architectures import (
    ARCHITECTURES,
    HEAD,
    N_EMBD,
    N_HEAD,
    N_VOCAB,
    Architecture,
    Floats,
    random_tensors,
    write_model,
)
from .test_families import FAMILY

pytestmark = pytest.mark.runtime

MOST_KLD = 1e-10
"""Mean in nats. Measured: 2e-14 to 2e-13 for the families, 1e-12 for gpt-oss, up to 8e-12 for the other models, whose
logits spread more."""


@dataclass(frozen=True)
class Case:
    """A model of some architecture, and tensors besides those of its layers."""

    architecture: Architecture
    more: Mapping[str, Floats] = field(default_factory=dict)


def changed(name: str, **keys: Any) -> Architecture:
    own = ARCHITECTURES[name]
    return replace(own, keys={**own.keys, **{key.replace("__", "."): value for key, value in keys.items()}})


# both ends of the ramp are inside, between two pairs
YARN = {
    **{"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__attn_factor": 1.25},
    "rope__scaling__original_context_length": 4096,
}
_QWEN3 = ARCHITECTURES["qwen3moe"]
_DEEPSEEK = ARCHITECTURES["deepseek2"]


def with_one_query_matrix(layer: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    own = {name: shape for name, shape in layer.items() if not name.startswith("attn_q_")}
    return {**own, "attn_q.weight": (N_EMBD, N_HEAD * HEAD)}


CASES: Mapping[str, Case] = {
    **{name: Case(own) for name, own in ARCHITECTURES.items() if "scales" not in name},
    "linear rope": Case(changed("olmoe", rope__scaling__factor=4.0)),
    "yarn": Case(changed("mixtral", **YARN)),
    "yarn, other pairs": Case(changed("qwen3moe", **YARN)),
    "scaling of kind none": Case(changed("olmoe", rope__scaling__type="none", rope__scaling__factor=4.0)),
    "rope factors": Case(
        ARCHITECTURES["mixtral"], {"rope_freqs.weight": np.linspace(1, 8, HEAD // 2, dtype=np.float32)}
    ),
    "sections that wrap, and a fourth": Case(
        Architecture("qwen3vlmoe", _QWEN3.layer, {**_QWEN3.keys, "rope.dimension_sections": [10, 7, 6, 4]})
    ),
    "grouped queries": Case(
        replace(
            changed("qwen3moe", attention__head_count_kv=2),
            layer={**_QWEN3.layer, "attn_k.weight": (N_EMBD, 2 * HEAD), "attn_v.weight": (N_EMBD, 2 * HEAD)},
        )
    ),
    "short windows in all layers, with a rope of their own": Case(
        changed("gpt-oss", attention__sliding_window=8, attention__sliding_window_pattern=0, rope__freq_base_swa=3e3)
    ),
    "short windows by turns": Case(changed("gpt-oss", attention__sliding_window=8, rope__freq_base_swa=3e3)),
    "yarn beside windows": Case(changed("gpt-oss", attention__sliding_window=8, **YARN)),
    "latent, one query matrix": Case(
        replace(
            changed("deepseek2", attention__q_lora_rank=0),
            layer=with_one_query_matrix(_DEEPSEEK.layer),
            first_layer=with_one_query_matrix(_DEEPSEEK.first_layer or {}),
        )
    ),
    "latent, linear rope": Case(changed("deepseek2", rope__scaling__factor=4.0)),
    "latent, yarn": Case(changed("deepseek2", rope__scaling__yarn_log_multiplier=0.0707, **YARN)),
    "latent, yarn without a factor of all attention": Case(changed("deepseek2", **YARN)),
    "softmax, not normalised, scaled": Case(changed("deepseek2", expert_gating_func=1, expert_weights_norm=False)),
}


def check(path: Path, tokens: npt.NDArray[np.int32]) -> None:
    with LlamaModel(path, n_ctx=256, n_threads=1, plain=True) as model:
        theirs = model.logits(tokens)
    ours = run_reference(path, tokens).logits
    assert theirs.std() > 0.01
    found = compare(theirs, ours, np.roll(tokens, -1))
    assert found.kld.mean() < MOST_KLD
    assert np.abs(ours - theirs).max() < 1e-4 * theirs.std()


@pytest.mark.parametrize("name", FAMILY)
def test_families(tmp_path: Path, name: str) -> None:
    directory = FAMILY[name][0](tmp_path / "model", "float32")
    source = open_source(directory, CONVERTERS, pre="gpt-2")
    # llama.cpp rounds what goes into quantized matrices, so they become F32 here
    exact = {tensor.name: F32 for tensor in source.tensors if tensor.type.is_quantized}
    write_quantized_gguf(source, exact, tmp_path / "model.gguf")
    check(tmp_path / "model.gguf", np.random.default_rng(1).integers(0, 4096, 128, dtype=np.int32))


@pytest.mark.parametrize("name", CASES)
def test_settings(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    tensors = {**random_tensors(case.architecture), **case.more}
    path = tmp_path / "model.gguf"
    write_model(path, case.architecture, tensors, lambda _, values: (values, gguf.GGMLQuantizationType.F32))
    check(path, np.random.default_rng(1).integers(0, N_VOCAB, 100, dtype=np.int32))
