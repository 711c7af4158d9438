"""Sound files raise no alarm: every family against its checkpoint, every type, padded experts, split files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from converters import CONVERTERS
from mopeq_edge.cli import cli
from mopeq_edge.emit import emit
from mopeq_edge.ggml.library import load_ggml
from mopeq_edge.ggml.types import BY_NAME, F32, QUANTIZABLE, GgmlType
from mopeq_edge.progress import SilentProgress
from mopeq_edge.source.model import Source
from mopeq_edge.source.open import open_source
from mopeq_edge.source.padded import PaddedSource, expert_padding
from mopeq_edge.split import read_parts

from ..builders import build_olmoe, write_gguf, write_quantized_gguf
from ..converters.onnx_reference.test_families import FAMILY
from .files import GROUPS, flat_imatrix, make

pytestmark = pytest.mark.runtime

EVERY_CHECK = {
    *("structure", "scales", "zeros", "key-values", "tensors", "weights"),
    *("runs", "token by token", "logits", "routing"),
}


def validate(*args: object) -> dict[str, Any]:
    """Checks by name; all that were not left out passed, and nothing was said on stderr."""
    done = CliRunner().invoke(cli, ["validate", *[str(arg) for arg in args], "--threads", "1", "--json"])
    assert done.exception is None, (done.exception, done.stderr)
    assert done.stderr == ""
    checks = json.loads(done.stdout)["checks"]
    assert all(check["passed"] is not False for check in checks)
    return {check["name"]: check for check in checks}


def passed(checks: dict[str, Any]) -> set[str]:
    return {name for name, check in checks.items() if check["passed"]}


def in_type(source: Source, kind: GgmlType) -> dict[str, GgmlType]:
    """Every matrix that has room for whole blocks in ``kind``; what is quantized already and has not, in F32."""
    types = {t.name: kind for t in source.tensors if t.quantizable and kind.fits(t.n_in)}
    return {t.name: F32 for t in source.tensors if t.type.is_quantized} | types


@pytest.mark.parametrize("name", FAMILY)
def test_families(tmp_path: Path, name: str) -> None:
    directory = FAMILY[name][0](tmp_path / "model", "bfloat16")
    source = open_source(directory, CONVERTERS, pre="gpt-2")
    write_gguf(source, tmp_path / "stored.gguf")
    for kind in ("F32", "Q8_0", "Q4_0"):
        path = tmp_path / f"{kind}.gguf"
        write_quantized_gguf(source, in_type(source, BY_NAME[kind]), path)
        checks = validate(path, "--against", directory)
        assert passed(checks) == EVERY_CHECK
        if kind == "F32":
            assert checks["logits"]["threshold"] == 1e-6
            assert checks["logits"]["value"] < 1e-10
            assert checks["weights"]["value"] == 0
    assert passed(validate(tmp_path / "stored.gguf", "--against", directory)) == EVERY_CHECK
    assert passed(validate(tmp_path / "Q4_0.gguf", "--against", tmp_path / "stored.gguf")) == EVERY_CHECK


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256, so that every type fits."""
    return build_olmoe(tmp_path_factory.mktemp("wide") / "model", hidden=256, ff=256, n_layer=1)


@pytest.mark.parametrize("name", QUANTIZABLE)
def test_types(wide: Path, tmp_path: Path, name: str) -> None:
    source = open_source(wide, CONVERTERS, pre="gpt-2")
    path = tmp_path / "out.gguf"
    write_quantized_gguf(source, in_type(source, BY_NAME[name]), path, flat_imatrix(source))
    checks = validate(path, "--against", wide)
    # gguf cannot dequantize the two for the reference, libggml can for the weights
    unknown = {"logits", "routing"} if name in ("Q1_0", "Q2_0") else set()
    assert passed(checks) == EVERY_CHECK - unknown


@pytest.mark.parametrize("form", ["stock", "groups"])
@pytest.mark.parametrize("kinds", [("Q2_K",), ("Q4_0",), ("Q3_K", "IQ4_NL")])
def test_padded_experts(tmp_path: Path, form: str, kinds: tuple[str, ...]) -> None:
    """With the source, and without: what all experts end in is meant."""
    directory = build_olmoe(tmp_path / "model", hidden=256, ff=160)
    plain = open_source(directory, CONVERTERS, pre="gpt-2")
    padding = expert_padding(plain)
    assert padding is not None
    assert (padding.width, padding.padded) == (160, 256)
    source = PaddedSource(plain, padding)
    types: dict[str, Any] = {
        t.name: BY_NAME[kinds[i % len(kinds)]] for i, t in enumerate(source.tensors) if t.projection is not None
    }
    if form == "groups":
        types = dict.fromkeys(types, GROUPS)
    write_quantized_gguf(source, types, tmp_path / "out.gguf")
    assert passed(validate(tmp_path / "out.gguf", "--against", directory)) == EVERY_CHECK
    alone = EVERY_CHECK - {"key-values", "tensors", "weights"}
    assert passed(validate(tmp_path / "out.gguf")) == alone


