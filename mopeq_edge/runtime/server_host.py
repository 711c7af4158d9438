"""Which addresses llama-server listens on: this machine's alone, unless the user says otherwise."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from itertools import pairwise

LOOPBACK = "127.0.0.1"
HOST, _VARIABLE = "--host", "LLAMA_ARG_HOST"


def host_arguments(given: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], str | None]:
    """(what to add to the arguments ``given`` to llama-server, a warning or None).

    Without a host of the user's it is :data:`LOOPBACK`, explicitly: llama-server's default may change.
    """
    host = option_value(given, HOST)
    host = host if host is not None else environment.get(_VARIABLE)
    if host is None:
        return [HOST, LOOPBACK], None
    return [], host_warning(host, has_key=bool({"--api-key", "--api-key-file"} & set(given)))


def option_value(given: Sequence[str], option: str) -> str | None:
    """The value of ``option`` in ``given``, the last if there are several."""
    return next((value for name, value in reversed(list(pairwise(given))) if name == option), None)


def is_socket_file(host: str) -> bool:
    """Whether llama-server takes ``host`` for the path of a socket."""
    return host.endswith(".sock")


def host_warning(host: str, *, has_key: bool) -> str | None:
    """What to know of a server on ``host`` that other machines reach."""
    if is_local(host):
        return None
    key = "" if has_key else ", and without --api-key they need no key"
    return f"warning: {HOST} {host}: other machines can reach the server{key}"


def is_local(host: str) -> bool:
    """Whether only this machine reaches ``host``: a loopback address, localhost, or a socket file."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or is_socket_file(host)
