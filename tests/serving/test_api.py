"""The API as OpenAI's own client sees it, against the device path and the binding's logits."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from mopeq_edge.binding import LlamaModel
from mopeq_edge.serving.app import Limits
from mopeq_edge.serving.engine import CancelledError, Engine, Files
from mopeq_edge.serving.events import Delta, Finish
from mopeq_edge.serving.refusal import RefusalError
from mopeq_edge.serving.requests import parse_chat, parse_completion
from mopeq_edge.vision.answer import Question, answer, see
from mopeq_edge.vision.prompt import Turn, lay_out_turns
from tools.vision_language_configs import MOLMOE, TINY

from ..vision.pictures import picture
from ..vision.test_device_path import make
from .server import KEY, Served, serving

pytestmark = pytest.mark.runtime

QUESTION = "What is this?"
LIMITS = Limits(body=200_000, waiting=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("served")
    _, gguf, vision = make(TINY, folder)
    photos = [folder / name for name in ("a.png", "b.png", "c.png")]
    for path, size in zip(photos, ((130, 50), (40, 90), (60, 60)), strict=True):
        picture(*size, seed=size[0]).save(path)
    return SimpleNamespace(gguf=gguf, vision=vision, photos=photos)


@pytest.fixture(scope="module")
def server(made: SimpleNamespace) -> Iterator[Served]:
    with serving(Files(made.gguf, made.vision, n_ctx=1024, most_pixels=1_000_000), LIMITS) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def image(path: Path) -> Any:
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> Any:
    return {"type": "text", "text": words}


def user(*parts: Any) -> Any:
    return {"role": "user", "content": list(parts)}


def expected(made: SimpleNamespace, *photos: Path, n: int = 8) -> str:
    question = Question(made.gguf, made.vision, photos, QUESTION, n_predict=n, n_ctx=1024)
    return "".join(answer(question)).lstrip()


GREEDY: Any = {"model": "any", "temperature": 0, "max_tokens": 8}


def test_the_answer_is_that_of_run_with_images(client: openai.OpenAI, made: SimpleNamespace) -> None:
    """One picture and two; the question may come before or between."""
    one, two = made.photos[:1], made.photos[:2]
    for photos in (one, two):
        found = client.chat.completions.create(messages=[user(*map(image, photos), text(QUESTION))], **GREEDY)
        assert found.choices[0].message.content == expected(made, *photos)
    assert found.model == "test"
    assert found.usage is not None
    assert found.usage.completion_tokens == 8
    with LlamaModel(made.gguf, vocab_only=True) as model:
        tower, seen = see(Question(made.gguf, made.vision, tuple(two), QUESTION))
        parts = lay_out_turns(model, tower.description, [Turn(QUESTION, 2)], seen)
    assert found.usage.prompt_tokens == sum(len(part) for part in parts)
    # marks in the text say where pictures stand
    marked = client.chat.completions.create(messages=[user(image(one[0]), text(f"<image>\n{QUESTION}"))], **GREEDY)
    assert marked.choices[0].message.content == expected(made, *one)
    assert marked.choices[0].finish_reason == "length"


def test_a_stream_says_the_same(client: openai.OpenAI, made: SimpleNamespace) -> None:
    messages = [user(image(made.photos[2]), text(QUESTION))]
    chunks = list(
        client.chat.completions.create(
            messages=messages, stream=True, stream_options={"include_usage": True}, logprobs=True, **GREEDY
        )
    )
    whole = client.chat.completions.create(messages=messages, logprobs=True, **GREEDY)
    said = [choice for chunk in chunks for choice in chunk.choices]
    assert said[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in said) == whole.choices[0].message.content
    assert whole.choices[0].logprobs is not None
    streamed = [entry for choice in said if choice.logprobs for entry in choice.logprobs.content or []]
    assert [entry.token for entry in streamed] == [entry.token for entry in whole.choices[0].logprobs.content or []]
    assert [choice.finish_reason for choice in said if choice.finish_reason] == ["length"]
    usage = chunks[-1].usage
    assert usage is not None
    assert whole.usage is not None
    assert usage.total_tokens == whole.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_conversation_is_laid_out_as_released(made: SimpleNamespace) -> None:
    with LlamaModel(made.gguf, vocab_only=True) as model:
        tower, seen = see(Question(made.gguf, made.vision, tuple(made.photos[:2]), QUESTION))
        turns = [Turn("Hi?", 1, " A dog. "), Turn("And <image> this?", 1)]
        parts = lay_out_turns(model, tower.description, turns, seen, "Be short.")
        said = [model.detokenize(part, special=True) if part.ndim == 1 else len(part) for part in parts]
        assert said == [
            "<|endoftext|>",
            "Be short.\n\n<|User|>: ",
            len(seen[0]),
            "\nHi?\n\n<|Assistant|>: A dog.",
            "<|endoftext|>",
            "<|User|>: And ",
            len(seen[1]),
            " this?\n\n<|Assistant|>:",
        ]


def test_conversations_of_molmoe(tmp_path: Path, made: SimpleNamespace) -> None:
    """All pictures at the beginning, no token between turns, what the system says before the first question."""
    _, gguf, vision = make(MOLMOE, tmp_path)
    with LlamaModel(gguf, vocab_only=True) as model:
        tower, seen = see(Question(gguf, vision, tuple(made.photos[:1]), QUESTION))
        turns = [Turn("Hi?", 0, "A dog."), Turn("And this?", 1)]
        parts = lay_out_turns(model, tower.description, turns, seen, "Be short.")
        assert [part.ndim for part in parts] == [1, 2, 1]
        text = model.detokenize(parts[2])
    assert text == " User: Be short.\n\nHi? Assistant: A dog. User: And this? Assistant:"


def test_what_the_context_has_is_not_computed_again(client: openai.OpenAI, made: SimpleNamespace) -> None:
    first = user(image(made.photos[1]), text("Which?"))
    one = client.chat.completions.create(messages=[first], **GREEDY)
    answered = {"role": "assistant", "content": one.choices[0].message.content}
    messages: Any = [first, answered, user(text(QUESTION))]
    two = client.chat.completions.create(messages=messages, **GREEDY)
    assert one.usage is not None
    assert two.usage is not None
    assert two.usage.prompt_tokens_details is not None
    kept = two.usage.prompt_tokens_details.cached_tokens
    assert kept is not None
    assert one.usage.prompt_tokens <= kept + 1 <= two.usage.prompt_tokens
    # the same from nothing
    engine = Engine(Files(made.gguf, made.vision, n_ctx=1024, keep_prefix=False))
    body = json.dumps({**GREEDY, "messages": messages}).encode()
    events = list(engine.answer(parse_chat(body), lambda: False))
    engine.close()
    fresh: Any = events[-1]
    assert (fresh.kept_tokens, fresh.prompt_tokens) == (0, two.usage.prompt_tokens)
    assert "".join(event.text for event in events[:-1] if hasattr(event, "text")) == two.choices[0].message.content


def test_log_probabilities_are_the_binding_s(client: openai.OpenAI, made: SimpleNamespace) -> None:
    """Of a prompt of ids and what follows it, as lm-evaluation-harness asks for them."""
    with LlamaModel(made.gguf, n_ctx=256, n_threads=1) as model:
        ids = [int(token) for token in model.tokenize("Once upon a time there was a law of the land.")]
        (following,) = model.greedy(ids, 1)
        rows = model.logits([*ids, following]).astype(np.float64)
        logprobs = (
            rows - np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True)) - rows.max(1, keepdims=True)
        )
    asked: Any = {"model": "any", "max_tokens": 1, "temperature": 0, "logprobs": 2, "echo": True, "seed": 1234}
    found = client.completions.create(prompt=[ids, ids[:3]], **asked)
    first, second = found.choices
    assert first.logprobs is not None
    chances, top = first.logprobs.token_logprobs, first.logprobs.top_logprobs
    assert chances is not None
    assert top is not None
    assert chances[0] is None
    assert len(chances) == len(ids) + 1 == len(top)
    want = [logprobs[i, token] for i, token in enumerate([*ids[1:], following])]
    assert np.allclose(chances[1:], want, atol=2e-3)
    for i, best in enumerate(top[1:]):
        assert max(best.values()) == pytest.approx(logprobs[i].max(), abs=2e-3)
    # a token that is the likeliest has exactly that number, so that harnesses see it
    assert chances[-1] == max(top[-1].values())
    assert second.logprobs is not None
    assert len(second.logprobs.token_logprobs or []) == 4
    text = client.completions.create(prompt="Once upon", **{**asked, "max_tokens": 0, "logprobs": None})
    assert text.choices[0].text == "Once upon"


def test_vlmevalkit_s_request(server: Served, made: SimpleNamespace) -> None:
    """As its OpenAI wrapper sends it: pictures as JPEG, more tokens than the context has."""
    file = BytesIO()
    Image.open(made.photos[0]).convert("RGB").save(file, "JPEG")
    url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [text("Look."), {"type": "image_url", "image_url": {"url": url, "detail": "low"}}, text("What?")]
    payload = {"model": "any", "messages": [{"role": "user", "content": content}], "n": 1, "temperature": 0}
    status, found = server.request("POST", "/v1/chat/completions", json.dumps({**payload, "max_tokens": 2048}).encode())
    assert status == 200
    assert isinstance(found["choices"][0]["message"]["content"], str)
    usage = found["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] <= 1024


def test_a_text_model_has_completions_alone(made: SimpleNamespace) -> None:
    engine = Engine(Files(made.gguf, None, n_ctx=128))
    with pytest.raises(RefusalError, match="chat needs a vision file"):
        list(engine.answer(parse_chat(b'{"messages": [{"role": "user", "content": "Hi"}]}'), lambda: False))
    body = b'{"prompt": "Once", "max_tokens": 3, "temperature": 0, "echo": true, "logprobs": 1}'
    first, *_, last = engine.answer(parse_completion(body), lambda: False)
    assert isinstance(first, Delta)
    assert (first.text, first.chances[0].logprob) == ("Once", None)
    assert isinstance(last, Finish)
    assert (last.completion_tokens, last.reason) == (3, "length")
    with pytest.raises(CancelledError):
        list(engine.answer(parse_completion(body), lambda: True))
    engine.close()


def test_stop(client: openai.OpenAI, made: SimpleNamespace) -> None:
    whole = expected(made, made.photos[0], n=8)
    stop = whole[len(whole) // 2 :][:3]
    messages = [user(image(made.photos[0]), text(QUESTION))]
    found = client.chat.completions.create(messages=messages, stop=[stop], **GREEDY)
    assert found.choices[0].message.content == whole[: whole.find(stop)]
    assert found.choices[0].finish_reason == "stop"


def test_drawn_answers_follow_the_seed(client: openai.OpenAI) -> None:
    asked: Any = {"model": "any", "messages": [user(text("Hi"))], "max_tokens": 12, "temperature": 1.5, "top_p": 1.0}
    drawn = [client.chat.completions.create(seed=seed, **asked).choices[0].message.content for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_refusals(server: Served, client: openai.OpenAI, made: SimpleNamespace, tmp_path: Path) -> None:
    chat = "/v1/chat/completions"
    hello = json.dumps({"messages": [{"role": "user", "content": "Hi"}]}).encode()
    status, found = server.request("POST", chat, hello, key="another")
    assert (status, found["error"]["code"]) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0).models.list()
    assert server.request("GET", "/health", key=None) == (200, {"status": "ok"})
    assert [model.id for model in client.models.list()] == ["test"]
    assert server.request("GET", "/v1/none")[0] == 404
    assert server.request("GET", chat)[0] == 405
    plain = {"Content-Type": "text/plain"}
    status, found = server.request("POST", chat, hello, **plain)
    assert (status, found["error"]["message"]) == (415, "the Content-Type is not application/json")
    status, found = server.request("POST", chat, b"x" * (LIMITS.body + 1))
    assert (status, found["error"]["message"]) == (413, f"the body has more than {LIMITS.body} bytes")
    remote: Any = {"type": "image_url", "image_url": {"url": "https://e.org/a.png"}}
    with pytest.raises(openai.BadRequestError, match="this server fetches nothing"):
        client.chat.completions.create(messages=[user(remote)], **GREEDY)
    bomb = tmp_path / "bomb.png"
    Image.new("1", (2000, 1000)).save(bomb)
    with pytest.raises(openai.BadRequestError, match="has 2000 × 1000 pixels, expected at most 1,000,000") as large:
        client.chat.completions.create(messages=[user(image(bomb), text("?"))], stream=True, **GREEDY)
    assert large.value.code == "invalid_image"
    bomb.write_bytes(b"no picture")
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\]\.content\[0\]\.image_url: not a picture"):
        client.chat.completions.create(messages=[user(image(bomb))], **GREEDY)
    with pytest.raises(openai.BadRequestError, match="the question has 2 times <image> for 1 pictures"):
        client.chat.completions.create(messages=[user(image(made.photos[0]), text("<image><image>"))], **GREEDY)
    with pytest.raises(openai.BadRequestError, match="leaves no room for an answer") as long:
        client.chat.completions.create(messages=[user(text("word " * 1100))], **GREEDY)
    assert long.value.code == "context_length_exceeded"
    status, found = server.post("/v1/completions", prompt=[99_999_999])
    assert (status, found["error"]["param"]) == (400, "prompt")


def test_more_requests_than_may_wait(server: Served) -> None:
    asked = {"prompt": "Once", "max_tokens": 200, "temperature": 0}
    with ThreadPoolExecutor(9) as pool:
        found = list(pool.map(lambda _: server.post("/v1/completions", **asked), range(9)))
    answers = {json.dumps(answer["choices"]) for status, answer in found if status == 200}
    busy = [answer["error"]["message"] for status, answer in found if status == 503]
    assert len(answers) == 1
    assert busy == [f"{LIMITS.waiting} requests are waiting already; try again later"] * len(busy)
    assert {status for status, _ in found} == {200, 503}


def test_clients_that_go_away_leave_nothing(server: Served, client: openai.OpenAI) -> None:
    body = json.dumps({"prompt": "Once", "max_tokens": 900, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    for sent, wait in ((head.encode(), 0.0), (head.encode() + body[:9], 0.0), (head.encode() + body, 0.05)) * 3:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(sent)
            time.sleep(wait)
    start = time.monotonic()
    while True:
        status, _ = server.post("/v1/completions", prompt="Once", max_tokens=2)
        if status == 200:
            break
        assert status == 503
        assert time.monotonic() - start < 20
        time.sleep(0.05)


CODE = "import sys; sys.argv[0] = 'mopeq-edge'; from mopeq_edge.cli import main; main()"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_command_and_its_end(made: SimpleNamespace) -> None:
    """Beside a vision file serve answers itself, and Ctrl-C in the middle of an answer ends it within two seconds."""
    command = [sys.executable, "-c", CODE, "serve", str(made.gguf), "--port", "0", "-t", "1", "-c", "1024"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.readline()
    assert f"/v1 with pictures through {made.vision.name}" in said
    url = next(word for word in said.split() if word.startswith("http://127.0.0.1:"))
    own = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    stream = own.completions.create(model="any", prompt="Once", max_tokens=1000, temperature=0, stream=True)
    assert next(iter(stream)).choices[0].index == 0
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert time.monotonic() - start < 2
    assert process.stderr.read() == ""
