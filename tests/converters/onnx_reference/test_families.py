"""Logits and routing of every family against transformers' float32 model of the same checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import CONVERTERS
from converters.onnx_reference import run_reference
from mopeq_edge.source.open import open_source

from ...builders import build_olmoe, write_gguf
from ..families import FAMILIES, causal_model, logits
from ..vision_language import VISION_LANGUAGE

Chosen = dict[int, Any]

FAMILY: Mapping[str, tuple[Callable[[Path, str], Path], Callable[[Path], Any]]] = {
    "olmoe": (lambda directory, dtype: build_olmoe(directory, dtype=dtype, n_layer=3), causal_model),
    **FAMILIES,
    **VISION_LANGUAGE,
}

TOLERANCE = 1e-4
"""Of the logits' spread. The two differ by the order of float32 sums; 5e-5 was the most, where gates are loudest."""


def watch_routers(model: Any) -> Chosen:
    """Fills itself, when the model runs, with (weights, ids) [n_tokens, n_used] of each layer's router."""
    chosen: Chosen = {}

    def keep(layer: int, _module: Any, _inputs: Any, outputs: Any) -> None:
        _, weights, ids = outputs
        chosen[layer] = (weights.detach().float().numpy(), ids.numpy())

    for name, module in model.named_modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            layer = re.search(r"layers\.(\d+)\.", name)
            assert layer is not None
            module.register_forward_hook(partial(keep, int(layer[1])))
    return chosen


def dense(ids: Any, weights: Any, n_expert: int) -> Any:
    """[n_tokens, n_expert]: the weight of every expert, whatever the order of the chosen ones."""
    found = np.zeros((len(ids), n_expert))
    np.put_along_axis(found, ids.astype(np.int64), weights, axis=1)
    return found


@pytest.mark.parametrize("name", FAMILY)
def test_same_logits_and_routing_as_transformers(tmp_path: Path, name: str) -> None:
    build, open_model = FAMILY[name]
    directory = build(tmp_path / "model", "float32")
    write_gguf(open_source(directory, CONVERTERS, pre="gpt-2"), tmp_path / "model.gguf")
    tokens = np.random.default_rng(0).integers(0, 4096, 100)
    model = open_model(directory)
    chosen = watch_routers(model)
    expected = logits(model, tokens.tolist())
    got = run_reference(tmp_path / "model.gguf", tokens)

    assert expected.std() > 0.5
    assert got.logits.dtype == np.float32
    assert got.logits.shape == expected.shape
    assert np.abs(got.logits - expected).max() < TOLERANCE * expected.std()
    assert chosen
    assert set(got.routed) == set(chosen)
    for layer, routed in got.routed.items():
        weights, ids = chosen[layer]
        assert routed.ids.shape == routed.weights.shape == ids.shape
        n_expert = int(max(ids.max(), routed.ids.max())) + 1
        theirs, ours = dense(ids, weights, n_expert), dense(routed.ids, routed.weights, n_expert)
        assert np.abs(theirs - ours).max() < TOLERANCE
        # what the margins promise: the choice could not have been turned by the rounding of the two
        assert (np.sort(ids) == np.sort(routed.ids))[routed.margins > TOLERANCE].all()
        assert (routed.margins > TOLERANCE).mean() > 0.95
