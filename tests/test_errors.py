"""Messages: one line of limited length that a terminal shows and does not obey."""

from __future__ import annotations

import pytest

from mopeq_edge.errors import MOST_CHARACTERS, FormatError, NoRoomError, printable, shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("as it is: 'ü' 🚀", "as it is: 'ü' 🚀"),
        ("two\nlines\r\nand\ta tab", "two lines and a tab"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\udcff\ud800", "\\udcff\\ud800"),
        ("right\u202eleft", "right\\u202eleft"),
    ],
)
def test_printable(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert str(FormatError(text)) == expected
    assert str(FormatError(text)).encode()


def test_long_names_are_cut() -> None:
    text = str(FormatError("start " + "x" * 10**6 + " end"))
    assert len(text) == MOST_CHARACTERS
    assert text.startswith("start xxx")
    assert text.endswith("xxx end")
    assert "[…]" in text


def test_shown() -> None:
    assert shown([1, 2]) == "[1, 2]"
    assert len(shown(["x" * 1000] * 10**6)) <= 120


def test_the_room_that_is_needed_stays() -> None:
    error = NoRoomError(5, "too\nsmall")
    assert (error.smallest, str(error)) == (5, "too small")
