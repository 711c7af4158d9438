"""The suite for devices, run as a user runs it: in a process of its own, on small files, sound and broken ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from mopeq_edge.cli import cli
from mopeq_edge.device_report.document import Report, read_report
from mopeq_edge.expert_groups.layout import ExpertGroup
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.gguf_file import KV, ValueType, read_header
from mopeq_edge.gguf_layout import string
from mopeq_edge.llama_cpp.bundle import STOCK
from mopeq_edge.runtime.locate import LIBRARY_VARIABLE, require_runtime, tool
from mopeq_edge.runtime.tools import run_tool
from mopeq_edge.source.huggingface import HuggingFaceSource

from ..builders import write_gguf, write_quantized_gguf

pytestmark = [
    pytest.mark.runtime,
    pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read from /proc"),
]

ROOT = Path(__file__).parents[2]
GPU = "NVIDIA RTX A1000 Laptop GPU, 560.35.03, 8.6, 35.00"


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def small(tiny_source: HuggingFaceSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in Q4_K_M, with a chat template. Do not change the file."""
    folder = tmp_path_factory.mktemp("suite")
    added = {"tokenizer.chat_template": string(TEMPLATE), "tokenizer.ggml.add_bos_token": KV(ValueType.BOOL, False)}
    source: Any = SimpleNamespace(
        kvs={**tiny_source.kvs, **added}, tensors=tiny_source.tensors, read_stored=tiny_source.read_stored
    )
    write_gguf(source, folder / "bf16.gguf")
    run_tool("llama-quantize", [folder / "bf16.gguf", folder / "small.gguf", "Q4_K_M", "2"])
    return folder / "small.gguf"


