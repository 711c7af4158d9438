from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from mopeq_edge.cli import cli
from mopeq_edge.errors import MopeqError, OutputError, RuntimeMissingError
from mopeq_edge.llama_cpp import bundle
from mopeq_edge.progress import SilentProgress
from mopeq_edge.runtime.locate import Runtime
from mopeq_edge.runtime.process import describe_exit, last_words, run_lines
from mopeq_edge.runtime.tools import run_tool

from .builds import PATCHED, PATCHES, write_build


def test_arguments_and_directory_reach_the_tool(installed: Runtime, tmp_path: Path) -> None:
    said = run_tool("llama-quantize", ["a b", tmp_path / "c"], cwd=tmp_path)
    assert said.splitlines() == [str(tmp_path.resolve()), "[a b]", f"[{tmp_path / 'c'}]"]


def test_output_of_both_streams_line_by_line(installed: Runtime, tmp_path: Path) -> None:
    lines: list[str] = []
    log = tmp_path / "log"
    said = run_tool("llama-imatrix", ["--mixed"], on_line=lines.append, log=log)
    # The carriage return ends a line; the byte that is no UTF-8 becomes U+FFFD.
    assert lines == ["one", "two", "\ufffd three", "four"]
    assert said == "one\ntwo\n\ufffd three\nfour\n" == log.read_text(encoding="utf-8")


def test_lines_arrive_while_the_program_runs() -> None:
    arrived: list[float] = []
    code = "import time; print('a', flush=True); time.sleep(0.4); print('b', flush=True)"
    assert run_lines([sys.executable, "-c", code], lambda line: arrived.append(time.monotonic())) == 0
    assert arrived[1] - arrived[0] > 0.3


def test_failure_is_one_line_with_the_last_words(installed: Runtime, tmp_path: Path) -> None:
    with pytest.raises(MopeqError) as caught:
        run_tool("llama-quantize", ["--fail"])
    assert str(caught.value) == "llama-quantize failed with exit code 3: no such tensor"
    log = tmp_path / "log"
    with pytest.raises(MopeqError, match=f"see {log}"):
        run_tool("llama-quantize", ["--fail"], log=log)
    assert log.read_text() == "loading\nno such tensor\n\n"


def test_a_crash_names_the_signal(installed: Runtime) -> None:
    with pytest.raises(MopeqError, match="llama-quantize was ended by SIGABRT: no output"):
        run_tool("llama-quantize", ["--abort"])


def test_describe_exit() -> None:
    assert describe_exit(1) == "failed with exit code 1"
    assert describe_exit(-signal.SIGKILL) == "was ended by SIGKILL (out of memory?)"
    assert last_words(["a", " b ", " ", ""]) == "b"


def test_what_cannot_be_run(installed: Runtime, tmp_path: Path) -> None:
    with pytest.raises(RuntimeMissingError, match="llama-none is missing"):
        run_tool("llama-none", [])
    with pytest.raises(OutputError, match="the log of llama-cli cannot be written"):
        run_tool("llama-cli", [], log=tmp_path / "no" / "log")
    with pytest.raises(RuntimeMissingError, match=f"could not start: {tmp_path / 'gone'}"):
        run_tool("llama-cli", [], cwd=tmp_path / "gone")


