"""``mopeq-edge serve FILE`` where llama.cpp's library answers: OpenAI's API with pictures through our own tower."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from mopeq_edge.cli.console import FILE, available_threads
from mopeq_edge.cli.image import THEIRS
from mopeq_edge.errors import ExtraMissingError

NEEDED = ("starlette", "uvicorn")
_MIB = 2**20


def wants_library(file: Path, args: Sequence[str]) -> bool:
    """Whether ``file`` has pictures that llama-server cannot see."""
    from mopeq_edge.vision.description import vision_beside

    names = {arg.partition("=")[0] for arg in args}
    return not names & set(THEIRS) and ("--vision" in names or vision_beside(file).is_file())


@click.command(name="serve", add_help_option=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: one that is free.")
@click.option("--api-key", envvar="LLAMA_API_KEY", help="What clients must send as a bearer token.")
@click.option("-a", "--alias", help="The model's name to clients (default: FILE's).")
@click.option("--vision", type=FILE, help="FILE's vision file (default: FILE's name with .vision.onnx).")
@click.option("--text-only", is_flag=True, help="No pictures and no chat: completions alone.")
@click.option("-c", "--ctx-size", type=click.IntRange(min=0), default=0, help="Tokens of context.")
@click.option("-t", "--threads", type=click.IntRange(min=1), default=available_threads, help="CPU threads.")
@click.option("-ngl", "--n-gpu-layers", type=click.IntRange(min=0), default=0, help="Layers on a GPU.")
@click.option("--keep-tower", is_flag=True, help="Keep the vision file open between pictures.")
@click.option("--cache-prompt/--no-cache-prompt", default=True, help="Go on from what the last request began with.")
@click.option("--waiting", type=click.IntRange(min=1), default=16, show_default=True, help="Most requests at once.")
@click.option("--max-body", type=click.IntRange(min=1), default=32, show_default=True, help="MiB of a request.")
@click.option("--max-pixels", type=click.IntRange(min=1), default=40_000_000, show_default=True, help="Of a picture.")
@click.pass_obj
def _serve(file: Path, /, **given: Any) -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ExtraMissingError(
            f"{file}: serving it needs {' and '.join(missing)}, not installed; run: pip install 'mopeq-edge[serve]'"
        )
    from mopeq_edge.runtime.server_host import host_warning
    from mopeq_edge.serving.app import Limits
    from mopeq_edge.serving.engine import Files
    from mopeq_edge.serving.listen import Listening, listen
    from mopeq_edge.vision.description import vision_beside

    vision = given["vision"] or vision_beside(file)
    # of a text model there is none
    seen = None if given["text_only"] or not (given["vision"] or vision.is_file()) else vision
    files = Files(
        gguf=file,
        vision=seen,
        n_ctx=given["ctx_size"],
        threads=given["threads"],
        n_gpu_layers=given["n_gpu_layers"],
        keep_tower=given["keep_tower"],
        keep_prefix=given["cache_prompt"],
        most_pixels=given["max_pixels"],
    )
    where = Listening(
        host=given["host"],
        port=given["port"],
        model=given["alias"] or file.name.removesuffix(".gguf"),
        key=given["api_key"] or None,
        limits=Limits(given["max_body"] * _MIB, given["waiting"]),
    )
    warning = host_warning(where.host, has_key=where.key is not None)
    if warning is not None:
        click.echo(warning, err=True)
    eyes = "without pictures" if seen is None else f"with pictures through {seen.name}"
    listen(files, where, lambda address: click.echo(f"{file}: served at {address}/v1 {eyes}", err=True))


def serve_with_library(file: Path, args: Sequence[str]) -> None:
    """Serve FILE with the arguments ``args`` behind it."""
    _serve.main(list(args), prog_name="mopeq-edge serve FILE", obj=file, standalone_mode=False)
