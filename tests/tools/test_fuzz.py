"""The fuzz targets: their seeds are read as what they are, and a few hundred changes of each find nothing."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from tools.fuzz import mutate as mutations
from tools.fuzz import seeds, targets
from tools.fuzz.__main__ import CORPUS, TARGETS
from tools.fuzz.all_targets import run_all
from tools.fuzz.seeds import seeds_of

CALLS = 150
QUICK = tuple(name for name in TARGETS if name != "tokenizer")


def test_all_targets_have_seeds() -> None:
    assert set(TARGETS) == set(targets.TARGETS)
    found = {name: seeds_of(name) for name in TARGETS}
    assert all(found.values())
    assert sum(len(data) for files in found.values() for data in files.values()) < 200_000
    # made anew, and the same
    assert {name: seeds_of(name) for name in TARGETS} == found


def test_seeds_are_read(tmp_path: Path) -> None:
    """A fuzzer that starts from files that are refused at once finds nothing."""
    from mopeq_edge.imatrix import read_imatrix
    from mopeq_edge.plan.artifact import read_plan
    from mopeq_edge.sensitivity.table import read_table
    from mopeq_edge.source.safetensors_file import SafetensorsFile
    from mopeq_edge.source.torch_file import open_torch_file
    from mopeq_edge.summary import summarise

    def path(target: str, name: str) -> Path:
        (tmp_path / name).write_bytes(seeds_of(target)[name])
        return tmp_path / name

    for name in seeds.gguf_seeds():
        assert summarise(path("gguf", name)).n_tensors == {"plain": 15, "f32": 2, "grouped": 17, "types": 0}[name]
    assert len(read_imatrix(path("imatrix", "imatrix")).entries) == 2
    assert len(read_plan(path("plan", "plan")).tensors) == 2
    assert len(SafetensorsFile(path("safetensors", "F64")).entries) == 3
    assert len(open_torch_file(path("torch", "torch")).entries) == 2
    assert list(read_table(path("artifacts", "table")).errors) == ["blk.0.ffn_up_exps.weight"]


def test_the_corpus_is_what_the_seeds_are_written_as() -> None:
    """``python -m tools.fuzz.seeds`` writes them again; torch's archives differ from version to version."""
    assert {folder.name for folder in CORPUS.iterdir()} == set(TARGETS)
    for name in TARGETS:
        files = {path.name: path.read_bytes() for path in (CORPUS / name).iterdir()}
        found = seeds_of(name)
        assert files.keys() >= found.keys()
        if name != "torch":
            assert {key: files[key] for key in found} == found
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 300_000


def test_all_targets_in_turn_and_what_they_find(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_all(("index", "vision"), 1, tmp_path, 1, blind=True, as_json=True) == 0
    found = json.loads(capfd.readouterr().out)["targets"]
    assert [(one["target"], one["found"], one["calls"] > 0) for one in found] == [
        ("index", [], True),
        ("vision", [], True),
    ]
    assert list(tmp_path.iterdir()) == []
    # a target that cannot run is no target without findings
    assert run_all(("nothing",), 1, tmp_path, 1, blind=True) == 1
    assert re.search(r"\| `nothing` \| \d+ \|  \|  \|  \|  \| 1 \|", capfd.readouterr().out)


def test_a_target_tells_a_bad_error() -> None:
    from mopeq_edge.errors import FormatError

    error = FormatError("x")
    error.args = ("two\nlines",)
    with pytest.raises(targets.UnfitError), targets.one_line():
        raise error
    with pytest.raises(KeyError), targets.one_line():
        raise KeyError
    with targets.one_line():
        raise FormatError("a line")


@pytest.mark.parametrize("name", QUICK)
def test_a_few_changes_find_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from converters import vocabulary

    monkeypatch.setattr(targets, "mkdtemp", lambda **_: str(tmp_path))
    # the target for config.json keeps a tokenizer in its place
    monkeypatch.setattr(vocabulary, "load_tokenizer", vocabulary.load_tokenizer)
    run = targets.TARGETS[name]()
    rng, files = random.Random(7), [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    for data in files:
        run(data)
    for _ in range(CALLS):
        data = rng.choice(files)
        for _ in range(rng.randrange(1, 4)):
            data = mutations.mutate(data, name, rng)
        run(data)
