"""The model and the tower, used by one thread: a request becomes events.

What the context holds from the request before is kept as far as the next begins with the same tokens and pictures.
Embeddings of the last pictures are kept too. The tower is opened for pictures that are new and closed behind them:
that takes a fraction of a second, and on a device the memory is worth more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mopeq_edge.binding import UBATCH, Floats, LlamaModel, Tokens
from mopeq_edge.errors import PictureError, PlanError
from mopeq_edge.serving.events import Delta, Event, Finish, TokenChance
from mopeq_edge.serving.images import Picture
from mopeq_edge.serving.refusal import RefusalError
from mopeq_edge.serving.requests import ChatRequest, CompletionRequest, Generation, Message
from mopeq_edge.serving.text import Writer
from mopeq_edge.vision.description import Description, Tiles
from mopeq_edge.vision.image_file import decode_image
from mopeq_edge.vision.prompt import Turn, lay_out_turns
from mopeq_edge.vision.sample import chooser
from mopeq_edge.vision.session import VisionSession
from mopeq_edge.vision.tower import Tower

PICTURES = 8
"""Pictures whose embeddings are kept."""
MOST_PIXELS = 40_000_000
MOST_CTX = 8192
"""Context if none is asked for, or what the model was trained on if that is less."""
_ECHO_BATCH = 64
"""Rows of logits at once: of a vocabulary of 129,280 tokens they take 33 MB."""

Cancel = Callable[[], bool]


class CancelledError(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Files:
    """What is served. ``vision`` None: no pictures and no chat. ``n_ctx`` 0: as :data:`MOST_CTX` says."""

    gguf: Path
    vision: Path | None
    n_ctx: int = 0
    threads: int = 1
    n_gpu_layers: int = 0
    keep_tower: bool = False
    keep_prefix: bool = True
    most_pixels: int = MOST_PIXELS


class Engine:
    """A loaded model. One object belongs to one thread; raises :class:`MopeqError` for files that do not fit."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._description: Description | None = None
        if files.vision is not None:
            self._description = VisionSession(files.vision, files.threads).describe()
        n_ctx = files.n_ctx
        if not n_ctx:
            with LlamaModel(files.gguf, vocab_only=True) as vocabulary:
                n_ctx = min(vocabulary.n_ctx_train or MOST_CTX, MOST_CTX)
        self._model = LlamaModel(
            files.gguf, n_ctx=n_ctx, n_batch=UBATCH, n_threads=files.threads, n_gpu_layers=files.n_gpu_layers
        )
        if self._description is not None and self._description.n_embd != self._model.n_embd:
            raise PlanError(
                f"{files.vision}: makes embeddings of {self._description.n_embd} numbers, {files.gguf} reads "
                f"{self._model.n_embd}; use the two files of one conversion"
            )
        self._tower: Tower | None = None
        self._seen: OrderedDict[tuple[str, bool], Floats] = OrderedDict()
        self._held: list[Hashable] = []
        """What the context has at each position."""

    @property
    def n_ctx(self) -> int:
        """Tokens of context."""
        return self._model.n_ctx

    def close(self) -> None:
        """Free the model."""
        self._model.close()

    def answer(self, request: ChatRequest | CompletionRequest, cancelled: Cancel) -> Iterator[Event]:
        """Raises :class:`RefusalError` for what cannot be answered, :class:`CancelledError` soon after that."""
        if isinstance(request, ChatRequest):
            self._forget()
            yield from self._chat(request, cancelled)
            return
        for index, prompt in enumerate(request.prompts):
            self._forget()
            tokens = self._tokens_of(prompt)
            if request.echo:
                yield self._echo(index, prompt, tokens, request.generation, cancelled)
            yield from self._go_on(index, [tokens], tokens.tolist(), request.generation, cancelled)

    def _forget(self) -> None:
        if not self._files.keep_prefix:
            self._held = []

    def _chat(self, request: ChatRequest, cancelled: Cancel) -> Iterator[Event]:
        description = self._description
        if description is None:
            raise RefusalError("chat needs a vision file, which says how a question is laid out; use /v1/completions")
        pictures = [part for message in request.messages for part in message.parts if isinstance(part, Picture)]
        embeddings = self._see(description, pictures, cancelled)
        turns = [_turn(description, message) for message in request.messages]
        try:
            parts = lay_out_turns(self._model, description, turns, embeddings, request.system)
        except PlanError as error:
            raise RefusalError(str(error), param="messages") from None
        keys = iter(self._keys(description, pictures))
        held: list[Hashable] = []
        for part in parts:
            held += part.tolist() if part.ndim == 1 else [(key, i) for key in [next(keys)] for i in range(len(part))]
        yield from self._go_on(0, parts, held, request.generation, cancelled, strip=True)

    def _keys(self, description: Description, pictures: Sequence[Picture]) -> list[tuple[str, bool]]:
        """What tells embeddings apart: the picture, and whether it is one tile because there are many."""
        layout = description.layout
        whole = isinstance(layout, Tiles) and len(pictures) > layout.most_tiled
        return [(picture.digest, whole) for picture in pictures]

    def _see(self, description: Description, pictures: Sequence[Picture], cancelled: Cancel) -> list[Floats]:
        files, found = self._files, []
        try:
            for key, picture in zip(self._keys(description, pictures), pictures, strict=True):
                if key not in self._seen:
                    assert files.vision is not None
                    if self._tower is None:
                        self._tower = Tower(files.vision, files.threads)
                    self._seen[key] = self._tower.embed_one(
                        decode_image(picture.data, picture.path, files.most_pixels),
                        len(pictures),
                        picture.path,
                        between=lambda: _check(cancelled),
                    )
                self._seen.move_to_end(key)
                found.append(self._seen[key])
        except PictureError as error:
            raise RefusalError(str(error), param=picture.path, code="invalid_image") from None
        finally:
            while len(self._seen) > PICTURES:
                self._seen.popitem(last=False)
            if not files.keep_tower:
                self._tower = None
        return found

    def _tokens_of(self, prompt: str | tuple[int, ...]) -> Tokens:
        if isinstance(prompt, str):
            tokens = self._model.tokenize(prompt, add_special=True, parse_special=True)
        else:
            tokens = np.array(prompt, np.int32)
        if not len(tokens) or tokens.max() >= self._model.n_vocab:
            raise RefusalError(f"prompt: expected token ids below {self._model.n_vocab}", param="prompt")
        return tokens

    def _go_on(
        self,
        index: int,
        parts: Sequence[Tokens | Floats],
        held: list[Hashable],
        wanted: Generation,
        cancelled: Cancel,
        *,
        strip: bool = False,
    ) -> Iterator[Event]:
        """Events of one choice; ``held`` names what is at each position of ``parts``."""
        length, model = len(held), self._model
        room = self._room(length)
        kept = self._known(held)
        most = room if wanted.most is None else min(wanted.most, room)
        writer, chances = Writer(wanted.stops, strip=strip), list[TokenChance]()
        choose = chooser(wanted.sampling)

        def pick(row: Floats) -> int:
            token = choose(row)
            if wanted.n_top is not None:
                chances.append(self._chance(row, token, wanted.n_top))
            return token

        n_out, reason = 0, "length"
        if most:
            self._held = []
            tokens = model.continuation(parts, most, pick, kept=kept, between=lambda: _check(cancelled))
            try:
                for token in tokens:
                    n_out += 1
                    held.append(token)
                    _check(cancelled)
                    text = writer.add(model.piece(token))
                    if text or writer.stopped:
                        yield Delta(index, text, tuple(chances))
                        chances.clear()
                    if writer.stopped:
                        break
            finally:
                # what is not decoded, the last token at least, is not there
                self._held = held[: model.n_past]
            if writer.stopped or n_out < most:
                reason = "stop"
        rest = writer.end()
        # the token that ended it was not said
        said = tuple(chances[: len(chances) - (reason == "stop" and not writer.stopped)])
        if rest or said:
            yield Delta(index, rest, said)
        yield Finish(index, reason, length, n_out, kept)

    def _known(self, held: Sequence[Hashable]) -> int:
        """Positions of the context that begin ``held``; fewer than all, since the last one's logits are needed."""
        known = 0
        for have, want in zip(self._held, held[:-1], strict=False):
            if have != want:
                break
            known += 1
        return known

    def _room(self, length: int) -> int:
        room = self._model.n_ctx - length
        if room < 1:
            raise RefusalError(
                f"the request has {length} tokens, the context of {self._model.n_ctx} leaves no room for an answer; "
                "send less, or start the server with a larger --ctx-size",
                code="context_length_exceeded",
            )
        return room

    def _echo(
        self, index: int, prompt: str | tuple[int, ...], tokens: Tokens, wanted: Generation, cancelled: Cancel
    ) -> Delta:
        """The prompt, and where they are wanted the chances of its tokens, each behind those before it."""
        pieces = [self._model.piece(int(token)) for token in tokens]
        text = prompt if isinstance(prompt, str) else b"".join(pieces).decode(errors="replace")
        if wanted.n_top is None:
            return Delta(index, text)
        self._room(len(tokens))
        self._held = []
        found = [TokenChance(int(tokens[0]), pieces[0], None)]
        for at, rows in self._model.row_batches([tokens], most=_ECHO_BATCH):
            _check(cancelled)
            behind = tokens[at + 1 : at + 1 + len(rows)]
            found += [self._chance(row, int(token), wanted.n_top) for row, token in zip(rows, behind, strict=False)]
        # whatever else is kept: what follows goes on from here
        self._held = tokens.tolist()
        return Delta(index, text, tuple(found))

    def _chance(self, row: Floats, token: int, n_top: int) -> TokenChance:
        logprobs = _log_softmax(row)
        best = np.argsort(-row, kind="stable")[:n_top] if n_top else ()
        top = tuple((int(t), self._model.piece(int(t)), float(logprobs[t])) for t in best)
        return TokenChance(token, self._model.piece(token), float(logprobs[token]), top)


def _turn(description: Description, message: Message) -> Turn:
    """A picture stands where the message has it, unless its text has the marks; then these say where."""
    prompt = description.prompt
    pictures = [part for part in message.parts if isinstance(part, Picture)]
    texts = [part for part in message.parts if isinstance(part, str)]
    if not prompt.mark or any(prompt.mark in text for text in texts):
        return Turn("".join(texts), len(pictures), message.answer)
    text = "".join(part if isinstance(part, str) else prompt.own for part in message.parts)
    return Turn(text, len(pictures), message.answer)


def _log_softmax(row: Floats) -> npt.NDArray[np.float64]:
    values = row.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    return values


def _check(cancelled: Cancel) -> None:
    if cancelled():
        raise CancelledError
