"""``--images``, and budgets that what sees pictures is part of: the commands on a test-size DeepSeek-VL2 and MolmoE."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mopeq_edge.calibrate.windows import PICTURE
from mopeq_edge.cli import cli
from mopeq_edge.errors import MopeqError, PlanError
from mopeq_edge.imatrix import read_imatrix
from mopeq_edge.pipeline_context import open_context
from mopeq_edge.pipeline_pictures import PicturesRequest, open_eyes, see_pictures
from mopeq_edge.progress import SilentProgress
from mopeq_edge.runtime.tools import run_tool
from tools.vision_language_configs import MOLMOE, TINY

from ..builders import EXAMPLE_TEXT
from ..converters.vision_language import build
from ..vision.pictures import picture

pytestmark = pytest.mark.runtime

COMMON = ("--threads", 1, "--json")
TEXT = ("--text", EXAMPLE_TEXT, "--chunks", 2, "--window", 64)
SPLIT = "modalities.safetensors"


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def found_of(*args: object) -> dict[str, Any]:
    done = invoke(*args, *COMMON)
    assert done.exit_code == 0, done.exception
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module", params=[TINY, MOLMOE])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(request.param, tmp_path_factory.mktemp("model") / "model", "bfloat16")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures, one of which has a caption, and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    picture(120, 50, seed=1).save(folder / "a.png")
    picture(40, 60, seed=2).save(folder / "b.JPG", format="JPEG")
    (folder / "b.txt").write_text("Waves of colour.\n")
    (folder / "notes.md").write_text("none")
    return folder


@pytest.fixture(scope="module")
def calibrated(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    work = tmp_path_factory.mktemp("work")
    return work, found_of("calibrate", model, "--images", photos, *TEXT, "--work-dir", work)


def test_the_split_is_said_and_kept(calibrated: tuple[Path, dict[str, Any]]) -> None:
    work, found = calibrated
    split = found["modalities"]
    assert (split["pictures"], split["vision_weight"]) == (2, 0.5)
    text, vision = split["tokens"]["text"], split["tokens"]["vision"]
    assert text + vision == found["tokens"]
    assert text > 128  # two windows, and prompts
    assert vision > 40
    for counts in split["counts"].values():
        assert sum(counts["text"]) / text == sum(counts["vision"]) / vision == round(sum(counts["text"]) / text)
    assert {SPLIT, "routing-by-kind.json", "imatrix.gguf", "gradient.gguf", "routing.safetensors"} == set(
        found["files"]
    )
    attention = read_imatrix(work / "imatrix.gguf").entries["blk.0.attn_output.weight"]
    assert attention.counts[0] == pytest.approx(found["tokens"])
    # what the vision side needs twice the room for is gone, what pictures became is not
    assert sorted(path.suffix for path in (work / "pictures").iterdir()) == [".safetensors"] * 2


def test_another_weight_measures_nothing_again(
    calibrated: tuple[Path, dict[str, Any]], model: Path, photos: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    shutil.copytree(calibrated[0], work)
    before = (work / SPLIT).stat().st_mtime_ns, (work / "imatrix.gguf").read_bytes()
    arguments = ("calibrate", model, "--images", photos, *TEXT, "--work-dir", work, "--vision-weight")
    found = found_of(*arguments, "tokens")
    assert found["modalities"]["vision_weight"] is None
    assert (work / SPLIT).stat().st_mtime_ns == before[0]
    assert (work / "imatrix.gguf").read_bytes() != before[1]
    whole = read_imatrix(work / "imatrix.gguf").entries["output.weight"]
    # text is predicted everywhere but in front of and inside pictures
    assert whole.counts[0] < found["tokens"]
    assert found_of(*arguments, "0.5")["modalities"] == calibrated[1]["modalities"]
    assert (work / "imatrix.gguf").read_bytes() == before[1]
    inspected = found_of_inspect(model, work)
    assert inspected["modalities"] == calibrated[1]["modalities"]


def found_of_inspect(model: Path, work: Path) -> dict[str, Any]:
    done = invoke("inspect", model, "--work-dir", work, "--json")
    assert done.exit_code == 0, done.exception
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_window_is_what_the_device_reads(model: Path, photos: Path, tmp_path: Path) -> None:
    """Token by token: prompt, as many places as the tower has embeddings, question, caption, end of text."""
    context = open_context(model, tmp_path, pre=None, threads=1, progress=SilentProgress())
    eyes = open_eyes(context, PicturesRequest(photos))
    with_caption = see_pictures(context, eyes, 64)[1]
    (other,) = see_pictures(context, open_eyes(context, PicturesRequest(photos, most=1)), 64)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    runs = np.split(with_caption.tokens, np.flatnonzero(np.diff(with_caption.tokens == PICTURE)) + 1)
    assert len(runs) == 3
    assert with_caption.embeddings is not None
    assert with_caption.embeddings().shape == (len(runs[1]), 64)
    kvs = context.source.kvs
    first, end = (kvs.get(f"tokenizer.ggml.{which}_token_id") for which in ("bos", "eos"))
    assert end is not None
    begins = [(first or end).value]
    if "tiles" in repr(eyes.tower):
        assert runs[0].tolist() == [*begins, *ids("<|User|>: ")]
        behind = ids("\nDescribe this image.\n\n<|Assistant|>:")
    else:
        assert runs[0].tolist() == begins
        behind = ids(" User: Describe this image. Assistant:")
    assert runs[2].tolist() == [*behind, *ids(" Waves of colour."), end.value]
    assert other.tokens[-len(behind) :].tolist() == behind


def test_a_run_that_was_killed_goes_on(
    calibrated: tuple[Path, dict[str, Any]], model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mopeq_edge.vision.tower import Tower

    arguments = ("calibrate", model, "--images", photos, *TEXT, "--work-dir", tmp_path, *COMMON)
    seen: list[str] = []
    embed = Tower.embed

    def stops(self: Tower, images: Any, names: Any = None) -> Any:
        if len(seen) == 1:
            raise RuntimeError("killed")
        seen.append(names[0])
        return embed(self, images, names)

    monkeypatch.setattr(Tower, "embed", stops)
    assert isinstance(invoke(*arguments).exception, RuntimeError)
    (left,) = (tmp_path / "pictures").glob("*.safetensors")
    before = left.stat().st_mtime_ns
    assert not (tmp_path / "imatrix.gguf").exists()

    def counts(self: Tower, images: Any, names: Any = None) -> Any:
        seen.append(names[0])
        return embed(self, images, names)

    monkeypatch.setattr(Tower, "embed", counts)
    done = invoke(*arguments)
    assert done.exit_code == 0, done.exception
    assert [Path(name).name for name in seen] == ["a.png", "b.JPG"]
    assert left.stat().st_mtime_ns == before
    for name in (SPLIT, "gradient.gguf"):
        assert (tmp_path / name).read_bytes() == (calibrated[0] / name).read_bytes()


def test_llama_quantize_takes_both_imatrices(
    calibrated: tuple[Path, dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    from converters import CONVERTERS
    from mopeq_edge.source.open import open_source

    from ..builders import write_gguf

    source = tmp_path / "source.gguf"
    write_gguf(open_source(model, CONVERTERS, pre="gpt-2"), source)
    for name in ("imatrix.gguf", "gradient.gguf"):
        out = tmp_path / f"{name}.q4_0"
        run_tool("llama-quantize", ["--imatrix", calibrated[0] / name, source, out, "Q4_0", "1"])
        assert out.stat().st_size > 1000


@pytest.mark.parametrize("layout", ["stock", "per-expert"])
def test_the_budget_is_for_everything_that_is_loaded(
    calibrated: tuple[Path, dict[str, Any]], model: Path, photos: Path, tmp_path: Path, layout: str
) -> None:
    work, out = tmp_path / "out.mopeq", tmp_path / "out.gguf"
    shutil.copytree(calibrated[0], work)
    given = ("--types", "Q4_0,Q8_0", "--layout", layout, "--work-dir", work)
    convert = ("convert", model, out, "--images", photos, *TEXT, *given, "--no-evaluate", "--no-report", "--target-gb")
    done = invoke(*convert, 1e-6, *COMMON)
    assert isinstance(done.exception, PlanError)
    assert not list(tmp_path.glob("out.*onnx*"))
    assert not out.exists()
    message = str(done.exception)
    least, whole = (int(message.split(mark)[1].split()[0].rstrip(",")) for mark in ("allow has ", "), "))
    names = ["out.vision.onnx", "out.vision.onnx.data"]
    beside = [int(message.split(f" bytes for {name}")[0].split()[-1]) for name in names]
    assert whole == least + sum(beside)
    # the exact minimum is enough, and with a byte less it is not
    assert invoke(*convert, (whole - 1) / 1e9, *COMMON).exit_code == 1
    found = found_of(*convert, whole / 1e9)
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("out.*") if path.is_file()}
    sizes.pop("out.report.html", None)  # no device loads it
    assert sizes == {"out.gguf": least, **dict(zip(names, beside, strict=True))}
    assert found["device_bytes"] == sum(sizes.values()) == whole
    assert found["vision"]["files"] == {name: sizes[name] for name in names}
    assert json.loads((work / "validation.json").read_text())["device_bytes"] == whole
    # plan, by itself, means the same; more files leave less
    target = ("--target-gb", (whole + 30_000) / 1e9)
    planned = found_of("plan", model, *given, *target)
    assert planned["budget_bytes"] == least + 30_000
    other = tmp_path / "other.bin"
    other.write_bytes(bytes(10_000))
    assert found_of("plan", model, *given, *target, "--beside", other)["budget_bytes"] == least + 20_000
    known = found_of("plan", model, *given, *target, "--beside", tmp_path / names[0])
    assert known["budget_bytes"] == least + 30_000
    assert found_of("plan", model, *given, *target, "--text-only")["budget_bytes"] == whole + 30_000
    # bits per weight are the GGUF's own
    assert found_of("plan", model, *given, "--target-bpw", 9)["file_bytes"] > least


def test_memory_of_both(calibrated: tuple[Path, dict[str, Any]], model: Path, photos: Path, tmp_path: Path) -> None:
    work, out = tmp_path / "out.mopeq", tmp_path / "out.gguf"
    shutil.copytree(calibrated[0], work)
    given = ("--images", photos, *TEXT, "--types", "Q8_0", "--work-dir", work, "--no-evaluate")
    fits = ("--fits", "500MB", "--ctx", 256, "--parallel", 1)
    found = found_of("convert", model, out, *given, *fits)["fits"]
    said = found_of("memory", out, "--ctx", 256, "--parallel", 1, "--memory", "500MB")
    assert said["prediction"]["tower_bytes"] == found["tower_bytes"] > 144_000_000
    assert said["prediction"]["needed_bytes"] == found["needed_bytes"] == max(found["tower_bytes"], found["text_bytes"])
    parts = {part["name"]: part["nbytes"] for part in said["prediction"]["parts"]}
    assert parts["Python, for pictures"] == 213_000_000
    done = invoke("convert", model, tmp_path / "b.gguf", *given, "--fits", "130MB", "--ctx", 256, *COMMON)
    assert "what sees pictures takes" in str(done.exception)
    assert "--text-only" in str(done.exception)


def test_bad_input(model: Path, photos: Path, tmp_path: Path, tiny_model: Path, bf16_gguf: Path) -> None:
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    for folder in (empty, broken):
        folder.mkdir()
    (empty / "a.txt").write_text("x")
    (broken / "c.png").write_bytes((photos / "a.png").read_bytes()[:300])
    cases: list[tuple[Path, tuple[object, ...], str]] = [
        (model, ("--images", empty), f"{empty}: expected pictures (.bmp"),
        (model, ("--images", tmp_path / "none"), "none: expected a folder of pictures, found none"),
        (model, ("--images", broken), f"{broken / 'c.png'}: cannot be decoded"),
        (model, ("--images", photos, "--trace"), "--images does not go with --trace"),
        (model, ("--images", photos, "--imatrix", photos / "a.png"), "--images does not go with --imatrix"),
        (model, ("--images", photos, "--vision-weight", "1.5"), "--vision-weight 1.5: expected a share from 0 to 1"),
        (model, ("--images", photos, "--vision-weight", "much"), "--vision-weight much: expected a share from 0 to 1"),
        (tiny_model, ("--images", photos, "--pre", "gpt-2"), "--images needs a model that sees pictures"),
        (bf16_gguf, ("--images", photos, "--no-fisher"), "--images needs the Hugging Face directory"),
    ]
    for source, given, message in cases:
        work = tmp_path / "work"
        done = invoke("calibrate", source, *given, *TEXT, "--work-dir", work, *COMMON)
        assert isinstance(done.exception, MopeqError), done.output
        assert message in str(done.exception)
        assert "\n" not in str(done.exception)
        assert not list(work.glob("*.gguf"))
