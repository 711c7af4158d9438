"""Whatever a model's files ask to be run is not run: every way in leaves a file if it is, and none does.

Pickles in ``pytorch_model.bin`` are in tests/source/test_torch_file.py, llama.cpp's script in
tests/converters/test_by_script.py.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from converters import CONVERTERS
from mopeq_edge.array_file import read_arrays
from mopeq_edge.cli import cli
from mopeq_edge.errors import MopeqError
from mopeq_edge.evaluate.reference import ReferenceKey, open_reference, write_reference
from mopeq_edge.gguf_file import read_header
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.source.open import open_source

from .builders import EXAMPLE_TEXT, build_olmoe, edit_json, write_gguf

TEMPLATE = "tokenizer.chat_template"


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_olmoe(tmp_path_factory.mktemp("random") / "model")


@pytest.fixture
def model(random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to add code to; what transformers would copy of it goes into a folder of this test."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return Path(shutil.copytree(random_model, tmp_path / "in" / "model"))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


class Runs:
    """Unpickled, it leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


def leaves(marker: Path) -> str:
    """Python that leaves a file, and defines whatever is asked for."""
    return f"open({str(marker)!r}, 'w').close()\nclass X:\n    pass\n"


def jinja(marker: Path) -> str:
    return "{{ cycler.__init__.__globals__.os.system(\"touch '" + str(marker) + "'\") }}"


def works(marker: Path) -> None:
    """What was given would have left the file."""
    assert marker.exists()
    marker.unlink()


def test_auto_map_of_config_json(model: Path, marker: Path) -> None:
    names = {"AutoConfig": "code.X", "AutoModelForCausalLM": "code.X", "AutoModel": "code.X"}
    (model / "code.py").write_text(leaves(marker))
    edit_json(model / "config.json", auto_map=names)
    source = open_source(model, CONVERTERS, "gpt-2")
    assert isinstance(source, HuggingFaceSource)
    from mopeq_edge.calibrate.blocks import BlockModel

    BlockModel(source)
    # a type that transformers does not know has nothing but the code
    edit_json(model / "config.json", model_type="unheard_of")
    source = open_source(model, CONVERTERS, "gpt-2")
    assert isinstance(source, HuggingFaceSource)
    with pytest.raises(MopeqError, match="transformers cannot build the model of its config"):
        BlockModel(source)
    assert not marker.exists()
    assert not (model.parent.parent / "modules").exists()
    exec((model / "code.py").read_text())
    works(marker)


def test_auto_map_of_the_tokenizer(model: Path, marker: Path) -> None:
    from transformers import AutoTokenizer

    code = "from transformers import PreTrainedTokenizerFast\nclass XTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    (model / "code.py").write_text(leaves(marker) + code)
    auto_map = {"AutoTokenizer": ["code.XTokenizer", "code.XTokenizer"]}
    edit_json(model / "tokenizer_config.json", tokenizer_class="XTokenizer", auto_map=auto_map)
    # a class of that name is not looked for: the file tokenizer.json is enough, or it is refused
    with suppress(MopeqError):
        open_source(model, CONVERTERS, "gpt-2")
    assert not marker.exists()
    AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    works(marker)


def test_files_named_like_modules(model: Path, marker: Path) -> None:
    """The checkpoint as the current folder, with modules that are imported after the start."""
    for name in ("torch", "gguf", "numpy", "transformers", "json", "yaml", "safetensors", "sitecustomize"):
        (model / f"{name}.py").write_text(leaves(marker))
    # -P as an installed program has it: the folder of the program is on the path, the current one is not
    program = [sys.executable, "-P", "-c", "from mopeq_edge.cli import main; main()"]
    root = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [*program, "inspect", ".", "--pre", "gpt-2"], cwd=model, env=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not marker.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_pickle_under_another_name(model: Path, marker: Path, name: str, kind: str) -> None:
    if kind == "pickle":
        (model / name).write_bytes(pickle.dumps(Runs(marker)))
    else:
        torch.save({"lm_head.weight": torch.ones(2, 2), "more": Runs(marker)}, model / name)
    if name == "tokenizer.model":
        from converters.sentencepiece_model import read_model

        with pytest.raises(MopeqError, match="is no SentencePiece model"):
            read_model(model / name)
    else:
        with pytest.raises(MopeqError):
            open_source(model, CONVERTERS, "gpt-2")
    assert not marker.exists()
    if kind == "torch":
        torch.load(io.BytesIO((model / name).read_bytes()), weights_only=False)
    else:
        pickle.loads((model / name).read_bytes())
    works(marker)


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "consolidated.00.pth", "optimizer.bin", "training_args.bin"])
def test_other_pickles_are_not_opened(model: Path, marker: Path, name: str) -> None:
    torch.save(Runs(marker), model / name)
    open_source(model, CONVERTERS, "gpt-2")
    (model / "model.safetensors").unlink()
    with pytest.raises(MopeqError, match=r"expected model.safetensors or .*, found"):
        open_source(model, CONVERTERS, "gpt-2")
    assert not marker.exists()


