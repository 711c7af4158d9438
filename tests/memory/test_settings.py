"""What llama.cpp makes of its options, by hand from its rules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mopeq_edge.errors import MopeqError
from mopeq_edge.memory.model import Hyperparameters
from mopeq_edge.memory.settings import CACHE_TYPES, COMPLETION, Settings, resolve

from .models import model_of, write_zeros


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Hyperparameters:
    return model_of(write_zeros(tmp_path_factory.mktemp("m") / "m.gguf", "olmoe")).hparams


def test_the_server_has_four_slots_that_share(olmoe: Hyperparameters) -> None:
    found = resolve(Settings(ctx=1000), olmoe)
    assert (found.n_ctx, found.n_ctx_seq, found.n_seq, found.unified, found.n_stream) == (1024, 1024, 4, True, 1)
    assert (found.n_tokens, found.n_outputs) == (512, 4)


def test_slots_of_their_own_divide_the_context(olmoe: Hyperparameters) -> None:
    found = resolve(Settings(ctx=2500, parallel=3), olmoe)
    # 2560 cells, a third of them is 853, in steps of 256: 1024
    assert (found.n_ctx, found.n_ctx_seq, found.n_stream) == (3072, 1024, 3)
    # 512 tokens are no multiple of three streams
    assert found.n_tokens == 513


def test_one_slot_for_other_programs_and_logits_of_a_whole_batch(olmoe: Hyperparameters) -> None:
    found = resolve(Settings(ctx=4096, program=COMPLETION), olmoe)
    assert (found.n_seq, found.n_outputs, found.unified) == (1, 512, False)


def test_batches_are_no_longer_than_the_context(olmoe: Hyperparameters) -> None:
    found = resolve(Settings(ctx=100), olmoe)
    assert (found.n_ctx, found.n_batch, found.n_tokens) == (256, 100, 100)


def test_without_a_context_the_trained_one(olmoe: Hyperparameters) -> None:
    assert resolve(Settings(), olmoe).n_ctx == 131072
    with pytest.raises(MopeqError, match="--ctx"):
        resolve(Settings(), replace(olmoe, n_ctx_train=0))


def test_what_llama_cpp_refuses(olmoe: Hyperparameters) -> None:
    q8 = CACHE_TYPES["q8_0"]
    with pytest.raises(MopeqError, match="needs flash attention"):
        resolve(Settings(ctx=512, cache_type_v=q8, flash_attn=False), olmoe)
    with pytest.raises(MopeqError, match="heads of 80 values"):
        resolve(Settings(ctx=512, cache_type_k=q8), replace(olmoe, head_k=80))
    mla = replace(olmoe, head_k_mla=64, head_v_mla=64)
    with pytest.raises(MopeqError, match="V is a part of K"):
        resolve(Settings(ctx=512, cache_type_v=q8), mla)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = write_zeros(tmp_path / "m.gguf", "olmoe")
    raw = path.read_bytes().replace(b"olmoe.embedding_length", b"olmoe.embedding_lengtt")
    path.write_bytes(raw)
    with pytest.raises(MopeqError, match="embedding_length' is missing"):
        model_of(path)
