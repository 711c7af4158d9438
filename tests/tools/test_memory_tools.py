"""What the memory tools read from /proc, nvidia-smi, llama.cpp's log and imatrix counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mopeq_edge.expert_groups.layout import ExpertGroup
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.gguf_file import read_header
from mopeq_edge.source.huggingface import HuggingFaceSource
from tools.expert_locality import cached_bytes, curve, expert_bytes
from tools.llama_server import buffers
from tools.process_memory import Sample, Sampler, gpu_bytes, peaks, read_faults, read_pss, read_status

from ..builders import write_quantized_gguf

STATUS = """Name:\tllama-server
VmHWM:\t  812340 kB
VmRSS:\t  800000 kB
RssAnon:\t  123456 kB
RssFile:\t  676000 kB
RssShmem:\t     544 kB
VmSwap:\t      12 kB
Threads:\t9
"""


def test_status() -> None:
    found = read_status(STATUS)
    assert found == {"anon": 123456 * 1024, "file": 676000 * 1024, "shmem": 544 * 1024, "swap": 12 * 1024}


def test_faults_behind_any_name() -> None:
    line = "4242 (llama) server)) S 1 4242 4242 0 -1 4194560 15890 77 21 3 100 20 0 0 20 0 9 0 12345 1000 2000"
    assert read_faults(line) == (15890, 21)


def test_pss() -> None:
    text = "55d0-7ffc ---p 00000000 00:00 0 [rollup]\nRss:    800000 kB\nPss:    790123 kB\nPss_Anon: 1 kB\n"
    assert read_pss(text) == 790123 * 1024
    assert read_pss("") is None


def test_gpu_memory_that_is_not_said_is_none() -> None:
    assert gpu_bytes(42, lambda _: "41, 100\n42, 1536\n") == 1536 * 2**20
    assert gpu_bytes(42, lambda _: "42, [N/A]\n") is None
    assert gpu_bytes(42, lambda _: "") is None


def test_peaks() -> None:
    samples = [
        Sample(0.0, anon=1, file=9, shmem=0, swap=0, minor_faults=1, major_faults=0, pss=7),
        Sample(0.1, anon=5, file=6, shmem=0, swap=2, minor_faults=4, major_faults=1),
        Sample(0.2, anon=3, file=3, shmem=0, swap=0, minor_faults=5, major_faults=1, pss=4),
    ]
    found = peaks(samples)
    assert (found["anon"], found["file"], found["rss"], found["pss"], found["gpu"]) == (5, 9, 11, 7, None)
    assert (found["swap"], found["minor_faults"], found["major_faults"]) == (2, 5, 1)
    assert found["at_peak"]["seconds"] == 0.1
    assert peaks([]) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_program_that_takes_64_mib() -> None:
    code = "x = bytearray(2**26); x[::4096] = b'1' * 2**14; import time; print('ready', flush=True); time.sleep(30)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        sampler = Sampler(process.pid, interval=0.005, pss_every=1)
        assert process.stdout is not None
        process.stdout.readline()
        while not sampler.samples or sampler.samples[-1].anon < 2**26:
            pass
        found = peaks(sampler.stop())
        process.kill()
    assert 2**26 < found["anon"] < 2**26 + 2**25
    assert found["pss"] is not None


def test_lines_of_the_log() -> None:
    log = """0.00.012.461 I load_tensors:   CPU_Mapped model buffer size =    14.77 MiB
0.00.012.461 I load_tensors:   CPU_REPACK model buffer size =     3.59 MiB
0.00.013.588 I llama_context:        CPU  output buffer size =     0.06 MiB
0.00.013.798 I llama_kv_cache:        CPU KV buffer size =     8.00 MiB
0.00.013.798 I llama_kv_cache:        CPU KV buffer size =     0.75 MiB
0.00.019.697 I sched_reserve:        CPU compute buffer size =    10.51 MiB
"""
    assert buffers(log) == {
        "model": [("CPU_Mapped", 14.77), ("CPU_REPACK", 3.59)],
        "kv": [("CPU", 8.0), ("CPU", 0.75)],
        "compute": [("CPU", 10.51)],
        "output": [("CPU", 0.06)],
    }


def test_the_curve_by_hand() -> None:
    name = "blk.0.ffn_up_exps.weight"
    sizes = {name: np.array([10, 10, 20, 20])}
    steps = [np.array([1, 0, 0, 0]), np.array([2, 0, 3, 0]), np.array([2, 1, 3, 0])]
    found = curve([{name: step.astype(np.float32)} for step in steps], sizes, 16)
    assert [(p.tokens, p.experts, p.nbytes) for p in found] == [(16, 0.25, 10), (32, 0.5, 30), (48, 0.75, 40)]
    assert [(p.chunk_experts, p.chunk_bytes) for p in found] == [(0.25, 10), (0.5, 30), (0.25, 10)]


@pytest.mark.runtime
def test_bytes_of_experts_in_groups(tiny_source: HuggingFaceSource, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    even, odd = tuple(range(0, 16, 2)), tuple(range(1, 16, 2))
    groups = (ExpertGroup(BY_NAME["Q2_K"], even), ExpertGroup(BY_NAME["Q4_K"], odd))
    write_quantized_gguf(tiny_source, {"blk.1.ffn_up_exps.weight": groups}, path)
    found = expert_bytes(read_header(path))
    assert len(found) == 12
    n = 256 * 256
    assert found["blk.1.ffn_up_exps.weight"].tolist() == [n * 84 // 256, n * 144 // 256] * 8
    assert found["blk.0.ffn_up_exps.weight"].tolist() == [2 * n] * 16


def test_what_was_just_written_is_in_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1" * 100_000)
    assert cached_bytes(path) in (100_000, None)
