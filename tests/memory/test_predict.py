"""The sum of the parts, verdicts, budgets and advice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mopeq_edge.errors import MopeqError, PlanError
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.memory.advice import advise
from mopeq_edge.memory.command import arguments, command_line
from mopeq_edge.memory.fits import HEADROOM, TRIED_TYPES, _in_type, file_budget
from mopeq_edge.memory.model import Model, StoredTensor
from mopeq_edge.memory.predict import ANONYMOUS, CACHE, GPU, MAPPED, WEIGHTS_GPU, Prediction, predict
from mopeq_edge.memory.repack import Cpu, is_repacked, this_cpu
from mopeq_edge.memory.settings import CACHE_TYPES, COMPLETION, Settings
from mopeq_edge.memory.verdict import FITS, FROM_DISK, TIGHT, TOO_LARGE, UNKNOWN, judge, parse_memory
from mopeq_edge.memory.weights import place_weights

from .models import model_of, write_zeros

AVX2 = Cpu("x86_64", frozenset({"avx", "avx2"}))
AVX512 = Cpu("x86_64", frozenset({"avx", "avx2", "avx512f"}))
ORIN = Cpu("aarch64", frozenset({"fp", "asimd", "asimddp"}))
OLD_ARM = Cpu("aarch64", frozenset({"fp", "asimd"}))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model_of(write_zeros(tmp_path_factory.mktemp("m") / "m.gguf", "olmoe"))


def tensor(name: str, kind: str, *shape: int) -> StoredTensor:
    return StoredTensor(name, shape, BY_NAME[kind])


@pytest.mark.parametrize(
    ("cpu", "kinds"),
    [
        (AVX2, {"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"}),
        (AVX512, {"Q4_0", "Q4_K", "IQ4_NL", "MXFP4", "Q2_K"}),
        (ORIN, {"Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4", "Q1_0"}),
        (OLD_ARM, set()),
    ],
)
def test_what_a_cpu_repacks(cpu: Cpu, kinds: set[str]) -> None:
    found = {n for n in BY_NAME if is_repacked(tensor("blk.0.attn_q.weight", n, 256, 256), cpu)}
    assert found == kinds


@pytest.mark.parametrize(
    ("stored", "repacked"),
    [
        (tensor("blk.0.ffn_up_exps.weight", "Q4_K", 256, 256, 8), True),
        (tensor("blk.0.ffn_up_exps.1.weight", "Q4_K", 256, 256, 3), True),
        (tensor("blk.0.ffn_up_exps.1.weight", "Q4_K", 256, 256, 1), False),  # a group of one is no stack to llama.cpp
        (tensor("blk.0.ffn_up_exps.1.weight", "Q4_K", 256, 256), False),
        (tensor("blk.0.attn_k_b.weight", "Q4_0", 64, 64, 8), False),
        (tensor("blk.0.attn_q.weight", "Q4_K", 256, 252), False),
        (tensor("token_embd.weight", "Q4_K", 256, 4096), False),
        (tensor("output.weight", "Q4_K", 256, 4096), True),
    ],
)
def test_which_tensors_are_repacked(stored: StoredTensor, repacked: bool) -> None:
    assert is_repacked(stored, AVX2) is repacked


def test_the_flags_of_this_cpu(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nBogoMIPS\t: 62.50\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd42\n")
    assert this_cpu(info, lambda: "aarch64") == Cpu("aarch64", frozenset({"fp", "asimd", "asimddp"}))
    info.write_text("processor\t: 0\nflags\t\t: avx avx2\n")
    assert this_cpu(info, lambda: "x86_64") == AVX2
    assert "Q4_0" in this_cpu(tmp_path / "none", lambda: "arm64").repacked


def test_weights_of_a_file_by_hand() -> None:
    kinds = [
        tensor("token_embd.weight", "F16", 256, 100),  # 51,200 bytes, from the file
        tensor("blk.0.attn_q.weight", "Q4_K", 256, 256),  # 36,864 bytes, copied
        tensor("blk.0.attn_norm.weight", "F32", 256),  # 1,024 bytes
        tensor("blk.0.attn_k.weight", "Q6_K", 256, 256),  # 53,760 bytes
        tensor("output.weight", "Q4_0", 256, 104),  # 14,976 bytes, copied; outside what stays mapped
    ]
    some = replace(_zeros(), tensors=tuple(kinds))
    found = place_weights(some, Settings(), AVX2)
    assert (found.mapped, found.repacked, found.allocated) == (143360, 36864 + 14976, 0)
    assert found.unread == 143360 - (51200 + 1024 + 53760)
    read = place_weights(some, Settings(mmap=False), AVX2)
    assert (read.mapped, read.repacked, read.allocated) == (0, 51840, 51200 + 1024 + 53760)
    assert (read.staging, found.staging) == (0, 0)
    plain = place_weights(some, Settings(repack=False), AVX2)
    assert (plain.mapped, plain.unread, plain.repacked) == (159744, 0, 0)


@pytest.mark.parametrize(("n_expert", "left"), [(16, 9437184 - 7_000_000), (8, 0), (64, 0)])
def test_a_piece_that_was_freed_stays_unless_it_is_large(n_expert: int, left: int) -> None:
    """Stacks of 9.4, 4.7 and 37.7 MB."""
    stack = tensor("blk.0.ffn_up_exps.weight", "Q4_K", 1024, 1024, n_expert)
    some = replace(_zeros(), tensors=(stack,))
    assert place_weights(some, Settings(mmap=False), AVX2).staging == left
    assert place_weights(some, Settings(), AVX2).staging == 0


def _zeros() -> Model:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return model_of(write_zeros(Path(folder) / "m.gguf", "olmoe"))


def test_layers_on_a_gpu_take_their_cache_along(model: Model) -> None:
    """Two layers and the output; one layer on the GPU is the output and the last layer with -ngl 2."""
    none, some, every = (predict(model, Settings(ctx=512, gpu_layers=n), AVX2) for n in (0, 2, 3))
    assert none.gpu == 0
    halves = [part.nbytes for part in some.parts if part.name == CACHE]
    assert halves == [none.nbytes(CACHE) // 2] * 2
    assert [part.place for part in every.parts if part.name == CACHE] == [GPU]
    assert not every.exact_graph
    on_gpu = {t.name for t in model.tensors if t.layer == 1 or t.name in ("output.weight", "output_norm.weight")}
    weights = sum(t.nbytes for t in model.tensors if t.name in on_gpu)
    assert some.nbytes(WEIGHTS_GPU) == weights


def test_totals_add_up(model: Model) -> None:
    found = predict(model, Settings(ctx=1024), AVX2)
    assert found.host == found.total(ANONYMOUS) + found.total(MAPPED) == sum(p.nbytes for p in found.parts)
    assert found.as_dict()["host_bytes"] == found.host
    assert found.exact_graph
    unknown = replace(model, hparams=replace(model.hparams, architecture="elsewhere"))
    assert not predict(unknown, Settings(ctx=1024), AVX2).exact_graph


@pytest.mark.parametrize("change", [{"ctx": 8192}, {"ubatch": 1024}, {"program": COMPLETION}, {"flash_attn": False}])
def test_more_of_anything_takes_more(model: Model, change: dict[str, object]) -> None:
    before = predict(model, Settings(ctx=4096, parallel=1), AVX2)
    after = predict(model, replace(Settings(ctx=4096, parallel=1), **change), AVX2)  # type: ignore[arg-type]
    assert after.needed > before.needed


def prediction(model: Model, **settings: object) -> Prediction:
    kinds = _in_type(model, BY_NAME["Q4_K"])
    return predict(kinds, Settings(ctx=1024, **settings), AVX2)  # type: ignore[arg-type]


def test_verdicts(model: Model) -> None:
    found = prediction(model)
    assert found.droppable > 0
    assert judge(found, found.peak).word == FITS
    assert judge(found, found.peak - 1).word == TIGHT
    assert judge(found, found.needed).ok
    low = judge(found, found.needed - 1)
    assert (low.word, low.missing, low.ok) == (FROM_DISK, 1, False)
    assert judge(found, found.total(ANONYMOUS) - 1).word == TOO_LARGE
    assert judge(found, None).word == UNKNOWN
    gpu = prediction(model, gpu_layers=3)
    assert judge(gpu, 10**12, gpu.gpu).ok
    assert judge(gpu, 10**12, gpu.gpu - 1).word == TOO_LARGE
    # nobody knows what the GPU has
    assert judge(gpu, 10**12).word == UNKNOWN
    # one memory for both
    assert judge(gpu, gpu.peak + gpu.gpu, unified=True).ok
    assert not judge(gpu, gpu.needed + gpu.gpu - 1, unified=True).ok


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("8GiB", 8 * 2**30), ("8GB", 8 * 10**9), ("7620 MiB", 7620 * 2**20), ("1.5gb", 1500000000), ("4096", 4096)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_memory(text) == nbytes


@pytest.mark.parametrize("text", ["", "8G", "-1GB", "0", "GiB", "8 GiB of"])
def test_sizes_that_say_nothing(text: str) -> None:
    with pytest.raises(MopeqError, match="expected a size"):
        parse_memory(text)


@pytest.mark.parametrize("cpu", [AVX2, AVX512, ORIN])
@pytest.mark.parametrize("ctx", [512, 8192])
def test_a_file_of_the_budget_fits_in_any_type(model: Model, cpu: Cpu, ctx: int) -> None:
    """A file of any type: within the budget of a memory it fits, and the budget is no more careful than it must."""
    settings = Settings(ctx=ctx, parallel=1)
    for name in (*TRIED_TYPES, "IQ4_NL", "Q6_K", "BF16"):
        stored = _in_type(model, BY_NAME[name])
        needed = predict(stored, settings, cpu).needed
        try:
            tight = file_budget(model, settings, cpu, needed).budget
        except PlanError:
            tight = 0
        # not even the headroom is left
        assert stored.file_bytes > tight
        # the header, and work buffers of other types
        enough = int(needed / (1 - HEADROOM)) + 4_000_000
        found = file_budget(model, settings, cpu, enough)
        assert found.budget >= stored.file_bytes
        assert needed - stored.file_bytes <= found.rest


def test_the_budget_states_its_parts(model: Model) -> None:
    found = file_budget(model, Settings(ctx=512), AVX2, 10**9)
    assert found.budget + found.rest + found.headroom == found.memory == 10**9
    assert found.headroom == 50_000_000
    assert f"{found.budget:,} bytes" in found.sentence()
    assert file_budget(model, Settings(ctx=512), AVX2, 10**9, headroom=0).budget == found.budget + 50_000_000


def test_a_budget_for_memory_that_a_gpu_shares(model: Model) -> None:
    """CUDA itself and the inputs on the CPU come on top; the weights count once."""
    settings = Settings(ctx=512, gpu_layers=3)
    found, shared = predict(model, settings, AVX2), file_budget(model, settings, AVX2, 10**9)
    plain = file_budget(model, Settings(ctx=512), AVX2, 10**9)
    assert 350_000_000 < shared.rest - plain.rest < 370_000_000
    weights = sum(t.nbytes for t in model.tensors)
    assert found.needed + found.gpu - weights <= shared.rest <= found.needed + found.gpu - weights + 2_000_000


def test_everything_on_a_gpu_leaves_the_inputs(model: Model) -> None:
    """Embeddings come in two ways (F32, 256 values each of 512 tokens), beside ids, cells and a mask in F16."""
    found = predict(model, Settings(ctx=1024, parallel=1, gpu_layers=3), AVX2)
    host = next(p.nbytes for p in found.parts if p.name == "compute buffer" and p.place == ANONYMOUS)
    assert host == 2 * 512 * 256 * 4 + 512 * 1024 * 2 + 512 * (4 + 4 + 8 + 8) + 4


def test_no_room_at_all(model: Model) -> None:
    with pytest.raises(PlanError, match="leave no room"):
        file_budget(model, Settings(ctx=65536), AVX2, 50_000_000)


def test_advice_is_true(model: Model) -> None:
    """Every lever saves what it says, and what is called enough is enough."""
    settings = Settings(ctx=65536)
    found = predict(model, settings, AVX2)
    limit = found.needed // 2
    levers = advise(model, settings, AVX2, limit)
    assert levers
    assert levers[0].fits
    context = next(lever for lever in levers if "context" in lever.what)
    number = int(context.what.split()[3])
    assert context.fits
    assert judge(predict(model, replace(settings, ctx=number), AVX2), limit).ok
    assert not judge(predict(model, replace(settings, ctx=number + 256), AVX2), limit).ok
    assert f"--ctx-size {number}" in context.command
    q8 = CACHE_TYPES["q8_0"]
    cache = next(lever for lever in levers if lever.what == "the KV cache in q8_0")
    then = predict(model, replace(settings, cache_type_k=q8, cache_type_v=q8), AVX2)
    assert cache.saves == found.needed - then.needed
    assert all(lever.saves > 0 for lever in levers)


def test_the_command_line_says_the_same() -> None:
    q8 = CACHE_TYPES["q8_0"]
    settings = Settings(
        ctx=4096, parallel=2, unified=True, cache_type_k=q8, cache_type_v=q8, mmap=False, repack=False, gpu_layers=5,
        ubatch=128, threads=3,
    )  # fmt: skip
    assert command_line("a b.gguf", settings) == (
        "llama-server -m 'a b.gguf' --ctx-size 4096 --parallel 2 --kv-unified --cache-type-k q8_0 --cache-type-v q8_0 "
        "--ubatch-size 128 --gpu-layers 5 --threads 3 --load-mode none --no-repack --cache-ram 0"
    )
    assert arguments(Settings()) == ["--gpu-layers", "0", "--threads", "1"]


@pytest.mark.runtime
def test_llama_server_knows_the_options() -> None:
    import subprocess

    from mopeq_edge.runtime.locate import tool

    shown = subprocess.run([str(tool("llama-server")), "--help"], capture_output=True, text=True, check=True).stdout
    settings = Settings(
        ctx=1, parallel=1, unified=True, cache_type_k=CACHE_TYPES["q4_0"], cache_type_v=CACHE_TYPES["q4_0"], batch=1,
        ubatch=1, flash_attn=False, mmap=False, repack=False, swa_full=True, gpu_layers=1,
    )  # fmt: skip
    options = [word for word in command_line("m", settings).split() if word.startswith("--")]
    assert len(options) == 14
    for option in options:
        assert option in shown
