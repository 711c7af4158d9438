"""Calibration takes the output matrix that the GGUF gets and that transformers takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from converters import CONVERTERS
from mopeq_edge.calibrate.blocks import BlockModel
from mopeq_edge.calibrate.curvature import Run, record_choices
from mopeq_edge.calibrate.passes import one_torch_thread
from mopeq_edge.calibrate.states import HiddenStates
from mopeq_edge.imatrix import EMBEDDING
from mopeq_edge.progress import SilentProgress
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.source.open import open_source
from tools.vision_language_configs import BASE

from ..converters.tied import BUILDERS, COPY, NONE, OTHER, build_tied


@pytest.mark.parametrize("head", [NONE, COPY, OTHER])
@pytest.mark.parametrize("name", ["olmoe", "granite-moe", "deepseek-v2", BASE])
def test_loss_of_a_tied_checkpoint_is_that_of_transformers(name: str, head: str, tmp_path: Path) -> None:
    directory = build_tied(name, tmp_path / "model", True, head)
    source = open_source(directory, CONVERTERS, pre="gpt-2")
    assert isinstance(source, HuggingFaceSource)
    windows = np.random.default_rng(1).integers(0, 4096, (2, 20)).astype(np.int32)
    blocks = BlockModel(source)
    states = HiddenStates(blocks.n_layer + 1, [windows.shape[1]] * len(windows), blocks.n_embd, tmp_path)
    with one_torch_thread(), SilentProgress().step("", 1) as step:
        choices = record_choices(Run(blocks, windows, states, 1, step))
    assert (blocks.output_name == EMBEDDING) == (head != OTHER and name != "olmoe")
    tokens = torch.from_numpy(windows).long()
    with torch.no_grad():
        logits = BUILDERS[name][1](directory).to(torch.float64)(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert choices.loss == pytest.approx(loss.item(), rel=1e-6)
