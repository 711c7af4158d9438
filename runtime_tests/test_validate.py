"""What ``mopeq-edge validate`` checks, a test for each: weights that are numbers, and llama.cpp against ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from converters.onnx_reference import run_reference
from mopeq_edge.errors import SourceError
from mopeq_edge.evaluate.divergence import log_softmax
from mopeq_edge.ggml.types import I32
from mopeq_edge.pipeline_validate import ValidateRequest, validate
from mopeq_edge.progress import SilentProgress
from mopeq_edge.runtime.server import Server
from mopeq_edge.split import read_parts
from mopeq_edge.summary import Summary
from mopeq_edge.validate.check import Check
from mopeq_edge.validate.stored import stored_model
from mopeq_edge.validate.tolerance import tolerance_of
from runtime_tests.engines import Engines, Setup

NAMES = (
    "plan",
    "scales",
    "zeros",
    "key-values",
    "tensors",
    "weights",
    "runs",
    "token by token",
    "logits",
    "routing",
)
"""Of validate's checks. ``key-values``, ``tensors`` and ``weights`` need --reference; ``plan`` needs OUT.mopeq."""

FIGURES = {
    **dict.fromkeys(("scales", "zeros"), "bad_count"),
    "weights": "relative_rms_error",
    **dict.fromkeys(("token by token", "logits"), "kld_mean_nats"),
    "routing": "same_choices_fraction",
}
"""What the value of a check is; what is allowed is beside it."""

N_PROMPT = 16
STANDARD_DEVIATIONS = 4.0
"""Between log-probabilities of one token: the tolerance is that of the RMS over all of them."""

Checks = Mapping[str, Sequence[Check]]


@pytest.fixture(scope="session")
def checks(
    request: pytest.FixtureRequest, summary: Summary, setup: Setup, engines: Engines, binding_problem: str | None
) -> Checks:
    """All checks by name. They load the file themselves."""
    engines.close()
    asked = ValidateRequest(
        path=setup.model,
        work=setup.model.with_name(f"{setup.model.name.removesuffix('.gguf')}.mopeq"),
        against=request.config.getoption("--reference"),
        run=binding_problem is None,
        threads=setup.n_threads,
        n_gpu_layers=setup.n_gpu_layers,
    )
    found: dict[str, list[Check]] = {}
    for check in validate(asked, SilentProgress()).checks:
        found.setdefault(check.name, []).append(check)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_validate(checks: Checks, name: str, binding_problem: str | None, record: Callable[..., None]) -> None:
    found = checks.get(name, ())
    failed = [check for check in found if check.passed is False]
    for check in failed or [check for check in found if check.passed]:
        record(message=check.message)
        if name in FIGURES:
            record(**{FIGURES[name]: check.value, f"{FIGURES[name]}_allowed": check.threshold})
        break
    assert not failed, "; ".join(check.message for check in failed)
    if not any(check.passed for check in found):
        reasons = [check.message for check in found] or [f"not reached: {binding_problem or 'see the other checks'}"]
        pytest.skip("; ".join(reasons))


def test_llama_server_agrees_with_onnx(
    server: Server,
    setup: Setup,
    tokens: npt.NDArray[np.int32],
    binding_problem: str | None,
    record: Callable[..., None],
) -> None:
    """The likeliest next tokens, where the library's logits are not to be had."""
    if binding_problem is None:
        pytest.skip("the library's logits are compared, see test_validate[logits]")
    prompt = tokens[:N_PROMPT]
    answer = server.complete(prompt.tolist(), 1, n_probs=8, ignore_eos=True)
    try:
        reference = run_reference(setup.model, prompt, threads=setup.n_threads)
    except SourceError as error:
        pytest.skip(str(error))
    matrices = stored_model(read_parts(setup.model)).matrices
    tolerance = tolerance_of(matrix.type for matrix in matrices if matrix.type is not I32)
    row: Any = log_softmax(reference.logits[-1:])[0]
    tops = answer["completion_probabilities"][0]["top_logprobs"]
    largest = max(abs(float(row[top["id"]]) - float(top["logprob"])) for top in tops)
    most = STANDARD_DEVIATIONS * tolerance.noise * float(reference.logits[-1].std())
    record(largest_difference_nats=largest, threshold_nats=most)
    assert largest <= most


def test_the_file_is_one_that_validate_knows(model_path: Path, checks: Checks) -> None:
    """Every check that ran has a test here, so that none is lost."""
    assert set(checks) <= {*NAMES, "structure", "evaluation", "prediction"}, model_path
