"""Is the file whole, does this llama.cpp take it, and are its expert groups used?"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mopeq_edge.binding import library_version
from mopeq_edge.device_report.build import Build
from mopeq_edge.llama_cpp.bundle import STOCK
from mopeq_edge.runtime.locate import find_runtime, tool
from mopeq_edge.summary import Summary, experts_by_type, summarise
from runtime_tests.engines import Engines, Setup

Record = Callable[..., None]


def test_the_structure_is_sound(model_path: Path, record: Record) -> None:
    found = summarise(model_path)
    assert found.architecture is not None, f"{model_path}: is no model but a file of type '{found.kind}'"
    record(file_bytes=found.file_bytes, bits_per_weight=found.bpw, tensors_count=found.n_tensors)


def test_the_library_takes_the_file(
    setup: Setup, engines: Engines, binding_problem: str | None, record: Record
) -> None:
    if binding_problem is not None and setup.build.is_own:
        record(binding=f"not used: {binding_problem}")
        pytest.skip(binding_problem)
    assert binding_problem is None, binding_problem
    record(binding=library_version())
    assert engines.library().n_vocab > 0


def test_expert_groups_are_used(summary: Summary, build: Build, record: Record) -> None:
    """A file with expert groups has no other tensors for its experts: what runs it uses the groups."""
    if not summary.stacks:
        pytest.skip("a stock file has no expert groups")
    assert build.runs_expert_groups, f"{build.tools or build.library} is not patched: mopeq-edge runtime patch DIR"
    record(build=str((build.library or build.tools or Path()).parent.name))
    counts = experts_by_type(summary.stacks)
    record(groups_count=sum(len(stack.groups) for stack in summary.stacks), expert_matrices_count=sum(counts.values()))
    record(experts_by_type=", ".join(f"{count} {name}" for name, count in counts.items()))


def test_stock_llama_cpp_refuses_expert_groups(summary: Summary, model_path: Path) -> None:
    """With an error that names a tensor, and without a crash."""
    if not summary.stacks:
        pytest.skip("a stock file has no expert groups")
    stock = find_runtime(STOCK)
    if stock is None:
        pytest.skip("no stock llama.cpp to try it in; mopeq-edge runtime install --stock builds one")
    done = subprocess.run(
        [tool("llama-bench", stock), "-m", model_path, "-p", "1", "-n", "0", "-r", "1", "-ngl", "0", "-v"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        timeout=600,
        check=False,
    )
    assert done.returncode > 0, f"exit code {done.returncode}"
    assert any(stack.name in done.stdout for stack in summary.stacks), done.stdout[-500:]
