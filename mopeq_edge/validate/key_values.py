"""The key-values that shape the computation, against those of the source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mopeq_edge.gguf_file import KV
from mopeq_edge.source.padded import ExpertPadding
from mopeq_edge.units import plural
from mopeq_edge.validate.check import Check, Names

KEY_VALUES = "key-values"
ARCHITECTURE = "general.architecture"
LEFT_OUT = ("tokenizer.", "general.", "mopeq.", "quantize.", "split.")
"""Text of the tokenizer, what a model is called, where a file comes from, how it is cut."""


def check_key_values(kvs: Mapping[str, KV], source: Mapping[str, KV], padding: ExpertPadding | None) -> list[Check]:
    """A line for every key that is missing, not in the source, or another number. ``padding``: of the file's experts.

    Numbers are compared as a GGUF has them, in float32 if they are fractions.
    """
    wanted = {key: kv.value for key, kv in source.items() if _counts(key)}
    if padding is not None:
        wanted[padding.key] = padding.padded
    found = {key: kv.value for key, kv in kvs.items() if _counts(key)}
    checks = []
    for key in sorted(wanted.keys() | found.keys()):
        if key in wanted and key in found and _same(wanted[key], found[key]):
            continue
        has = f"is {found[key]!r}" if key in found else "is missing"
        should = f"the source has {wanted[key]!r}" if key in wanted else "the source has no such key"
        checks.append(Check(KEY_VALUES, key, None, None, False, f"{key}: {has}, {should}", Names.TENSOR))
    looked_at = plural(len(wanted), "key")
    return checks or [Check(KEY_VALUES, looked_at, 0, 0, True, "what shapes the computation is as in the source")]


def _counts(key: str) -> bool:
    return key == ARCHITECTURE or not key.startswith(LEFT_OUT)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list) or isinstance(b, list):
        return isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, bool) or isinstance(b, bool) or isinstance(a, str) or isinstance(b, str):
        return type(a) is type(b) and bool(a == b)
    if isinstance(a, float) or isinstance(b, float):
        return bool(np.float32(a) == np.float32(b))
    return bool(a == b)
