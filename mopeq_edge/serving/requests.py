"""Requests in OpenAI's words as what is to be computed."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mopeq_edge.serving.fields import Fields, is_text, parse_object
from mopeq_edge.serving.images import Picture, parse_image
from mopeq_edge.serving.refusal import RefusalError
from mopeq_edge.vision.sample import Sampling

TEMPERATURE, TOP_K, TOP_P = 0.8, 40, 0.95
"""Where a request says nothing: llama-server's."""
MOST_TOKENS = 2**20
MOST_STOPS = 16
MOST_TOP = 20
MOST_PROMPTS = 128
MOST_MESSAGES = 512

_NOT_HERE: Mapping[str, tuple[Any, ...]] = {
    **{"n": (1,), "best_of": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},)},
    **{"tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "suffix": ("",), "audio": ()},
    **{"response_format": ({"type": "text"},), "modalities": (["text"],), "grammar": ("",), "json_schema": ({},)},
}
"""Fields that would change the answer and are not done here, and the values that ask for nothing."""


@dataclass(frozen=True)
class Generation:
    """How to go on behind a prompt. ``most`` None: as far as the context reaches."""

    sampling: Sampling
    most: int | None
    stops: tuple[str, ...]
    n_top: int | None
    """Likeliest tokens to list for each; None: no log-probabilities."""
    stream: bool
    with_usage: bool
    """Whether a stream ends with the usage."""


@dataclass(frozen=True)
class Message:
    """What the user said, with pictures in the text's places, and what was answered; None: this is asked."""

    parts: tuple[str | Picture, ...]
    answer: str | None = None


@dataclass(frozen=True)
class ChatRequest:
    """A conversation that ends with a question."""

    system: str
    messages: tuple[Message, ...]
    generation: Generation


@dataclass(frozen=True)
class CompletionRequest:
    """Prompts as texts or token ids; ``echo``: give them back too, with their log-probabilities."""

    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool
    generation: Generation


def parse_chat(body: bytes) -> ChatRequest:
    """``POST /v1/chat/completions``. Raises :class:`RefusalError` that names the field."""
    fields = Fields(parse_object(body))
    fields.none_of(_NOT_HERE)
    wanted = fields.flag("logprobs")
    n_top = fields.whole("top_logprobs", 0, MOST_TOP, 0) if wanted else None
    found = fields.raw("messages")
    if not isinstance(found, list) or not found or len(found) > MOST_MESSAGES:
        raise fields.wrong("messages", f"a list of 1 to {MOST_MESSAGES} messages")
    system, messages = _conversation(found)
    return ChatRequest(system, messages, _generation(fields, n_top, None))


def parse_completion(body: bytes) -> CompletionRequest:
    """``POST /v1/completions``. Raises :class:`RefusalError` that names the field."""
    fields = Fields(parse_object(body))
    fields.none_of(_NOT_HERE)
    echo = fields.flag("echo")
    prompts = _prompts(fields)
    n_top = fields.whole("logprobs", 0, MOST_TOP, None)
    generation = _generation(fields, n_top, 16)
    if generation.stream and len(prompts) > 1:
        raise RefusalError("stream: one prompt at a time", param="prompt")
    return CompletionRequest(prompts, echo, generation)


