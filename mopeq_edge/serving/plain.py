"""Pictures of a request to llama-server, as files that its own reader sees as a person does.

That reader knows no EXIF, shows what lies under transparency and takes half a picture for a whole one; and an address
it fetches. So every picture is read here, and goes on as a PNG of 8 bit without transparency.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from mopeq_edge.errors import PictureError
from mopeq_edge.serving.images import parse_base64, parse_image
from mopeq_edge.serving.refusal import RefusalError
from mopeq_edge.vision.image_file import decode_image, encode_png

_NOT_SEEN = ("tools", "response_format", "json_schema")
"""Fields that describe answers, not questions."""
_PICTURES = ("image_url", "input_image")
_OTHER_MEDIA = ("input_audio", "input_video", "video_url")
_URL = "data:image/png;base64,"


def read_json(body: bytes) -> Any:
    """What is in ``body``; None if that is no JSON, of which llama-server says what is wrong with it."""
    try:
        return json.loads(body)
    except ValueError:
        return None


def has_media(value: Any) -> bool:
    """Whether there are pictures or sounds in the request."""
    if isinstance(value, list):
        return any(map(has_media, value))
    if not isinstance(value, dict):
        return False
    if value.get("type") in (*_PICTURES, *_OTHER_MEDIA, "image") or "multimodal_data" in value:
        return True
    return any(has_media(item) for key, item in value.items() if key not in _NOT_SEEN)


def with_plain_pictures(value: Any, most_pixels: int) -> bytes:
    """The JSON of ``value`` with every picture as a PNG in base64; anything else as it was.

    Raises :class:`RefusalError` for a picture that is none, is damaged, too large, or an address.
    """
    return json.dumps(_plain(value, "", most_pixels)).encode()


def _plain(value: Any, path: str, most: int) -> Any:
    if isinstance(value, list):
        return [_plain(item, f"{path}[{i}]", most) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    dot = f"{path}." if path else ""
    found = {key: item if key in _NOT_SEEN else _plain(item, f"{dot}{key}", most) for key, item in value.items()}
    kind = value.get("type")
    if kind in _PICTURES:
        at = f"{dot}image_url"
        seen = _URL + _png(parse_image(value.get("image_url"), at).data, at, most)
        found["image_url"] = {**value["image_url"], "url": seen} if isinstance(value["image_url"], dict) else seen
    elif kind == "image" and isinstance(source := value.get("source"), dict):
        found["source"] = _anthropic(source, f"{dot}source", most)
    elif kind in _OTHER_MEDIA:
        _check_media(value.get(kind), f"{dot}{kind}")
    if isinstance(data := value.get("multimodal_data"), list):
        found["multimodal_data"] = [_raw(item, f"{dot}multimodal_data[{i}]", most) for i, item in enumerate(data)]
    return found


def _anthropic(source: dict[str, Any], path: str, most: int) -> dict[str, Any]:
    """What Anthropic's API calls the source of an image."""
    if source.get("type") == "url":
        parse_image(source.get("url"), f"{path}.url")
    data = parse_base64(source.get("data"), f"{path}.data")
    return {**source, "media_type": "image/png", "data": _png(data, f"{path}.data", most)}


def _raw(value: Any, path: str, most: int) -> Any:
    """A picture or sound in base64."""
    data = parse_base64(value, path)
    return value if _is_sound(data) else _png(data, path, most)


def _png(data: bytes, path: str, most: int) -> str:
    try:
        return base64.b64encode(encode_png(decode_image(data, path, most))).decode()
    except PictureError as error:
        raise RefusalError(str(error), param=path, code="invalid_image") from None


def _is_sound(data: bytes) -> bool:
    """By the marks that llama-server knows: WAV, MP3, FLAC."""
    wav = data[:4] == b"RIFF" and data[8:12] == b"WAVE"
    mp3 = data[:3] == b"ID3" or (data[:1] == b"\xff" and data[1:2] >= b"\xe0")
    return wav or mp3 or data[:4] == b"fLaC"


def _check_media(value: Any, path: str) -> None:
    """Sound and video go on as they are, but nothing is fetched."""
    addresses = [value.get("data"), value.get("url")] if isinstance(value, dict) else [value]
    if any(isinstance(address, str) and address.startswith("http") for address in addresses):
        raise RefusalError(
            f"{path} is an address; this server fetches nothing, send the data themselves",
            param=path,
            code="invalid_media_url",
        )
