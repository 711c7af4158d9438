"""Checkpoints of torch.save: the same tensors as from safetensors, read by rows; nothing in a pickle is run."""

from __future__ import annotations

import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mopeq_edge.source.shard as shard_module
from converters import CONVERTERS
from mopeq_edge.cli import main
from mopeq_edge.errors import FormatError, SourceError
from mopeq_edge.source.checkpoint import SINGLE, TORCH_INDEX, TORCH_SINGLE, Checkpoint
from mopeq_edge.source.open import open_source
from mopeq_edge.source.torch_file import open_torch_file

from ..builders import build_olmoe, write_gguf


def tensors() -> dict[str, torch.Tensor]:
    """Every type of weights, a view of another's storage, two names of one tensor, one without elements."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(6, 5, generator=generator)
    return {
        "wide": wide,
        "rows of wide": wide[2:4],
        "wide again": wide,
        **{str(dtype): torch.randn(3, 4, 7, generator=generator).to(dtype) for dtype in WEIGHTS},
        "vector": torch.randn(9, generator=generator),
        "nothing": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2, 2, generator=generator)),
        "count": torch.tensor(7),
    }


WEIGHTS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def test_the_same_numbers_as_torchs_own(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / TORCH_SINGLE)
    file = open_torch_file(tmp_path / TORCH_SINGLE)
    assert list(file.entries) == sorted(tensors())
    for name, value in tensors().items():
        assert file.entries[name].shape == tuple(value.shape)
        want = value.detach().reshape(-1, value.shape[-1] if value.ndim else 1)
        assert file.read(name).tobytes() == value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        if value.dtype in WEIGHTS and len(want) > 2:
            assert np.array_equal(file.read_f32(name, 1, 3), want[1:3].float().numpy())


def test_only_the_rows_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(tensors(), tmp_path / TORCH_SINGLE)
    file = open_torch_file(tmp_path / TORCH_SINGLE)
    read: list[int] = []
    real = shard_module.read_bytes

    def counting(path: Path, offset: int, count: int) -> np.ndarray:
        read.append(count)
        return real(path, offset, count)

    monkeypatch.setattr(shard_module, "read_bytes", counting)
    file.read("torch.float64", 4, 6)
    assert read == [2 * 7 * 8]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_the_file_is_not_mapped_afterwards(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / TORCH_SINGLE)
    file = open_torch_file(tmp_path / TORCH_SINGLE)
    assert file.entries
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.fixture
def olmoe(tmp_path: Path) -> Path:
    return build_olmoe(tmp_path / "safetensors" / "model", dtype="float32", n_layer=1)


@pytest.mark.parametrize("n_shards", [1, 3])
def test_the_same_gguf_as_from_safetensors(olmoe: Path, tmp_path: Path, n_shards: int) -> None:
    other = tmp_path / "torch" / "model"
    other.mkdir(parents=True)
    for path in olmoe.iterdir():
        if path.name != SINGLE:
            (other / path.name).write_bytes(path.read_bytes())
    save_as_torch(load_file(olmoe / SINGLE), other, n_shards)
    for directory in (olmoe, other):
        source = open_source(directory, CONVERTERS, pre="gpt-2")
        write_gguf(source, directory.with_suffix(".gguf"))
    assert (other.with_suffix(".gguf")).read_bytes() == olmoe.with_suffix(".gguf").read_bytes()
    names = [path.name for path in Checkpoint(other).files]
    assert names == ([TORCH_SINGLE] if n_shards == 1 else [TORCH_INDEX, "0.bin", "1.bin", "2.bin"])


def save_as_torch(state: dict[str, torch.Tensor], directory: Path, n_shards: int) -> None:
    """In runs of names, so that the order of shards is the order of names."""
    if n_shards == 1:
        torch.save(state, directory / TORCH_SINGLE)
        return
    names = sorted(state)
    parts = [names[i * len(names) // n_shards : (i + 1) * len(names) // n_shards] for i in range(n_shards)]
    placement = {name: f"{shard}.bin" for shard, part in enumerate(parts) for name in part}
    for shard, part in enumerate(parts):
        torch.save({name: state[name] for name in part}, directory / f"{shard}.bin")
    (directory / TORCH_INDEX).write_text(json.dumps({"weight_map": placement}))


def test_safetensors_come_first(olmoe: Path) -> None:
    (olmoe / TORCH_SINGLE).write_bytes(b"not looked at")
    assert [path.name for path in Checkpoint(olmoe).files] == [SINGLE]


def test_shards_and_index_that_disagree(olmoe: Path, tmp_path: Path) -> None:
    save_as_torch({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path, 2)
    torch.save({"c": torch.ones(2)}, tmp_path / "1.bin")
    with pytest.raises(FormatError, match=rf"{TORCH_INDEX}: tensor 'b' is said to be in '1.bin', but is not there"):
        Checkpoint(tmp_path)
    torch.save({"b": torch.ones(2), "c": torch.ones(2)}, tmp_path / "1.bin")
    with pytest.raises(FormatError, match=rf"1.bin: holds tensor 'c', but {TORCH_INDEX} does not name it"):
        Checkpoint(tmp_path)
    (tmp_path / "1.bin").unlink()
    with pytest.raises(SourceError, match=rf"shard '1.bin' is missing, {TORCH_INDEX} names 2 shards"):
        Checkpoint(tmp_path)


class Runs:
    """Unpickled by anything but a loader of weights alone, it leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


