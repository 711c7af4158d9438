"""JSON of strangers: parsed within limits of size, depth and number of values, every key once, every number finite."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mopeq_edge.errors import shown
from mopeq_edge.regular_file import read_whole

MAX_BYTES = 2**27
"""Of a file; tokenizer.json files of the largest vocabularies take a quarter of that."""

MAX_VALUES = 2**22
"""Values in a file, which bounds the memory that they take: the largest tokenizer.json files in use have 2 million."""

MAX_DEPTH = 200
"""Of objects and arrays in each other; files in use have less than ten."""


def parse_json(raw: bytes, *, finite: bool = True) -> Any:
    """The value in ``raw``.

    Raises :class:`ValueError` with one line for what is no JSON, is too deep or too much, has a key twice or, unless
    ``finite`` is false, a number that is none (``NaN``, ``Infinity``, ``1e999``): some config.json files have those.
    """
    # each value but the first comes behind one of these
    n_values = sum(raw.count(mark) for mark in (b",", b"[", b"{"))
    if n_values > MAX_VALUES:
        raise ValueError(f"it has {n_values} values, expected at most {MAX_VALUES}")
    try:
        found = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_number if finite else None,
            parse_float=_finite if finite else None,
        )
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    if _deeper(found, MAX_DEPTH):
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    return found


def load_json(path: Path, *, finite: bool = True) -> Any:
    """The value in the file ``path``: :func:`parse_json` of :func:`read_whole`, and what they raise."""
    return parse_json(read_whole(path, MAX_BYTES), finite=finite)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"'{twice}' appears twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"it has {text}, which is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it has {text[:40]}, which is no number")
    return value


def _deeper(value: Any, most: int) -> bool:
    """Whether containers lie more than ``most`` deep in ``value``; a level at a time, so without recursion."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


Check = Callable[[Any], bool]


def is_count(value: Any, most: int = 2**63 - 1) -> bool:
    """Whether ``value`` is a whole number from 0 to ``most``; true and false are none."""
    return type(value) is int and 0 <= value <= most


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number."""
    return type(value) in (int, float) and abs(value) < math.inf


def is_texts(value: Any) -> bool:
    """Whether ``value`` is a list of strings."""
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def require(fields: Any, checks: dict[str, Check]) -> dict[str, Any]:
    """``fields`` if it is an object with exactly the keys of ``checks`` and a value that each accepts, else
    :class:`ValueError`."""
    if not isinstance(fields, dict):
        raise ValueError(f"expected an object, found {type(fields).__name__}")
    if fields.keys() != checks.keys():
        more, less = sorted(fields.keys() - checks.keys()), sorted(checks.keys() - fields.keys())
        raise ValueError(f"'{more[0]}' is not known" if more else f"'{less[0]}' is missing")
    for key, check in checks.items():
        if not check(fields[key]):
            raise ValueError(f"{key} is {shown(fields[key])}")
    return fields
