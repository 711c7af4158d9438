"""One request and its client: the body comes in time and within its limit, the client may go away, or is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse

from mopeq_edge.serving.refusal import BUSY, TOO_LARGE, UNAUTHORIZED, RefusalError

BODY_SECONDS = 60.0
"""For a client to send its request."""


async def read_body(request: Request, most: int) -> bytes:
    """All of it. Raises :class:`RefusalError` for more than ``most`` bytes, or if they do not come in time."""
    too_large = RefusalError(f"the body has more than {most} bytes", status=TOO_LARGE)
    length = request.headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length) > most:
        raise too_large
    found = bytearray()
    try:
        with anyio.fail_after(BODY_SECONDS):
            async for piece in request.stream():
                found += piece
                if len(found) > most:
                    raise too_large
    except TimeoutError:
        raise RefusalError(f"the body did not come in {BODY_SECONDS:g} seconds", status=408) from None
    return bytes(found)


async def while_connected(request: Request, work: Awaitable[Any]) -> Any:
    """What ``work`` gives, or None if the client went away before; then it is cancelled."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for pending in (task, gone):
            pending.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def refused(error: RefusalError) -> JSONResponse:
    """What the client gets."""
    headers = {"Retry-After": "1"} if error.status == BUSY else {}
    if error.status == UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.as_dict(), error.status, headers)
