"""Every bad input: one line on stderr that says what to do, exit code 1, no file left, no input changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mopeq_edge.cli import main

from ..builders import build_olmoe, edit_json, write_gguf

PROGRAM = [sys.executable, "-c", "from mopeq_edge.cli import main; main()"]
BIG = ("--target-gb", 1)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OLMoE with a text beside it. Do not change it."""
    directory = build_olmoe(tmp_path_factory.mktemp("random") / "model")
    (directory / "calibration.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    return directory


@pytest.fixture(scope="session")
def sharded_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_olmoe(tmp_path_factory.mktemp("sharded") / "model", n_layer=1, n_shards=3)


@pytest.fixture
def model(random_model: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(random_model, tmp_path / "in" / "model"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the result would go, in a folder of its own."""
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "out.gguf"


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file below ``folder``; links by their target."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def the_line(stderr: str) -> str:
    """The one error line of a run that said nothing else but notes."""
    lines = [line for line in stderr.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("mopeq-edge: error: ")
    return lines[0]


Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs the command line here and returns its error; nothing but the work directory may have changed."""

    def run(command: str, *args: object) -> str:
        (tmp_path / "cwd").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "cwd")
        inputs = [Path(str(arg)) for arg in args if isinstance(arg, Path) and arg.exists()]
        before = {
            folder: contents(folder)
            for folder in {path if path.is_dir() else path.parent for path in inputs} | {tmp_path / "results"}
            if folder.is_dir()
        }
        # named, so that no llama.cpp is needed to recognise it; a GGUF names its own
        pre = ["--pre", "gpt-2"] if Path(str(args[0])).is_dir() else []
        monkeypatch.setattr(sys, "argv", ["mopeq-edge", command, *map(str, args), "--work-dir", "work", *pre])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        said = capfd.readouterr()
        assert caught.value.code == 1
        assert said.out == ""
        for folder, files in before.items():
            assert contents(folder) == files
        return the_line(said.err)

    return run


def test_missing_directory_in_a_process_of_its_own(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    done = subprocess.run(
        [*PROGRAM, "convert", str(gone), "out.gguf", "--target-gb", "4"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"{gone}: does not exist; give the directory of a Hugging Face checkpoint or a GGUF" in the_line(done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_dense_model(tmp_path: Path, out: Path, refused: Refused) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **size)).save_pretrained(tmp_path / "in")
    said = refused("convert", tmp_path / "in", out, *BIG)
    assert "a dense model (LlamaForCausalLM, no experts in config.json)" in said
    assert "Mixture-of-Experts" in said


@pytest.mark.runtime
def test_unknown_architecture(model: Path, out: Path, refused: Refused) -> None:
    """llama.cpp's script is asked, and does not know it either."""
    edit_json(model / "config.json", architectures=["NewMoeForCausalLM"])
    said = refused("convert", model, out, *BIG)
    assert f"{model}: llama.cpp's convert_hf_to_gguf.py failed with exit code 1: " in said
    assert "Model NewMoeForCausalLM is not supported; give a BF16 GGUF of it instead" in said


def test_missing_shard(sharded_model: Path, tmp_path: Path, out: Path, refused: Refused) -> None:
    model = Path(shutil.copytree(sharded_model, tmp_path / "in"))
    (model / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in refused("convert", model, out, *BIG)


def test_tensor_absent_from_the_index(sharded_model: Path, tmp_path: Path, out: Path, refused: Refused) -> None:
    model = Path(shutil.copytree(sharded_model, tmp_path / "in"))
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    index = model / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map[name]
    edit_json(index, weight_map=weight_map)
    assert name in refused("convert", model, out, *BIG)


@pytest.mark.parametrize("keep", [4, 1000, -1])
def test_truncated_safetensors(model: Path, out: Path, refused: Refused, keep: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in refused("convert", model, out, *BIG)


@pytest.mark.parametrize("keep", [10, 5000, -1])
def test_truncated_gguf(bf16_gguf: Path, tmp_path: Path, out: Path, refused: Refused, keep: int) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "model.gguf"
    path.write_bytes(bf16_gguf.read_bytes()[:keep])
    assert str(path) in refused("convert", path, out, *BIG)


def test_no_text(model: Path, bf16_gguf: Path, out: Path, refused: Refused) -> None:
    (model / "calibration.txt").unlink()
    for args in ((model, out, *BIG), (model, out, *BIG, "--no-evaluate"), (bf16_gguf, out, *BIG, "--no-evaluate")):
        assert "--text FILE" in refused("convert", *args)
    assert "no text to calibrate on; give --text FILE or --imatrix FILE" in refused("calibrate", model)


def test_text_that_cannot_be_read(model: Path, tmp_path: Path, out: Path, refused: Refused) -> None:
    text = tmp_path / "t" / "text"
    text.parent.mkdir()
    assert f"{text}: cannot be read" in refused("convert", model, out, *BIG, "--text", text)
    text.write_bytes(b"abc\xff")
    assert f"{text}: not UTF-8 (at byte 3)" in refused("convert", model, out, *BIG, "--text", text)


@pytest.mark.runtime
def test_text_too_short_for_a_window(model: Path, out: Path, refused: Refused) -> None:
    (model / "calibration.txt").write_text("Too short.\n")
    assert "too few for one window of 512" in refused("convert", model, out, *BIG, "--no-evaluate")


def test_impossible_budget_states_the_minimum(
    model: Path, out: Path, refused: Refused, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refused("convert", model, out, "--target-gb", 0.0001)
    monkeypatch.setattr(sys, "argv", ["mopeq-edge", "inspect", str(model), "--json", "--pre", "gpt-2"])
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    smallest = json.loads(capfd.readouterr().out)["smallest_bytes"]
    assert f"budget of 0.0001 GB (100000 bytes): the smallest file these types and floors allow has {smallest} " in said
    # nothing had been computed yet
    assert not (Path("work") / "stages.json").exists()


@pytest.mark.parametrize(
    ("args", "found"),
    [
        (("--target-gb", 4, "--target-bpw", 3), "found [4.0, 3.0]"),
        (("--target-gb", 4, "--target-gib", 4), "found [4.0, 4.0]"),
        ((), "found none"),
        (("--target-gb", -1), "found [-1.0]"),
        (("--target-bpw", "nan"), "found [nan]"),
    ],
)
def test_exactly_one_budget(model: Path, out: Path, refused: Refused, args: tuple[object, ...], found: str) -> None:
    said = refused("convert", model, out, *args)
    assert "give exactly one of --target-gb (1e9 bytes), --target-gib (2^30 bytes), --target-bpw and --fits" in said
    assert said.endswith(found)


@pytest.mark.parametrize("link", ["same", "hard", "symbolic"])
def test_output_over_the_input(
    bf16_gguf: Path, model: Path, tmp_path: Path, out: Path, refused: Refused, link: str
) -> None:
    """A GGUF under its own name and under two more, and the same for a shard of a checkpoint."""
    source = tmp_path / "in" / "model.gguf"
    shutil.copy(bf16_gguf, source)
    text = ("--text", model / "calibration.txt")
    for given, file in ((source, source), (model, model / "model.safetensors")):
        if link == "hard":
            os.link(file, out)
        elif link == "symbolic":
            out.symlink_to(file)
        target = file if link == "same" else out
        for force in ((), ("--force",)):
            said = refused("convert", given, target, *BIG, *text, *force)
            assert f"{target}: is the input {file} (the same file); choose another name for the output" in said
        out.unlink(missing_ok=True)


def test_output_that_exists(model: Path, out: Path, refused: Refused) -> None:
    out.write_text("precious")
    said = refused("convert", model, out, *BIG)
    assert f"{out}: exists already; choose another name or give --force to replace it" in said
    assert "is a directory" in refused("convert", model, out.parent, *BIG, "--force")


def test_what_a_gguf_cannot_give(bf16_gguf: Path, model: Path, out: Path, refused: Refused) -> None:
    text = ("--text", model / "calibration.txt")
    for command, *args in (
        ("convert", bf16_gguf, out, *BIG, *text, "--fisher"),
        ("calibrate", bf16_gguf, *text, "--fisher"),
    ):
        assert "gradients need the Hugging Face directory" in refused(str(command), *args)


def test_stages_out_of_order(model: Path, out: Path, refused: Refused) -> None:
    assert "run mopeq-edge calibrate first" in refused("sensitivity", model)
    assert "run mopeq-edge sensitivity first" in refused("plan", model, *BIG)
    assert "plan.json" in refused("emit", model, out)


def test_options_that_name_nothing(model: Path, out: Path, refused: Refused) -> None:
    assert "unknown GGUF type; known: " in refused("convert", model, out, *BIG, "--types", "Q9_K")
    assert "with ROLE one of expert, " in refused("convert", model, out, *BIG, "--floor", "experts=Q4_K")
    (model / "x").write_text("GGUF no more")
    assert str(model / "x") in refused("convert", model, out, *BIG, "--imatrix", model / "x", "--no-evaluate")


@pytest.mark.runtime
@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_a_weight_that_is_no_number(
    model: Path, out: Path, refused: Refused, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from converters import CONVERTERS
    from mopeq_edge.source import huggingface
    from mopeq_edge.source.huggingface import open_huggingface

    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.experts.5.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    source, text = model, ("--text", model / "calibration.txt", "--window", 64)
    if kind == "gguf":
        source = model.parent / "model.gguf"
        with monkeypatch.context() as patch:
            patch.setattr(huggingface, "require_finite", lambda values, *_: values)
            write_gguf(open_huggingface(model, CONVERTERS, pre="gpt-2"), source)
    said = refused("convert", source, out, *BIG, *text, "--no-evaluate")
    assert f"{source}: tensor 'blk.1.ffn_up_exps.weight', expert 5: 1 of 2048 weights are NaN or infinite" in said


@pytest.mark.runtime
def test_disk_full(random_model: Path, tmp_path: Path, out: Path) -> None:
    """No file may grow beyond 400,000 bytes in this process: the artifacts fit, the output does not."""
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (400000, 400000)); "
    args = ["convert", str(random_model), str(out), "--target-gb", "1", "--window", "64", "--chunks", "2"]
    args += ["--no-evaluate", "--no-fisher", "--sensitivity", "imatrix", "--work-dir", str(tmp_path / "work")]
    done = subprocess.run([PROGRAM[0], "-c", code + PROGRAM[2], *args], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    said = the_line(done.stderr)
    assert f"{out}: cannot be written (File too large)" in said
    assert "free space or choose another place" in said
    assert list(out.parent.iterdir()) == []
    assert not [path for path in (tmp_path / "work").iterdir() if path.name.endswith(".tmp")]
