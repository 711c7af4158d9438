"""The server in a thread of the test's own process, and requests to it."""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from mopeq_edge.serving.app import Limits, make_app
from mopeq_edge.serving.engine import Files
from mopeq_edge.serving.listen import address
from mopeq_edge.serving.worker import Worker

KEY = "a key"


@dataclass(frozen=True)
class Served:
    url: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def request(
        self, method: str, path: str, body: bytes | None = None, key: str | None = KEY, **headers: str
    ) -> tuple[int, Any]:
        """(status, JSON of the answer)"""
        own = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {**own, **headers})
            answer = connection.getresponse()
            raw = answer.read()
            return answer.status, json.loads(raw) if raw else None
        finally:
            connection.close()

    def post(self, path: str, **fields: Any) -> tuple[int, Any]:
        return self.request("POST", path, json.dumps(fields).encode())


@contextmanager
def serving(files: Files, limits: Limits) -> Iterator[Served]:
    import socket

    worker = Worker(files)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        app = make_app(worker, "test", KEY, limits)
        config = uvicorn.Config(app, log_level=logging.ERROR, lifespan="off", ws="none", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield Served(address(bound))
        finally:
            server.should_exit = True
            thread.join(10)
            assert worker.stop(10)
