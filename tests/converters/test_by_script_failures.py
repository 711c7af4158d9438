"""What goes wrong with llama.cpp's script, when it runs again, and what is said before it does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from converters import by_script
from converters.by_script import NAME, bytes_needed, header_gguf, last_error
from mopeq_edge.cli import cli
from mopeq_edge.errors import CalibrationError, MopeqError, OutputError, SourceError
from mopeq_edge.interrupts import MESSAGE
from mopeq_edge.pipeline import open_context
from mopeq_edge.progress import SilentProgress

from ..builders import EXAMPLE_TEXT, bf16, edit_json, write_safetensors
from .test_by_script import TARGET, convert
from .unknown_families import build_lfm2_moe

PROGRAM = "from mopeq_edge.cli import main; main()"


@pytest.fixture
def lfm2(tmp_path: Path) -> Path:
    return build_lfm2_moe(tmp_path / "model", "bfloat16")


@pytest.mark.runtime
def test_an_architecture_that_the_script_does_not_know(lfm2: Path, tmp_path: Path) -> None:
    edit_json(lfm2 / "config.json", architectures=["NewMoeForCausalLM"])
    said = (
        r"model: llama.cpp's convert_hf_to_gguf.py failed with exit code 1: Model NewMoeForCausalLM is not supported;"
    )
    with pytest.raises(SourceError, match=said):
        open_context(lfm2, tmp_path / "work", pre=None, threads=1, progress=SilentProgress())
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["hashes.json"]


@pytest.mark.runtime
def test_a_pre_tokenizer_that_nobody_knows(lfm2: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((lfm2 / "tokenizer.json").read_text())
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, tokenizer["pre_tokenizer"]]}
    (lfm2 / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SourceError, match=r"llama.cpp knows no such pre-tokenizer; give the name of one .* --pre NAME"):
        header_gguf(lfm2, tmp_path / "header.gguf", pre=None)


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    """Another program in the script's place; ``output`` is the file that it is to write."""
    program = tmp_path / "fake.py"
    program.write_text(f"import json, os, sys, time\noutput = json.loads(sys.argv[2])['output']\n{body}\n")
    monkeypatch.setattr(by_script, "CHILD", program)
    return program


FAILURES = {
    "ERROR:hf-to-gguf:no more": ("print('ERROR:hf-to-gguf:no more'); sys.exit(3)", "failed with exit code 3: no more;"),
    "exception": ("raise KeyError('n_head')", "failed with exit code 1: KeyError: 'n_head';"),
    "killed": ("os.kill(os.getpid(), 9)", r"was ended by SIGKILL \(out of memory\?\)"),
    "half a file": ("", r"model: of llama.cpp's convert_hf_to_gguf.py: .*GGUF"),
}


