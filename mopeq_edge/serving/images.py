"""Pictures in requests: data: URIs in base64. Nothing is fetched from anywhere."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from mopeq_edge.serving.refusal import RefusalError

_HEAD = re.compile(r"data:[\w.+/-]*(?:;[\w.=+-]+)*;base64,", re.ASCII)
_MOST_HEAD = 200


@dataclass(frozen=True)
class Picture:
    """The bytes of a picture's file, not decoded yet; ``path`` is its place in the request."""

    data: bytes = field(repr=False)
    path: str

    @property
    def digest(self) -> str:
        """The same for the same bytes."""
        return hashlib.sha256(self.data).hexdigest()


def parse_image(value: Any, path: str) -> Picture:
    """``{"url": "data:…"}`` or the text alone. Raises :class:`RefusalError`."""
    url = value.get("url") if isinstance(value, dict) else value
    if not isinstance(url, str):
        raise RefusalError(f'{path} has no url; expected {{"url": "data:image/…;base64,…"}}', param=path)
    head = _HEAD.match(url, 0, _MOST_HEAD)
    if head is None:
        scheme = re.match(r"[a-zA-Z][\w.+-]*(?=:)", url[:20])
        what = f"a {scheme[0]}: address" if scheme and scheme[0] != "data" else "no data: URI in base64"
        raise RefusalError(
            f"{path} is {what}; this server fetches nothing, send the picture itself as data:image/…;base64,…",
            param=path,
            code="invalid_image_url",
        )
    return Picture(parse_base64(url[head.end() :], path), path)


def parse_base64(value: Any, path: str) -> bytes:
    """The bytes. Raises :class:`RefusalError`."""
    try:
        # without their line breaks, which some clients send
        return base64.b64decode("".join(value.split()), validate=True)
    except (AttributeError, binascii.Error, ValueError):
        raise RefusalError(f"{path} is not base64", param=path, code="invalid_image_url") from None
