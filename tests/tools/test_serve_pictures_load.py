"""The load test of the server with pictures, for a few seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.serve_pictures_load import load
from tools.vision_language_configs import TINY

from ..vision.test_device_path import make


@pytest.mark.runtime
def test_a_few_seconds(tmp_path: Path) -> None:
    _, gguf, _ = make(TINY, tmp_path)
    report = load(gguf, 4)
    assert report.failures == []
    assert report.wrong == []
    assert report.same > 0
    assert len(report.requests) > 1
    assert report.anon_late < report.anon_early + 32 * 2**20
