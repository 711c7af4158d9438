"""The tiny-sight model: its own modules against transformers', and its training from start to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from converters.deepseek_ocr import skeleton
from converters.deepseek_vl2 import text_settings
from tools.sight_batches import make_batch
from tools.sight_model import SIZES, Sight, load, save
from tools.sight_pictures import PAIRS
from tools.sight_text import make_tokenizer, prefix
from tools.train_sight import answer_logits, main

from ..converters.vision.references import text_logits, vl2_picture
from ..converters.vision_language import fill_plain


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights that differ everywhere."""
    torch.manual_seed(1)
    model = Sight(SIZES, make_tokenizer().get_vocab_size())
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:
                value += 0.1 * torch.randn(value.shape)
    folder = tmp_path_factory.mktemp("sight") / "model"
    save(model, folder)
    return folder


def transformers_model(directory: Path) -> Any:
    from tools.tiny_models import DeepseekTextLM

    settings, _ = skeleton(directory, text_settings(json.loads((directory / "config.json").read_text())))
    return fill_plain(DeepseekTextLM(settings).eval(), directory)


@pytest.mark.parametrize("grid", [(1, 1), (3, 1), (1, 2)])
def test_logits_are_those_of_transformers(grid: tuple[int, int], directory: Path) -> None:
    """Tower, projector, order, and every question alone, although all stand in one row in training."""
    tokenizer = make_tokenizer()
    batch, model = make_batch(tokenizer, grid, range(2)), load(directory)
    before = prefix(tokenizer)
    with torch.no_grad():
        seen = model.see(batch.pixels)
        logits, labels = answer_logits(model, seen, batch, torch.tensor(before))
        mine = model.arrange(seen, *grid).numpy()
    reference = transformers_model(directory)
    for i, own in enumerate(batch.asked):
        picture = vl2_picture(directory, batch.pixels[i].numpy(), *grid)
        np.testing.assert_allclose(mine[i], picture, atol=1e-5)
        at = 0
        for one in own:
            rows = text_logits(reference, [np.array(before), picture, np.array(one.tokens)])
            expected = rows[len(rows) - 1 - one.n_answer : len(rows) - 1]
            got = logits[i, at : at + one.n_answer].numpy()
            assert np.abs(got - expected).max() < 1e-5 * max(1.0, expected.std())
            assert labels[i, at : at + one.n_answer].tolist() == list(one.tokens[-one.n_answer :])
            at += one.n_answer


def test_a_training_from_start_to_end(tmp_path: Path) -> None:
    """A few steps; the same command gives the same bytes."""
    small = ["--tower-steps", 2, "--steps", 2, "--batch", 2, "--threads", 1, "--held-out", 2]
    for name in ("a", "b"):
        done = CliRunner().invoke(main, [str(tmp_path / name), *map(str, small)], catch_exceptions=False)
        assert done.exit_code == 0
    numbers = json.loads(done.stdout)
    assert numbers["pictures"] == 8
    assert 0 <= numbers["right"]["all"] <= 1
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert {"calibration.txt", "config.json", "model.safetensors", "tokenizer.json"} <= {str(name) for name in files}
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / "pictures" / "00.txt").read_text() in {f"{a} {b}\n" for a, b in PAIRS}
    assert "<|Assistant|>: " in (tmp_path / "a" / "calibration.txt").read_text()
    start = Sight(SIZES, make_tokenizer().get_vocab_size()).state_dict()
    assert {n: v.shape for n, v in load(tmp_path / "a").state_dict().items()} == {n: v.shape for n, v in start.items()}