def test_an_exception_ends_the_whole_process_group(tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    late = tmp_path / "late"
    with pytest.raises(KeyboardInterrupt):
        run_lines(["sh", "-c", f"(sleep 0.3; touch '{late}') & echo started; wait"], interrupt)
    time.sleep(0.5)
    assert not late.exists()


def invoke_info(*options: str) -> str:
    result = CliRunner().invoke(cli, ["runtime", "info", *options])
    assert result.exit_code == 0, result.output
    return result.output


def test_info_of_an_installation(installed: Runtime) -> None:
    found = json.loads(invoke_info("--json"))
    assert found["installed"] is True
    assert found["binding_matches"] is True
    assert (found["version"], found["build"]) == (installed.version, "stock")
    assert found["directory"] == str(installed.directory)
    assert found["library_dir"] == str(installed.directory / "bin")
    assert found["tools"]["llama-cli"] == {
        "path": str(installed.directory / "bin" / "llama-cli"),
        "version": "stand-in 4711",
    }
    table = dict(line.split(maxsplit=1) for line in invoke_info().splitlines())
    assert table["llama-quantize"] == "stand-in 4711"
    assert table["directory"] == str(installed.directory)


def test_info_of_several_builds(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "patch_files", lambda: PATCHES)
    monkeypatch.setattr("mopeq_edge.runtime.info.build_name", bundle.build_name)
    write_build(cache, "stock")
    assert "per-expert files  do not run: run: mopeq-edge runtime install" in invoke_info()
    for name in (PATCHED, f"{PATCHED}-cuda87", "groups0000000000"):
        write_build(cache, name)
    found = json.loads(invoke_info("--json"))
    assert (found["build"], found["runs_expert_groups"], found["others"]) == (PATCHED, True, [])
    assert found["builds"] == {
        "groups0000000000": "with an earlier patch, not used, for cpu",
        PATCHED: "with our patch, for cpu",
        f"{PATCHED}-cuda87": "with our patch, for cuda87",
        "stock": "without our patch, for cpu",
    }
    lines = invoke_info().splitlines()
    assert f"installed         {PATCHED}, with our patch, for cpu, in use" in lines
    assert "per-expert files  run with these libraries" in lines


def test_info_without_an_installation(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    other = cache / "llama.cpp-0.0.1-stock"
    other.mkdir(parents=True)
    (other / "runtime.json").write_text("{}")
    found = json.loads(invoke_info("--json"))
    assert (found["installed"], found["tools"], found["library_dir"]) == (False, {}, None)
    assert found["binding_matches"] is False
    assert found["others"] == ["llama.cpp-0.0.1-stock"]
    assert (found["builds"], found["runs_expert_groups"]) == ({}, False)
    assert "run: mopeq-edge runtime install" in invoke_info()
    (tmp_path / "libggml-base.so").touch()
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    found = json.loads(invoke_info("--json"))
    assert (found["binding_matches"], found["library_dir"]) == (None, str(tmp_path))


def test_install_command_hands_over_its_options(
    installed: Runtime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    console = ModuleType("mopeq_edge.cli.console")
    console.console_progress = lambda: nullcontext(SilentProgress())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mopeq_edge.cli.console", console)
    result = CliRunner().invoke(cli, ["runtime", "install", "--stock"])
    assert (result.exit_code, result.exception) == (0, None)
    assert str(installed.directory) in result.output
    result = CliRunner().invoke(
        cli, ["runtime", "install", "--stock", "--force", "--jobs", "1", "--sdist", str(tmp_path)]
    )
    assert isinstance(result.exception, RuntimeMissingError)
    assert f"{tmp_path}: expected a source distribution" in str(result.exception)
    assert CliRunner().invoke(cli, ["runtime", "install", "--jobs", "0"]).exit_code == 2


@pytest.mark.runtime
def test_every_real_tool_is_there(real_runtime: Runtime) -> None:
    found = json.loads(invoke_info("--json"))
    wanted = ["bench", "cli", "completion", "imatrix", "mtmd-cli", "perplexity", "quantize", "server", "tokenize"]
    assert sorted(found["tools"]) == [f"llama-{name}" for name in wanted]
    versions = {name: tool["version"] for name, tool in found["tools"].items()}
    # The only one that has no --version.
    assert versions.pop("llama-quantize") is None
    assert len(set(versions.values())) == 1
    assert None not in versions.values()


@pytest.mark.runtime
def test_real_quantize_explains_itself(real_runtime: Runtime) -> None:
    with pytest.raises(MopeqError, match="llama-quantize failed with exit code 1"):
        run_tool("llama-quantize", ["no-such.gguf", "out.gguf", "Q4_K_M"])
    path = real_runtime.bin / "llama-quantize"
    said = subprocess.run([path, "--help"], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert "--tensor-type-file" in said.stdout
    assert "Q4_K_M" in said.stdout
    assert "error while loading" not in said.stdout


@pytest.mark.runtime
def test_real_converter_is_complete(real_runtime: Runtime) -> None:
    script = real_runtime.convert / "convert_hf_to_gguf.py"
    done = subprocess.run(
        [sys.executable, script, "--print-supported-models"], text=True, capture_output=True, check=False
    )
    assert "OlmoeForCausalLM" in done.stdout + done.stderr, done.stderr
