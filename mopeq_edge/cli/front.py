"""``mopeq-edge serve FILE`` where llama-server sees pictures: we read them first, and it answers behind us."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import NoReturn

import click

from mopeq_edge.cli.image import THEIRS
from mopeq_edge.cli.server import NEEDED
from mopeq_edge.runtime.server_host import HOST, LOOPBACK, is_socket_file, option_value

PORT, DEFAULT_PORT = "--port", "8080"
_NO_PICTURES = "--no-mmproj"
_TLS = ("--ssl-key-file", "--ssl-cert-file")
_SAYS_AND_ENDS = ("-h", "--help", "--usage", "--version")
_VARIABLES = {
    HOST: "LLAMA_ARG_HOST",
    PORT: "LLAMA_ARG_PORT",
    "--mmproj": "LLAMA_ARG_MMPROJ",
    "--ssl-key-file": "LLAMA_ARG_SSL_KEY_FILE",
}


def sees(args: Sequence[str]) -> bool:
    """Whether llama-server, given ``args``, sees pictures."""
    names = {arg.partition("=")[0] for arg in args}
    if names & {_NO_PICTURES, *_SAYS_AND_ENDS}:
        return False
    return bool(names & set(THEIRS)) or _VARIABLES["--mmproj"] in os.environ


def in_the_way(args: Sequence[str]) -> str | None:
    """Why nothing of ours can stand before llama-server here, if that is so."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        return f"without {' and '.join(missing)} (pip install 'mopeq-edge[serve]')"
    if os.name != "posix":
        return "on Windows"
    if set(args) & set(_TLS) or _VARIABLES["--ssl-key-file"] in os.environ:
        return "with TLS, for which a proxy may stand before it"
    return f"with a socket file as {HOST}" if is_socket_file(_option(args, HOST, LOOPBACK)) else None


def serve_behind_us(command: Sequence[str], args: Sequence[str], file: object) -> NoReturn:
    """Start ``command`` with the user's ``args``; the process ends with it."""
    from mopeq_edge.serving.before import stand_before

    host, port = _option(args, HOST, LOOPBACK), _option(args, PORT, DEFAULT_PORT)
    if not (port.isascii() and port.isdigit()):
        raise click.UsageError(f"{PORT} {port}: expected a number")
    code = stand_before(
        [*command, *_without(args, HOST, PORT)],
        host,
        int(port),
        lambda address: click.echo(f"{file}: served at {address}, which reads pictures for llama-server", err=True),
    )
    sys.exit(code)


def _option(args: Sequence[str], name: str, default: str) -> str:
    return option_value(args, name) or os.environ.get(_VARIABLES[name]) or default


def _without(args: Sequence[str], *names: str) -> list[str]:
    """``args`` less the options ``names`` and their values."""
    values = {i + 1 for i, (name, _) in enumerate(pairwise(args)) if name in names}
    return [arg for i, arg in enumerate(args) if i not in values and arg not in names]