@pytest.mark.parametrize("form", ["stock", "groups"])
def test_split_files(tmp_path: Path, form: str) -> None:
    """Of which no one has all of the experts."""
    directory = build_olmoe(tmp_path / "model", ff=512)
    source = open_source(directory, CONVERTERS, pre="gpt-2")
    types: dict[str, Any] = {t.name: GROUPS if form == "groups" else t.type for t in source.tensors if t.projection}
    every = {t.name: types.get(t.name, t.type) for t in source.tensors}
    progress = SilentProgress()
    path, ggml = tmp_path / "out.gguf", load_ggml()
    emit(source, every, source.kvs, None, ggml, path, threads=1, progress=progress, split_bytes=600_000)
    first = min(tmp_path.glob("out-*.gguf"))
    assert len(read_parts(first)) > 3
    assert passed(validate(first, "--against", directory)) == EVERY_CHECK


def test_blocks_that_predict_further_tokens(tmp_path: Path) -> None:
    """A file that keeps them is compared with all that the checkpoint has."""
    directory = FAMILY["deepseek-v3"][0](tmp_path / "model", "bfloat16")
    source = open_source(directory, CONVERTERS, pre="gpt-2", keep_mtp=True)
    assert any(tensor.mtp for tensor in source.tensors)
    write_gguf(source, tmp_path / "out.gguf")
    assert passed(validate(tmp_path / "out.gguf", "--against", directory)) == EVERY_CHECK


@pytest.mark.parametrize("tokens", [2, 600])
def test_few_and_many_tokens(wide: Path, tmp_path: Path, evaluation_text: str, tokens: int) -> None:
    """More than llama.cpp computes in one graph; the text comes from a file."""
    path, text = tmp_path / "out.gguf", tmp_path / "text.txt"
    write_gguf(open_source(wide, CONVERTERS, pre="gpt-2"), path)
    text.write_text(evaluation_text[:20_000], encoding="utf-8")
    checks = validate(path, "--text", text, "--tokens", tokens)
    assert passed(checks) >= {"logits", "routing", "token by token"}
    assert f"in {tokens} of {tokens} choices" in checks["routing"]["message"] or tokens == 600
    assert checks["runs"]["looked_at"] == f"{tokens} tokens"


def test_experts_that_are_zeros_in_the_source(tmp_path: Path) -> None:
    """A pruned expert: an alarm, unless the source says that it is meant."""
    from safetensors.torch import load_file, save_file

    directory = build_olmoe(tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    for name in ("gate", "up", "down"):
        tensors[f"model.layers.1.mlp.experts.3.{name}_proj.weight"][:] = 0
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    source = open_source(directory, CONVERTERS, pre="gpt-2")
    write_gguf(source, tmp_path / "out.gguf")
    assert passed(validate(tmp_path / "out.gguf", "--against", directory)) == EVERY_CHECK
    done = CliRunner().invoke(cli, ["validate", str(tmp_path / "out.gguf"), "--no-run"])
    assert done.exit_code == 1
    assert "blk.1.ffn_up_exps.weight: zeros: all of expert 3;" in done.stderr


def test_measured_against_the_source(tmp_path: Path, evaluation_text: str) -> None:
    made = make(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text(evaluation_text[:3000], encoding="utf-8")
    write_gguf(open_source(made.source, CONVERTERS, pre="gpt-2"), tmp_path / "source.gguf")
    options = ("--against", tmp_path / "source.gguf", "--text", text, "--ctx", 64, "--chunks", 3)
    limits = ("--max-kld", 1, "--max-kld-99.9", 2, "--min-same-top", 0.5)
    checks = validate(made.file, *options, *limits)
    assert passed(checks) == EVERY_CHECK | {"plan", "evaluation", "prediction"}
    assert checks["prediction"]["value"] > 0
    done = CliRunner().invoke(
        cli,
        ["validate", str(made.file), *map(str, options), "--max-kld", "1e-9", "--min-same-top", "1", "--threads", "1"],
    )
    assert done.exit_code == 1
    assert len(done.stderr.splitlines()) == 2
    assert "at most 1e-09 was asked for (--max-kld)" in done.stderr
    assert "at least 100 % was asked for (--min-same-top)" in done.stderr


def test_no_framework_is_loaded(tmp_path: Path) -> None:
    """Against a checkpoint directory, in a process of its own."""
    made = make(tmp_path)
    code = f"""
import sys
from click.testing import CliRunner
from mopeq_edge.cli import cli
from mopeq_edge.emit import emit
from mopeq_edge.ggml.library import load_ggml
done = CliRunner().invoke(cli, ["validate", {str(made.file)!r}, "--against", {str(made.source)!r}, "--threads", "1"])
assert done.exit_code == 0, done.output
assert "logits           passed" in done.stdout and "weights          passed" in done.stdout, done.stdout
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
