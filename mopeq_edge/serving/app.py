"""The routes: OpenAI's, over HTTP. Bodies, waiting requests and connections have limits."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mopeq_edge.serving.events import Event
from mopeq_edge.serving.exchange import read_body, refused, while_connected
from mopeq_edge.serving.refusal import BUSY, NOT_FOUND, UNAUTHORIZED, UNSUPPORTED, RefusalError
from mopeq_edge.serving.requests import ChatRequest, CompletionRequest, parse_chat, parse_completion
from mopeq_edge.serving.wire import Answer, sse
from mopeq_edge.serving.worker import Job, Worker

Parse = Callable[[bytes], ChatRequest | CompletionRequest]
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Limits:
    """``body`` in bytes; ``waiting`` are requests at once, the one that is answered too."""

    body: int = 32 * 2**20
    waiting: int = 16


def make_app(worker: Worker, model: str, key: str | None, limits: Limits) -> Starlette:
    """The application; ``model`` is its name to clients, ``key`` what they must send, if anything."""
    service = _Service(worker, model, limits)

    def guarded(handler: Handler) -> Handler:
        async def checked(request: Request) -> Response:
            try:
                _check_key(request, key)
                return await handler(request)
            except RefusalError as error:
                return refused(error)

        return checked

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def chat(request: Request) -> Response:
        return await service.answer(request, parse_chat)

    async def completions(request: Request) -> Response:
        return await service.answer(request, parse_completion)

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [service.model_card()]})

    routes = [
        Route("/health", health),
        Route("/v1/models", guarded(models)),
        Route("/v1/chat/completions", guarded(chat), methods=["POST"]),
        Route("/v1/completions", guarded(completions), methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _no_route})


class _Service:
    def __init__(self, worker: Worker, model: str, limits: Limits) -> None:
        self._worker, self._model, self._limits = worker, model, limits
        self._waiting = 0

    def model_card(self) -> dict[str, Any]:
        return {
            **{"id": self._model, "object": "model", "created": 0, "owned_by": "mopeq-edge"},
            "meta": {"n_ctx": self._worker.n_ctx},
        }

    async def answer(self, request: Request, parse: Parse) -> Response:
        if self._waiting >= self._limits.waiting:
            raise RefusalError(f"{self._waiting} requests are waiting already; try again later", status=BUSY)
        self._waiting += 1
        handed_over = False
        try:
            try:
                asked = parse(await self._body(request))
            except ClientDisconnect:
                return Response(status_code=400)
            events = self._events(asked)
            answer = Answer(
                self._model, chat=isinstance(asked, ChatRequest), logprobs=asked.generation.n_top is not None
            )
            if asked.generation.stream:
                # until the first event an error is an answer of its own, with its own status
                first = await while_connected(request, anext(events))
                if first is None:
                    return Response(status_code=400)
                handed_over = True
                return _Stream(_chunks(answer, first, events, asked), lambda: self._end(events))
            whole = await while_connected(request, _all(answer, events))
            return JSONResponse(answer.whole()) if whole else Response(status_code=400)
        finally:
            if not handed_over:
                self._waiting -= 1

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # a page in a browser may send other types without asking
            raise RefusalError("the Content-Type is not application/json", status=UNSUPPORTED)
        return await read_body(request, self._limits.body)

    async def _end(self, events: AsyncGenerator[Event]) -> None:
        self._waiting -= 1
        await events.aclose()

    async def _events(self, asked: ChatRequest | CompletionRequest) -> AsyncGenerator[Event]:
        """What the model's thread says; it is told when nobody listens any more."""
        loop, found = asyncio.get_running_loop(), asyncio.Queue[Event | RefusalError | None]()
        job = Job(asked, lambda event: loop.call_soon_threadsafe(found.put_nowait, event))
        self._worker.submit(job)
        try:
            while (event := await found.get()) is not None:
                if isinstance(event, RefusalError):
                    raise event
                yield event
        finally:
            job.cancelled.set()


class _Stream(StreamingResponse):
    """Calls ``end`` in any case: a client that is gone already would leave the chunks untouched."""

    def __init__(self, chunks: AsyncIterator[bytes], end: Callable[[], Awaitable[None]]) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._end()


async def _chunks(
    answer: Answer, first: Event, events: AsyncIterator[Event], asked: ChatRequest | CompletionRequest
) -> AsyncIterator[bytes]:
    try:
        if (start := answer.first()) is not None:
            yield sse(start)
        answer.take(first)
        yield sse(answer.chunk(first))
        async for event in events:
            answer.take(event)
            yield sse(answer.chunk(event))
        if asked.generation.with_usage:
            yield sse(answer.last())
        yield sse("[DONE]")
    except RefusalError as error:
        yield sse(error.as_dict())


async def _all(answer: Answer, events: AsyncIterator[Event]) -> bool:
    async for event in events:
        answer.take(event)
    return True


def _check_key(request: Request, key: str | None) -> None:
    if key is None:
        return
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(sent.strip().encode(), key.encode()):
        raise RefusalError("the API key is missing or wrong", status=UNAUTHORIZED, code="invalid_api_key")


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    message = f"{what}: there is no such route here" if error.status_code == NOT_FOUND else f"{what}: {error.detail}"
    return refused(RefusalError(message, status=error.status_code))
