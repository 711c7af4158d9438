"""The load test, and what it would say of a server that answers wrongly or forgets memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from mopeq_edge.memory.process import Sample
from tools.serve_load import Answer, Report, compare, load, note_memory

from ..builders import build_olmoe


def test_only_level_tokens_may_differ() -> None:
    alone = Answer((5, 6, 7), (1.0, 0.004, 2.0))
    assert compare(alone, Answer((5, 6, 7))) == "same"
    assert compare(alone, Answer((5, 9, 1))) == "tie 0.0040"
    assert compare(alone, Answer((5, 6, 8))) == "token 2 is 8, alone 7, 2.000 nats before the next"
    assert compare(alone, Answer((4, 6, 7))).startswith("token 0 is 4")
    assert compare(alone, Answer((5, 6))) == "2 tokens, alone 3"


def test_memory_that_grows_shows() -> None:
    report = Report()
    samples = [Sample(n, 100 + n, 0, 0, 0, 0, 0) for n in range(100)]
    note_memory(report, samples)
    assert (report.anon_early, report.anon_late, report.anon_peak) == (129, 189, 199)
    assert report.growth == pytest.approx(189 / 129 - 1)


@pytest.mark.runtime
def test_five_seconds(tmp_path: Path) -> None:
    from mopeq_edge.pipeline import open_context, source_gguf
    from mopeq_edge.progress import SilentProgress

    model = build_olmoe(tmp_path / "model")
    file = source_gguf(open_context(model, tmp_path / "work", pre=None, threads=1, progress=SilentProgress()))
    report = load(file, 5)
    assert report.failures == []
    assert report.wrong == []
    assert report.same > 0
    assert {"asked", "broken off", "nonsense"} <= report.requests.keys()
    # sized for eight clients from the start
    assert report.anon_late < report.anon_early + 16 * 2**20
