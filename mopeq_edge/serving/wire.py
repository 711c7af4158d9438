"""Events in OpenAI's words: whole answers, and the chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mopeq_edge.serving.events import Delta, Finish, TokenChance


@dataclass
class Choice:
    """What came of one choice so far."""

    index: int
    text: str = ""
    chances: list[TokenChance] = field(default_factory=list)
    finish: Finish | None = None


class Answer:
    """One answer to a chat or a completion; it takes events and says them."""

    def __init__(self, model: str, *, chat: bool, logprobs: bool) -> None:
        self._chat, self._logprobs, self._model = chat, logprobs, model
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._choices: dict[int, Choice] = {}

    def take(self, event: Delta | Finish) -> None:
        """Remember ``event``."""
        choice = self._choices.setdefault(event.index, Choice(event.index))
        if isinstance(event, Finish):
            choice.finish = event
            return
        choice.text += event.text
        choice.chances += event.chances

    def whole(self) -> dict[str, Any]:
        """The answer that is not a stream."""
        kind = "chat.completion" if self._chat else "text_completion"
        choices = []
        for choice in sorted(self._choices.values(), key=lambda choice: choice.index):
            reason = choice.finish.reason if choice.finish is not None else None
            own = self._own(choice.text, choice.chances, 0)
            if self._chat:
                own = {"message": {"role": "assistant", **own.pop("delta"), "refusal": None}, **own}
            choices.append({"index": choice.index, "finish_reason": reason, **own})
        return {**self._head(kind), "choices": choices, "usage": self.usage()}

    def first(self) -> dict[str, Any] | None:
        """The chunk that begins the stream of a chat."""
        return self._chunk(0, {"delta": {"role": "assistant", "content": ""}}, None) if self._chat else None

    def chunk(self, event: Delta | Finish) -> dict[str, Any]:
        """``event`` as a chunk; it must have been taken before."""
        if isinstance(event, Finish):
            return self._chunk(event.index, {"delta": {}} if self._chat else {"text": ""}, event.reason)
        before = len(self._choices[event.index].text) - len(event.text)
        return self._chunk(event.index, self._own(event.text, event.chances, before), None)

    def last(self) -> dict[str, Any]:
        """The chunk with the usage, which has no choice."""
        return {**self._head(self._chunk_kind), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens of all choices."""
        ends = [choice.finish for choice in self._choices.values() if choice.finish is not None]
        read, written = sum(e.prompt_tokens for e in ends), sum(e.completion_tokens for e in ends)
        return {
            **{"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
            "prompt_tokens_details": {"cached_tokens": sum(e.kept_tokens for e in ends)},
        }

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, index: int, own: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "finish_reason": reason, **own}
        return {**self._head(self._chunk_kind), "choices": [choice]}

    def _own(self, text: str, chances: Sequence[TokenChance], before: int) -> dict[str, Any]:
        """Text and log-probabilities of a choice; ``before`` are the characters before this text."""
        found: dict[str, Any] = {"delta": {"content": text}} if self._chat else {"text": text}
        if self._logprobs:
            found["logprobs"] = {"content": [_of_chat(c) for c in chances]} if self._chat else _legacy(chances, before)
        else:
            found["logprobs"] = None
        return found


def sse(chunk: dict[str, Any] | str) -> bytes:
    """One event of a stream."""
    text = chunk if isinstance(chunk, str) else json.dumps(chunk, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def _of_chat(chance: TokenChance) -> dict[str, Any]:
    top = [{"token": _text(data), "logprob": value, "bytes": list(data)} for _, data, value in chance.top]
    own = {"token": chance.text, "logprob": chance.logprob, "bytes": list(chance.data)}
    return {**own, "top_logprobs": top}


def _legacy(chances: Sequence[TokenChance], before: int) -> dict[str, Any]:
    """As ``/v1/completions`` has them: lists by token. Of tokens with the same text the likeliest is listed."""
    offsets, top = [], list[dict[str, float] | None]()
    for chance in chances:
        offsets.append(before)
        before += len(chance.text)
        best: dict[str, float] = {}
        for _, data, value in chance.top:
            best.setdefault(_text(data), value)
        if chance.logprob is not None:
            best.setdefault(chance.text, chance.logprob)
        top.append(None if chance.logprob is None else best)
    return {
        "tokens": [chance.text for chance in chances],
        "token_logprobs": [chance.logprob for chance in chances],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def _text(data: bytes) -> str:
    return data.decode(errors="replace")
