"""Requests of OpenAI's API: what is understood, and what is refused with which words."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from mopeq_edge.serving.images import Picture
from mopeq_edge.serving.refusal import RefusalError
from mopeq_edge.serving.requests import Message, parse_chat, parse_completion
from mopeq_edge.vision.sample import Sampling

DATA = b"\x89PNG not decoded here"
URL = "data:image/png;base64," + base64.b64encode(DATA).decode()
IMAGE = {"type": "image_url", "image_url": {"url": URL, "detail": "low"}}
USER = {"role": "user", "content": "Hi"}


def chat(*messages: Any, **more: Any) -> Any:
    return parse_chat(json.dumps({"model": "any", "messages": list(messages), **more}).encode())


def completion(prompt: Any = "Once", **more: Any) -> Any:
    return parse_completion(json.dumps({"prompt": prompt, **more}).encode())


def test_a_conversation() -> None:
    text = {"type": "text", "text": "What is this?"}
    found = chat(
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [IMAGE, text]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
        {"role": "user", "content": "Which?"},
        {"role": "user", "content": [text]},
    )
    assert found.system == "Be short."
    picture = Picture(DATA, "messages[1].content[0].image_url")
    assert found.messages == (
        Message((picture, "What is this?"), "A dog."),
        Message(("Which?", "\n", "What is this?")),
    )


def test_what_is_computed() -> None:
    more = {"temperature": 0, "top_p": 0.5, "top_k": -1, "seed": -1, "stop": ["a", None], "max_tokens": 7, "n": 1}
    wanted = chat(USER, **more, logprobs=True, top_logprobs=3, frequency_penalty=0.0, tools=[]).generation
    assert wanted.sampling == Sampling(0.0, 0, 0.5, 2**63 - 1)
    assert (wanted.most, wanted.stops, wanted.n_top, wanted.stream, wanted.with_usage) == (7, ("a",), 3, False, False)
    streamed = chat(USER, stream=True, stream_options={"include_usage": True}, max_completion_tokens=5, max_tokens=9)
    assert (streamed.generation.most, streamed.generation.stream, streamed.generation.with_usage) == (5, True, True)
    unsaid = chat(USER).generation
    assert (unsaid.most, unsaid.n_top, unsaid.stops) == (None, None, ())
    assert (unsaid.sampling.temperature, unsaid.sampling.top_k, unsaid.sampling.top_p) == (0.8, 40, 0.95)
    # another seed each time
    assert chat(USER).generation.sampling.seed != unsaid.sampling.seed


def test_prompts_of_completions() -> None:
    assert completion().prompts == ("Once",)
    assert completion().generation.most == 16
    assert completion([1, 2]).prompts == ((1, 2),)
    assert completion([[1, 2], [3]]).prompts == ((1, 2), (3,))
    assert completion(["a", "b"], logprobs=1, echo=True, max_tokens=0).generation.most == 0


@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        ({"n": 2}, "n", "n is 2, which is not supported here; leave it out"),
        ({"tools": [{"type": "function"}]}, "tools", "which is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "which is not supported"),
        ({"temperature": "hot"}, "temperature", "temperature is 'hot', expected a number from 0 to 2"),
        ({"temperature": float("nan")}, "temperature", "temperature is nan, expected"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0, expected a whole number from 1"),
        ({"max_tokens": True}, "max_tokens", "max_tokens is True, expected"),
        ({"stop": [""]}, "stop", "texts that are not empty"),
        ({"stop": "\ud800"}, "stop", "expected a text"),
        ({"stream": "yes"}, "stream", "stream is 'yes', expected true or false"),
        ({"stream_options": 3}, "stream_options", "stream_options is 3, expected an object"),
        ({"seed": 1.5}, "seed", "seed is 1.5, expected a whole number"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
    ],
)
def test_refused_settings(more: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RefusalError) as refused:
        chat(USER, **more)
    assert message in str(refused.value)
    assert (refused.value.param, refused.value.status) == (param, 400)
    assert refused.value.as_dict()["error"]["type"] == "invalid_request_error"


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def image(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": url}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is [], expected a list of 1 to 512 messages"),
        (["Hi"], "messages[0] is no object with role and content"),
        ([{"role": "robot", "content": "Hi"}], "messages[0].role is 'robot', expected system, user or assistant"),
        ([{"role": "user", "content": 3}], "messages[0].content is no text and no list of parts"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content is no text"),
        ([USER, {"role": "assistant", "content": "Yes"}], "the last message is not the user's"),
        ([{"role": "assistant", "content": "Yes"}, USER], "messages[0] is an answer to nothing"),
        ([{"role": "system", "content": [IMAGE]}, USER], "messages[0].content has a picture; only the user's may"),
        ([user({"type": "text"})], "messages[0].content[0].text is None, expected a text"),
        ([user({"type": "input_audio"})], "content[0].type is 'input_audio', expected text or image_url"),
        ([user(image(None))], 'image_url has no url; expected {"url": "data:image/'),
        ([user(image({"url": "https://e.org/a.png"}))], "is a https: address; this server fetches nothing, send"),
        ([user(image({"url": "file:///etc/passwd"}))], "is a file: address; this server fetches nothing"),
        ([user(image({"url": "data:image/png,abc"}))], "is no data: URI in base64"),
        ([user(image({"url": "data:image/png;base64,a b$"}))], "is not base64"),
    ],
)
def test_refused_messages(messages: list[Any], message: str) -> None:
    with pytest.raises(RefusalError) as refused:
        chat(*messages)
    assert message in str(refused.value)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'"text"'])
def test_what_is_no_object(body: bytes) -> None:
    for parse in (parse_chat, parse_completion):
        with pytest.raises(RefusalError, match="the body is not"):
            parse(body)


@pytest.mark.parametrize("prompt", [None, "", [], [1, "a"], [[]], [-1], [1.5], [True], {"a": 1}, [["a"]], ["a"] * 129])
def test_refused_prompts(prompt: Any) -> None:
    with pytest.raises(RefusalError, match=r"prompt is .*, expected a text, token ids, or a list"):
        completion(prompt)


def test_line_breaks_in_base64() -> None:
    url = "data:image/jpeg;charset=x;base64," + base64.encodebytes(DATA * 9).decode()
    found = chat(user(image(url))).messages[0].parts[0]
    assert isinstance(found, Picture)
    assert found.data == DATA * 9
