"""Windows against hand-made ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mopeq_edge.errors import MopeqError
from mopeq_edge.evaluate.chunks import cut_text, first_counted, read_text, windows


class LetterTokenizer:
    """One token a letter: a is 1, b is 2. Adds BOS 99 if it is asked for special tokens and wants one."""

    bos = 99

    def __init__(self, add_bos: bool) -> None:
        self.add_bos = add_bos

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = False) -> np.ndarray:
        assert not parse_special
        bos = [self.bos] if add_special and self.add_bos else []
        return np.array([*bos, *(ord(letter) - 96 for letter in text)], np.int32)


def test_the_tail_is_dropped_and_without_bos_nothing_is_replaced() -> None:
    cut = windows(np.arange(10, dtype=np.int32), 3)
    assert cut.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert cut.dtype == np.int32


def test_bos_takes_the_first_place_of_each_window_and_leaves_the_input_alone() -> None:
    tokens = np.arange(8, dtype=np.int32)
    assert windows(tokens, 4, bos=99).tolist() == [[99, 1, 2, 3], [99, 5, 6, 7]]
    assert tokens.tolist() == list(range(8))


@pytest.mark.parametrize(("n_chunks", "expected"), [(1, 1), (2, 2), (7, 3), (None, 3)])
def test_at_most_n_chunks(n_chunks: int | None, expected: int) -> None:
    assert len(windows(np.zeros(11, np.int32), 3, n_chunks=n_chunks)) == expected


def test_a_text_is_cut_with_the_bos_that_the_vocabulary_adds() -> None:
    assert cut_text(LetterTokenizer(add_bos=True), "abcdefg", 4).tolist() == [[99, 1, 2, 3], [99, 5, 6, 7]]
    assert cut_text(LetterTokenizer(add_bos=False), "abcdefg", 4).tolist() == [[1, 2, 3, 4]]


def test_one_window_is_enough_and_less_is_an_error() -> None:
    assert windows(np.zeros(4, np.int32), 4).shape == (1, 4)
    with pytest.raises(MopeqError, match=r"has 3 tokens, too few for one window of 4"):
        windows(np.zeros(3, np.int32), 4)


@pytest.mark.parametrize(("n_ctx", "n_chunks"), [(1, None), (0, None), (4, 0), (4, -1)])
def test_sizes_that_measure_nothing(n_ctx: int, n_chunks: int | None) -> None:
    with pytest.raises(MopeqError, match="nothing"):
        windows(np.zeros(20, np.int32), n_ctx, n_chunks=n_chunks)


@pytest.mark.parametrize(("n_ctx", "half"), [(512, 256), (7, 3), (2, 1)])
def test_where_counting_starts(n_ctx: int, half: int) -> None:
    assert first_counted(n_ctx, "second-half") == half
    assert first_counted(n_ctx, "all") == 0


def test_reading_drops_one_final_newline_and_keeps_other_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("é\r\nb\n\n".encode())
    assert read_text(path) == "é\r\nb\n"


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MopeqError, match=r"missing.txt: cannot be read \(No such file"):
        read_text(tmp_path / "missing.txt")
    path = tmp_path / "latin.txt"
    path.write_bytes(b"abc\xe9")
    with pytest.raises(MopeqError, match=r"latin.txt: not UTF-8 \(at byte 3\)"):
        read_text(path)
