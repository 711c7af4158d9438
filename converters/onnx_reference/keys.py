"""Key-values of one architecture, checked when they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mopeq_edge.errors import FormatError, SourceError
from mopeq_edge.gguf_file import GGUFHeader


@dataclass(frozen=True)
class Keys:
    """The key-values ``ARCHITECTURE.*`` of a file. A default stands for a key that is not there."""

    header: GGUFHeader
    architecture: str

    def integer(self, key: str, default: int | None = None) -> int:
        """A number that is not negative; an array of equal numbers, one a layer, is as good."""
        value = self._value(key, default)
        if isinstance(value, list) and value:
            if len(set(value)) > 1:
                raise SourceError(
                    f"{self.header.path}: {self._name(key)} differs from layer to layer, expected one number: the ONNX "
                    "reference computes all layers alike"
                )
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._wrong(key, value, "a whole number")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive :meth:`integer`."""
        value = self.integer(key, default)
        if value == 0:
            raise self._wrong(key, value, "a positive number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self._wrong(key, value, "a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def get(self, key: str) -> Any:
        """Whatever is there, or None."""
        return self.header.get(self._name(key))

    def wrong(self, key: str, expected: str) -> FormatError:
        """The error for a value that is no good."""
        return self._wrong(key, self.get(key), expected)

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None and default is None:
            raise FormatError(
                f"{self.header.path}: has no '{self._name(key)}', which a model of {self.architecture} needs; "
                "convert it again"
            )
        return default if value is None else value

    def _name(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def _wrong(self, key: str, value: object, expected: str) -> FormatError:
        return FormatError(
            f"{self.header.path}: {self._name(key)} is {str(value)[:40]!r}, expected {expected}; convert it again"
        )
