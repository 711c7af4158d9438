"""Load ``mopeq-edge serve``: clients at once, some break off, some send nonsense; answers and memory are checked.

``python -m tools.serve_load FILE --minutes 5 --json FIGURES``. Before and after, one client alone asks every prompt
greedily. A loaded server computes several prompts in one batch, whose sums round differently, so a text may part from
the alone one where two tokens were nearly level: a difference counts as wrong unless the gap of the two best tokens,
alone, is below ``TIE`` nats at the first differing token. What follows such a token is another text, not compared.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mopeq_edge.memory.process import Sample, Sampler
from mopeq_edge.runtime.server import Server, serving

CLIENTS = 8
TIE = 0.01
"""Nats between the two best tokens below which either may come."""
TOKENS = 24
KEY = "a key"
PROMPTS = (
    "Once upon a time",
    "The law of the land",
    "def main():",
    "In the year of the great",
    "It was a dark night and",
    "The quick brown fox jumps over the lazy dog, and then",
    "1, 2, 3, 4,",
    "A",
)
NONSENSE: Sequence[tuple[str, bytes]] = (
    ("/completion", b"{"),
    ("/completion", b"[]"),
    ("/completion", b'{"prompt": 3.5e400}'),
    ("/completion", b'{"prompt": {"a": [null]}}'),
    ("/completion", b'{"prompt": [-1, 99999999]}'),
    ("/completion", b'{"prompt": "x", "grammar": "root ::= ("}'),
    ("/completion", b"\xff\xfe\x00" * 100),
    ("/v1/chat/completions", b'{"messages": "none"}'),
    ("/no/such/path", b"{}"),
)
"""(path, body) of requests that must be refused."""


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, and for each the gap in nats to the second best."""

    tokens: tuple[int, ...]
    gaps: tuple[float, ...] = ()


@dataclass
class Report:
    """What a load test found. Sizes in bytes, ``anon`` the memory that is the process's own."""

    seconds: float = 0.0
    requests: Counter[str] = field(default_factory=Counter)
    same: int = 0
    parted_at_a_tie: int = 0
    widest_tie: float = 0.0
    """Nats."""
    wrong: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    anon_early: int = 0
    anon_late: int = 0
    anon_peak: int = 0

    @property
    def growth(self) -> float:
        """Own memory late over early, less one."""
        return self.anon_late / self.anon_early - 1 if self.anon_early else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "requests": dict(sorted(self.requests.items())), "growth": round(self.growth, 4)}


def _connect(server: Server, timeout: float = 120) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=timeout)


def post(server: Server, path: str, body: bytes, key: str | None = KEY) -> tuple[int, bytes]:
    """(status, body of the answer)"""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    connection = _connect(server)
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _body(prompt: str, **more: Any) -> bytes:
    settings = {"temperature": 0, "cache_prompt": False, "return_tokens": True, "n_predict": TOKENS, **more}
    return json.dumps({"prompt": prompt, **settings}).encode()


def ask(server: Server, prompt: str) -> Answer:
    """The greedy answer with its gaps. Raises OSError for any other status than 200."""
    status, raw = post(server, "/completion", _body(prompt, n_probs=2))
    if status != 200:
        raise OSError(f"status {status}: {raw[:200]!r}")
    found = json.loads(raw)
    gaps = []
    for entry in found["completion_probabilities"]:
        best = sorted((top["logprob"] for top in entry["top_logprobs"]), reverse=True)
        gaps.append(best[0] - best[1])
    return Answer(tuple(found["tokens"]), tuple(gaps))


def compare(alone: Answer, loaded: Answer) -> str:
    """``same``, ``tie 0.012`` where they part at two tokens so nearly level (in nats), or what is wrong."""
    for index, (want, got) in enumerate(zip(alone.tokens, loaded.tokens, strict=False)):
        if want != got:
            gap = alone.gaps[index] if index < len(alone.gaps) else float("inf")
            return (
                f"tie {gap:.4f}"
                if gap < TIE
                else f"token {index} is {got}, alone {want}, {gap:.3f} nats before the next"
            )
    if len(alone.tokens) != len(loaded.tokens):
        return f"{len(loaded.tokens)} tokens, alone {len(alone.tokens)}"
    return "same"


