"""The file to test and the llama.cpp to test it in, from the command line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mopeq_edge.binding import LlamaModel
from mopeq_edge.cli.console import available_threads
from mopeq_edge.device_report.bench import BenchSizes
from mopeq_edge.device_report.build import Build, find_build, why_the_binding_cannot
from mopeq_edge.device_report.document import is_report
from mopeq_edge.errors import FormatError, MopeqError
from mopeq_edge.gguf_file import GGUFHeader
from mopeq_edge.runtime.locate import LIBRARY_VARIABLE
from mopeq_edge.runtime.server import Server, ServerError
from mopeq_edge.split import read_parts
from mopeq_edge.summary import Summary, summarise
from runtime_tests.engines import Engines, Setup
from runtime_tests.prompts import LENGTHS, N_CTX, TEXT
from runtime_tests.recording import Recorder
from runtime_tests.vocabulary import ServerVocabulary, Vocabulary

Tokens = npt.NDArray[np.int32]
Record = Callable[[str, object], None]

RECORDER = "mopeq_edge_recorder"
BUILD = pytest.StashKey[Build]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mopeq-edge")
    group.addoption("--model", type=Path, help="GGUF file to test in llama.cpp")
    group.addoption("--llama-cpp", type=Path, metavar="DIR", help="your own build (default: the installed runtime)")
    group.addoption("--n-gpu-layers", type=int, default=0, help="layers to put on the GPU (default: 0)")
    group.addoption("--threads", type=int, default=available_threads(), help="CPU threads (default: every CPU)")
    group.addoption("--reference", type=Path, metavar="SOURCE.gguf", help="the model it was made from, to measure KLD")
    group.addoption("--bench", default="512,128,3", metavar="P,G,N", help="llama-bench: prompt, generate, repetitions")
    group.addoption("--report", type=Path, help="JSON to write (default: MODEL with .report.json, beside it)")


def pytest_configure(config: pytest.Config) -> None:
    model: Path | None = config.getoption("--model")
    if model is None or hasattr(config, "workerinput"):
        return
    try:
        build = config.stash[BUILD] = find_build(config.getoption("--llama-cpp"))
        BenchSizes.parse(config.getoption("--bench"))
    except MopeqError as error:
        raise pytest.UsageError(str(error)) from None
    reference: Path | None = config.getoption("--reference")
    options = {
        "threads_count": config.getoption("--threads"),
        "gpu_layers_count": config.getoption("--n-gpu-layers"),
        "bench": config.getoption("--bench"),
        "reference": reference.name if reference is not None else None,
    }
    recorder = Recorder(_report_path(config.getoption("--report"), model), model, build, options)
    config.pluginmanager.register(recorder, RECORDER)


def _report_path(given: Path | None, model: Path) -> Path:
    """Beside the model, or here where that cannot be written. Nothing but an earlier report is replaced."""
    name = f"{model.name.removesuffix('.gguf')}.report.json"
    beside = model.parent if os.access(model.parent, os.W_OK) else Path.cwd()
    path = given if given is not None else beside / name
    if path.exists() and not is_report(path):
        raise pytest.UsageError(f"--report {path}: exists and is no report; choose another name")
    return path


@pytest.fixture(scope="session")
def model_path(request: pytest.FixtureRequest) -> Path:
    path: Path | None = request.config.getoption("--model")
    if path is None:
        pytest.skip("no model was given; run: pytest runtime_tests --model out.gguf")
    return path


@pytest.fixture(scope="session")
def summary(model_path: Path) -> Summary:
    """What the file is. A broken one fails ``test_the_structure_is_sound``; no other test could say more."""
    try:
        return summarise(model_path)
    except FormatError as error:
        pytest.skip(f"the file is broken: {error}")


@pytest.fixture(scope="session")
def header(model_path: Path, summary: Summary) -> GGUFHeader:
    return read_parts(model_path)[0]


@pytest.fixture(scope="session")
def build(request: pytest.FixtureRequest) -> Build:
    found = request.config.stash.get(BUILD, None)
    return find_build(request.config.getoption("--llama-cpp")) if found is None else found


@pytest.fixture(scope="session")
def setup(
    request: pytest.FixtureRequest, model_path: Path, build: Build, summary: Summary, header: GGUFHeader
) -> Setup:
    if summary.stacks and not build.runs_expert_groups:
        pytest.skip("this llama.cpp does not run expert groups: see test_expert_groups_are_used")
    trained = header.get(f"{summary.architecture}.context_length")
    n_ctx = min(N_CTX, trained) if isinstance(trained, int) and trained > 0 else N_CTX
    option = request.config.getoption
    return Setup(model_path, build, n_ctx, option("--threads"), option("--n-gpu-layers"))


@pytest.fixture(scope="session")
def engines(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    found = Engines(setup, tmp_path_factory.mktemp("engines"))
    yield found
    found.close()


@pytest.fixture(scope="session")
def binding_problem(setup: Setup) -> str | None:
    """Why the library cannot be used from Python, or None; from then on it is the one that is loaded."""
    library = setup.build.library
    problem = why_the_binding_cannot(library, setup.model, setup.n_gpu_layers)
    if problem is None:
        os.environ[LIBRARY_VARIABLE] = str(library)
    return problem


@pytest.fixture
def library(engines: Engines, binding_problem: str | None) -> Engines:
    """To open the model in this process, if the binding fits this llama.cpp."""
    if binding_problem is not None:
        pytest.skip(f"not from Python: {binding_problem}")
    try:
        engines.library()
    except MopeqError:
        pytest.skip("llama.cpp does not load the file: see test_the_library_takes_the_file")
    return engines


@pytest.fixture
def server(engines: Engines, build: Build) -> Server:
    if build.tool("llama-server") is None:
        pytest.skip("this llama.cpp has no llama-server")
    try:
        return engines.server()
    except ServerError:
        pytest.skip("llama-server does not start: see test_llama_server_starts")


@pytest.fixture(scope="session")
def vocabulary(setup: Setup, engines: Engines, binding_problem: str | None) -> Iterator[Vocabulary]:
    if binding_problem is None:
        with LlamaModel(setup.model, vocab_only=True) as opened:
            yield opened
    elif setup.build.tool("llama-server") is not None:
        yield ServerVocabulary(engines)
    else:
        pytest.skip(f"nothing to tokenize with: {binding_problem}, and there is no llama-server")


@pytest.fixture(scope="session")
def tokens(vocabulary: Vocabulary) -> Tokens:
    """The longest prompt, int32 [max(LENGTHS)]; shorter ones are its begin."""
    # A vocabulary of whole sentences would leave too few: begin again.
    return np.resize(vocabulary.tokenize(TEXT, add_special=True), max(LENGTHS))


@pytest.fixture
def record(record_property: Record) -> Callable[..., None]:
    """Keep figures (units in their names) and texts in the report."""

    def keep(**values: object) -> None:
        for name, value in values.items():
            record_property(name, value)

    return keep
