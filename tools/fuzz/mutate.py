"""Changes that a fuzzer of bytes finds rarely: numbers at the ends of their ranges, JSON values of another kind."""

from __future__ import annotations

import json
import random
from typing import Any

NUMBERS = (0, 1, 2, 31, 63, 64, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**12, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", "x", "0", "0-99999999999", "\x1b[31m", "\ud800", "../x", "/etc/passwd", "n" * 300, "mixed", "Q4_K"),
    *([], [[]], [0], [-1], ["a"], {}, {"a": 1}),
)
JSON_TARGETS = ("plan", "index", "config", "tokenizer")


def mutate(data: bytes, target: str, rng: random.Random) -> bytes:
    """``data`` with one change of a kind that fits files of ``target``."""
    if target in JSON_TARGETS or (target == "vision" and data.startswith(b"{")):
        return _json(data, rng)
    if target in ("safetensors", "artifacts") and len(data) > 8 and rng.random() < 0.7:
        length = int.from_bytes(data[:8], "little")
        text = _json(data[8 : 8 + length], rng)
        return len(text).to_bytes(8, "little") + text + data[8 + length :]
    return _binary(data, rng)


def _binary(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return b"\0"
    at, kind = rng.randrange(len(data)), rng.randrange(6)
    if kind <= 2:
        width = (1, 4, 8)[kind]
        number = rng.choice(NUMBERS) & (256**width - 1)
        return data[:at] + number.to_bytes(width, "little") + data[at + width :]
    end = min(len(data), at + rng.randrange(1, 64))
    if kind == 3:
        return data[:at] + data[end:]
    if kind == 4:
        return data[:end] + data[at:]
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def _json(data: bytes, rng: random.Random) -> bytes:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return _binary(data, rng)
    if rng.random() < 0.05:
        return _binary(data, rng)
    places: list[tuple[Any, Any]] = []
    level = [found]
    while level:
        outer = level.pop()
        keys = list(outer) if isinstance(outer, dict) else range(len(outer)) if isinstance(outer, list) else ()
        for key in keys:
            places.append((outer, key))
            level.append(outer[key])
    if not places:
        return json.dumps(rng.choice(VALUES)).encode()
    outer, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0:
        del outer[key]
    elif kind == 1 and isinstance(outer, dict):
        outer[rng.choice([str(rng.choice(VALUES))[:80], *map(str, outer)])] = outer[key]
    elif kind == 2:
        other, place = rng.choice(places)
        try:
            outer[key] = json.loads(json.dumps(other[place]))
        except (KeyError, IndexError, ValueError):
            outer[key] = 0
    else:
        outer[key] = rng.choice(VALUES)
    return json.dumps(found).encode()
