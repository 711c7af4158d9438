"""Speed by llama-bench: prompt tokens and generated tokens a second, with every repetition."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopeq_edge.errors import MopeqError
from mopeq_edge.runtime.process import describe_exit, last_words

SECONDS = 3600


@dataclass(frozen=True)
class BenchSizes:
    """Tokens of the prompt, tokens to generate, how often."""

    n_prompt: int = 512
    n_generate: int = 128
    repetitions: int = 3

    @classmethod
    def parse(cls, text: str) -> BenchSizes:
        """Of "512,128,3". Raises :class:`MopeqError`."""
        match = re.fullmatch(r"([1-9]\d*),([1-9]\d*),([1-9]\d*)", text)
        if match is None:
            raise MopeqError(f"--bench {text}: expected PROMPT,GENERATE,REPETITIONS such as 512,128,3")
        return cls(int(match[1]), int(match[2]), int(match[3]))


@dataclass(frozen=True)
class Speed:
    """Tokens a second: mean, standard deviation and every repetition; ``n_threads`` of the CPU."""

    n_tokens: int
    mean: float
    deviation: float
    samples: tuple[float, ...]
    n_threads: int


@dataclass(frozen=True)
class Bench:
    """What llama-bench says of itself and of both speeds."""

    prompt: Speed
    generate: Speed
    backends: str | None
    cpu: str | None
    gpu: str | None


def run_bench(program: Path, model: Path, sizes: BenchSizes, *, n_threads: int, n_gpu_layers: int) -> Bench:
    """Run llama-bench ``program``. Raises :class:`MopeqError` if it fails or says nothing that can be read."""
    options = {"-p": sizes.n_prompt, "-n": sizes.n_generate, "-r": sizes.repetitions, "-t": n_threads}
    command = [str(program), "-m", str(model), "-ngl", str(n_gpu_layers), "-o", "json"]
    command += [str(word) for pair in options.items() for word in pair]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except OSError as error:
        raise MopeqError(f"{program} could not start: {error.strerror}; build llama.cpp again") from error
    except subprocess.TimeoutExpired:
        raise MopeqError(f"{program} did not end in {SECONDS} seconds; ask for less with --bench") from None
    if done.returncode != 0:
        raise MopeqError(f"{program} {describe_exit(done.returncode)}: {last_words(done.stderr.splitlines())}")
    return read_bench(done.stdout)


def read_bench(text: str) -> Bench:
    """From what ``llama-bench -o json`` prints. Raises :class:`MopeqError`."""
    try:
        rows: list[dict[str, Any]] = json.loads(text)
        prompt = next(_speed(row, row["n_prompt"]) for row in rows if row["n_prompt"] and not row["n_gen"])
        generate = next(_speed(row, row["n_gen"]) for row in rows if row["n_gen"] and not row["n_prompt"])
        first = rows[0]
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise MopeqError(
            f"llama-bench: expected JSON with a prompt and a generation test, found {text[:80]!r} ({error!r}); "
            "this llama.cpp may be too old"
        ) from error
    return Bench(prompt, generate, *(first.get(name) or None for name in ("backends", "cpu_info", "gpu_info")))


def _speed(row: dict[str, Any], n_tokens: int) -> Speed:
    return Speed(
        int(n_tokens),
        float(row["avg_ts"]),
        float(row["stddev_ts"]),
        tuple(float(sample) for sample in row["samples_ts"]),
        int(row["n_threads"]),
    )