def suite(model: Path, *options: object, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", LIBRARY_VARIABLE))}
    words = ["runtime_tests", "-p", "no:cacheprovider", "--model", model, "--bench", "16,8,2", "--threads", "1"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *map(str, words), *map(str, options)],
        env={**kept, **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def outcomes(report: Report, outcome: str) -> set[str]:
    return {test.name for test in report.tests if test.outcome == outcome}


def figures(report: Report, name: str) -> dict[str, Any]:
    return next(dict(test.figures) for test in report.tests if test.name == name)


@pytest.fixture(scope="module")
def whole(small: Path, bf16_gguf: Path) -> tuple[subprocess.CompletedProcess[str], Report]:
    """A run with everything, and its report, which lies beside the model."""
    done = suite(small, "--reference", bf16_gguf)
    return done, read_report(small.with_name("small.report.json"))


def test_a_sound_file_passes(whole: tuple[subprocess.CompletedProcess[str], Report], small: Path) -> None:
    done, report = whole
    assert done.returncode == 0, done.stdout
    assert f"Report: {small.with_name('small.report.json')}" in done.stdout
    assert outcomes(report, "failed") == set()
    # a stock file without a plan
    assert outcomes(report, "skipped") == {
        "test_file.py::test_expert_groups_are_used",
        "test_file.py::test_stock_llama_cpp_refuses_expert_groups",
        "test_validate.py::test_llama_server_agrees_with_onnx",
        "test_validate.py::test_validate[plan]",
    }
    assert {
        *(f"test_generation.py::test_greedy_text_is_the_same_twice[{n}]" for n in (1, 7, 64, 600)),
        "test_server.py::test_four_at_once_say_what_each_says_alone",
        "test_server.py::test_it_chats",
        "test_server.py::test_its_probabilities_are_the_library_s",
        "test_validate.py::test_validate[logits]",
        "test_validate.py::test_validate[weights]",
    } <= outcomes(report, "passed")


def test_what_the_report_says(whole: tuple[subprocess.CompletedProcess[str], Report], small: Path) -> None:
    report = whole[1]
    header = read_header(small)
    assert (report.model["file_bytes"], report.model["architecture"]) == (header.file_size, "olmoe")
    assert report.model["plan_sha256"] is None
    assert len(report.model["header_sha256"]) == 64
    assert report.llama_cpp["given_by"] == "runtime"
    assert report.llama_cpp["backends"] == "CPU"
    assert report.llama_cpp["version"] in report.llama_cpp["binding"]
    assert report.device["memory_total_bytes"] > 0
    assert report.options["reference"] == "tiny-olmoe-bf16.gguf"
    speed = figures(report, "test_speed.py::test_speed")
    assert (speed["prompt_count"], speed["generated_count"], speed["threads_count"]) == (16, 8, 1)
    assert speed["generated_tokens_per_second"] > 0
    memory = figures(report, "test_memory.py::test_memory")
    # all of the file is read, and the cache of 1024 tokens alone takes 4 layers * 2 * 256 * 2 bytes each
    assert memory["file_bytes_at_peak"] > header.file_size
    assert memory["anonymous_bytes_at_peak"] > 1024 * 4 * 2 * 256 * 2
    assert memory["peak_rss_bytes"] >= memory["peak_pss_bytes"]
    assert memory["peak_gpu_bytes"] is None
    assert 0 < figures(report, "test_source.py::test_it_is_near_its_source")["kld_mean_nats"] < 0.2
    assert 0 < figures(report, "test_validate.py::test_validate[logits]")["kld_mean_nats"] < 0.01
    texts = [t.texts for t in report.tests if t.name.endswith("[64]") and "greedy_tokens" in t.texts]
    # the library and llama-server
    assert len(texts) == 2
    assert texts[0]["greedy_tokens"] == texts[1]["greedy_tokens"]
    assert not any(str(Path.home()) in text for text in map(str, report.llama_cpp.values()))


def test_an_own_build_without_libraries_and_the_comparison(
    whole: tuple[subprocess.CompletedProcess[str], Report], small: Path, tmp_path: Path
) -> None:
    """llama-server does what the library cannot; what both did says the same."""
    for name in ("llama-server", "llama-cli", "llama-bench"):
        (tmp_path / "build" / "bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / "build" / "bin" / name).symlink_to(tool(name, require_runtime(STOCK)))
    path = tmp_path / "own.json"
    done = suite(small, "--llama-cpp", tmp_path, "--report", path)
    report = read_report(path)
    assert done.returncode == 0, done.stdout
    passed = outcomes(report, "passed")
    assert {
        "test_server.py::test_greedy_completion_is_the_same_twice[600]",
        "test_validate.py::test_llama_server_agrees_with_onnx",
        "test_text.py::test_special_tokens_are_one_token",
        "test_speed.py::test_speed",
        "test_memory.py::test_memory",
    } <= passed
    assert not any(name.startswith("test_generation.py") for name in passed)
    reasons = {test.reason for test in report.tests if test.name.startswith("test_generation.py")}
    assert reasons == {"not from Python: the build has no shared libllama (it needs -DBUILD_SHARED_LIBS=ON)"}
    assert report.llama_cpp["library_directory"] is None
    both = ["validate", "--compare", str(small.with_name("small.report.json")), str(path), "--json"]
    compared = CliRunner().invoke(cli, both)
    assert compared.exit_code == 0, compared.output
    found = json.loads(compared.stdout)
    assert found["same_file"]
    assert found["texts"] == []
    assert "generated_tokens_per_second" in {figure["name"] for figure in found["figures"]}


def test_a_cut_file_fails_in_the_named_test(small: Path, tmp_path: Path) -> None:
    """And the report is written all the same, with what nvidia-smi says."""
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(small.read_bytes()[:-1000])
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncase \"$1\" in --query-gpu=name,driver*) echo '{GPU}';; *) exit 9;; esac\n")
    smi.chmod(0o755)
    done = suite(cut, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    report = read_report(tmp_path / "cut.report.json")
    assert done.returncode == 1
    assert outcomes(report, "failed") == {"test_file.py::test_the_structure_is_sound"}
    assert outcomes(report, "passed") == set()
    (reason,) = (test.reason for test in report.tests if test.outcome == "failed")
    assert "ends at" in (reason or "") or "truncated" in (reason or ""), reason
    assert (report.model["name"], report.model["header_sha256"]) == ("cut.gguf", None)
    assert report.device["gpus"][0]["driver_version"] == "560.35.03"
    assert report.device["gpu_memory_total_bytes"] == []


def test_a_crash_leaves_what_was_known(small: Path, tmp_path: Path) -> None:
    (tmp_path / "crash.py").write_text(
        "import os\ndef pytest_runtest_call(item):\n    if 'special' in item.name: os.abort()\n"
    )
    path = tmp_path / "crash.json"
    done = suite(small, "-k", "test_text", "-p", "crash", "--report", path, PYTHONPATH=str(tmp_path))
    assert done.returncode == -signal.SIGABRT
    assert outcomes(read_report(path), "passed") == {"test_text.py::test_text_comes_back"}


def test_a_damaged_weight_fails_in_the_named_test(small: Path, tmp_path: Path) -> None:
    header = read_header(small)
    info = next(info for info in header.tensors if info.name == "blk.1.ffn_up_exps.weight")
    assert info.type.name == "Q4_K"
    data = bytearray(small.read_bytes())
    at = header.data_start + info.offset + 5 * info.nbytes // 16
    data[at : at + 2] = b"\x00\x7e"  # NaN as the scale of the first block of expert 5
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(data)
    done = suite(damaged, "-k", "test_validate or sound")
    report = read_report(tmp_path / "damaged.report.json")
    assert done.returncode == 1
    assert outcomes(report, "failed") == {"test_validate.py::test_validate[scales]"}
    (reason,) = (test.reason for test in report.tests if test.outcome == "failed")
    assert "expert 5 of blk.1.ffn_up_exps.weight" in (reason or "")


def test_a_per_expert_file_needs_a_patched_llama_cpp(tiny_source: HuggingFaceSource, tmp_path: Path) -> None:
    """In a stock build one test says so, and the others are left out."""
    file = tmp_path / "groups.gguf"
    groups = [ExpertGroup(BY_NAME[name], tuple(range(first, 16, 2))) for first, name in enumerate(("Q3_K", "Q4_K"))]
    write_quantized_gguf(tiny_source, {"blk.0.ffn_up_exps.weight": tuple(groups)}, file)
    used, refused = (
        f"test_file.py::test_{n}" for n in ("expert_groups_are_used", "stock_llama_cpp_refuses_expert_groups")
    )
    done = suite(file, "-k", "test_file or ends_at", "--report", tmp_path / "patched.json")
    assert done.returncode == 0, done.stdout
    patched = read_report(tmp_path / "patched.json")
    assert {used, refused, "test_server.py::test_it_ends_at_eos"} <= outcomes(patched, "passed")
    assert figures(patched, used) == {"groups_count": 2, "expert_matrices_count": 16}
    suite(file, "--llama-cpp", require_runtime(STOCK).directory, "--report", tmp_path / "stock.json")
    stock = read_report(tmp_path / "stock.json")
    assert outcomes(stock, "failed") == {used}
    assert outcomes(stock, "passed") == {refused, "test_file.py::test_the_structure_is_sound"}
    both = ["validate", "--compare", str(tmp_path / "patched.json"), str(tmp_path / "stock.json")]
    compared = CliRunner().invoke(cli, both)
    assert compared.exit_code == 1
    assert f"1 passed in one and failed in the other: {used}" in compared.stdout


def test_what_is_refused_before_any_test(small: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.json"
    notes.write_text('{"mine": 1}')
    for options, said in (
        (("--report", notes), "exists and is no report"),
        (("--llama-cpp", tmp_path), "expected a build of llama.cpp"),
        (("--bench", "much"), "expected PROMPT,GENERATE,REPETITIONS"),
    ):
        done = suite(small, *options)
        assert done.returncode == pytest.ExitCode.USAGE_ERROR
        assert said in done.stderr
    assert notes.read_text() == '{"mine": 1}'