def break_off(server: Server, prompt: str, seconds: float) -> None:
    """Ask for a long stream and go away in the middle of it, or of the request."""
    go_away(server, "/completion", _body(prompt, stream=True, n_predict=200), seconds)


def go_away(server: Server, path: str, body: bytes, seconds: float) -> None:
    """Send a request and close the connection after ``seconds``; 0: before it is sent whole."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(head.encode() + (body if seconds else body[:10]))
        time.sleep(seconds)


def _client(server: Server, seed: int, until: float, alone: dict[str, Answer], report: Report, lock: Any) -> None:
    draw = random.Random(seed)
    while time.monotonic() < until:
        kind = draw.choices(("asked", "broken off", "nonsense", "no key"), (0.6, 0.2, 0.17, 0.03))[0]
        prompt = draw.choice(PROMPTS)
        try:
            if kind == "asked":
                found = compare(alone[prompt], ask(server, prompt))
                with lock:
                    report.same += found == "same"
                    if found.startswith("tie "):
                        report.parted_at_a_tie += 1
                        report.widest_tie = max(report.widest_tie, float(found[4:]))
                    elif found != "same":
                        report.wrong.append(f"{prompt!r}: {found}")
            elif kind == "broken off":
                break_off(server, prompt, draw.choice((0.0, 0.02, 0.1, 0.3)))
            else:
                path, body = draw.choice(NONSENSE) if kind == "nonsense" else ("/completion", _body(prompt))
                status, _ = post(server, path, body, KEY if kind == "nonsense" else None)
                if status < 400 or (kind == "no key" and status != 401):
                    raise OSError(f"{kind}: status {status} for {body[:60]!r}")
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            with lock:
                report.failures.append(f"{kind}: {type(error).__name__}: {error}")
        with lock:
            report.requests[kind] += 1


def load(file: Path, seconds: float, *, seed: int = 1, clients: int = CLIENTS) -> Report:
    """Serve ``file`` for ``seconds`` to ``clients`` at once. An empty list of failures and of wrong answers is good."""
    arguments = ["-c", "from mopeq_edge.cli import main; main()", "serve", str(file), "--api-key", KEY]
    # without the cache of prompts in memory, which grows up to 8 GiB by design
    arguments += ["-t", "1", "-c", str(256 * clients), "-np", str(clients), "--cache-ram", "0"]
    report, lock = Report(), threading.Lock()
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(sys.executable), arguments, Path(folder) / "log") as server,
    ):
        alone = {prompt: ask(server, prompt) for prompt in PROMPTS}
        sampler = Sampler(server.process.pid, interval=min(0.5, seconds / 50), pss_every=10**9)
        start = time.monotonic()
        threads = [
            threading.Thread(target=_client, args=(server, seed + n, start + seconds, alone, report, lock))
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
            for prompt in PROMPTS:
                if (found := compare(alone[prompt], ask(server, prompt))) != "same":
                    report.wrong.append(f"alone afterwards, {prompt!r}: {found}")
    return report


def note_memory(report: Report, samples: Sequence[Sample]) -> None:
    """The medians of the second and the last fifth: the first fills buffers that stay."""
    n = max(1, len(samples) // 5)
    report.anon_early = int(statistics.median(s.anon for s in samples[n : 2 * n] or samples))
    report.anon_late = int(statistics.median(s.anon for s in samples[-n:]))
    report.anon_peak = max(s.anon for s in samples)


def command(load: Callable[..., Any], description: str | None, argv: Sequence[str] | None = None) -> int:
    """The command line of a load test: runs ``load(file, seconds, seed=, clients=)`` and prints its report as JSON."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(argv)
    report = load(given.file, 60 * given.minutes, seed=given.seed, clients=given.clients)
    text = json.dumps(report.as_dict(), indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")
    return int(bool(report.failures or report.wrong))


def main(argv: Sequence[str] | None = None) -> int:
    return command(load, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
