"""Every message that docs/troubleshooting.md explains is one that the code gives."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from .pages import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
HOLE = "…"


def messages() -> list[str]:
    """All text of the packages, values of f-strings as a hole."""
    found = []
    for path in sorted([*(ROOT / "mopeq_edge").rglob("*.py"), *(ROOT / "converters").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else HOLE for v in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def explained() -> list[str]:
    rows = re.findall(r"^\| `([^`]+)`(.*?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [message for message, of in rows if "of llama.cpp" not in of]


ALL = messages()


@pytest.mark.parametrize("message", explained())
def test_the_code_says_it(message: str) -> None:
    pieces = [piece.strip() for piece in message.split(HOLE) if piece.strip()]
    assert pieces
    assert any(all(piece in text for piece in pieces) for text in ALL), message


def test_messages_that_nobody_gives_are_found() -> None:
    assert len(explained()) > 20
    assert not any("this model is too beautiful" in text for text in ALL)


def test_it_explains_a_message_for_every_kind_of_error() -> None:
    """Of each class in errors.py that users meet, at least one message: found where it is raised."""
    raised: dict[str, set[str]] = {}
    for path in sorted(Path(ROOT / "mopeq_edge").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                raised.setdefault(node.exc.func.id, set()).add(ast.unparse(node.exc))
    holes = {name: [re.sub(r"\{[^{}]*\}", HOLE, text) for text in texts] for name, texts in raised.items()}
    page = [[piece.strip() for piece in message.split(HOLE) if piece.strip()] for message in explained()]
    for name in ("CalibrationError", "FormatError", "OutputError", "PlanError", "RuntimeMissingError", "SourceError"):
        texts = holes[name]
        assert any(all(piece in text for piece in pieces) for pieces in page for text in texts), name
