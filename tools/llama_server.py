"""A llama-server for measurements: started, asked with prompts of given lengths, stopped."""

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


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def complete(self, prompt: Sequence[int], n_predict: int = 4, timeout: float = 600) -> dict[str, Any]:
        """The answer to a prompt of token ids."""
        body = {"prompt": list(prompt), "n_predict": n_predict, "cache_prompt": False, "temperature": 0}
        request = urllib.request.Request(
            f"{self.url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            answer: dict[str, Any] = json.loads(reply.read())
        return answer

    def complete_all(self, prompts: Sequence[Sequence[int]], n_predict: int = 4) -> list[dict[str, Any]]:
        """All at once."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.complete(prompt, n_predict), prompts))


class ServerError(Exception):
    """The server ended before it was ready; the message is the end of its log."""


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
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, preexec_fn=preexec)
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
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    tail = server.log.read_text(errors="replace").splitlines()[-5:]
    raise ServerError(f"llama-server is not ready (exit {server.process.poll()}): {' | '.join(tail)}")
