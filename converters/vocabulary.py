"""A byte-level vocabulary: tokens, their types, merges and special tokens, as llama.cpp wants them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from converters.pre_tokenizer import pre_tokenizer_name
from mopeq_edge.errors import FormatError, SourceError
from mopeq_edge.source.checkpoint import read_json_object

NO_VOCABULARY = "(no vocabulary)"
"""In place of a pre-tokenizer's name: leave the vocabulary out. For those who look at the other key-values alone, where
there is no transformers."""

_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_SPECIAL_ENDS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))


def add_bpe_vocabulary(
    writer: Any, directory: Path, vocab_size: int, pre: str | None, *, add_bos: bool | None = None, n_further: int = 0
) -> None:
    """Add the vocabulary in ``directory``, filled up to ``vocab_size`` tokens, to a ``gguf.GGUFWriter``.

    ``pre`` overrides the pre-tokenizer's name (:data:`NO_VOCABULARY`: adds nothing), ``add_bos`` what the tokenizer
    says about BOS. The ``n_further`` tokens behind ``vocab_size`` are left out. Raises :class:`SourceError` if there is
    no tokenizer, it does not fit the model or llama.cpp has no pre-tokenizer like it.
    """
    if pre == NO_VOCABULARY:
        return
    if is_byte_fallback(directory):
        raise SourceError(
            f"{directory}: its tokenizer.json is of the SentencePiece kind (byte_fallback), expected a byte-level one: "
            "llama.cpp's converter reads no other for this architecture; use the tokenizer of these weights"
        )
    tokenizer = load_tokenizer(directory)
    check_fits(directory, tokenizer, vocab_size, n_further)
    name = pre_tokenizer_name(directory, tokenizer, pre)
    tokens, types = tokens_and_types(tokenizer, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = special_tokens(directory, load_merges=True)
    if not special.merges:
        raise SourceError(f"{directory}: the tokenizer has no merges, expected a byte-pair one; not supported yet")
    add_special_tokens(writer, special, add_bos)


def special_tokens(directory: Path, *, load_merges: bool = False, n_vocab: int | None = None) -> Any:
    """A ``gguf.SpecialVocab`` of ``directory`` that decides as llama.cpp's copy of it. ``n_vocab``: ids end there."""
    try:
        special = gguf.SpecialVocab(directory, load_merges=load_merges, n_vocab=n_vocab)
        _follow_post_processor(special, directory)
    except FormatError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError) as error:
        # the gguf package takes the files to be of the form that tokenizers writes
        raise SourceError(
            f"{directory}: its special tokens cannot be read ({type(error).__name__}: {error}); download it again"
        ) from None
    return special


def add_special_tokens(writer: Any, special: Any, add_bos: bool | None) -> None:
    """Merges, ids of special tokens, whether they are added, chat template; ``add_bos`` overrides what is said."""
    if add_bos is not None and "bos" in special.add_special_token:
        special.add_special_token["bos"], add_bos = add_bos, None
    special.add_to_gguf(writer, quiet=True)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)


def check_fits(directory: Path, tokenizer: Any, vocab_size: int, n_further: int = 0) -> None:
    """Refuse a tokenizer with ids that the model has no row for."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size + n_further:
        further = f" and {n_further} further" if n_further else ""
        raise SourceError(
            f"{directory}: the tokenizer has a token {largest}, but config.json has vocab_size {vocab_size}{further}; "
            "use the tokenizer of these weights"
        )


def is_byte_fallback(directory: Path) -> bool:
    """Whether tokenizer.json is a SentencePiece model written as byte pairs, as llama.cpp's converter tells it."""
    path = directory / "tokenizer.json"
    try:
        found = read_json_object(path) if path.is_file() else {}
    except FormatError:
        return False  # load_tokenizer says what is wrong with it
    model, decoder = found.get("model"), found.get("decoder")
    return (
        isinstance(model, dict)
        and isinstance(decoder, dict)
        and model.get("type") == "BPE"
        and bool(model.get("byte_fallback"))
        and decoder.get("type") == "Sequence"
    )


def load_tokenizer(directory: Path) -> Any:
    """The checkpoint's tokenizer; code that it may carry is never run."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise SourceError(
            f"{directory}: reading its tokenizer needs transformers; run: pip install 'mopeq-edge[calibrate]'"
        ) from None
    # transformers reads config.json too, and warns of models that it does not know, which changes no tokenizer
    log = logging.getLogger("transformers.configuration_utils")
    was, log.disabled = log.disabled, True
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except BaseException as error:
        # transformers and tokenizers raise whatever they like for a bad file, bare Exception included; a panic of the
        # latter is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise SourceError(f"{directory}: its tokenizer cannot be loaded ({reason}); download its files again") from None
    finally:
        log.disabled = was


def tokens_and_types(tokenizer: Any, vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and ``gguf.TokenType`` of ids 0 to ``vocab_size`` - 1; ids without a token become ``[PAD…]``."""
    text_of = {number: text for text, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens: list[str] = []
    types: list[int] = []
    for number in range(vocab_size):
        text = text_of.get(number)
        kind = gguf.TokenType.NORMAL
        if text is None:
            text, kind = f"[PAD{number}]", gguf.TokenType.UNUSED
        elif number in added:
            if not added[number].normalized:
                # llama.cpp looks for added tokens in text that was normalized, so normalize them too
                text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
            if added[number].special or looks_special(text):
                kind = gguf.TokenType.CONTROL
            else:
                text, kind = text.replace("\N{LOWER ONE EIGHTH BLOCK}", " "), gguf.TokenType.USER_DEFINED
        tokens.append(text)
        types.append(int(kind))
    return tokens, types


def looks_special(text: str) -> bool:
    """Some checkpoints do not mark their control tokens as special."""
    return text in _SPECIAL or any(text.startswith(start) and text.endswith(end) for start, end in _SPECIAL_ENDS)


def _follow_post_processor(special: Any, directory: Path) -> None:
    """Whether BOS and EOS are added: what tokenizer.json does counts, not what tokenizer_config.json says.

    The released gguf package has it the other way round; llama.cpp's own copy of it decides like this.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return
    post: Mapping[str, Any] = read_json_object(path).get("post_processor") or {}
    adds: dict[str, bool] = {}
    for step in post.get("processors", [post]):
        if step.get("type") == "ByteLevel":
            adds.setdefault("bos", False)
            adds.setdefault("eos", False)
        elif step.get("type") == "TemplateProcessing" and len(single := step.get("single", [])) > 1:
            if "SpecialToken" in single[0]:
                adds["bos"] = True
            if "SpecialToken" in single[-1]:
                adds["eos"] = True
    special.add_special_token = {**adds, **{k: v for k, v in special.add_special_token.items() if k not in adds}}
