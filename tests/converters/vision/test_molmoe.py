"""MolmoE's vision file against CLIP of transformers and the equations of the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.vision import find_family, write_vision
from mopeq_edge.errors import SourceError
from mopeq_edge.source.checkpoint import Checkpoint
from mopeq_edge.vision.crops import crop
from mopeq_edge.vision.session import VisionSession
from mopeq_edge.vision.tower import Tower
from tools.vision_language_configs import MOLMOE, config_of

from ...builders import edit_json
from ...vision.pictures import picture
from ..vision_language import build
from .references import molmo_crops, weights

CLOSE = 1e-5


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(MOLMOE, tmp_path_factory.mktemp("molmoe") / "model", "float32")


def write(directory: Path, out: Path, kind: str = "F32") -> Any:
    config = json.loads((directory / "config.json").read_text())
    family = find_family(config)
    assert family is not None
    options: dict[str, Any] = {"kind": kind, "made_from": "7" * 64, "threads": 1}
    return write_vision(Checkpoint(directory), family, directory, config, out, **options)


@pytest.fixture(scope="module")
def written(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(directory, tmp_path_factory.mktemp("out") / "out.vision.onnx").path


@pytest.mark.parametrize("size", [(40, 40), (70, 30), (25, 60)])
def test_crops_are_those_of_transformers_clip(size: tuple[int, int], directory: Path, written: Path) -> None:
    """Tower, two layers, padding, pooling and projector."""
    session = VisionSession(written, 1)
    layout: Any = session.describe().layout
    place = crop(picture(*size), layout)
    # empty, full and partly padded patches
    assert {float(x > 0) + float(x >= 1) for x in place.masks.ravel()} >= {0.0, 2.0}
    views = zip(place.pixels, place.masks, strict=True)
    found = np.stack([session.run({"pixels": p[None], "mask": m})["embeddings"] for p, m in views])
    expected = molmo_crops(directory, place.pixels, place.masks)
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) < CLOSE * np.linalg.norm(expected)
    bare = molmo_crops(directory, place.pixels, np.ones_like(place.masks))
    assert np.linalg.norm(bare - expected) > 0.01 * np.linalg.norm(expected)


def test_picture_tokens_are_rows_of_the_further_embedding(directory: Path, written: Path) -> None:
    session = VisionSession(written, 1)
    feeds = {name: np.zeros(shape, np.float32) for name, shape in session.inputs.items()}
    _, tensors = weights(directory)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    rows = [ids[token] - 4104 for token in ("<im_start>", "<im_end>", "<im_patch>", "<im_col>")]
    expected = tensors["model.transformer.wte.new_embedding"][rows].numpy()
    np.testing.assert_array_equal(session.run(feeds)["picture_tokens"], expected)


@pytest.mark.parametrize(("kind", "most", "least"), [("F16", 2e-3, 1e-6), ("INT8", 5e-2, 1e-3)])
def test_other_types_state_their_error(kind: str, most: float, least: float, directory: Path, tmp_path: Path) -> None:
    assert least < write(directory, tmp_path / "out.vision.onnx", kind).description.relative_error < most


def test_released_settings(directory: Path) -> None:
    """24 × 24 patches; of 23 layers the 22nd and the 15th, so that the last is not computed."""
    config = config_of(MOLMOE)
    names = {f"model.vision_backbone.image_vit.transformer.resblocks.{i}.ffn_norm.bias": (1024,) for i in range(23)}

    class Shapes:
        shapes = names

        def read_f32(self, name: str, index: int | None = None) -> Any:
            raise AssertionError

    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["id"] += 50304 - 4104
    released = directory.parent / "released"
    released.mkdir()
    (released / "tokenizer.json").write_text(json.dumps(tokenizer))
    family = find_family(config)
    assert family is not None
    tower = family.read(released, config, Shapes())
    assert (tower.width, tower.heads, tower.ff, tower.inner, tower.n_embd) == (1024, 16, 4096, 1024, 2048)
    assert (tower.n_side, tower.layers, tower.layout.most, tower.layout.margins) == (24, (21, 14), 12, (4, 4))
    assert tower.unused == ("model.vision_backbone.image_vit.transformer.resblocks.22.",)
    assert tower.prompt.before + "x" + tower.prompt.after == " User: x Assistant:"


REFUSED = [
    (
        {"image_padding_embed": "regress"},
        "config.json has image_padding_embed 'regress', expected 'pad_and_partial_pad'",
    ),
    ({"image_pooling_2d": "stack"}, "config.json has image_pooling_2d 'stack', expected 'attention-meanq'"),
    ({"use_cls_feature": True}, "config.json has use_cls_feature True, expected False"),
    ({"vit_layers": [-2, -11]}, r"config.json has vit_layers \[-2, -11\] for 10 layers of the vision side"),
    ({"vit_layers": [-2]}, r"tensor 'model.vision_backbone.pad_embed' has shape \[2, 64\], but config.json asks for"),
    ({"vision_backbone": {"image_num_layers": 9}}, "has image_num_layers 9 in vision_backbone, expected 10"),
    ({"vision_backbone": {"image_num_heads": 8}}, "has image_num_key_value_heads 4 in vision_backbone, expected 8"),
    (
        {"vision_backbone": {"image_num_pos": 146}},
        "expected a square of an even number of patches with a position each",
    ),
    ({"additional_vocab_size": 2}, "tokenizer.json has token <im_patch> at 4106, expected 4104 to 4105"),
    ({"vision_backbone": {"image_emb_dim": 64, "image_head_dim": 16}}, r"patch_embedding.weight' has shape \[32, 12\]"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_is_not_known_is_refused(changes: dict[str, Any], message: str, directory: Path, tmp_path: Path) -> None:
    copied = tmp_path / "model"
    copied.mkdir()
    for path in directory.iterdir():
        (copied / path.name).symlink_to(path)
    config = json.loads((directory / "config.json").read_text())
    (copied / "config.json").unlink()
    (copied / "config.json").write_text(json.dumps(config))
    edit_json(
        copied / "config.json", **{k: {**config[k], **v} if isinstance(v, dict) else v for k, v in changes.items()}
    )
    with pytest.raises(SourceError, match=message) as caught:
        write(copied, tmp_path / "out.vision.onnx")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_tokens_of_a_picture(written: Path) -> None:
    """The tower as it is used: the whole, 6 rows of 6, then 2 × 3 crops' 8 rows of 10, with their own tokens."""
    tower = Tower(written, 1)
    image = picture(30, 22)
    layout: Any = tower.description.layout
    place = crop(image, layout)
    (found,) = tower.embed([image])
    assert found.shape == (4 + 6 * 7 + (2 * place.rows + 4) * (2 * place.columns + 5), 64)
