"""A model in llama.cpp through the low-level binding: tokens or embeddings in, logits out.

Only the C API is used, so that every number here is llama.cpp's own. The log is kept silent; its last
error line becomes the message when a call fails.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from mopeq_edge.binding_log import log_tail
from mopeq_edge.errors import MopeqError
from mopeq_edge.graph_nodes import NodeReader
from mopeq_edge.runtime.locate import import_llama_cpp, library_dir
from mopeq_edge.runtime.per_expert import why_it_does_not_load

Tokens = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

UBATCH = 512
"""Most tokens that one graph computes at once: llama.cpp's own default."""


class LlamaModel:
    """A GGUF that llama.cpp has loaded, with one context of one sequence; free it with ``with`` or ``close``.

    One object belongs to one thread. Raises :class:`MopeqError` with llama.cpp's own reason when the file
    cannot be loaded or the context cannot be made.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int = 0,
        n_batch: int = UBATCH,
        n_threads: int | None = None,
        vocab_only: bool = False,
        use_mmap: bool = True,
        n_gpu_layers: int = 0,
        plain: bool = False,
        nodes: NodeReader | None = None,
    ) -> None:
        """Load ``path``.

        ``n_ctx``: tokens of context, 0 for the length the model was trained on. ``n_batch``: most tokens
        of one decode call. ``n_threads``: None for all CPUs this process may use. ``vocab_only``: only the
        tokenizer; the file then needs ``general.architecture`` and ``tokenizer.*`` keys and no tensor.
        ``plain``: an F32 cache, no flash attention and no repacked weights. llama.cpp then computes one
        token and many tokens in nearly the same way, so that the two can be compared; without it they
        differ by the rounding of F16 and of the activations, which a near tie in a router amplifies.
        ``nodes``: is given results inside the graph while it is computed.
        """
        self.path = Path(path)
        self._c = import_llama_cpp()
        self._log = log_tail(self._c)
        self._model: Any = None
        self._context: Any = None
        self._batch: Any = None
        self._nodes, self._callback = nodes, None if nodes is None else nodes.callback(self._c)
        self._embedding_batch: Any = None
        self._closed = False
        self.n_past = 0
        """Tokens in the context."""
        self._log.acquire()
        try:
            self._load(vocab_only, use_mmap, n_gpu_layers, plain)
            self._vocab = self._c.llama_model_get_vocab(self._model)
            if not vocab_only:
                self._open_context(n_ctx, n_batch, n_threads or _available_cpus(), plain)
        except BaseException:
            self.close()
            raise

    def _load(self, vocab_only: bool, use_mmap: bool, n_gpu_layers: int, plain: bool) -> None:
        c = self._c
        c.llama_backend_init()
        params = c.llama_model_default_params()
        params.vocab_only = vocab_only
        params.load_mode = c.LLAMA_LOAD_MODE_MMAP if use_mmap else c.LLAMA_LOAD_MODE_NONE
        params.n_gpu_layers = n_gpu_layers
        params.use_extra_bufts = not plain
        self._log.clear()
        self._model = c.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            known = why_it_does_not_load(self.path, library_dir())
            raise MopeqError(known or f"{self.path}: llama.cpp cannot load it: {self._log.reason()}")

    def _open_context(self, n_ctx: int, n_batch: int, n_threads: int, plain: bool) -> None:
        c = self._c
        params = c.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = n_batch
        params.n_ubatch = min(n_batch, UBATCH)
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = n_threads
        params.no_perf = True
        if plain:
            params.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.type_k = params.type_v = c.GGML_TYPE_F32
        if self._callback is not None:
            params.cb_eval = self._callback
        self._log.clear()
        self._context = c.llama_init_from_model(self._model, params)
        if not self._context:
            raise MopeqError(
                f"{self.path}: llama.cpp cannot make a context of {n_ctx or self.n_ctx_train} tokens: "
                f"{self._log.reason()}"
            )
        self._n_batch = n_batch
        self._batch = self._new_batch(0)

    def _new_batch(self, n_embd: int) -> Any:
        """A batch of the one sequence: of tokens, or of embeddings of ``n_embd`` numbers."""
        batch = self._c.llama_batch_init(self._n_batch, n_embd, 1)
        for row in range(self._n_batch):
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = 0
        return batch

    def close(self) -> None:
        """Free the context and the model. May be called twice."""
        if self._closed:
            return
        for batch in (self._batch, self._embedding_batch):
            if batch is not None:
                self._c.llama_batch_free(batch)
        if self._context:
            self._c.llama_free(self._context)
        if self._model:
            self._c.llama_model_free(self._model)
        self._batch = self._embedding_batch = self._context = self._model = self._vocab = None
        self._log.release()
        self._closed = True

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def n_vocab(self) -> int:
        """Tokens in the vocabulary, the width of a row of logits."""
        return int(self._c.llama_vocab_n_tokens(self._vocab))

    @property
    def n_ctx_train(self) -> int:
        """Tokens of context that the model was trained on."""
        return int(self._c.llama_model_n_ctx_train(self._model))

    @property
    def n_ctx(self) -> int:
        """Tokens that fit into the context; llama.cpp may round the wish up."""
        return int(self._c.llama_n_ctx(self._open()))

    @property
    def add_bos(self) -> bool:
        """Whether the vocabulary wants texts to begin with :attr:`bos`."""
        return bool(self._c.llama_vocab_get_add_bos(self._vocab))

    @property
    def bos(self) -> int:
        """The token that begins a text, -1 if the vocabulary has none."""
        return int(self._c.llama_vocab_bos(self._vocab))

    @property
    def n_embd(self) -> int:
        """Width of an embedding that can be read in the place of a token."""
        return int(self._c.llama_model_n_embd_inp(self._model))

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = False) -> Tokens:
        """``text`` as token ids, int32 [n_tokens].

        ``add_special``: add the BOS and EOS that the vocabulary asks for. ``parse_special``: read
        ``<|...|>`` in the text as control tokens instead of as plain text.
        """
        data = text.encode()
        size = len(data) + 2
        for _ in range(2):
            tokens = np.empty(size, np.int32)
            buffer = tokens.ctypes.data_as(ctypes.POINTER(self._c.llama_token))
            n = self._c.llama_tokenize(self._vocab, data, len(data), buffer, size, add_special, parse_special)
            if n >= 0:
                return tokens[:n].copy()
            size = -n
        raise MopeqError(f"{self.path}: llama.cpp cannot tokenize a text of {len(data)} bytes; give a shorter one")

    def detokenize(self, tokens: npt.ArrayLike, special: bool = False) -> str:
        """Token ids [n_tokens] as text; ``special`` shows control tokens. Broken UTF-8 becomes U+FFFD."""
        ids = np.ascontiguousarray(tokens, np.int32)
        pointer = ids.ctypes.data_as(ctypes.POINTER(self._c.llama_token))
        size = 16 * len(ids) + 16
        for _ in range(2):
            text = ctypes.create_string_buffer(size)
            n = self._c.llama_detokenize(self._vocab, pointer, len(ids), text, size, False, special)
            if n >= 0:
                return text.raw[:n].decode(errors="replace")
            size = -n
        raise MopeqError(f"{self.path}: llama.cpp cannot turn {len(ids)} tokens into text")

    def piece(self, token: int) -> bytes:
        """The bytes of one token inside a text, none for a control token: a character may be several tokens."""
        size = 64
        for _ in range(2):
            text = ctypes.create_string_buffer(size)
            n = self._c.llama_token_to_piece(self._vocab, token, text, size, 0, False)
            if n >= 0:
                return text.raw[:n]
            size = -n
        raise MopeqError(f"{self.path}: llama.cpp cannot turn token {token} into text")

    def ends(self, token: int) -> bool:
        """Whether ``token`` ends generation."""
        return bool(self._c.llama_vocab_is_eog(self._vocab, token))

    def logits(self, tokens: npt.ArrayLike, first: int = 0) -> Floats:
        """Logits of a fresh sequence, float32 [n_tokens - first, n_vocab].

        Row i belongs to position ``first`` + i and rates the token after it. The tokens [n_tokens] are
        decoded in batches of ``n_batch``; positions before ``first`` cost no output row.
        """
        return self.mixed_logits([np.ascontiguousarray(tokens, np.int32)], first)

    def mixed_logits(self, parts: Sequence[Tokens | Floats], first: int = 0) -> Floats:
        """The same of a sequence in parts: int32 tokens [n], or float32 embeddings [n, n_embd] in the place of n
        tokens.
        """
        rows = np.empty((self._length(parts) - first, self.n_vocab), np.float32)
        for at, got in self.row_batches(parts, first):
            rows[at - first : at - first + len(got)] = got
        return rows

    def row_batches(
        self, parts: Sequence[Tokens | Floats], first: int = 0, *, kept: int = 0, most: int | None = None
    ) -> Iterator[tuple[int, Floats]]:
        """The same batch by batch, of at most ``most`` tokens: (position of the first row, rows).

        A view that is valid until the next batch. The first ``kept`` tokens of ``parts``, fewer than all, are in the
        context from an earlier call with the same beginning: what follows them there is forgotten.
        """
        kept = self._begin(parts, kept)
        start, size = 0, min(most or self._n_batch, self._n_batch)
        for part in parts:
            for at in range(min(max(kept - start, 0), len(part)), len(part), size):
                piece = part[at : at + size]
                got = self._decode(piece, start + at, first)
                yield start + at + len(piece) - len(got), got
            start += len(part)

    def step_logits(self, tokens: npt.ArrayLike) -> Floats:
        """The same rows as :meth:`logits`, decoded one token at a time as in generation.

        float32 [n_tokens, n_vocab].
        """
        ids = self._fresh(tokens)
        rows = np.empty((len(ids), self.n_vocab), np.float32)
        for position in range(len(ids)):
            rows[position] = self._decode(ids[position : position + 1], position, 0)[0]
        return rows

    def logits_after(self, prompt_tokens: npt.ArrayLike, tokens: npt.ArrayLike) -> Floats:
        """Logits behind the prompt [n_prompt] and behind each of ``tokens`` [n], decoded singly as in generation.

        float32 [n + 1, n_vocab].
        """
        prompt, ids = np.ascontiguousarray(prompt_tokens, np.int32), np.ascontiguousarray(tokens, np.int32)
        self._check_length(len(prompt) + len(ids))
        rows = [self.logits(prompt, first=len(prompt) - 1)[0]]
        for i in range(len(ids)):
            rows.append(self._decode(ids[i : i + 1], len(prompt) + i, 0)[0].copy())
        return np.stack(rows)

    def greedy(self, prompt_tokens: npt.ArrayLike, n: int) -> list[int]:
        """The likeliest continuation of the prompt [n_tokens], at most ``n`` tokens.

        It ends before a token that ends generation.
        """
        ids = np.ascontiguousarray(prompt_tokens, np.int32)
        return list(self.continuation([ids], n, lambda row: int(row.argmax())))

    def continuation(
        self,
        parts: Sequence[Tokens | Floats],
        n: int,
        choose: Callable[[Floats], int],
        *,
        kept: int = 0,
        between: Callable[[], object] = lambda: None,
    ) -> Iterator[int]:
        """At most ``n`` tokens behind the parts of :meth:`mixed_logits`, each as ``choose`` picks it from its logits.

        It ends before a token that ends generation. ``choose`` gets a row [n_vocab] that is valid during its call.
        ``kept`` as in :meth:`row_batches`; ``between`` is called after every batch of ``parts`` and may raise.
        """
        length = sum(len(part) for part in parts)
        self._check_length(length + n)
        last = np.empty((0, self.n_vocab), np.float32)
        for _, rows in self.row_batches(parts, length - 1, kept=kept):
            last = rows
            between()
        token = choose(last[-1])
        for position in range(length, length + n):
            if self.ends(token):
                return
            yield token
            if position + 1 < length + n:
                token = choose(self._decode(np.array([token], np.int32), position, 0)[0])

    def _open(self) -> Any:
        if not self._context:
            raise ValueError(f"{self.path}: has no context: it was opened with vocab_only or is closed")
        return self._context

    def _fresh(self, tokens: npt.ArrayLike) -> Tokens:
        """``tokens`` ready to decode, with the context emptied."""
        ids = np.ascontiguousarray(tokens, np.int32)
        self._begin([ids])
        return ids

    def _begin(self, parts: Sequence[Tokens | Floats], kept: int = 0) -> int:
        """Empty the context for ``parts`` behind its first ``kept`` tokens, and return how many it still has.

        None where llama.cpp cannot forget a part of them.
        """
        length = self._length(parts)
        if not 0 <= kept < length or kept > self.n_past:
            raise ValueError(f"cannot keep {kept} of {length} tokens: the context has {self.n_past}")
        memory = self._c.llama_get_memory(self._open())
        if not kept or not self._c.llama_memory_seq_rm(memory, 0, kept, -1):
            self._c.llama_memory_clear(memory, True)
            kept = 0
        self.n_past = kept
        return kept

    def _length(self, parts: Sequence[Tokens | Floats]) -> int:
        """Tokens of ``parts``, which are sound and fit into the context."""
        self._open()
        if not parts:
            raise ValueError("expected one row of tokens, got none")
        for part in parts:
            if part.ndim == 2 and (part.dtype != np.float32 or part.shape[1] != self.n_embd):
                raise ValueError(f"expected embeddings of {self.n_embd} float32, got {part.shape} of {part.dtype}")
            if part.ndim not in (1, 2) or not len(part) or (part.ndim == 1 and part.dtype != np.int32):
                raise ValueError(f"expected one row of tokens, got an array of shape {part.shape}")
        length = sum(len(part) for part in parts)
        self._check_length(length)
        return length

    def _check_length(self, n_tokens: int) -> None:
        if n_tokens > self.n_ctx:
            raise MopeqError(
                f"{self.path}: {n_tokens} tokens do not fit into its context of {self.n_ctx}; "
                "give fewer or open it with a larger n_ctx"
            )

    def _decode(self, part: Tokens | Floats, position: int, first: int) -> Floats:
        """Decode tokens [n] or embeddings [n, n_embd] at ``position``...; a view [n_out, n_vocab] of rows from
        ``first``.

        The view is valid until the next decode.
        """
        n = len(part)
        if part.ndim == 2:
            if self._embedding_batch is None:
                self._embedding_batch = self._new_batch(self.n_embd)
            batch = self._embedding_batch
            np.ctypeslib.as_array(batch.embd, part.shape)[:] = part
        else:
            batch = self._batch
            np.ctypeslib.as_array(batch.token, (n,))[:] = part
        wanted = np.arange(position, position + n) >= first
        np.ctypeslib.as_array(batch.pos, (n,))[:] = np.arange(position, position + n)
        np.ctypeslib.as_array(batch.logits, (n,))[:] = wanted
        batch.n_tokens = n
        self._log.clear()
        status = self._c.llama_decode(self._open(), batch)
        if self._nodes is not None:
            self._nodes.check()
        if status != 0:
            raise MopeqError(f"{self.path}: llama.cpp cannot decode (status {status}): {self._log.reason()}")
        self.n_past = position + n
        n_out = int(wanted.sum())
        if not n_out:
            return np.empty((0, self.n_vocab), np.float32)
        return np.ctypeslib.as_array(self._c.llama_get_logits(self._context), (n_out, self.n_vocab))


def library_version() -> str:
    """The llama.cpp in use, e.g. "llama.cpp 0.5.0 (llama-cpp-python 0.3.36)"."""
    c = import_llama_cpp()
    return f"llama.cpp {c.llama_version().decode()} (llama-cpp-python {c.__version__})"


def _available_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
