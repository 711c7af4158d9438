"""Fields of a request's JSON, checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mopeq_edge.errors import shown
from mopeq_edge.serving.refusal import RefusalError

T = TypeVar("T")


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``. Raises :class:`RefusalError`."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise RefusalError("the body is not JSON; send an object as application/json") from None
    if not isinstance(found, dict):
        raise RefusalError("the body is not a JSON object")
    return found


class Fields:
    """Fields of one object; null is as if a field were not there."""

    def __init__(self, found: Mapping[str, Any], path: str = "") -> None:
        self._found, self._path = found, path

    def raw(self, name: str) -> Any:
        """As it was sent."""
        return self._found.get(name)

    def wrong(self, name: str, expected: str) -> RefusalError:
        """That ``name`` is something else than ``expected``."""
        path = f"{self._path}{name}"
        return RefusalError(f"{path} is {shown(self._found.get(name))}, expected {expected}", param=path)

    def get(self, name: str, holds: Callable[[Any], bool], expected: str, default: T) -> T:
        """The field if ``holds`` of it, ``default`` if it is not there."""
        value = self._found.get(name)
        if value is None:
            return default
        if not holds(value):
            raise self.wrong(name, expected)
        return value  # type: ignore[no-any-return]

    def whole(self, name: str, least: int, most: int, default: T) -> int | T:
        """A whole number from ``least`` to ``most``."""
        return self.get(
            name,
            lambda x: isinstance(x, int) and not isinstance(x, bool) and least <= x <= most,
            f"a whole number from {least} to {most}",
            default,
        )

    def number(self, name: str, least: float, most: float, default: float) -> float:
        """A number from ``least`` to ``most``."""
        return float(
            self.get(
                name,
                lambda x: isinstance(x, (int, float)) and not isinstance(x, bool) and least <= x <= most,
                f"a number from {least:g} to {most:g}",
                default,
            )
        )

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        return self.get(name, lambda x: isinstance(x, bool), "true or false", default)

    def none_of(self, names: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise for a field of ``names`` that asks for what is not done here: whose value is none of those."""
        for name, harmless in names.items():
            value = self._found.get(name)
            if value is not None and value not in harmless:
                raise RefusalError(
                    f"{self._path}{name} is {shown(value)}, which is not supported here; leave it out",
                    param=f"{self._path}{name}",
                    code="unsupported_parameter",
                )


def is_text(value: Any) -> bool:
    """Whether ``value`` is a text that has bytes: JSON can name halves of characters."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
