"""Which build runs which file."""

from __future__ import annotations

from pathlib import Path

import pytest

from mopeq_edge.errors import FormatError, MopeqError, RuntimeMissingError
from mopeq_edge.gguf_file import KV, ValueType
from mopeq_edge.llama_cpp import bundle
from mopeq_edge.runtime import choose, locate
from mopeq_edge.runtime.choose import prepare_start
from mopeq_edge.runtime.per_expert import runs_expert_groups, why_it_does_not_load

from .builds import PATCHED, PATCHES, write_build, write_file, write_libraries, write_per_expert, write_tools


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A package with a patch, on a machine without a GPU."""
    monkeypatch.setattr(bundle, "patch_files", lambda: PATCHES)
    monkeypatch.setattr(choose, "has_gpu", lambda: False)
    return monkeypatch


@pytest.fixture
def stock_file(tmp_path: Path) -> Path:
    return write_file(tmp_path / "stock.gguf")


@pytest.fixture
def per_expert_file(tmp_path: Path) -> Path:
    return write_per_expert(tmp_path / "per-expert.gguf")


def program(file: Path, build: str = "auto") -> Path:
    return prepare_start("llama-cli", file, build).program


def refusal(file: Path, build: str = "auto", name: str = "llama-cli") -> str:
    with pytest.raises(MopeqError) as caught:
        prepare_start(name, file, build)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_default_is_the_patched_build_on_the_cpu(cache: Path, stock_file: Path, per_expert_file: Path) -> None:
    stock, patched, cuda = (write_build(cache, name) for name in ("stock", PATCHED, f"{PATCHED}-cuda87"))
    for file in (stock_file, per_expert_file):
        assert program(file) == program(file, "cpu") == patched / "llama-cli"
        assert program(file, "cuda") == cuda / "llama-cli"
    assert program(stock_file, "stock") == stock / "llama-cli"
    found = locate.find_runtime()
    assert found is not None
    assert found.bin == locate.library_dir() == patched
    assert locate.tool("llama-quantize") == patched / "llama-quantize"


def test_cuda_where_it_is_installed_and_there_is_a_gpu(
    cache: Path, per_expert_file: Path, machine: pytest.MonkeyPatch
) -> None:
    patched = write_build(cache, PATCHED)
    machine.setattr(choose, "has_gpu", lambda: True)
    assert program(per_expert_file) == patched / "llama-cli"
    old, own = (write_build(cache, f"{PATCHED}-cuda{arch}") for arch in (75, 86))
    write_build(cache, "groups0000000000-cuda86")
    machine.setattr(choose, "cuda_backend", lambda: "cuda86")
    assert program(per_expert_file) == program(per_expert_file, "cuda") == own / "llama-cli"
    machine.setattr(choose, "cuda_backend", lambda: "cuda90")
    assert program(per_expert_file) == old / "llama-cli"
    # The Python library stays on the CPU.
    assert locate.library_dir() == patched


def test_an_old_stock_build_serves_until_the_patched_one_is_there(
    cache: Path, stock_file: Path, per_expert_file: Path
) -> None:
    stock = write_build(cache, "stock")
    write_build(cache, "groups0000000000")
    assert program(stock_file) == stock / "llama-cli"
    assert locate.library_dir() == stock
    said = refusal(per_expert_file)
    assert said.startswith(f"{per_expert_file}: has experts of different types (expert groups, version 1), which")
    assert said.endswith("use the patched llama.cpp (mopeq-edge runtime install)")
    assert "run: mopeq-edge runtime install" in refusal(stock_file, "cpu")


def test_stock_does_not_run_per_expert_files(cache: Path, per_expert_file: Path) -> None:
    write_build(cache, "stock")
    write_build(cache, PATCHED)
    assert "this llama.cpp (stock) does not run; leave out --build stock" in refusal(per_expert_file, "stock")


@pytest.mark.parametrize(
    ("build", "command"),
    [("auto", "install"), ("cpu", "install"), ("cuda", "install --cuda"), ("stock", "install --stock")],
)
def test_what_is_not_installed(cache: Path, stock_file: Path, build: str, command: str) -> None:
    assert refusal(stock_file, build).endswith(f"run: mopeq-edge runtime {command}")


def test_a_llama_cpp_of_ones_own(
    cache: Path, tmp_path: Path, machine: pytest.MonkeyPatch, stock_file: Path, per_expert_file: Path
) -> None:
    patched = write_build(cache, PATCHED)
    own = write_libraries(tmp_path / "own", patched=True)
    machine.setenv("LLAMA_CPP_LIB_PATH", str(own))
    assert f"LLAMA_CPP_LIB_PATH={own} has no llama-cli; unset it" in refusal(stock_file)
    write_tools(own)
    assert program(per_expert_file) == own / "llama-cli"
    assert program(per_expert_file, "cpu") == patched / "llama-cli"
    write_libraries(own, patched=False)
    assert program(stock_file) == own / "llama-cli"
    said = refusal(per_expert_file)
    assert f"(LLAMA_CPP_LIB_PATH={own}) does not run; unset LLAMA_CPP_LIB_PATH and use the patched" in said
    machine.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path / "none"))
    assert "LLAMA_CPP_LIB_PATH" in refusal(stock_file)


def test_a_build_without_the_tool(cache: Path, stock_file: Path) -> None:
    (write_build(cache, PATCHED) / "llama-server").unlink()
    assert "llama-server is missing from" in refusal(stock_file, name="llama-server")


@pytest.mark.parametrize("version", [KV(ValueType.UINT32, 2), KV(ValueType.INT32, 1), KV(ValueType.STRING, "1")])
def test_unknown_versions(cache: Path, tmp_path: Path, version: KV) -> None:
    write_build(cache, PATCHED)
    with pytest.raises(FormatError, match=r"mopeq\.expert_groups\.version is .*, expected 1 \(UINT32\)"):
        prepare_start("llama-cli", write_file(tmp_path / "x.gguf", version))


def test_what_the_library_knows(tmp_path: Path) -> None:
    assert runs_expert_groups(write_libraries(tmp_path / "a", patched=True))
    assert not runs_expert_groups(write_libraries(tmp_path / "b", patched=False))
    assert not runs_expert_groups(tmp_path)
    for path in (tmp_path / "a").iterdir():
        path.write_bytes(b"")
    assert not runs_expert_groups(tmp_path / "a")


def test_why_a_file_does_not_load(tmp_path: Path, stock_file: Path, per_expert_file: Path) -> None:
    patched, stock = (write_libraries(tmp_path / name, patched=name == "patched") for name in ("patched", "stock"))
    assert why_it_does_not_load(per_expert_file, patched) is None
    assert why_it_does_not_load(stock_file, stock) is None
    assert why_it_does_not_load(tmp_path / "none.gguf", stock) is None
    said = why_it_does_not_load(per_expert_file, stock)
    assert said is not None
    assert f"the llama.cpp in {stock} does not run; leave LLAMA_CPP_LIB_PATH unset" in said


def test_what_is_installed(cache: Path) -> None:
    assert locate.installed_builds() == ()
    names = ["groups0000000000", PATCHED, f"{PATCHED}-cuda87", "stock"]
    for name in names:
        write_build(cache, name)
    (cache / f"llama.cpp-{locate.pinned_version()}-broken").mkdir()
    (cache / f"llama.cpp-{locate.pinned_version()}-broken" / "runtime.json").write_text("{")
    write_build(cache, "stock-cuda50")
    (cache / f"llama.cpp-{locate.pinned_version()}-stock-cuda50").rename(cache / "llama.cpp-0-stock")
    assert [found.build_id for found in locate.installed_builds()] == sorted(names)
    with pytest.raises(RuntimeMissingError, match=r"build stock-cuda87.*runtime install --stock --cuda"):
        locate.require_runtime("stock", "cuda87")