@pytest.mark.runtime
@pytest.mark.parametrize("failure", FAILURES)
def test_failures_leave_nothing(lfm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    body, said = FAILURES[failure]
    fake(tmp_path, monkeypatch, "open(output, 'wb').write(b'GGUF' * 9)\n" + body)
    with pytest.raises(MopeqError, match=said) as caught:
        convert(lfm2, tmp_path / "work")
    assert "\n" not in str(caught.value)
    assert ".tmp" not in str(caught.value)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["hashes.json"]


@pytest.mark.runtime
def test_interrupted(lfm2: Path, tmp_path: Path) -> None:
    """Ctrl-C ends the script with the command, and the half file goes."""
    body = "open(output, 'wb').write(b'GGUF'); open(sys.argv[0] + '.pid', 'w').write(str(os.getpid())); time.sleep(600)"
    with pytest.MonkeyPatch.context() as patch:
        program = fake(tmp_path, patch, body)
    code = f"import pathlib, converters.by_script as b; b.CHILD = pathlib.Path({str(program)!r}); {PROGRAM}"
    command = [sys.executable, "-c", code, "convert", str(lfm2), str(tmp_path / "out.gguf"), *TARGET]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    # ignored where the tests run in a script's background
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, env=env, cwd=tmp_path, stderr=subprocess.PIPE, preexec_fn=heard)
    told = program.with_name(program.name + ".pid")
    deadline = time.monotonic() + 60
    while not (told.exists() and told.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list((tmp_path / "out.mopeq").glob(".converted.gguf.*.tmp"))
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert said.endswith(MESSAGE)
    assert "Traceback" not in said
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)
    assert [path.name for path in (tmp_path / "out.mopeq").iterdir()] == ["hashes.json"]
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.runtime
def test_disk_too_small(lfm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = bytes_needed(lfm2)
    fake(tmp_path, monkeypatch, "sys.exit('it ran')")
    for free, said in ((needed - 1, "are free in .*; free space or choose another place"), (needed, "it ran")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with pytest.raises(SourceError if free == needed else OutputError, match=said):
            convert(lfm2, tmp_path / "work")
        assert [path.name for path in (tmp_path / "work").iterdir()] == ["hashes.json"]


@pytest.mark.runtime
def test_a_changed_source_is_converted_anew(lfm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = tmp_path / "count"
    fake(tmp_path, monkeypatch, f"open({str(count)!r}, 'a').write('x'); open(output, 'wb').write(b'GGUF')")
    monkeypatch.setattr(by_script, "_require_moe", lambda *_: None)

    def runs() -> int:
        convert(lfm2, tmp_path / "work")
        return len(count.read_text())

    assert [runs(), runs()] == [1, 1]
    (lfm2 / "calibration.txt").write_text("not read")
    (lfm2 / "out.gguf").write_text("not read")
    assert runs() == 1
    edit_json(lfm2 / "config.json", note="changed")
    assert [runs(), runs()] == [2, 2]
    raw = bytearray((lfm2 / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (lfm2 / "model.safetensors").write_bytes(raw)
    assert [runs(), runs()] == [3, 3]
    (tmp_path / "work" / NAME).write_bytes(b"damaged")
    assert runs() == 4


@pytest.mark.runtime
def test_growth_is_reported(lfm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "file = open(output, 'wb')\nfor _ in range(2):\n    file.write(bytes(1000)); file.flush(); time.sleep(0.3)"
    fake(tmp_path, monkeypatch, body)
    monkeypatch.setattr(by_script, "_require_moe", lambda *_: None)
    monkeypatch.setattr(by_script, "_POLL_SECONDS", 0.05)
    seen: list[float] = []
    monkeypatch.setattr("mopeq_edge.progress._SilentStep.advance", lambda _, amount=1.0: seen.append(amount))
    convert(lfm2, tmp_path / "work")
    assert sum(seen) == 2000
    assert len([amount for amount in seen if amount]) >= 2


def test_bytes_of_every_type(tmp_path: Path) -> None:
    """Two bytes a weight: also for FP8 and for four-bit weights in 32-bit words; four for vectors."""
    edit_json(tmp_path / "config.json", architectures=["X"])
    tensors = {
        "bf16": ("BF16", (4, 8), bf16(np.zeros(32))),
        "fp8": ("F8_E4M3", (4, 8), bytes(32)),
        "f32": ("F32", (4, 8), bytes(128)),
        "packed": ("I32", (4, 1), bytes(16)),
        "vector": ("BF16", (8,), bytes(16)),
    }
    write_safetensors(tmp_path / "model.safetensors", tensors)
    assert bytes_needed(tmp_path) == 4 * 32 * 2 + 8 * 4
    (tmp_path / "tokenizer.json").write_bytes(bytes(100))
    assert bytes_needed(tmp_path) == 4 * 32 * 2 + 8 * 4 + 100


def test_wider_weights_are_rounded_and_told(tmp_path: Path) -> None:
    tensors = {"a": ("F16", (4, 8), bytes(64)), "b": ("F32", (8,), bytes(32))}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    assert list(by_script._warnings(tmp_path)) == [
        f"{tmp_path}: its weights in F16 are rounded to BF16 (routers and norms stay F32)"
    ]


def test_last_error() -> None:
    trace = ["Traceback (most recent call last):", '  File "x.py", line 3', "KeyError: 'a'", "Writing: 10%|#", ""]
    assert last_error(trace) == "KeyError: 'a'"
    assert last_error(["INFO:x:fine", "ERROR:hf-to-gguf:Model X is not supported"]) == "Model X is not supported"
    assert last_error(["package.errors.BadError: two\x1b", "INFO:x: later"]).startswith("BadError: two")
    assert last_error(["Killed"]) == "Killed"
    assert last_error([]) == "no output"


def test_what_cannot_be_done_is_said_first(lfm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("converted")

    monkeypatch.setattr("converters.by_script.converted_gguf", never)
    out = tmp_path / "out.gguf"

    def error(command: str, *args: object) -> Exception:
        work = ("--work-dir", tmp_path / "work") if command != "convert" else ()
        done = CliRunner().invoke(cli, [str(arg) for arg in (command, lfm2, *args, *work)])
        assert isinstance(done.exception, MopeqError), done.output
        return done.exception

    for command, *place in (("convert", out, "--target-bpw", 5), ("calibrate",)):
        text = ("--text", EXAMPLE_TEXT)
        for options in (("--fisher", *text), ("--trace", *text)):
            said = error(str(command), *place, *options)
            assert isinstance(said, CalibrationError)
            assert f"{lfm2}: gradients need an architecture that we have a converter for" in str(said)
        assert f"{lfm2}: no text to calibrate on; give --text FILE or --imatrix FILE" in str(
            error(str(command), *place)
        )
        assert "gone: cannot be read" in str(error(str(command), *place, "--text", "gone"))
    out.write_text("precious")
    assert "exists already" in str(error("convert", out, "--target-bpw", 5, "--text", EXAMPLE_TEXT))
    weights = lfm2 / "model.safetensors"
    assert "is the input" in str(error("convert", weights, "--target-bpw", 5, "--text", EXAMPLE_TEXT, "--force"))


def test_no_experts_in_numbers(tmp_path: Path) -> None:
    edit_json(tmp_path / "config.json", architectures=["YForCausalLM"], num_experts=0, moe_layers=[], use_moe=False)
    with pytest.raises(SourceError, match=r"a dense model \(YForCausalLM, no experts in config.json\)"):
        open_context(tmp_path, tmp_path / "work", pre=None, threads=1, progress=SilentProgress())
    assert not (tmp_path / "work").exists()


def test_without_torch(lfm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_script, "require_runtime", lambda: SimpleNamespace(version="1", convert=tmp_path))
    monkeypatch.setattr(by_script.importlib.util, "find_spec", lambda name: None if name == "torch" else name)
    with pytest.raises(MopeqError, match=r"needs torch, not installed; run: pip install 'mopeq-edge\[calibrate\]'"):
        convert(lfm2, tmp_path / "work")


@pytest.mark.skipif(os.name != "posix", reason="parents of POSIX")
def test_the_script_ends_with_a_killed_parent(tmp_path: Path) -> None:
    child = "from converters.script_child import end_with_parent; import time; end_with_parent(); time.sleep(60)"
    parent = (
        "import subprocess, sys, time\n"
        "print(subprocess.Popen([sys.executable, '-c', sys.argv[1]]).pid, flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", parent, child], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        pid = int(running.stdout.readline())
        time.sleep(1)
        os.kill(pid, 0)
        running.kill()
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        # a killed parent's child that nobody waits for stays as a zombie where no init collects it
        if "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]:
            break
        time.sleep(0.05)
    assert time.monotonic() < until
