"""The errors that a user can cause. The CLI turns each into one line on stderr and exit code 1."""

from __future__ import annotations

import reprlib

MOST_CHARACTERS = 2000
"""Longest message: what a file calls its tensors may be as long as the file."""


def printable(text: str, most: int = MOST_CHARACTERS) -> str:
    """``text`` as one line of at most ``most`` characters that any terminal can be given.

    Names in messages come from files: escape sequences, newlines and bytes that are no UTF-8 are shown, not sent.
    """
    if len(text) > most:
        text = f"{text[: most * 3 // 4 - 5]} […] {text[len(text) - most // 4 :]}"
    text = text.replace("\r\n", " ").replace("\n", " ").replace("\t", " ")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object) -> str:
    """``value`` as it is written in Python, shortened: for a message about what a file has."""
    return printable(reprlib.repr(value), 120)


class MopeqError(Exception):
    """Base of all expected failures.

    The message is one line: the object, what was expected, what was found and what to do.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class SourceError(MopeqError):
    """A checkpoint or GGUF that cannot be read as a Mixture-of-Experts model."""


class FormatError(MopeqError):
    """A file that breaks its own format: GGUF, imatrix, safetensors or one of our artifacts."""


class PictureError(FormatError):
    """A file of a picture that is none, is damaged, too large, or too thin to be seen."""


class CalibrationError(MopeqError):
    """Text or statistics that cannot serve to calibrate this model."""


class PlanError(MopeqError):
    """A budget or a choice of types that no plan can meet."""


class NoRoomError(PlanError):
    """A budget below the smallest possible file, which has ``smallest`` bytes."""

    def __init__(self, smallest: int, message: str) -> None:
        super().__init__(message)
        self.smallest = smallest


class OutputError(MopeqError):
    """A place where the result cannot be written."""


class BusyError(OutputError):
    """A directory or an output that another run is working on."""


class DamagedError(MopeqError):
    """A GGUF whose bytes are not those that were written."""


class RuntimeMissingError(MopeqError):
    """llama.cpp libraries or tools that are not installed or do not work."""


class ExtraMissingError(MopeqError):
    """A package of an optional extra that is not installed."""


class ClusterError(MopeqError):
    """A cluster that cannot be reached, or whose machines cannot do the work."""


class PatchError(MopeqError):
    """A llama.cpp source tree that our patch does not fit, or a patch that cannot be read."""
