"""A model that was trained to see answers about pictures that it never saw, on the device, at 3 bits a weight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer

from mopeq_edge.cli import cli
from mopeq_edge.plan.candidates import FLOORS
from mopeq_edge.progress import SilentProgress
from mopeq_edge.vision.tower import Tower
from tools.compare_sight import file_bits
from tools.sight_accuracy import GREY, OTHER, SEEN, Case, cases, guessed, in_torch, on_device, shares, shown
from tools.sight_pictures import draw_scene

SIGHT = Path(__file__).parents[2] / "examples" / "tiny-sight"

pytestmark = pytest.mark.runtime

PICTURES = 36
BPW = 3.0
"""Of the GGUF as a whole. Half of its weights are no experts, so the default floors leave no room."""
FLOORS_OF_2 = [option for role in FLOORS for option in ("--floor", f"{role.value}=2")]


@pytest.fixture(scope="module")
def asked() -> Sequence[Case]:
    """Held-out pictures of every way to be cut, half of them of pairs that were held out too."""
    tokenizer = Tokenizer.from_file(str(SIGHT / "tokenizer.json"))
    return [case for case, _ in cases(tokenizer, PICTURES)]


def invoke(*args: object) -> str:
    done = CliRunner().invoke(cli, [str(arg) for arg in args], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def right(gguf: Path, which: str, asked: Sequence[Case]) -> float:
    tower = Tower(gguf.with_name("out.vision.onnx"), 1)
    answers = on_device(gguf, tower, shown(tower, asked, which), asked, 1, SilentProgress())
    return shares(answers)["all"]


@pytest.mark.parametrize(("layout", "vision_type"), [("stock", "F16"), ("per-expert", "INT8")])
def test_in_3_bits(layout: str, vision_type: str, asked: Sequence[Case], tmp_path: Path) -> None:
    """Nearly all answers are right, and as many as by guessing where the picture is grey or that of another question;
    ``run`` says what it sees in a file.
    """
    out = tmp_path / "out.gguf"
    given = ["--text", SIGHT / "calibration.txt", "--window", 64, "--chunks", 8, "--threads", 1, "--no-evaluate"]
    given += ["--images", SIGHT / "pictures", "--max-images", 4]
    given += [*FLOORS_OF_2, "--types", "k", "--layout", layout, "--vision-type", vision_type]
    invoke("convert", SIGHT, out, "--target-bpw", BPW, *given)
    assert file_bits(out) <= BPW
    assert right(out, SEEN, asked) > 0.85
    by_guess = guessed(asked)
    assert by_guess < 0.5
    for which in (GREY, OTHER):
        assert right(out, which, asked) < by_guess + 0.1
    scene = draw_scene(2_000_000_000, (3, 1))
    scene.image.save(tmp_path / "photo.png")
    said = invoke("run", out, "--image", tmp_path / "photo.png", "-p", "Describe this image.", "-t", 1)
    assert said.strip() == ", ".join(f"{thing.colour} {thing.kind}" for thing in scene.things)


def test_the_checkpoint_itself(asked: Sequence[Case]) -> None:
    """In torch, as it was trained."""
    tokenizer = Tokenizer.from_file(str(SIGHT / "tokenizer.json"))
    again, batches = zip(*cases(tokenizer, PICTURES), strict=True)
    assert [case.asked for case in again] == [case.asked for case in asked]
    assert shares(in_torch(SIGHT, tokenizer, batches, asked))["all"] > 0.85
