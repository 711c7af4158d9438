"""What stands before llama-server, with a stand-in for it: what goes through, what does not, and who hears of it."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import os
import signal as signals
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from mopeq_edge.serving.front import make_front
from mopeq_edge.serving.listen import server_of

from ..vision.pictures import picture
from ..vision.test_image_file import turned

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the front needs socket files")

ANSWER = b"HTTP/1.1 207 Odd\r\nX-Own: 1\r\nContent-Length: 5\r\nConnection: keep-alive\r\n\r\n\0\xff123"
STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n"
IMAGE = base64.b64encode(turned(picture(24, 16), 6, "PNG")).decode()
CHAT = {"messages": [{"content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{IMAGE}"}}]}]}
JSON = {"Content-Type": "application/json"}


class StandIn:
    """Keeps what it is asked; its answers are bytes."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.left = threading.Event()
        self.more = threading.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        self.asked.append(head + await reader.readexactly(length))
        if head.startswith(b"GET /props"):
            status = b"401 No" if b"a wrong key" in head else b"200 OK"
            writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
        elif head.startswith(b"GET /stream"):
            writer.write(STREAM + b"3\r\none\r\n")
            await writer.drain()
            while not self.more.is_set() and not reader.at_eof():
                await asyncio.sleep(0.01)
            writer.write(b"3\r\ntwo\r\n0\r\n\r\n")
        elif head.startswith(b"GET /wait"):
            await reader.read()
            self.left.set()
        elif head.startswith(b"GET /broken"):
            writer.write(b"no HTTP\r\n\r\n")
        else:
            writer.write(ANSWER)
        writer.close()


@contextmanager
def before(path: Path, stand_in: StandIn | None) -> Iterator[int]:
    """The port of a front before ``stand_in``, which listens on ``path``."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        server = server_of(make_front(path, most_body=100_000))

        async def run() -> None:
            behind = await asyncio.start_unix_server(stand_in.serve, path) if stand_in else None
            await server.serve([bound])
            if behind:
                behind.close()

        thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield bound.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(10)


@pytest.fixture
def front(tmp_path: Path) -> Iterator[SimpleNamespace]:
    stand_in = StandIn()
    with before(tmp_path / "s", stand_in) as port:
        yield SimpleNamespace(port=port, behind=stand_in)


def request(port: int, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())
    finally:
        connection.close()


def test_what_has_no_pictures_goes_through_as_it_is(front: SimpleNamespace) -> None:
    body = b'{"prompt":  "\\u0069mage", "x": 1e2}'
    status, answer, headers = request(front.port, "POST", "/a%20b/c?d=%C3%A9&e", body, Authorization="Bearer k", **JSON)
    assert (status, answer, headers["x-own"]) == (207, b"\0\xff123", "1")
    (asked,) = front.behind.asked
    head, _, sent = asked.partition(b"\r\n\r\n")
    assert sent == body
    assert head.startswith(b"POST /a%20b/c?d=%C3%A9&e HTTP/1.1\r\n")
    assert b"authorization: Bearer k" in head
    for method, content in (("DELETE", b""), ("POST", b"--x\r\nfile\xff"), ("PUT", b"{no json")):
        assert request(front.port, method, "/", content)[0] == 207
        assert front.behind.asked[-1].startswith(method.encode())
        assert front.behind.asked[-1].endswith(b"\r\n\r\n" + content)


def test_pictures_are_read_before_it(front: SimpleNamespace) -> None:
    # also where a name is written in another way, and whatever the body says that it is
    body = json.dumps(CHAT).replace("image_url", "\\u0069mage_url").encode()
    assert request(front.port, "POST", "/v1/chat/completions", body, **{"Content-Type": "text/plain"})[0] == 207
    guard, asked = front.behind.asked
    assert guard.startswith(b"GET /props HTTP/1.1\r\n")
    sent = json.loads(asked.partition(b"\r\n\r\n")[2])
    assert sent != CHAT
    assert sent["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


def test_refusals_do_not_reach_it(front: SimpleNamespace) -> None:
    body = json.dumps(CHAT).replace("data:image/png", "http://e.org/").encode()
    status, answer, _ = request(front.port, "POST", "/v1/chat/completions", body, **JSON)
    error = json.loads(answer)["error"]
    assert (status, error["param"], error["type"]) == (
        *(400, "messages[0].content[0].image_url"),
        "invalid_request_error",
    )
    assert "this server fetches nothing" in error["message"]
    assert request(front.port, "POST", "/", b"x" * 100_001)[0] == 413
    status, answer, _ = request(front.port, "POST", "/", b"[" * 50_000)
    assert (status, json.loads(answer)["error"]["message"]) == (400, "the body is nested too deep")
    assert [asked.split()[1] for asked in front.behind.asked] == [b"/props"]


def test_nothing_is_decoded_for_a_stranger(front: SimpleNamespace) -> None:
    """Without the key the request goes through as it is, and llama-server refuses it."""
    body = json.dumps(CHAT).encode()
    request(front.port, "POST", "/v1/chat/completions", body, Authorization="Bearer a wrong key", **JSON)
    assert front.behind.asked[-1].endswith(body)


def test_an_answer_comes_in_pieces(front: SimpleNamespace) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=30)
    connection.request("GET", "/stream")
    answer = connection.getresponse()
    assert answer.getheader("Content-Type") == "text/event-stream"
    assert answer.read1() == b"one"
    front.behind.more.set()
    assert answer.read() == b"two"
    connection.close()


def test_a_client_that_goes_away_is_gone_for_both(front: SimpleNamespace) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=30)
    connection.request("GET", "/wait")
    while not front.behind.asked:
        time.sleep(0.01)
    assert not front.behind.left.is_set()
    connection.close()
    assert front.behind.left.wait(10)


def test_one_that_does_not_answer(front: SimpleNamespace, tmp_path: Path) -> None:
    assert request(front.port, "GET", "/broken")[0] == 503
    with before(tmp_path / "none", None) as port:
        status, answer, headers = request(port, "GET", "/health")
    assert (status, headers["retry-after"]) == (503, "1")
    assert json.loads(answer)["error"]["message"] == "llama-server does not answer; try again later"


STAND_BEFORE = """
import sys
from mopeq_edge.serving.before import stand_before
sys.exit(stand_before(sys.argv[1:], "127.0.0.1", 0, lambda address: print(address, flush=True)))
"""


def test_it_ends_with_llama_server() -> None:
    """Which gets a socket file of its own; its exit code is ours."""
    command = [sys.executable, "-c", STAND_BEFORE, "/bin/sh", "-c", 'test "$0" = --host && echo "$1" && exit 9']
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 9, done.stderr
    (socket_file,) = [line for line in done.stdout.splitlines() if line.endswith("/llama.sock")]
    assert not Path(socket_file).parent.exists()


@pytest.mark.parametrize(("signal", "code"), [("TERM", 143), ("INT", 130), ("KILL", -9)])
def test_llama_server_ends_with_it(signal: str, code: int) -> None:
    if signal == "KILL" and sys.platform != "linux":
        pytest.skip("only Linux tells a child")
    command = [sys.executable, "-c", STAND_BEFORE, "/bin/sh", "-c", "echo $$; exec sleep 100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        child = next(int(line) for line in lines if line.strip().isdigit())
        process.send_signal(getattr(signals, f"SIG{signal}"))
        assert process.wait(20) == code
    end = time.monotonic() + 10
    while time.monotonic() < end and Path(f"/proc/{child}/status").exists():
        time.sleep(0.02)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
