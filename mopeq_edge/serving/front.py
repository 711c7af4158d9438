"""What stands before llama-server: every picture of a request is read here, everything else goes to it as it is."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import anyio.to_thread
import h11
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from mopeq_edge.serving.exchange import read_body, refused, while_connected
from mopeq_edge.serving.plain import has_media, read_json, with_plain_pictures
from mopeq_edge.serving.refusal import BUSY, UNAUTHORIZED, RefusalError
from mopeq_edge.serving.relay import Reply, ask

MOST_BODY = 128 * 2**20
"""Bytes of a request."""
MOST_PIXELS = 40_000_000
"""Of a picture."""
GUARDED = b"/props"
"""A route of llama-server that wants the key, if there is one."""


def make_front(socket: Path, most_pixels: int = MOST_PIXELS, most_body: int = MOST_BODY) -> ASGIApp:
    """The application before the llama-server that listens on ``socket``."""
    one_at_a_time = asyncio.Lock()

    async def plain(request: Request, body: bytes) -> bytes:
        value = await anyio.to_thread.run_sync(read_json, body) if body else None
        if not has_media(value):
            return body
        # nothing is decoded for a stranger
        async with ask(socket, "GET", GUARDED, request.headers.raw, b"") as reply:
            if reply.status == UNAUTHORIZED:
                return body
        async with one_at_a_time:
            return await anyio.to_thread.run_sync(with_plain_pictures, value, most_pixels)

    async def answer(request: Request, body: bytes, send: Send) -> None:
        started = False
        try:
            body = await plain(request, body)
            async with ask(socket, request.method, _target(request), request.headers.raw, body) as reply:
                started = True
                await _pass_on(reply, send)
        except RefusalError as error:
            await refused(error)(request.scope, request.receive, send)
        except RecursionError:
            await refused(RefusalError("the body is nested too deep"))(request.scope, request.receive, send)
        except (OSError, h11.ProtocolError):
            # once the answer has begun, its end in the middle says so
            if not started:
                busy = RefusalError("llama-server does not answer; try again later", status=BUSY)
                await refused(busy)(request.scope, request.receive, send)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        request = Request(scope, receive)
        with suppress(ClientDisconnect):
            try:
                body = await read_body(request, most_body)
            except RefusalError as error:
                await refused(error)(scope, receive, send)
            else:
                await while_connected(request, answer(request, body, send))

    return app


def _target(request: Request) -> bytes:
    query: bytes = request.scope["query_string"]
    path: bytes = request.scope["raw_path"]
    return path + (b"?" + query if query else b"")


async def _pass_on(reply: Reply, send: Send) -> None:
    await send({"type": "http.response.start", "status": reply.status, "headers": reply.headers})
    async for piece in reply.pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