def test_arrays_of_objects(tmp_path: Path, marker: Path) -> None:
    """numpy keeps objects as pickles."""
    key = ReferenceKey("a", "b", 4, None, "all", "c")
    rows = np.zeros((1, 3, 5), np.float32)
    folder = write_reference(tmp_path, key, "x", np.zeros((1, 4), np.int32), 5, rows).folder
    for name in ("tokens.npy", "logits.npy"):
        good = (folder / name).read_bytes()
        np.save(folder / name, np.array([Runs(marker)], dtype=object), allow_pickle=True)
        with pytest.raises(MopeqError, match="delete the folder and evaluate again"):
            open_reference(tmp_path, key)
        np.savez(folder / "archive", np.zeros(3))
        (folder / "archive.npz").replace(folder / name)
        with pytest.raises(MopeqError, match="delete the folder and evaluate again"):
            open_reference(tmp_path, key)
        (folder / name).write_bytes(good)
    assert not marker.exists()
    (tmp_path / "artifact").write_bytes(pickle.dumps(Runs(marker)))
    with pytest.raises(MopeqError, match="run it again"):
        read_arrays(tmp_path / "artifact", "mopeq-edge x", "1", "run it again")
    assert not marker.exists()


def test_yaml_of_the_model_card(model: Path, marker: Path) -> None:
    text = f"license: !!python/object/apply:os.system [\"touch '{marker}'\"]\n"
    (model / "README.md").write_text(f"---\n{text}---\n")
    with pytest.raises(MopeqError, match="cannot be read as a model card"):
        open_source(model, CONVERTERS, "gpt-2")
    assert not marker.exists()
    yaml.unsafe_load(text)
    works(marker)


def test_a_chat_template_is_copied_and_not_rendered(model: Path, tmp_path: Path, marker: Path) -> None:
    edit_json(model / "tokenizer_config.json", chat_template=jinja(marker))
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text(jinja(marker))
    source = open_source(model, CONVERTERS, "gpt-2")
    assert source.kvs[TEMPLATE].value == jinja(marker)
    done = CliRunner().invoke(cli, ["inspect", str(model), "--pre", "gpt-2"])
    assert done.exit_code == 0, done.output
    path = tmp_path / "m.gguf"
    write_gguf(source, path)
    for command in ("inspect", "validate", "memory"):
        done = CliRunner().invoke(cli, [command, str(path)])
        assert done.exit_code == 0, done.output
    assert not marker.exists()
    jinja2.Template(jinja(marker)).render()
    works(marker)


@pytest.mark.runtime
def test_a_chat_template_through_convert_and_evaluate(model: Path, tmp_path: Path, marker: Path) -> None:
    """In a process each, so that llama.cpp's own template engine would be seen too."""
    edit_json(model / "tokenizer_config.json", chat_template=jinja(marker))
    source = open_source(model, CONVERTERS, "gpt-2")
    given, out = tmp_path / "given.gguf", tmp_path / "out.gguf"
    write_gguf(source, given)
    text = ["--text", str(EXAMPLE_TEXT)]
    small = ["--threads", "1", "--chunks", "2"]
    root = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    for args in (
        ["convert", given, out, "--target-bpw", "8", *text, *small, "--window", "64", "--no-evaluate"],
        ["evaluate", out, "--against", given, *text, *small, "--ctx", "64", "--work-dir", tmp_path / "reference"],
    ):
        command = [sys.executable, "-c", "from mopeq_edge.cli import main; main()", *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, env=root, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert read_header(out).get(TEMPLATE) == jinja(marker)
    assert not marker.exists()


def test_names_from_a_gguf_reach_no_terminal_as_they_are(model: Path, tmp_path: Path) -> None:
    """The name of the model is text of the file; nothing that is printed may hold an escape."""
    source = open_source(model, CONVERTERS, "gpt-2")
    path = tmp_path / "m.gguf"
    write_gguf(source, path)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"blk.0.attn_q.weight", b"blk.0.att\x1b[2J.weight"[: len(b"blk.0.attn_q.weight")]))
    for command in ("inspect", "validate"):
        done = CliRunner().invoke(cli, [command, str(path)])
        assert isinstance(done.exception, MopeqError)
        assert "\x1b" not in str(done.exception)
        assert r"\x1b[2J" in str(done.exception)
