"""Strings of strangers in YAML and Markdown: one line, printable, and never a mark of the language around them."""

from __future__ import annotations

import json

LONGEST = 200
"""Characters of a value that are shown."""

_MARKS = frozenset("\\`*_{}[]<>()#+!|~&$:@")


def clean(text: str) -> str:
    """``text`` on one line, without what no printer shows (control and direction marks, lone surrogates)."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(shown.split())[:LONGEST]


def markdown(text: str) -> str:
    """:func:`clean` text that Markdown shows as it is, also in a table."""
    return "".join(f"\\{c}" if c in _MARKS else c for c in clean(text))


def yaml_lines(key: str, value: str | tuple[str, ...]) -> list[str]:
    """One key of a YAML mapping: strings as JSON, which YAML reads as its own; an empty value is left out."""
    if isinstance(value, str):
        return [f"{key}: {_scalar(value)}"] if value else []
    return [f"{key}:", *(f"- {_scalar(item)}" for item in value)] if value else []


def _scalar(text: str) -> str:
    # clean text has no character that YAML forbids; an escaped surrogate pair would be read as two characters
    return json.dumps(clean(text), ensure_ascii=False)
