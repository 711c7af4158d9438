"""Checkpoints that only llama.cpp's own script converts: the whole way, and that their code stays unrun."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from converters import by_script
from converters.by_script import (
    NAME,
    bytes_needed,
    checkpoint_files,
    converted_gguf,
)
from mopeq_edge.cli import cli
from mopeq_edge.errors import SourceError
from mopeq_edge.ggml.types import F32
from mopeq_edge.gguf_file import read_header
from mopeq_edge.pipeline import open_context
from mopeq_edge.progress import SilentProgress
from mopeq_edge.runtime.locate import require_runtime
from mopeq_edge.source.digests import Digests
from mopeq_edge.source.gguf import GGUFSource
from mopeq_edge.workdir import WorkDirectory

from ..builders import EXAMPLE_TEXT, edit_json, write_quantized_gguf
from .families import causal_model, logits
from .unknown_families import build_dots1, build_hunyuan_moe, build_lfm2_moe

BUILDS: dict[str, tuple[Callable[[Path, str], Path], tuple[str, ...], str]] = {
    "lfm2": (build_lfm2_moe, (), "gpt-2"),
    "dots1": (build_dots1, ("--pre", "olmo"), "olmo"),
}
"""How to write one, options of convert, and the pre-tokenizer's name that must come out."""

TARGET = ("--target-bpw", "5", "--text", str(EXAMPLE_TEXT), "--window", "64", "--chunks", "4", "--threads", "1")


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


def convert(directory: Path, work: Path, progress: Any = None, pre: str | None = None) -> Path:
    digests = Digests(work / "hashes.json")
    return converted_gguf(directory, "X", WorkDirectory(work), digests, pre=pre, progress=progress or SilentProgress())


@pytest.fixture(scope="module", params=BUILDS)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A checkpoint, and what ``convert`` left of it. Do not change the files."""
    build, options, pre = BUILDS[request.param]
    folder = tmp_path_factory.mktemp("converted")
    directory = build(folder / "model", "bfloat16")
    before = {path: path.read_bytes() for path in directory.iterdir()}
    done = CliRunner().invoke(cli, ["convert", str(directory), str(folder / "out.gguf"), *TARGET, *options, "--json"])
    assert done.exit_code == 0, done.output
    assert {path: path.read_bytes() for path in directory.iterdir()} == before
    work = folder / "out.mopeq"
    return SimpleNamespace(directory=directory, work=work, out=folder / "out.gguf", pre=pre, options=options, done=done)


@pytest.mark.runtime
def test_the_whole_way(converted: SimpleNamespace) -> None:
    from mopeq_edge.binding import LlamaModel

    found = json.loads(converted.done.stdout)
    assert found["sensitivity"] == "imatrix"  # no gradients
    assert found["file_bytes"] == found["predicted_file_bytes"] == converted.out.stat().st_size
    assert found["file_bytes"] <= found["budget_bytes"]
    with LlamaModel(converted.out, n_threads=1) as llama:
        assert np.isfinite(llama.logits([1, 2, 3])).all()
    name = json.loads((converted.directory / "config.json").read_text())["architectures"][0]
    said = converted.done.stderr
    assert (
        f"note: {converted.directory}: no converter of ours knows {name}; llama.cpp's own convert_hf_to_gguf.py" in said
    )
    assert " are free in " in said
    assert not [path.name for path in converted.work.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.runtime
def test_same_logits_as_transformers(converted: SimpleNamespace, tmp_path: Path, evaluation_text: str) -> None:
    """BF16 weights are exact in the F32 copy, which llama.cpp computes without rounding activations."""
    from transformers import AutoTokenizer

    from mopeq_edge.binding import LlamaModel

    source = GGUFSource(converted.work / NAME)
    write_quantized_gguf(source, {tensor.name: F32 for tensor in source.tensors}, tmp_path / "f32.gguf")
    tokens = AutoTokenizer.from_pretrained(converted.directory).encode(evaluation_text[:600])[:96]
    expected = logits(causal_model(converted.directory), tokens)
    assert expected.std() > 0.3
    for path, tolerance in ((tmp_path / "f32.gguf", 1e-4), (source.path, 0.1)):
        with LlamaModel(path, n_threads=1, plain=True) as llama:
            assert llama.tokenize(evaluation_text[:600])[:96].tolist() == tokens
            got = llama.logits(tokens)
        assert np.abs(got - expected).max() < tolerance * expected.std()


@pytest.mark.runtime
def test_pre_tokenizer(converted: SimpleNamespace) -> None:
    assert read_header(converted.work / NAME).get("tokenizer.ggml.pre") == converted.pre


@pytest.mark.runtime
def test_estimate_is_enough_and_not_far_off(converted: SimpleNamespace) -> None:
    real = (converted.work / NAME).stat().st_size
    assert real <= bytes_needed(converted.directory) < 1.25 * real


@pytest.mark.runtime
def test_converted_once(converted: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the script ran again")

    monkeypatch.setattr(by_script, "run_script", never)
    notes = Notes()
    pre = converted.options[1] if converted.options else None
    found = open_context(converted.directory, converted.work, pre=pre, threads=1, progress=notes)
    assert found.source.path == converted.work / NAME
    assert notes.lines[0].startswith(f"note: {converted.directory}: read as {found.source.path}, which")
    assert set(checkpoint_files(converted.directory)) < set(found.inputs)
    # another name of the pre-tokenizer asks for another file
    with pytest.raises(AssertionError, match="ran again"):
        convert(converted.directory, converted.work, pre="starcoder")


@pytest.mark.runtime
def test_inspect_converts_nothing(converted: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as of the converted file. Modules of the current folder, here the checkpoint, are not imported."""
    directory = Path(shutil.copytree(converted.directory, tmp_path / "model"))
    for name in ("torch", "gguf", "numpy", "transformers", "json", "conversion"):
        (directory / f"{name}.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w').close()\n")
    before = sorted(directory.iterdir())
    monkeypatch.chdir(directory)
    shown = CliRunner().invoke(cli, ["inspect", ".", "--json", *converted.options])
    assert shown.exit_code == 0, shown.output
    of_file = CliRunner().invoke(cli, ["inspect", str(converted.work / NAME), "--json"])
    assert json.loads(shown.stdout) == json.loads(of_file.stdout)
    assert sorted(directory.iterdir()) == before
    assert not (tmp_path / "marker").exists()


