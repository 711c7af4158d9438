"""``convert`` writes what sees pictures, and ``run --image`` uses it: the whole way on a test-size DeepSeek-VL2."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mopeq_edge.cli import cli
from mopeq_edge.cli.image import wants_images
from mopeq_edge.errors import MopeqError, OutputError
from mopeq_edge.vision.answer import Question, answer
from mopeq_edge.vision.description import vision_beside
from mopeq_edge.vision.session import VisionSession
from tools.vision_language_configs import TINY

from ..builders import EXAMPLE_TEXT
from ..converters.vision_language import build
from ..vision.pictures import picture

pytestmark = pytest.mark.runtime


@dataclass(frozen=True)
class Converted:
    model: Path
    out: Path
    result: dict[str, Any]

    def again(self, *options: object, out: Path | None = None) -> Result:
        return convert(self.model, out or self.out, self.out.parent / "work", *options)


def convert(model: Path, out: Path, work: Path, *options: object) -> Result:
    given = ["--work-dir", work, "--text", EXAMPLE_TEXT, "--chunks", 2, "--window", 64, "--threads", 1, "--no-evaluate"]
    args = [
        "convert",
        model,
        out,
        "--target-bpw",
        9,
        "--no-report",
        *given,
        "--no-fisher",
        "--types",
        "Q8_0",
        "--json",
        *options,
    ]
    return CliRunner().invoke(cli, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    folder = tmp_path_factory.mktemp("vision")
    model = build(TINY, folder / "model", "bfloat16")
    done = convert(model, folder / "out.gguf", folder / "work")
    assert done.exit_code == 0, done.output
    return Converted(model, folder / "out.gguf", json.loads(done.stdout))


def test_both_files_are_there_and_counted(converted: Converted) -> None:
    graph = converted.out.with_name("out.vision.onnx")
    assert vision_beside(converted.out) == graph
    sizes = [path.stat().st_size for path in (graph, graph.with_name("out.vision.onnx.data"))]
    found = converted.result["vision"]
    assert (found["file_bytes"], found["output"], found["type"]) == (sum(sizes), graph.name, "F16")
    assert 0 < found["relative_error"] < 2e-3
    # the budget is the GGUF's
    assert converted.result["file_bytes"] == converted.out.stat().st_size
    assert VisionSession(graph, 1).describe().weights_bytes == sizes[1]


def test_the_same_again_is_kept_and_another_type_needs_force(converted: Converted, tmp_path: Path) -> None:
    for path in converted.out.parent.glob("out.*"):
        if path.is_file():
            shutil.copy(path, tmp_path / path.name)
    out = tmp_path / "out.gguf"
    out.unlink()
    graph = tmp_path / "out.vision.onnx"
    before = graph.stat().st_mtime_ns
    assert converted.again(out=out).exit_code == 0
    assert graph.stat().st_mtime_ns == before
    out.unlink()
    refused = converted.again("--vision-type", "INT8", out=out)
    assert isinstance(refused.exception, OutputError)
    assert str(refused.exception).startswith(f"{graph}: exists already; choose another name or give --force")
    assert not out.exists()
    done = converted.again("--vision-type", "INT8", "--force", out=out)
    assert json.loads(done.stdout)["vision"]["type"] == "INT8"
    assert VisionSession(graph, 1).describe().weights_type == "INT8"


def test_text_only(converted: Converted, tmp_path: Path) -> None:
    done = converted.again("--text-only", out=tmp_path / "text.gguf")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["vision"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["text.gguf"]


def test_a_vision_side_that_is_not_known_stops_before_the_work(converted: Converted, tmp_path: Path) -> None:
    copied = tmp_path / "model"
    shutil.copytree(converted.model, copied)
    config = json.loads((copied / "config.json").read_text())
    config["tile_tag"] = "1D"
    (copied / "config.json").write_text(json.dumps(config))
    done = convert(copied, tmp_path / "out.gguf", tmp_path / "work")
    assert isinstance(done.exception, MopeqError)
    assert "tile_tag '1D', expected '2D'" in str(done.exception)
    assert "--text-only" in str(done.exception)
    assert not list(tmp_path.glob("out*"))
    assert convert(copied, tmp_path / "out.gguf", tmp_path / "work", "--text-only").exit_code == 0


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, ["run", *map(str, args)])


def test_run_answers(converted: Converted, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    picture(100, 60).save(photo)
    graph = vision_beside(converted.out)
    expected = "".join(answer(Question(converted.out, graph, (photo,), "What is this?", n_predict=5)))
    done = run(converted.out, "--image", photo, "-p", "What is this?", "-n", 5, "-t", 1)
    assert (done.exit_code, done.stdout) == (0, expected + "\n")
    moved = tmp_path / "eyes.vision.onnx"
    for ending in ("", ".data"):
        shutil.copy(f"{graph}{ending}", tmp_path / f"out.vision.onnx{ending}")
    other = run(
        converted.out, f"--image={photo}", "--vision", tmp_path / "out.vision.onnx", "-p", "What is this?", "-n", 5
    )
    assert other.stdout == done.stdout
    refused = run(converted.out, "--image", photo, "--vision", moved, "-p", "What?")
    assert str(refused.exception) == (
        f"{moved}: does not exist; expected the vision file that mopeq-edge convert wrote"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--image", "x.png"], "Missing option '-p'"),
        (["--image", "x.png", "-p", "x", "--mirostat", "2"], "No such option '--mirostat'"),
        (["--vision", "x.onnx", "-p", "x"], "--vision: expected a picture; give --image FILE too"),
        (["--image", "x.png", "-p", "x", "-n", "0"], "Invalid value for '-n'"),
    ],
)
def test_wrong_use(args: list[str], message: str, converted: Converted) -> None:
    done = run(converted.out, *args)
    assert done.exit_code == 2
    assert message in done.output
    assert "--build cuda: with --image" in run("--build", "cuda", converted.out, "--image", "x.png").output


def test_whose_pictures() -> None:
    assert wants_images(["-p", "x", "--image", "a.png"])
    assert wants_images(["--image=a.png"])
    assert not wants_images(["-p", "--images", "-n", "3"])
    assert not wants_images(["--mmproj", "m.gguf", "--image", "a.png"])


def test_a_split_file_has_one_vision_file() -> None:
    assert vision_beside(Path("d/out-00001-of-00003.gguf")) == Path("d/out.vision.onnx")
