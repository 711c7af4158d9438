"""``mopeq-edge run`` and ``serve``: llama-cli and llama-server of the llama.cpp that runs the file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import click

from mopeq_edge import interrupts
from mopeq_edge.cli.console import FILE
from mopeq_edge.cli.image import THEIRS
from mopeq_edge.errors import RuntimeMissingError
from mopeq_edge.runtime.choose import BUILDS, Start, prepare_start
from mopeq_edge.runtime.server_host import host_arguments

_Command = Callable[..., None]


def _arguments(command: _Command) -> _Command:
    """``[--build B] FILE [ARGS]...``: what follows FILE is the tool's."""
    for decorate in (
        click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[ARGS]..."),
        click.argument("file", type=FILE),
        click.option(
            "--build",
            type=click.Choice(list(BUILDS)),
            default="auto",
            help="Which llama.cpp: auto takes the one that LLAMA_CPP_LIB_PATH names, else cuda if that is installed "
            "and nvidia-smi finds a GPU, else cpu.",
        ),
    ):
        command = decorate(command)
    return command


_SETTINGS = {"allow_interspersed_args": False}


@click.command(context_settings=_SETTINGS)
@_arguments
def run(build: str, file: Path, args: tuple[str, ...]) -> None:
    """Run FILE in llama-cli; ARGS go to it as they are.

    Per-expert files run in the llama.cpp that mopeq-edge patches and installs, all others in any. What follows
    FILE, also after a --, is llama-cli's: mopeq-edge run FILE -- --help shows its help.

    With --image PICTURE, which may be given again, pictures are seen through FILE's .vision.onnx (or --vision V), and
    llama.cpp's library answers -p QUESTION; then ARGS may also be -n, -c, -t, --temp, --top-k, --top-p, --seed, -ngl.
    Where mmproj-FILE lies beside instead, llama-cli sees with it; with -p QUESTION it ends behind the answer.

    \b
    Example:
      mopeq-edge run out.gguf -n 64 -p Hello
      mopeq-edge run out.gguf --image photo.jpg -p "What is this?"
    """
    from mopeq_edge.cli.image import mmproj_for, one_answer, run_with_images, wants_images, with_plain_images

    if wants_images(args):
        if (mmproj := mmproj_for(file, args)) is not None:
            # not llama-mtmd-cli, which ends before it has written all that it said
            given = ["--mmproj", str(mmproj), *one_answer(args), *with_plain_images(args)]
            start = _prepared("llama-cli", build, file)
            _become(start, [str(start.program), "-m", str(file), *given])
        if build != "auto":
            raise click.UsageError(f"--build {build}: with --image llama.cpp's library is used; set LLAMA_CPP_LIB_PATH")
        run_with_images(file, args)
        return
    start = _prepared("llama-cli", build, file)
    # click leaves a -- that follows FILE in place
    passed = args[1:] if args[:1] == ("--",) else args
    _become(start, [str(start.program), "-m", str(file), *passed])


@click.command(context_settings=_SETTINGS)
@click.option(
    "--engine",
    type=click.Choice(["auto", "library", "llama-server"]),
    default="auto",
    help="What answers: auto is llama-server, for which mopeq-edge reads pictures, but llama.cpp's library where "
    "FILE's .vision.onnx lies beside; llama-server is that alone.",
)
@_arguments
def serve(engine: str, build: str, file: Path, args: tuple[str, ...]) -> None:
    """Serve FILE with llama-server; ARGS go to it as they are.

    Per-expert files run in the llama.cpp that mopeq-edge patches and installs, all others in any. What follows
    FILE, also after a --, is llama-server's: mopeq-edge serve FILE -- --help shows its help. It listens on 127.0.0.1
    unless --host names another address; --api-key KEY is for what other machines reach. Where mmproj-FILE lies beside,
    it is given to llama-server too, and pictures of requests are read here first.

    Where FILE's .vision.onnx lies beside, mopeq-edge itself answers, by llama.cpp's library: chat with pictures, and
    completions with log-probabilities, in OpenAI's API (docs/serve.md). Then ARGS are --host, --port, --api-key, -c,
    -t, -ngl, --alias, --vision, --text-only, --keep-tower, --no-cache-prompt, --waiting, --max-body, --max-pixels.

    \b
    Example:
      mopeq-edge serve out.gguf --port 8080
    """
    from mopeq_edge.cli.server import serve_with_library, wants_library

    passed = args[1:] if args[:1] == ("--",) else args
    if engine == "library" or (engine == "auto" and wants_library(file, passed)):
        if build != "auto":
            raise click.UsageError(f"--build {build}: llama.cpp's library answers; set LLAMA_CPP_LIB_PATH")
        serve_with_library(file, passed)
        return
    _serve(build, file, passed, reads_pictures=engine == "auto")


def _serve(build: str, file: Path, args: Sequence[str], *, reads_pictures: bool) -> NoReturn:
    from mopeq_edge.cli.front import in_the_way, sees, serve_behind_us

    start = _prepared("llama-server", build, file)
    host, warning = host_arguments(args, os.environ)
    if warning is not None:
        click.echo(warning, err=True)
    added = mmproj_arguments(file, args)
    command = [str(start.program), "-m", str(file), *added]
    if reads_pictures and sees([*added, *args]):
        reason = in_the_way(args)
        if reason is None:
            with _starting(start):
                serve_behind_us(command, args, file)
        click.echo(
            f"warning: {file}: llama-server reads pictures itself {reason}: EXIF is not followed, and addresses are "
            "fetched",
            err=True,
        )
    _become(start, [*command, *host, *args])


def _prepared(name: str, build: str, file: Path) -> Start:
    start = prepare_start(name, file, build)
    click.echo(start.message, err=True)
    return start


def _become(start: Start, command: list[str]) -> NoReturn:
    with _starting(start):
        if os.name == "posix":
            _replace_this_process(command)
        sys.exit(_wait(command))


@contextmanager
def _starting(start: Start) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RuntimeMissingError(
            f"{start.program} could not start: {error.strerror}; run: mopeq-edge runtime install --force"
        ) from error


def mmproj_arguments(file: Path, given: Sequence[str]) -> list[str]:
    """llama-server's option for the mmproj beside ``file``, unless the user says which or none."""
    from mopeq_edge.vision.mmproj import mmproj_beside

    found = mmproj_beside(file)
    named = {arg.partition("=")[0] for arg in given} & {*THEIRS, "--no-mmproj"}
    if named or "LLAMA_ARG_MMPROJ" in os.environ or not found.is_file():
        return []
    click.echo(f"{file}: sees pictures through {found.name}", err=True)
    return ["--mmproj", str(found)]


def _replace_this_process(command: list[str]) -> NoReturn:
    """Signals, the terminal and the exit code are then the tool's own."""
    sys.stdout.flush()
    sys.stderr.flush()
    interrupts.uninstall()
    # Python ignores these for itself, and a program inherits what is ignored.
    for ignored in ("SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, ignored), signal.SIG_DFL)
    os.execv(command[0], command)


def _wait(command: list[str]) -> int:
    interrupts.uninstall()
    with subprocess.Popen(command) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                # The console has told the tool too; it decides.
                continue