CODE = """
open({marker!r}, "w").close()
from transformers import PreTrainedTokenizerFast
class XTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.runtime
def test_code_of_the_directory_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = build_hunyuan_moe(tmp_path / "model", "bfloat16")
    marker = tmp_path / "marker"
    (directory / "tokenization_x.py").write_text(CODE.format(marker=str(marker)))
    auto_map = {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}
    edit_json(directory / "tokenizer_config.json", tokenizer_class="XTokenizer", auto_map=auto_map)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(SourceError, match="its tokenizer needs Python code of its directory, which is never run; give"):
        convert(directory, tmp_path / "work")
    assert not marker.exists()
    assert not (tmp_path / "modules").exists()
    # the script alone runs it
    script = require_runtime().convert / by_script.SCRIPT
    command = [sys.executable, script, directory, "--outtype", "bf16", "--outfile", tmp_path / "x.gguf"]
    subprocess.run([str(part) for part in command], capture_output=True, check=False)
    assert marker.exists()


def test_what_names_the_pre_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name that was given, else llama.cpp's, else that of a plain byte-level tokenizer."""
    from converters.script_child import Job, name_pre_tokenizer

    def named(job: Job, known: str | None) -> str:
        class TextModel:
            def get_vocab_base_pre(self, tokenizer: str) -> str:
                if known is None:
                    raise NotImplementedError("update get_vocab_base_pre()")
                return known + tokenizer

        monkeypatch.setitem(sys.modules, "conversion.base", SimpleNamespace(TextModel=TextModel))  # type: ignore[arg-type]
        name_pre_tokenizer(job)
        return TextModel().get_vocab_base_pre("2")

    assert named(Job("m", "o", pre=None, plain="gpt-2"), "qwen") == "qwen2"
    assert named(Job("m", "o", pre="mine", plain="gpt-2"), "qwen") == "mine"
    assert named(Job("m", "o", pre=None, plain="gpt-2"), None) == "gpt-2"
    with pytest.raises(NotImplementedError, match="knows no such pre-tokenizer"):
        named(Job("m", "o"), None)
