"""Pictures in requests to llama-server: in every form of its APIs, each becomes a plain PNG or is refused."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mopeq_edge.serving.plain import has_media, read_json, with_plain_pictures
from mopeq_edge.serving.refusal import RefusalError

from ..vision.pictures import picture
from ..vision.test_image_file import turned

SEEN = picture(24, 16)
LYING = base64.b64encode(turned(SEEN, 6, "PNG")).decode()
SOUND = base64.b64encode(b"RIFF\x24\0\0\0WAVEfmt ").decode()
MOST = 10_000


def url(data: str) -> str:
    return f"data:image/jpeg;base64,{data}"


def chat(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}], **more}


FORMS: dict[str, Any] = {
    "OpenAI": chat({"type": "image_url", "image_url": {"url": url(LYING), "detail": "high"}}),
    "OpenAI, short": chat({"type": "image_url", "image_url": url(LYING)}),
    "Responses": {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url(LYING)}]}]},
    "Anthropic": chat({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": LYING}}),
    "Anthropic, of a tool": chat(
        {"type": "tool_result", "content": [{"type": "image", "source": {"media_type": "image/png", "data": LYING}}]}
    ),
    "llama-server": {"prompt": {"prompt_string": "<__media__>", "multimodal_data": [LYING, SOUND]}},
    "llama-server, several": {"prompt": [{"prompt_string": "x", "multimodal_data": [LYING]}, "y"]},
}


def texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for item in values for text in texts(item)]


@pytest.mark.parametrize("form", FORMS)
def test_every_picture_becomes_plain(form: str) -> None:
    body = {**FORMS[form], "temperature": 0.5, "tools": [{"type": "image_url"}]}
    assert has_media(body)
    found = json.loads(with_plain_pictures(body, MOST))
    ((old, new),) = [pair for pair in zip(texts(body), texts(found), strict=True) if pair[0] != pair[1]]
    assert old.removeprefix(url("")) == LYING
    head, _, data = new.rpartition(",")
    assert head == ("data:image/png;base64" if old.startswith("data:") else "")
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        np.testing.assert_array_equal(np.asarray(image), np.asarray(SEEN))
    # nothing else changes
    assert found == json.loads(json.dumps(body).replace(old, new))


def test_anthropic_s_type_is_said() -> None:
    source = {"type": "base64", "media_type": "image/tiff", "data": LYING}
    found = json.loads(with_plain_pictures(chat({"type": "image", "source": source}), MOST))
    assert found["messages"][0]["content"][0]["source"]["media_type"] == "image/png"


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        *(
            (chat({"type": "image_url", "image_url": {"url": address}}), "fetches nothing", "image_url")
            for address in ("http://e.org/a.png", "https://e.org/a.png", "file:///a.png", LYING)
        ),
        (chat({"type": "image_url"}), "has no url", "image_url"),
        (chat({"type": "image", "source": {"type": "url", "url": "http://e.org/"}}), "fetches nothing", "source.url"),
        (chat({"type": "image", "source": {"type": "base64", "data": 1}}), "is not base64", "source.data"),
        *(
            (chat({"type": kind, kind: {key: "https://e.org/a"}}), "fetches nothing", kind)
            for kind in ("input_audio", "video_url", "input_video")
            for key in ("url", "data")
        ),
        (chat({"type": "image_url", "image_url": url("AAAA")}), "not a picture in one of the formats", "image_url"),
        (chat({"type": "image_url", "image_url": url(LYING[:400])}), "the picture is damaged", "image_url"),
    ],
)
def test_refused(body: dict[str, Any], message: str, param: str) -> None:
    assert has_media(body)
    with pytest.raises(RefusalError, match=message) as caught:
        with_plain_pictures(body, MOST)
    assert caught.value.param == f"messages[0].content[0].{param}"
    assert caught.value.status == 400


def test_raw_data() -> None:
    body = {"prompt": [{"prompt_string": "x", "multimodal_data": [LYING, url(LYING)]}]}
    with pytest.raises(RefusalError, match="is not base64") as caught:
        with_plain_pictures(body, MOST)
    assert caught.value.param == "prompt[0].multimodal_data[1]"
    with pytest.raises(RefusalError, match="16 × 24 pixels, expected at most 383; make it smaller"):
        with_plain_pictures({"multimodal_data": [LYING]}, 383)


def test_what_has_none() -> None:
    for body in (chat({"type": "text", "text": "image_url"}), {"prompt": "x"}, [1], "image", None, 3):
        assert not has_media(body)
    assert read_json(b"{no json") is None
    assert read_json(b'"\xff"') is None
