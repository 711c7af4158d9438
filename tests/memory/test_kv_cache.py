"""Bytes of the KV cache by hand: 2 layers, heads of 64, 4 heads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mopeq_edge.memory.kv_cache import KVCache, kv_cache
from mopeq_edge.memory.model import Hyperparameters
from mopeq_edge.memory.settings import CACHE_TYPES, Settings, resolve

from .models import model_of, write_zeros


def hparams_of(folder: Path, name: str, **keys: int) -> Hyperparameters:
    return model_of(write_zeros(folder / "m.gguf", name, **keys)).hparams


def cache_of(hparams: Hyperparameters, settings: Settings) -> KVCache:
    return kv_cache(hparams, settings, resolve(settings, hparams))


def test_all_heads(tmp_path: Path) -> None:
    hparams = hparams_of(tmp_path, "olmoe")
    assert cache_of(hparams, Settings(ctx=512)).nbytes == 2 * 2 * (4 * 64 * 2) * 512


def test_grouped_queries_and_quantized_cells(tmp_path: Path) -> None:
    hparams = hparams_of(tmp_path, "qwen3moe", **{"attention.head_count_kv": 2})
    kinds = {"cache_type_k": CACHE_TYPES["q8_0"], "cache_type_v": CACHE_TYPES["q4_0"]}
    found = cache_of(hparams, Settings(ctx=512, **kinds))
    # a row of 128 values: four blocks of 34 or of 18 bytes
    assert found.nbytes == 2 * 512 * (4 * 34 + 4 * 18)
    assert (found.rotate_k, found.rotate_v) == (64, 64)


def test_streams_have_cells_of_their_own(tmp_path: Path) -> None:
    hparams = hparams_of(tmp_path, "olmoe")
    found = cache_of(hparams, Settings(ctx=1000, parallel=2))
    assert (found.cells, found.n_stream, found.nbytes) == (512, 2, 2 * 2 * 512 * 512 * 2)


def test_latent_attention_keeps_one_head_and_no_values(tmp_path: Path) -> None:
    hparams = hparams_of(tmp_path, "deepseek2")
    # 64 compressed and 32 rotated values
    assert cache_of(hparams, Settings(ctx=512)).nbytes == 2 * 512 * 96 * 2


@pytest.mark.parametrize(
    ("settings", "cells"),
    [
        (Settings(ctx=4096, parallel=1), 768),  # a window of 128 and a batch of 512, in steps of 256
        (Settings(ctx=512, parallel=1), 512),  # never more than the context
        (Settings(ctx=8192), 1024),  # four sequences share: four windows
        (Settings(ctx=8192, parallel=4), 768),
        (Settings(ctx=4096, parallel=1, ubatch=64), 256),
        (Settings(ctx=4096, parallel=1, swa_full=True), 4096),
    ],
)
def test_sliding_windows(tmp_path: Path, settings: Settings, cells: int) -> None:
    hparams = hparams_of(tmp_path, "gpt-oss")
    found = cache_of(hparams, settings)
    assert hparams.swa == (True, False)
    assert [layer.cells for layer in found.layers] == [cells, resolve(settings, hparams).n_ctx_seq]
    assert found.window_cells == cells


def test_heads_that_differ_by_layer(tmp_path: Path) -> None:
    hparams = replace(hparams_of(tmp_path, "qwen3moe"), n_head_kv=(4, 1))
    found = cache_of(hparams, Settings(ctx=512))
    assert [layer.nbytes for layer in found.layers] == [2 * 4 * 64 * 2 * 512, 2 * 1 * 64 * 2 * 512]
