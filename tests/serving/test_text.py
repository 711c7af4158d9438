"""Text as it becomes whole: characters of several tokens, stops across tokens."""

from __future__ import annotations

import random

import pytest

from mopeq_edge.serving.text import Writer


def written(pieces: list[bytes], *stops: str, strip: bool = False) -> tuple[list[str], bool]:
    writer = Writer(stops, strip=strip)
    found = []
    for piece in pieces:
        found.append(writer.add(piece))
        if writer.stopped:
            break
    return [*found, writer.end()], writer.stopped


def test_a_character_of_several_tokens_comes_at_once() -> None:
    smile = "😀".encode()
    assert written([b"a", smile[:1], smile[1:3], smile[3:], b"b"]) == (["a", "", "", "😀", "b", ""], False)
    assert written([b"a", smile[:2]]) == (["a", "", "\ufffd"], False)


def test_what_may_begin_a_stop_is_kept_back() -> None:
    assert written([b"one\n", b"\nt", b"wo"], "\n\n") == (["one", "", ""], True)
    assert written([b"one\n", b"two\n"], "\n\n") == (["one", "\ntwo", "\n"], False)
    # the first in the text, not in the list
    assert written([b"abcdef"], "ef", "cd") == (["ab", ""], True)


def test_white_space_at_the_beginning() -> None:
    assert written([b" ", b"\n", b" a ", b"b "], strip=True) == (["", "", "a ", "b ", ""], False)
    assert written([b" \n\nb"], "\n\n", strip=True) == (["b", ""], False)


@pytest.mark.parametrize("seed", range(20))
def test_like_finding_it_in_the_whole_text(seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choices("abé", k=40))
    stops = ["".join(draw.choices("abé", k=draw.randint(2, 4))) for _ in range(2)]
    raw, pieces = text.encode(), []
    while raw:
        n = draw.randint(1, 4)
        pieces.append(raw[:n])
        raw = raw[n:]
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    # a stop is found with the token that completes it: of two that overlap the one that is whole first
    first = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
    found, stopped = written(pieces, *stops)
    assert stopped == bool(ends)
    if first is None:
        assert "".join(found) == text
    else:
        whole = {text[: text.find(stop)] for stop in stops if stop in text}
        assert "".join(found) in whole
