"""Picture files and a question to logits: onnxruntime and llama.cpp at F32 against the whole model in torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import CONVERTERS
from converters.vision import find_family, write_vision
from mopeq_edge.binding import LlamaModel
from mopeq_edge.errors import MopeqError, PlanError
from mopeq_edge.source.checkpoint import Checkpoint
from mopeq_edge.source.open import open_source
from mopeq_edge.vision.answer import Question, answer, see
from mopeq_edge.vision.crops import crop
from mopeq_edge.vision.image_file import open_image
from mopeq_edge.vision.prompt import lay_out
from mopeq_edge.vision.sample import Sampling
from mopeq_edge.vision.tiles import cut
from tools.vision_language_configs import BASE, MOLMOE, SMALL, TINY

from ..builders import write_gguf
from ..converters.vision.references import molmo_picture, text_logits, vl2_picture
from ..converters.vision_language import VISION_LANGUAGE
from .pictures import picture

pytestmark = pytest.mark.runtime

QUESTION = "What is in these?"


def make(name: str, folder: Path) -> tuple[Path, Path, Path]:
    """A test-size checkpoint in F32, its GGUF and its vision file."""
    directory = VISION_LANGUAGE[name][0](folder / "model", "float32")
    write_gguf(open_source(directory, CONVERTERS, pre="gpt-2"), folder / "out.gguf")
    config = json.loads((directory / "config.json").read_text())
    family = find_family(config)
    assert family is not None
    options: dict[str, Any] = {"kind": "F32", "made_from": "1" * 64, "threads": 1}
    write_vision(Checkpoint(directory), family, directory, config, folder / "out.vision.onnx", **options)
    return directory, folder / "out.gguf", folder / "out.vision.onnx"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make(TINY, tmp_path_factory.mktemp("vl2"))


@pytest.fixture
def photos(tmp_path: Path) -> tuple[Path, ...]:
    """One that is wide and one that is tall."""
    paths = tmp_path / "a.png", tmp_path / "b.png"
    for path, size in zip(paths, ((130, 50), (40, 90)), strict=True):
        picture(*size, seed=size[0]).save(path)
    return paths


def encoded(directory: Path, *texts: str) -> list[Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    return [np.array(tokenizer.encode(text, add_special_tokens=False), np.int32) for text in texts]


@pytest.mark.parametrize("name", [TINY, SMALL, BASE])
def test_logits_are_those_of_the_whole_model_in_torch(name: str, tmp_path: Path, photos: tuple[Path, ...]) -> None:
    """Plain attention and latent; two pictures, so tiles, and text before, between and behind them."""
    directory, gguf, vision = make(name, tmp_path)
    tower, seen = see(Question(gguf, vision, photos, QUESTION))
    with LlamaModel(gguf, n_threads=1, n_ctx=512, plain=True) as model:
        parts = lay_out(model, tower.description, QUESTION, seen)
        got = model.mixed_logits(parts)
        begin = model.bos
    layout: Any = tower.description.layout
    places = [cut(open_image(path), layout, 2) for path in photos]
    pictures = [vl2_picture(directory, place.pixels, place.columns, place.rows) for place in places]
    before, between, behind = encoded(directory, "<|User|>: ", "\n", f"\n{QUESTION}\n\n<|Assistant|>:")
    whole = [np.array([begin], np.int32), before, pictures[0], between, pictures[1], behind]
    reference = VISION_LANGUAGE[name][1](directory)
    expected = text_logits(reference, whole)
    assert [part.shape for part in parts] == [part.shape for part in whole]
    assert got.shape == expected.shape
    assert expected.std() > 0.5
    assert np.abs(got - expected).max() < 1e-4 * expected.std()
    # the text behind the pictures depends on them
    other = text_logits(reference, [*whole[:2], pictures[0][::-1].copy(), *whole[3:]])
    assert np.abs(other - expected)[-1].max() > 0.05 * expected.std()


def test_logits_of_molmoe_are_those_of_the_whole_model_in_torch(tmp_path: Path, photos: tuple[Path, ...]) -> None:
    """Two pictures, then the text; crops by our own tiling, everything behind it in torch."""
    directory, gguf, vision = make(MOLMOE, tmp_path)
    tower, seen = see(Question(gguf, vision, photos, QUESTION))
    with LlamaModel(gguf, n_threads=1, n_ctx=1024, plain=True) as model:
        parts = lay_out(model, tower.description, QUESTION, seen)
        got = model.mixed_logits(parts)
    layout: Any = tower.description.layout
    pictures = [molmo_picture(directory, crop(open_image(path), layout)) for path in photos]
    (text,) = encoded(directory, f" User: {QUESTION} Assistant:")
    (first,) = encoded(directory, "<|endoftext|>")
    whole = [first, *pictures, text]
    reference = VISION_LANGUAGE[MOLMOE][1](directory)
    expected = text_logits(reference, whole)
    assert [part.shape for part in parts] == [part.shape for part in whole]
    assert expected.std() > 0.5
    assert np.abs(got - expected).max() < 1e-4 * expected.std()
    other = text_logits(reference, [first, pictures[1], pictures[0], text])
    assert np.abs(other - expected)[-1].max() > 0.01 * expected.std()


def test_embeddings_of_tokens_are_as_good_as_tokens(bf16_gguf: Path, tiny_source: Any, evaluation_text: str) -> None:
    """Rows of the embedding matrix in the place of their tokens, in batches that end inside a part."""
    tensor = next(t for t in tiny_source.tensors if t.name == "token_embd.weight")
    with LlamaModel(bf16_gguf, n_ctx=256, n_batch=32, n_threads=1, plain=True) as model:
        ids = model.tokenize(evaluation_text)[:100]
        rows = np.ascontiguousarray(tiny_source.read(tensor)[ids], np.float32)
        expected = model.logits(ids)
        got = model.mixed_logits([ids[:10], rows[10:75], ids[75:]])
        np.testing.assert_allclose(model.mixed_logits([ids[:10], rows[10:75], ids[75:]], first=60), got[60:], atol=1e-6)
        # a router that nearly ties may fall the other way in another batch
        assert np.median(np.abs(got - expected).max(axis=1)) < 0.05
        assert np.abs(got - expected)[:32].max() < 0.05
        with pytest.raises(ValueError, match=r"expected embeddings of 256 float32, got \(3, 255\) of float32"):
            model.mixed_logits([rows[:3, :255]])
        with pytest.raises(MopeqError, match="300 tokens do not fit into its context of 256"):
            model.mixed_logits([np.zeros((300, 256), np.float32)])


def test_an_answer_is_the_likeliest_token_each_time(tiny: tuple[Path, Path, Path], photos: tuple[Path, ...]) -> None:
    _, gguf, vision = tiny
    question = Question(gguf, vision, photos, QUESTION, n_predict=6)
    text = "".join(answer(question))
    assert text == "".join(answer(question))
    tower, seen = see(question)
    with LlamaModel(gguf, n_threads=1, n_ctx=512) as model:
        parts = lay_out(model, tower.description, QUESTION, seen)
        ids: list[int] = []
        for _ in range(6):
            row = model.mixed_logits([*parts, *([np.array(ids, np.int32)] if ids else [])])[-1]
            ids.append(int(row.argmax()))
        assert text == model.detokenize(ids)
    warm = Question(gguf, vision, photos, QUESTION, n_predict=6, sampling=Sampling(temperature=5.0, top_p=1.0, seed=4))
    assert "".join(answer(warm)) == "".join(answer(warm)) != text


def test_marks_say_where_pictures_stand(tiny: tuple[Path, Path, Path], photos: tuple[Path, ...]) -> None:
    _, gguf, vision = tiny
    tower, seen = see(Question(gguf, vision, photos, ""))
    with LlamaModel(gguf, vocab_only=True) as model:
        parts = lay_out(model, tower.description, "first <image> then <image>?", seen)
        assert [part.ndim for part in parts] == [1, 1, 2, 1, 2, 1]
        assert model.detokenize(parts[1]) == "<|User|>: first "
        assert model.detokenize(parts[3]) == " then "
        assert model.detokenize(parts[5]) == "?\n\n<|Assistant|>:"
        with pytest.raises(PlanError, match="the question has 1 times <image> for 2 pictures; expected one for"):
            lay_out(model, tower.description, "<image>", seen)


def test_what_does_not_fit(tiny: tuple[Path, Path, Path], photos: tuple[Path, ...], bf16_gguf: Path) -> None:
    _, gguf, vision = tiny
    with pytest.raises(PlanError, match=r"question and pictures are \d+ tokens, the context has 64; give a larger"):
        list(answer(Question(gguf, vision, photos, QUESTION, n_ctx=64)))
    with pytest.raises(PlanError, match=r"makes embeddings of 64 numbers, .*bf16.gguf reads 256; use the two"):
        list(answer(Question(bf16_gguf, vision, photos, QUESTION)))
