"""``mopeq-edge run FILE --image PICTURE``: pictures through our own tower, tokens through llama.cpp's library."""

from __future__ import annotations

import atexit
import csv
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mopeq_edge.cli.console import FILE, available_threads

_IMAGE, _VISION = "--image", "--vision"
THEIRS = ("--mmproj", "-mm", "--mmproj-url", "-mmu", "-hf", "-hfr", "--hf-repo")
"""Options of llama.cpp's tools that say what sees pictures."""


def wants_images(args: Sequence[str]) -> bool:
    """Whether arguments of ``run`` ask for pictures, and not for llama-cli's own way to see them."""
    names = [arg.partition("=")[0] for arg in args]
    return any(name in (_IMAGE, _VISION) for name in names) and not any(name in THEIRS for name in names)


def mmproj_for(file: Path, args: Sequence[str]) -> Path | None:
    """What llama.cpp sees pictures with for ``file``: the mmproj beside it, unless there is a vision file of ours."""
    from mopeq_edge.vision.description import vision_beside
    from mopeq_edge.vision.mmproj import mmproj_beside

    own = any(arg.partition("=")[0] == _VISION for arg in args) or vision_beside(file).is_file()
    found = mmproj_beside(file)
    return found if not own and found.is_file() else None


def one_answer(args: Sequence[str]) -> list[str]:
    """llama-cli's option to end behind the answer, where there is a question and no wish to go on."""
    names = {arg.partition("=")[0] for arg in args}
    return ["--single-turn"] if names & {"-p", "--prompt"} and not names & {"-cnv", "--conversation"} else []


def with_plain_images(args: Sequence[str]) -> list[str]:
    """``args`` for llama-cli with every picture read here: as a person sees it, or refused before a model is loaded.

    llama-cli's own reader knows no EXIF and takes half a picture for a whole one.
    """
    from mopeq_edge.vision.image_file import encode_png, open_image

    found = []
    left = iter(args)
    for arg in left:
        name, equals, value = arg.partition("=")
        if name != _IMAGE:
            found.append(arg)
            continue
        value = value if equals else next(left, "")
        # as llama-cli takes several, but a file's name may have a comma
        paths = [value] if Path(value).is_file() else next(csv.reader([value]), [value])
        for path in paths:
            found += [_IMAGE, _handed_over(encode_png(open_image(Path(path))))]
    return found


def _handed_over(content: bytes) -> str:
    """The path of a file that is gone when the program that this process becomes, or starts, has ended."""
    if os.name == "posix":
        with tempfile.TemporaryFile() as file:
            file.write(content)
            file.flush()
            number = os.dup(file.fileno())
        os.lseek(number, 0, os.SEEK_SET)
        os.set_inheritable(number, True)
        return f"/dev/fd/{number}"
    with tempfile.NamedTemporaryFile(suffix=".png", delete=False) as named:
        named.write(content)
    atexit.register(os.unlink, named.name)
    return named.name


@click.command(name="run", add_help_option=False)
@click.option("--image", "images", type=FILE, multiple=True, help="A picture; may be given again.")
@click.option("--vision", type=FILE, help="Its vision file (default: FILE's name with .vision.onnx).")
@click.option("-p", "--prompt", required=True, help="The question.")
@click.option("-n", "--predict", "--n-predict", type=click.IntRange(min=1), default=256, help="Most tokens of answer.")
@click.option("-c", "--ctx-size", type=click.IntRange(min=0), default=0, help="Tokens of context (default: as needed).")
@click.option("-t", "--threads", type=click.IntRange(min=1), default=available_threads, help="CPU threads.")
@click.option("--temp", "--temperature", type=click.FloatRange(min=0), default=0.0, help="0: the likeliest token.")
@click.option("--top-k", type=click.IntRange(min=0), default=40)
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=0.95)
@click.option("-s", "--seed", type=click.IntRange(min=0), default=0)
@click.option("-ngl", "--n-gpu-layers", type=click.IntRange(min=0), default=0, help="Layers on a GPU.")
@click.pass_obj
def with_images(file: Path, /, **given: Any) -> None:
    """Answer a question about pictures."""
    from mopeq_edge.vision.answer import Question, answer
    from mopeq_edge.vision.description import vision_beside
    from mopeq_edge.vision.sample import Sampling

    if not given["images"]:
        raise click.UsageError("--vision: expected a picture; give --image FILE too")
    question = Question(
        gguf=file,
        vision=given["vision"] or vision_beside(file),
        images=given["images"],
        text=given["prompt"],
        n_predict=given["predict"],
        n_ctx=given["ctx_size"],
        sampling=Sampling(given["temp"], given["top_k"], given["top_p"], given["seed"]),
        threads=given["threads"],
        n_gpu_layers=given["n_gpu_layers"],
    )
    for piece in answer(question):
        click.echo(piece, nl=False)
    click.echo()


def run_with_images(file: Path, args: Sequence[str]) -> None:
    """Run FILE with the arguments ``args`` behind it."""
    with_images.main(list(args), prog_name="mopeq-edge run FILE", obj=file, standalone_mode=False)
