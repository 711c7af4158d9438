"""README.md before the gguf package reads it: small files that become large are refused, ordinary ones are not."""

from __future__ import annotations

import time
from pathlib import Path

import gguf
import pytest

from converters.model_card import MAX_FRONT_MATTER, check_model_card
from mopeq_edge.errors import SourceError


def bomb(lines: int) -> str:
    """Nine times as many entries a line."""
    found = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    found += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, lines)]
    return "\n".join(["---", *found, f"base_model: *a{lines - 1}", "---", "text"])


def test_aliases_are_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(bomb(40))
    with pytest.raises(SourceError, match=r"README.md: its YAML has the alias '\*a0', expected plain values"):
        check_model_card(tmp_path)


def test_what_they_do_to_the_package(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """So that the check is there for a reason: two more lines take far more than nine times as long as the first."""
    spent = []
    for lines in (3, 5):
        (tmp_path / "README.md").write_text(bomb(lines))
        start = time.process_time()
        gguf.Metadata.load(None, tmp_path, None, 1)
        spent.append(sum(len(record.getMessage()) for record in caplog.records))
        caplog.clear()
        assert time.process_time() - start < 60
    assert spent[1] > 50 * spent[0] > 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# A model\n* [a](b) & more: *x*\n",
        "---\nlicense: mit\ntags:\n- a & b\n- 'it is *good*'\n---\n*emphasis* &amp;\n",
        "---\nlicense: [broken\n---\n",
        "---\nno end: 1\n",
    ],
)
def test_ordinary_ones_pass(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    check_model_card(tmp_path)


def test_others(tmp_path: Path) -> None:
    check_model_card(tmp_path)
    (tmp_path / "README.md").write_text("---\n" + "a: b\n" * MAX_FRONT_MATTER)
    with pytest.raises(SourceError, match=f"characters, expected at most {MAX_FRONT_MATTER}"):
        check_model_card(tmp_path)
    (tmp_path / "README.md").write_bytes(b"---\n\xff\n")
    with pytest.raises(SourceError, match="cannot be read as a model card"):
        check_model_card(tmp_path)
