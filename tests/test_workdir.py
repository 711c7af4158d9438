"""A stage is reused only when neither its inputs nor its files have changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from mopeq_edge.artifacts import digest, file_digest, read_json, write_json
from mopeq_edge.errors import FormatError
from mopeq_edge.workdir import WorkDirectory

INPUTS, OTHER = digest(["model", 1]), digest(["model", 2])


@pytest.fixture
def work(tmp_path: Path) -> WorkDirectory:
    """A directory in which ``calibrate`` left two files and ``plan`` one."""
    found = WorkDirectory(tmp_path)
    for name in ("imatrix.gguf", "states.bin", "plan.json"):
        found.file(name).write_bytes(name.encode())
    found.record("calibrate", INPUTS, ["states.bin", "imatrix.gguf"])
    found.record("plan", OTHER, ["plan.json"])
    return found


def test_an_empty_directory(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path / "none")
    assert not work.has("plan", INPUTS)
    assert work.files("plan") == ()
    assert work.made_from("plan") is None
    assert not work.path.exists()


def test_reused_when_nothing_changed(work: WorkDirectory) -> None:
    assert work.has("calibrate", INPUTS)
    assert work.has("plan", OTHER)
    assert work.files("calibrate") == ("imatrix.gguf", "states.bin")
    assert work.made_from("calibrate") == INPUTS
    # What another process sees
    assert WorkDirectory(work.path).has("calibrate", INPUTS)


def test_other_inputs_run_the_stage_again(work: WorkDirectory) -> None:
    assert not work.has("calibrate", OTHER)
    assert not work.has("plan", INPUTS)
    assert not work.has("emit", INPUTS)


@pytest.mark.parametrize("change", ["edited", "truncated", "longer", "gone", "directory"])
def test_a_changed_file_runs_its_stage_again(work: WorkDirectory, change: str) -> None:
    path = work.file("imatrix.gguf")
    before = path.read_bytes()
    if change == "edited":
        path.write_bytes(b"I" + before[1:])
    elif change == "truncated":
        path.write_bytes(before[:-1])
    elif change == "longer":
        path.write_bytes(before + b"\0")
    else:
        path.unlink()
        if change == "directory":
            path.mkdir()
    assert not work.has("calibrate", INPUTS)
    assert work.has("plan", OTHER)
    if change != "directory":
        path.write_bytes(before)
        assert work.has("calibrate", INPUTS)


def test_the_second_record_replaces_the_first(work: WorkDirectory) -> None:
    work.file("plan.json").write_bytes(b"for another budget")
    work.record("plan", INPUTS, ["plan.json"])
    assert work.has("plan", INPUTS)
    assert not work.has("plan", OTHER)
    assert work.has("calibrate", INPUTS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "\xff\xfe",
        '{"format": "mopeq-edge work directory", "version": 2, "stages": {}}',
        '{"format": "mopeq-edge plan", "version": 1, "stages": {}}',
        '{"format": "mopeq-edge work directory", "version": 1}',
        '{"format": "mopeq-edge work directory", "version": 1, "stages": null}',
        '{"format": "mopeq-edge work directory", "version": 1, "stages": 7}',
        '{"format": "mopeq-edge work directory", "version": 1, "stages": {"plan": null}}',
        '{"format": "mopeq-edge work directory", "version": 1, "stages": {"plan": 7}}',
        '{"format": "mopeq-edge work directory", "version": 1, "stages": {"plan": {"made_from": "x"}}}',
        '{"format": "mopeq-edge work directory", "version": 1, "stages": {"plan": {"files": {}}}}',
    ],
)
def test_an_unreadable_record_runs_everything_again(work: WorkDirectory, text: str) -> None:
    work.file("stages.json").write_bytes(text.encode("latin-1"))
    assert not work.has("plan", OTHER)
    assert not work.has("calibrate", INPUTS)
    assert work.files("plan") == ()
    work.record("plan", OTHER, ["plan.json"])
    assert work.has("plan", OTHER)
    assert not work.has("calibrate", INPUTS)


def test_the_record_is_the_same_bytes_for_the_same_stages(work: WorkDirectory, tmp_path: Path) -> None:
    first = work.file("stages.json").read_bytes()
    work.record("plan", OTHER, ["plan.json"])
    work.record("calibrate", INPUTS, ["imatrix.gguf", "states.bin"])
    assert work.file("stages.json").read_bytes() == first
    assert str(tmp_path).encode() not in first
    stages = json.loads(first)["stages"]
    assert stages["plan"] == {
        "made_from": OTHER,
        "files": {"plan.json": hashlib.sha256(b"plan.json").hexdigest()},
    }


def test_digests(tmp_path: Path) -> None:
    # The order of keys means nothing; order and kind of everything else do.
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    values = [{"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, [1, 2], [2, 1], [[1], 2], "", None, 0]
    assert len({digest(value) for value in values}) == len(values)
    assert digest([]) == hashlib.sha256(b"[]").hexdigest()
    big = bytes(range(256)) * 2**15
    (tmp_path / "big").write_bytes(big)
    assert len(big) > 2**22
    assert file_digest(tmp_path / "big") == hashlib.sha256(big).hexdigest()


def test_json_artifacts(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, "thing", 3, {"b": [1, "ü"], "a": None})
    assert read_json(path, "thing", 3) == {"format": "thing", "version": 3, "b": [1, "ü"], "a": None}
    first = path.read_bytes()
    write_json(path, "thing", 3, {"a": None, "b": [1, "ü"]})
    assert path.read_bytes() == first
    for name, version in (("thing", 4), ("thing", 2), ("other", 3)):
        with pytest.raises(FormatError, match=f"{path}: expected '{name}' version {version}, found .*make it again"):
            read_json(path, name, version)
    path.write_bytes(first[:-3])
    with pytest.raises(FormatError, match=f"{path}: cannot be read as JSON"):
        read_json(path, "thing", 3)
    with pytest.raises(FormatError, match=r"none\.json: cannot be read as JSON"):
        read_json(tmp_path / "none.json", "thing", 3)


def test_files_that_are_about_to_change_are_not_finished(tmp_path: Path) -> None:
    """A calibration that is killed between two of its files leaves old and new ones: no later stage may take them."""
    work = WorkDirectory(tmp_path)
    work.file("a").write_bytes(b"old")
    work.record("calibrate", "first", ["a"])
    work.record("plan", "first", ["a"])
    work.forget("calibrate")
    work.forget("calibrate")
    assert work.files("calibrate") == ()
    assert not work.has("calibrate", "first")
    assert work.has("plan", "first")