def _generation(fields: Fields, n_top: int | None, default: int | None) -> Generation:
    least = 0 if fields.flag("echo") else 1
    most = fields.whole("max_completion_tokens", least, MOST_TOKENS, None)
    if most is None:
        most = fields.whole("max_tokens", least, MOST_TOKENS, default)
    seed = fields.whole("seed", -(2**63), 2**64, None)
    sampling = Sampling(
        temperature=fields.number("temperature", 0, 2, TEMPERATURE),
        # -1 is how some clients say all
        top_k=max(fields.whole("top_k", -1, 2**31, TOP_K), 0),
        top_p=max(fields.number("top_p", 0, 1, TOP_P), 1e-6),
        seed=secrets.randbits(63) if seed is None else seed % 2**63,
    )
    streaming = Fields(fields.get("stream_options", lambda x: isinstance(x, dict), "an object", {}), "stream_options.")
    return Generation(sampling, most, _stops(fields), n_top, fields.flag("stream"), streaming.flag("include_usage"))


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.raw("stop")
    found = [value] if isinstance(value, str) else value or []
    # harnesses send null among them
    found = [stop for stop in found if stop is not None] if isinstance(found, list) else found
    if not isinstance(found, list) or len(found) > MOST_STOPS or not all(is_text(x) and x for x in found):
        raise fields.wrong("stop", f"a text or a list of at most {MOST_STOPS} texts that are not empty")
    return tuple(found)


def _prompts(fields: Fields) -> tuple[str | tuple[int, ...], ...]:
    value = fields.raw("prompt")
    expected = f"a text, token ids, or a list of at most {MOST_PROMPTS} of either, none of them empty"
    several = isinstance(value, list) and any(isinstance(item, (str, list)) for item in value)
    prompts = value if several else [value]
    if not isinstance(prompts, list) or len(prompts) > MOST_PROMPTS:
        raise fields.wrong("prompt", expected)
    found: list[str | tuple[int, ...]] = []
    for prompt in prompts:
        if prompt and is_text(prompt):
            found.append(prompt)
        elif isinstance(prompt, list) and prompt and all(type(x) is int and 0 <= x < 2**31 for x in prompt):
            found.append(tuple(prompt))
        else:
            raise fields.wrong("prompt", expected)
    return tuple(found)


def _conversation(found: Sequence[Any]) -> tuple[str, tuple[Message, ...]]:
    """What the system says, and questions with their answers. Messages of the user in a row are one."""
    system: list[str] = []
    messages: list[Message] = []
    asked: list[str | Picture] = []
    for i, item in enumerate(found):
        path = f"messages[{i}]"
        if not isinstance(item, dict):
            raise RefusalError(f"{path} is no object with role and content", param=path)
        role, content = item.get("role"), item.get("content")
        if role in ("system", "developer"):
            system.append("".join(_texts(content, path)))
        elif role == "user":
            parts = _parts(content, path)
            asked += ["\n", *parts] if asked else parts
        elif role == "assistant":
            if not asked:
                raise RefusalError(f"{path} is an answer to nothing; expected a question of the user first", param=path)
            messages.append(Message(tuple(asked), "".join(_texts(content, path))))
            asked = []
        else:
            raise Fields(item, f"{path}.").wrong("role", "system, user or assistant")
    if not asked:
        raise RefusalError("the last message is not the user's", param="messages")
    return "\n".join(system), (*messages, Message(tuple(asked)))


def _texts(content: Any, path: str) -> list[str]:
    parts = _parts(content, path)
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) != len(parts):
        raise RefusalError(f"{path}.content has a picture; only the user's may", param=f"{path}.content")
    return texts


def _parts(content: Any, path: str) -> list[str | Picture]:
    if is_text(content):
        return [content]
    if not isinstance(content, list) or not content:
        raise RefusalError(f"{path}.content is no text and no list of parts", param=f"{path}.content")
    found: list[str | Picture] = []
    for i, part in enumerate(content):
        where = f"{path}.content[{i}]"
        if is_text(part):
            found.append(part)
            continue
        if not isinstance(part, dict):
            raise RefusalError(f"{where} is no object with a type", param=where)
        fields = Fields(part, f"{where}.")
        if part.get("type") == "text":
            text = part.get("text")
            if not is_text(text):
                raise fields.wrong("text", "a text")
            found.append(str(text))
        elif part.get("type") == "image_url":
            found.append(parse_image(part.get("image_url"), f"{where}.image_url"))
        else:
            raise fields.wrong("type", "text or image_url")
    return found
