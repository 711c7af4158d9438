"""A llama-server of its own: started on a free port, asked, stopped."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopeq_edge.errors import MopeqError

LOG_LINES = {
    "model": r"load_tensors:\s+(\S+) model buffer size =\s+([\d.]+) MiB",
    "kv": r"(\S+) KV buffer size =\s+([\d.]+) MiB",
    "compute": r"(\S+) compute buffer size =\s+([\d.]+) MiB",
    "output": r"(\S+)\s+output buffer size =\s+([\d.]+) MiB",
}
"""What llama.cpp says of its buffers: kind, and a pattern of (buffer, MiB)."""


def buffers(log: str) -> dict[str, list[tuple[str, float]]]:
    """(buffer, MiB) by kind, as llama.cpp prints them: to a hundredth of a MiB."""
    return {
        kind: [(name, float(size)) for name, size in re.findall(pattern, log)] for kind, pattern in LOG_LINES.items()
    }


class ServerError(MopeqError):
    """llama-server ended before it was ready, or did not answer a request; the message has its own words."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def post(self, route: str, body: dict[str, Any], timeout: float = 600) -> dict[str, Any]:
        """The JSON answer of ``route``, e.g. "/tokenize". Raises :class:`ServerError`."""
        request = urllib.request.Request(
            f"{self.url}{route}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                answer: dict[str, Any] = json.loads(reply.read())
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace").strip()[:300]
            raise ServerError(f"llama-server answers {route} with status {error.code}: {said}") from error
        except (OSError, ValueError) as error:
            raise ServerError(
                f"llama-server does not answer {route} (exit {self.process.poll()}): {error}; {_tail(self.log)}"
            ) from error
        return answer

    def complete(
        self, prompt: Sequence[int] | str, n_predict: int = 4, timeout: float = 600, **options: Any
    ) -> dict[str, Any]:
        """The likeliest continuation of token ids or a text; ``options`` are those of llama-server's /completion."""
        given = list(prompt) if not isinstance(prompt, str) else prompt
        body = {"prompt": given, "n_predict": n_predict, "cache_prompt": False, "temperature": 0, **options}
        return self.post("/completion", body, timeout)

    def complete_all(
        self, prompts: Sequence[Sequence[int]], n_predict: int = 4, **options: Any
    ) -> list[dict[str, Any]]:
        """All at once."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.complete(prompt, n_predict, **options), prompts))


@contextmanager
def serving(
    program: Path,
    arguments: Sequence[str],
    log: Path,
    *,
    wait: float = 300,
    started: Callable[[int], None] | None = None,
    preexec: Callable[[], None] | None = None,
) -> Iterator[Server]:
    """Start ``program`` with ``arguments`` on a free port and wait until it answers; it is killed at the end.

    ``started`` gets the process id at once. Raises :class:`ServerError`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(program), *arguments, "--host", "127.0.0.1", "--port", str(port), "-lv", "4"]
    with log.open("wb") as out:
        try:
            process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, preexec_fn=preexec)
        except OSError as error:
            raise ServerError(f"{program} could not start: {error.strerror}; build llama.cpp again") from error
    try:
        if started is not None:
            started(process.pid)
        server = Server(process, f"http://127.0.0.1:{port}", log)
        _await(server, wait)
        yield server
    finally:
        process.kill()
        process.wait()


def _await(server: Server, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5) as reply:
                if reply.status == 200:
                    return
        except OSError:
            time.sleep(0.05)
    raise ServerError(f"llama-server is not ready (exit {server.process.poll()}): {_tail(server.log)}")


def _tail(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").splitlines()[-5:])
