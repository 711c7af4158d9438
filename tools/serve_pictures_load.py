"""Load ``mopeq-edge serve`` where it answers questions about pictures itself: clients at once, some break off, some
send nonsense; answers and memory are checked.

``python -m tools.serve_pictures_load FILE --minutes 5 --json FIGURES``, with FILE's vision file beside it. Before and
after, one client alone asks every question greedily. The server goes on from nothing that it computed before
(``--no-cache-prompt``), so every answer under load must be the same, to the letter.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from mopeq_edge.memory.process import Sampler
from mopeq_edge.runtime.server import Server
from tools.serve_load import CLIENTS, KEY, Report, command, go_away, note_memory, post

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOKENS = 16
SIZES = ((96, 64), (64, 160), (120, 120), (200, 50), (33, 47))
QUESTIONS = ("What is this?", "Which colours are there?")
START_SECONDS = 120.0
BUSY = 503


def data_uri(raw: bytes) -> str:
    """As a request has it."""
    return "data:image/png;base64," + base64.b64encode(raw).decode()


def picture(width: int, height: int, seed: int) -> bytes:
    """A PNG of random rectangles."""
    draw, image = random.Random(seed), Image.new("RGB", (width, height))
    for _ in range(8):
        x, y = draw.randrange(width), draw.randrange(height)
        colour = tuple(draw.randrange(256) for _ in range(3))
        image.paste(colour, (x, y, min(x + 40, width), min(y + 30, height)))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def question(url: str, text: str, **more: Any) -> bytes:
    """The body of a question about one picture."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return json.dumps(
        {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": TOKENS, **more}
    ).encode()


def bomb() -> bytes:
    """A PNG of few bytes and 144 million pixels."""
    file = io.BytesIO()
    Image.new("1", (12000, 12000)).save(file, "PNG")
    return file.getvalue()


def nonsense() -> list[tuple[str, bytes]]:
    """(path, body) of requests that must be refused."""
    good = picture(64, 64, 0)
    return [
        (CHAT, b"{"),
        (CHAT, b"[]"),
        (CHAT, b'{"messages": "none"}'),
        (CHAT, b'{"messages": [{"role": "user", "content": "Hi"}], "n": 3}'),
        (CHAT, question(data_uri(b"no picture"), "?")),
        (CHAT, question(data_uri(good[: len(good) // 2]), "?")),
        (CHAT, question(data_uri(bomb()), "?")),
        (CHAT, question("https://example.org/a.png", "?")),
        (CHAT, question(data_uri(good), "<image> <image>")),
        (CHAT, question(data_uri(good), "word " * 9000)),
        (CHAT, b"\xff\xfe\x00" * 100),
        (COMPLETIONS, b'{"prompt": [-1, 99999999]}'),
        (COMPLETIONS, b'{"prompt": [99999999]}'),
        ("/no/such/path", b"{}"),
    ]


@contextmanager
def serving(file: Path, arguments: Sequence[str]) -> Iterator[Server]:
    """``mopeq-edge serve`` on a free port, killed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        code = "from mopeq_edge.cli import main; main()"
        command = [sys.executable, "-c", code, "serve", str(file), "--port", "0", "--api-key", KEY, *arguments]
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        try:
            yield Server(process, _address(process, log), log)
        finally:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        found = [word for word in log.read_text().split() if word.startswith("http://")]
        if found:
            return found[0].removesuffix("/v1")
        time.sleep(0.05)
    raise OSError(f"the server did not start (exit {process.poll()}): {log.read_text()[-500:]}")


def ask(server: Server, body: bytes) -> str:
    """The answer's text; waits while the server is full. Raises OSError for any other status than 200."""
    while True:
        status, raw = post(server, CHAT, body)
        if status == 200:
            return str(json.loads(raw)["choices"][0]["message"]["content"])
        if status != BUSY:
            raise OSError(f"status {status}: {raw[:200]!r}")
        time.sleep(0.1)


def _client(
    server: Server,
    seed: int,
    until: float,
    alone: dict[bytes, str],
    wrong: Sequence[tuple[str, bytes]],
    report: Report,
    lock: Any,
) -> None:
    draw = random.Random(seed)
    while time.monotonic() < until:
        kind = draw.choices(("asked", "broken off", "nonsense", "no key"), (0.55, 0.2, 0.2, 0.05))[0]
        body = draw.choice(list(alone))
        try:
            if kind == "asked":
                found = ask(server, body)
                with lock:
                    report.same += found == alone[body]
                    if found != alone[body]:
                        report.wrong.append(f"{found!r}, alone {alone[body]!r}")
            elif kind == "broken off":
                streamed = json.dumps({**json.loads(body), "stream": True, "max_tokens": 200}).encode()
                go_away(server, CHAT, streamed, draw.choice((0.0, 0.02, 0.1, 0.5)))
            else:
                path, sent = draw.choice(wrong) if kind == "nonsense" else (CHAT, body)
                status, raw = post(server, path, sent, KEY if kind == "nonsense" else None)
                if (status < 400 or status >= 500) and status != BUSY:
                    raise OSError(f"{kind}: status {status} for {sent[:60]!r}")
                if kind == "no key" and status != 401:
                    raise OSError(f"no key: status {status}")
                if "message" not in json.loads(raw)["error"]:
                    raise OSError(f"{kind}: {raw[:100]!r}")
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            with lock:
                report.failures.append(f"{kind}: {type(error).__name__}: {error}")
        with lock:
            report.requests[kind] += 1


def load(file: Path, seconds: float, *, seed: int = 1, clients: int = CLIENTS, ctx: int = 2048) -> Report:
    """Serve ``file`` for ``seconds`` to ``clients`` at once. An empty list of failures and of wrong answers is good."""
    report, lock, wrong = Report(), threading.Lock(), nonsense()
    pictures = [data_uri(picture(*size, seed=n)) for n, size in enumerate(SIZES)]
    # more pictures than the server keeps embeddings of
    pictures += [data_uri(picture(80, 80, seed=100 + n)) for n in range(6)]
    with serving(file, ["-t", "1", "-c", str(ctx), "--no-cache-prompt"]) as server:
        alone = {}
        for url in pictures:
            for text in QUESTIONS:
                body = question(url, text)
                alone[body] = ask(server, body)
        sampler = Sampler(server.process.pid, interval=min(0.5, seconds / 50), pss_every=10**9)
        start = time.monotonic()
        threads = [
            threading.Thread(target=_client, args=(server, seed + n, start + seconds, alone, wrong, report, lock))
            for n in range(clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        report.seconds = round(time.monotonic() - start, 1)
        note_memory(report, sampler.stop())
        if server.process.poll() is not None:
            report.failures.append(f"the server ended with {server.process.returncode}")
        else:
            report.wrong += [f"alone afterwards: {text!r}" for body, text in alone.items() if ask(server, body) != text]
        if said := server.log.read_text().splitlines()[1:]:
            report.failures.append(f"the server wrote {said[0]!r}")
    return report


def main(argv: Sequence[str] | None = None) -> int:
    return command(load, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
