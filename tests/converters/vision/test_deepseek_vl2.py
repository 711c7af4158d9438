"""DeepSeek-VL2's vision file against SigLIP of transformers and the equations of the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.vision import find_family, write_vision
from mopeq_edge.errors import SourceError
from mopeq_edge.source.checkpoint import Checkpoint
from mopeq_edge.vision.session import VisionSession
from mopeq_edge.vision.tiles import cut
from mopeq_edge.vision.tower import Tower
from tools.vision_language_configs import SMALL, TINY, config_of

from ...builders import edit_json
from ...vision.pictures import picture
from ..vision_language import build
from .references import siglip, vl2_picture, weights

STAMP = "5" * 64
CLOSE = 1e-5


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(TINY, tmp_path_factory.mktemp("vl2") / "model", "float32")


def write(directory: Path, out: Path, kind: str = "F32") -> Any:
    config = json.loads((directory / "config.json").read_text())
    family = find_family(config)
    assert family is not None
    return write_vision(Checkpoint(directory), family, directory, config, out, kind=kind, made_from=STAMP, threads=1)


@pytest.fixture(scope="module")
def written(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(directory, tmp_path_factory.mktemp("out") / "out.vision.onnx").path


def relative(found: Any, expected: Any) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("size", [(60, 60), (200, 60), (60, 190), (30, 12)])
def test_a_picture_is_that_of_transformers_siglip(size: tuple[int, int], directory: Path, written: Path) -> None:
    """Tower, projector, order and newlines; the tiles are our own here."""
    tower = Tower(written, threads=1)
    image = picture(*size)
    place = cut(image, tower.description.layout, 1)
    (found,) = tower.embed([image])
    expected = vl2_picture(directory, place.pixels, place.columns, place.rows)
    assert relative(found, expected) < CLOSE
    assert np.abs(found - expected).max() < 10 * CLOSE * np.abs(expected).max()


def test_the_reference_would_see_another_activation(directory: Path, written: Path) -> None:
    """The comparison above can fail: exact gelu in the tower moves it by more than its bound."""
    model = siglip(directory)
    pixels = cut(picture(60, 60), Tower(written, 1).description.layout, 1).pixels
    with torch.no_grad():
        right = model(torch.from_numpy(pixels)).last_hidden_state.numpy()
        for module in model.modules():
            if hasattr(module, "activation_fn"):
                module.activation_fn = torch.nn.GELU()
        wrong = model(torch.from_numpy(pixels)).last_hidden_state.numpy()
    assert relative(wrong, right) > 2 * CLOSE


@pytest.mark.parametrize(("kind", "most", "least"), [("F16", 2e-3, 1e-6), ("INT8", 5e-2, 1e-3)])
def test_other_types_state_their_error(
    kind: str, most: float, least: float, directory: Path, written: Path, tmp_path: Path
) -> None:
    result = write(directory, tmp_path / "out.vision.onnx", kind)
    assert least < result.description.relative_error < most
    exact, rough = VisionSession(written, 1), VisionSession(result.path, 1)
    tile = cut(picture(70, 50), result.description.layout, 3).pixels[:1]
    found, expected = (session.run({"pixels": tile})["embeddings"] for session in (rough, exact))
    # another picture: of the stated size, not the same
    assert 0.2 < relative(found, expected) / result.description.relative_error < 5
    sizes = [
        path.stat().st_size for path in (tmp_path / "out.vision.onnx.data", written.with_name(written.name + ".data"))
    ]
    assert sizes[0] < 0.75 * sizes[1]
    assert result.file_bytes == sizes[0] + result.path.stat().st_size


def test_the_same_checkpoint_gives_the_same_bytes(directory: Path, written: Path, tmp_path: Path) -> None:
    again = write(directory, tmp_path / written.name)
    assert again.path.read_bytes() == written.read_bytes()
    assert (tmp_path / f"{written.name}.data").read_bytes() == written.with_name(f"{written.name}.data").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [written.name, f"{written.name}.data"]


def test_released_settings_are_those_of_the_released_sizes(directory: Path) -> None:
    """27 layers of 1152 with 16 heads; 27 × 27 patches in 14 × 14 tokens; 23 shapes in at most nine tiles."""
    for name, n_embd in ((TINY, 1280), (SMALL, 2048)):
        config = config_of(name)
        tower = find_family(config).read(directory.parent, config, None)  # type: ignore[union-attr]
        found = (tower.layers, tower.width, tower.heads, tower.ff, tower.n_side, tower.layout.rows, tower.n_embd)
        assert found == (27, 1152, 16, 4304, 27, 14, n_embd)
        assert len(tower.layout.candidates) == 23
        assert (768, 1536) in tower.layout.candidates
        assert (tower.layout.most_tiled, tower.layout.whole_first) == (2, True)
        assert tower.prompt.before + "x" + tower.prompt.after == "<|User|>: x\n\n<|Assistant|>:"


REFUSED = [
    ({"tile_tag": "1D"}, "config.json has tile_tag '1D', expected '2D'"),
    ({"projector_config": {"projector_type": "linear"}}, "has projector_type 'linear' in projector_config, expected"),
    ({"vision_config": {"heads": 5}}, "with width 32, heads 5, image_size 44 and patch_size 14, expected whole heads"),
    ({"vision_config": {"layers": 3}}, "tensor 'vision.blocks.2.norm1.weight' is missing, the vision side needs it"),
    ({"vision_config": {"layers": 1}}, "tensor 'vision.blocks.1.attn.proj.bias' is not known in the vision side of a"),
    (
        {"vision_config": {"mlp_ratio": 2.0}},
        r"tensor 'vision.blocks.0.mlp.fc1.bias' has shape .119., but config.json asks for .64.;",
    ),
    ({"vision_config": {"image_size": 88}}, r"candidate_resolutions .* expected pairs of multiples of 88"),
    ({"projector_config": {"n_embed": 32}}, "config.json has n_embed 32 in projector_config, but hidden_size 64"),
    ({"vision_config": None}, "config.json has vision_config None, expected an object"),
    ({"vision_config": {"patch_size": "14"}}, "config.json has patch_size '14', expected a positive number"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_is_not_known_is_refused_and_leaves_nothing(
    changes: dict[str, Any], message: str, directory: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "model"
    copied.mkdir()
    for path in directory.iterdir():
        (copied / path.name).symlink_to(path)
    config = json.loads((directory / "config.json").read_text())
    (copied / "config.json").unlink()
    (copied / "config.json").write_text(json.dumps(config))
    merged = {k: {**config[k], **v} if isinstance(v, dict) else v for k, v in changes.items()}
    edit_json(copied / "config.json", **merged)
    if "image_size" in str(changes):
        (copied / "processor_config.json").unlink()
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(SourceError, match=message) as caught:
        write(copied, out / "out.vision.onnx")
    assert "\n" not in str(caught.value)
    assert list(out.iterdir()) == []


def test_numbers_that_f16_cannot_hold(directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from mopeq_edge.errors import PlanError

    copied = tmp_path / "model"
    copied.mkdir()
    for path in directory.iterdir():
        if path.suffix != ".safetensors":
            (copied / path.name).symlink_to(path)
    _, tensors = weights(directory)
    tensors["projector.layers.2.weight"][3, 5] = 70000.0
    save_file({name: value.contiguous() for name, value in tensors.items()}, copied / "model.safetensors")
    with pytest.raises(
        PlanError, match=r"'projector.layers.2.weight': --vision-type F16 is for weights up to 65504, found"
    ):
        write(copied, tmp_path / "out.vision.onnx", "F16")
    assert write(copied, tmp_path / "out.vision.onnx", "F32").description.relative_error == 0
