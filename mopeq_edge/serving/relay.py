"""A request to a server on this machine and its answer, piece by piece as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import h11

Headers = Sequence[tuple[bytes, bytes]]

PIECE = 1 << 16
"""Bytes that are read at once."""
_OF_A_CONNECTION = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect")
)


@dataclass(frozen=True)
class Reply:
    """The head of an answer, and its body as it comes."""

    status: int
    headers: list[tuple[bytes, bytes]]
    pieces: AsyncIterator[bytes]


@asynccontextmanager
async def ask(socket: Path, method: str, target: bytes, headers: Headers, body: bytes) -> AsyncIterator[Reply]:
    """The answer of the server that listens on ``socket``; the connection ends with the block.

    Raises :class:`OSError` and :class:`h11.ProtocolError`.
    """
    reader, writer = await asyncio.open_unix_connection(socket)
    connection = h11.Connection(h11.CLIENT)
    try:
        kept = [*_own(headers, b"content-length"), (b"content-length", str(len(body)).encode())]
        kept.append((b"connection", b"close"))
        for event in (h11.Request(method=method, target=target, headers=kept), h11.Data(body), h11.EndOfMessage()):
            writer.write(connection.send(event) or b"")
        await writer.drain()
        while not isinstance(head := await _next(connection, reader), h11.Response):
            # 100 Continue and the like
            pass
        yield Reply(head.status_code, _own(list(head.headers)), _pieces(connection, reader))
    finally:
        writer.close()


async def _pieces(connection: h11.Connection, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while isinstance(event := await _next(connection, reader), h11.Data):
        yield bytes(event.data)


async def _next(connection: h11.Connection, reader: asyncio.StreamReader) -> object:
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(await reader.read(PIECE))
    return event


def _own(headers: Headers, *without: bytes) -> list[tuple[bytes, bytes]]:
    """Those that are about the message, not about one connection."""
    return [(name, value) for name, value in headers if name.lower() not in {*_OF_A_CONNECTION, *without}]
