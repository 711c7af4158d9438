"""The same files and windows through llama-perplexity: the two must tell the same numbers.

It stores the source's log-probabilities in 16 bits over a range of at most 16 nats, so each is off by up
to half a step, ROUNDING; ours are not rounded. A log-probability that is off by h moves a position's KLD,
and so every percentile and mean of it, by at most h·(1 + KLD + sqrt(2·KLD)); it moves ln PPL of the source
by at most h. What is computed from the target alone is not rounded and agrees to the printed digits.
"""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mopeq_edge.evaluate.reference import ReferenceLogits
from mopeq_edge.evaluate.run import evaluate, make_reference
from mopeq_edge.runtime.locate import tool

pytestmark = pytest.mark.runtime

N_CTX, N_CHUNKS = 256, 20
ROUNDING = 16 / 65535 / 2
PRINTED = 1e-6


@pytest.fixture(scope="module")
def reference(bf16_gguf: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> ReferenceLogits:
    return make_reference(bf16_gguf, text_file, tmp_path_factory.mktemp("work"), n_ctx=N_CTX, n_chunks=N_CHUNKS)


@pytest.fixture(scope="module")
def stored(bf16_gguf: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "logits.bin"
    perplexity(bf16_gguf, "-f", text_file, "--kl-divergence-base", path)
    return path


def perplexity(model: Path, *arguments: str | Path) -> str:
    # One window a batch, as ours: another batch rounds activations apart and may route tokens elsewhere.
    size = ["-c", str(N_CTX), "-b", str(N_CTX), "--chunks", str(N_CHUNKS)]
    command = [tool("llama-perplexity"), "-m", model, *size, *arguments]
    # The tools leave their last lines unwritten in one run of twenty: the logger's thread is not waited for.
    for _ in range(6):
        output = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout
        if "--kl-divergence" not in arguments or "Same top p: " in output:
            return output
    pytest.fail(f"llama-perplexity did not print its statistics:\n{output}")


def printed(output: str, name: str) -> tuple[float, float]:
    """A value and its ± of the statistics."""
    match = re.search(rf"^{re.escape(name)}\s*:\s*([-\d.]+)%?(?: ±\s*([-\d.]+))?", output, re.MULTILINE)
    assert match, f"llama-perplexity printed no {name}:\n{output}"
    return float(match[1]), float(match[2] or "nan")


def test_the_source_is_cut_and_scored_alike(reference: ReferenceLogits, stored: Path) -> None:
    head = np.frombuffer(stored.read_bytes()[:20], np.int32)[2:]
    assert head.tolist() == [N_CTX, reference.n_vocab, N_CHUNKS]
    tokens = np.fromfile(stored, np.int32, offset=20, count=N_CTX * N_CHUNKS)
    np.testing.assert_array_equal(tokens, reference.tokens.ravel())


@pytest.mark.parametrize("name", ["q2_k", "q4_k_m"])
def test_a_quantized_model(name: str, request: pytest.FixtureRequest, reference: ReferenceLogits, stored: Path) -> None:
    target = request.getfixturevalue(name)
    output = perplexity(target, "--kl-divergence-base", stored, "--kl-divergence")
    ours = evaluate(target, reference).divergence
    assert ours.n_positions == N_CHUNKS * (N_CTX - 1 - N_CTX // 2)

    values = {
        "Mean    KLD": ours.kld_mean,
        "Median  KLD": ours.kld_median,
        "99.0%   KLD": ours.kld_p99,
        "99.9%   KLD": ours.kld_p99_9,
        "Maximum KLD": ours.kld_max,
    }
    for title, value in values.items():
        allowed = ROUNDING * (1 + value + math.sqrt(2 * value)) + PRINTED
        assert value == pytest.approx(printed(output, title)[0], abs=allowed), title
    assert ours.kld_mean_se == pytest.approx(printed(output, "Mean    KLD")[1], abs=1e-5)

    theirs, error = printed(output, "Mean PPL(Q)")
    assert ours.ppl_target == pytest.approx(theirs, abs=theirs * 1e-6 + PRINTED)
    assert ours.ppl_target_se == pytest.approx(error, abs=1e-5)
    theirs, error = printed(output, "Mean PPL(base)")
    assert math.log(ours.ppl_base) == pytest.approx(math.log(theirs), abs=ROUNDING)
    assert ours.ppl_base_se == pytest.approx(error, rel=1e-3)
    theirs, error = printed(output, "Mean ln(PPL(Q)/PPL(base))")
    assert ours.ln_ppl_ratio == pytest.approx(theirs, abs=ROUNDING + PRINTED)
    assert ours.ln_ppl_ratio_se == pytest.approx(error, rel=1e-2)

    # The stored source may call another of two tokens the top one if they are less than a step apart.
    best = np.sort(np.asarray(reference.logits), axis=2)[:, :, -2:]
    near_ties = float(np.mean(best[..., 1] - best[..., 0] < 2 * ROUNDING))
    theirs, error = printed(output, "Same top p")
    assert 100 * ours.same_top == pytest.approx(theirs, abs=100 * near_ties + 6e-4)
    assert 100 * ours.same_top_se == pytest.approx(error, abs=0.01)
