"""Listen until the user ends it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp

from mopeq_edge import interrupts
from mopeq_edge.errors import MopeqError
from mopeq_edge.serving.app import Limits, make_app
from mopeq_edge.serving.engine import Files
from mopeq_edge.serving.worker import Worker

MOST_CONNECTIONS = 256
GRACE_SECONDS = 1
"""For answers that are under way when the server is told to end."""


@dataclass(frozen=True)
class Listening:
    """Where, and to whom. ``port`` 0: one that is free."""

    host: str
    port: int
    model: str
    key: str | None
    limits: Limits


def listen(files: Files, where: Listening, ready: Callable[[str], None]) -> None:
    """Load ``files`` and answer until Ctrl-C or SIGTERM, which end the process. ``ready`` is told the address.

    Raises :class:`MopeqError` for files that cannot be loaded and an address that cannot be had.
    """
    bound = bind(where.host, where.port)
    with bound:
        worker = Worker(files)
        app = make_app(worker, where.model, where.key, where.limits)
        # from here on the signals are uvicorn's, which ends in order and raises them again
        interrupts.uninstall()
        ready(address(bound))
        number = signal.SIGINT
        try:
            server_of(app).run(sockets=[bound])
        except KeyboardInterrupt:
            pass
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
        # the model's thread may be in the middle of a batch, and nothing of it needs saving
        os._exit(128 + number)


def server_of(app: ASGIApp) -> uvicorn.Server:
    """What answers with ``app``, quietly."""
    config = uvicorn.Config(
        app,
        access_log=False,
        log_level=logging.CRITICAL,
        lifespan="off",
        ws="none",
        http="h11",
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return uvicorn.Server(config)


def bind(host: str, port: int) -> socket.socket:
    """Listening there. Raises :class:`MopeqError` for an address that cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host.strip("[]"), port), family=family, backlog=MOST_CONNECTIONS)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MopeqError(f"--host {host} --port {port}: cannot listen there ({reason}); choose another") from None


def address(bound: socket.socket) -> str:
    """Its URL."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