def refused(path: Path, error: type[Exception] = FormatError) -> str:
    with pytest.raises(error) as caught:
        open_torch_file(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_pickle_that_runs_something_is_refused_and_not_run(tmp_path: Path, old_format: bool) -> None:
    marker, path = tmp_path / "marker", tmp_path / TORCH_SINGLE
    harmful = {"weight": torch.ones(3), "more": Runs(marker)}
    torch.save(harmful, path, _use_new_zipfile_serialization=not old_format)
    said = refused(path)
    assert not marker.exists()
    if not old_format:
        assert "refused, nothing of it was run: its pickle asks for 'posix.system'; use a checkpoint in" in said
    # the marker works
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_a_whole_checkpoint_with_one_is_refused_and_not_run(
    olmoe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    save_as_torch(load_file(olmoe / SINGLE), olmoe, 3)
    (olmoe / SINGLE).unlink()
    torch.save({**torch.load(olmoe / "1.bin"), "more": Runs(marker)}, olmoe / "1.bin")
    monkeypatch.setattr(sys, "argv", ["mopeq-edge", "inspect", str(olmoe), "--pre", "gpt-2"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "1.bin: refused, nothing of it was run: its pickle asks for 'posix.system'" in said.err
    assert not marker.exists()


def test_a_bare_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / TORCH_SINGLE
    path.write_bytes(pickle.dumps(Runs(marker)))
    assert "not an archive as torch.save writes them" in refused(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.ones(2)], "expected tensors by name, found list"),
        ({"a": 3}, "expected tensors by name, found int under 'a'"),
        ({1: torch.ones(2)}, "expected tensors by name, found Tensor under 1"),
        ({"model": {"a": torch.ones(2)}}, "expected tensors by name, found dict under 'model'"),
        ({"a": torch.ones(4, 2).T}, "tensor 'a' is a view of others or sparse, expected rows as stored"),
        ({"a": torch.ones(1).expand(4)}, "tensor 'a' is a view of others or sparse"),
        ({"a": torch.eye(3).to_sparse()}, "tensor 'a' is a view of others or sparse"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "tensor 'a' has type torch.complex64, expected weights"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, value: object, message: str) -> None:
    torch.save(value, tmp_path / TORCH_SINGLE)
    assert message in refused(tmp_path / TORCH_SINGLE)


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / TORCH_SINGLE
    torch.save(tensors(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "or it is truncated" in refused(path)
    path.write_bytes(b"")
    assert "or it is truncated" in refused(path)
    path.unlink()
    assert "cannot be read" in refused(path)


def rewritten(path: Path, change: Any) -> None:
    """The archive again, its members as ``change(name, data)`` says: the pairs to write."""
    with zipfile.ZipFile(path) as archive:
        members = [(member.filename, archive.read(member)) for member in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            for pair in change(name, data):
                archive.writestr(*pair)


def test_what_is_compressed_is_not_unpacked(tmp_path: Path) -> None:
    """A megabyte of an archive may hold a gigabyte of one letter; torch would unpack a pickle whatever its size."""
    path = tmp_path / TORCH_SINGLE
    for name in ("archive/data.pkl", "archive/data/0", "archive/byteorder", "archive/other"):
        torch.save(tensors(), path)
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w") as member:
            member.write(bytes(10**6))
        assert f"'{name}' is compressed, expected data as stored" in refused(path)


def test_a_member_that_begins_nowhere(tmp_path: Path) -> None:
    """Found by fuzzing: a place beyond 2^63 in the archive's directory."""
    path = tmp_path / TORCH_SINGLE
    torch.save(tensors(), path)
    with zipfile.ZipFile(path, "a") as archive:
        next(m for m in archive.infolist() if m.filename.endswith("/data/0")).header_offset = 2**63 + 8
        archive.writestr("archive/last", b"")
    assert "/data/0' begins at byte 92233720368547" in refused(path)


def test_a_pickle_larger_than_any_list_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(tensors(), tmp_path / TORCH_SINGLE)
    monkeypatch.setattr("mopeq_edge.source.torch_file.MAX_PICKLE", 100)
    assert "bytes, expected at most 100" in refused(tmp_path / TORCH_SINGLE)


def test_an_archive_that_was_tampered_with(tmp_path: Path) -> None:
    path = tmp_path / TORCH_SINGLE
    for change, message in (
        (lambda n, d: [(n, b"big" if n.endswith("/byteorder") else d)], "its numbers are not little-endian"),
        (
            lambda n, d: [(n, d)] + [(n.replace("/data/0", "/data/999"), d)] * n.endswith("/data/0"),
            "tensors name others",
        ),
        # what torch.jit.save adds
        (
            lambda n, d: [(n, d)] + [("archive/constants.pkl", d)] * n.endswith("data.pkl"),
            "holds a program (TorchScript)",
        ),
        (lambda n, d: [(n, d[:-1] if n.endswith("data.pkl") else d)], "torch cannot load it"),
    ):
        torch.save(tensors(), path)
        rewritten(path, change)
        assert message in refused(path)
