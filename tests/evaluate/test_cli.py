"""The command: a table that fits, JSON that parses, and sources that cannot serve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mopeq_edge.cli import cli
from mopeq_edge.cli.evaluate import resolve_source
from mopeq_edge.errors import MopeqError
from mopeq_edge.gguf_file import read_header
from mopeq_edge.progress import SilentProgress


def arguments(target: Path, source: Path, text: Path, work_dir: Path) -> list[str]:
    return [
        *("evaluate", str(target), "--against", str(source), "--text", str(text)),
        *("--ctx", "64", "--chunks", "4", "--work-dir", str(work_dir)),
    ]


@pytest.mark.runtime
def test_json_and_table_tell_the_same(q2_k: Path, bf16_gguf: Path, text_file: Path, tmp_path: Path) -> None:
    command = arguments(q2_k, bf16_gguf, text_file, tmp_path)
    as_json = CliRunner().invoke(cli, [*command, "--json"], catch_exceptions=False)
    values = json.loads(as_json.stdout)
    assert values["positions_count"] == 4 * 31
    table = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert f"{values['kld_mean_nats']:.6f}" in table.stdout
    assert f"{100 * values['same_top_fraction']:.3f}" in table.stdout
    assert f"{values['ppl_target_per_token']:.4f}" in table.stdout
    assert max(len(line) for line in table.stdout.splitlines()) <= 80


@pytest.mark.runtime
def test_the_logits_lie_in_a_directory_named_after_the_source_unless_told(
    q2_k: Path, bf16_gguf: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    CliRunner().invoke(cli, arguments(q2_k, bf16_gguf, text_file, tmp_path)[:-2], catch_exceptions=False)
    (work_dir,) = tmp_path.iterdir()
    assert work_dir.name == f"{bf16_gguf.stem}.mopeq"
    assert [path.name[:10] for path in work_dir.iterdir()] == ["reference-"]


def test_sources_that_cannot_serve(tmp_path: Path) -> None:
    work, progress = tmp_path / "work", SilentProgress()
    with pytest.raises(MopeqError, match=r"config\.json"):
        resolve_source(tmp_path, work, 1, progress)
    with pytest.raises(MopeqError, match=r"none.gguf: does not exist"):
        resolve_source(tmp_path / "none.gguf", work, 1, progress)


@pytest.mark.runtime
def test_a_checkpoint_is_as_good_as_its_gguf(tiny_model: Path, bf16_gguf: Path, tmp_path: Path) -> None:
    made = resolve_source(tiny_model, tmp_path, 2, SilentProgress())
    ours, theirs = read_header(made), read_header(bf16_gguf)
    assert ours.tensors == theirs.tensors
    data = [path.read_bytes()[header.data_start :] for path, header in ((made, ours), (bf16_gguf, theirs))]
    assert data[0] == data[1]


@pytest.mark.parametrize("option", [["--ctx", "1"], ["--chunks", "0"], ["--positions", "some"], ["--threads", "0"]])
def test_options_out_of_range(tmp_path: Path, option: list[str]) -> None:
    path = tmp_path / "model.gguf"
    result = CliRunner().invoke(cli, [*arguments(path, path, path, tmp_path), *option])
    assert result.exit_code == 2
    assert option[0] in result.stderr
