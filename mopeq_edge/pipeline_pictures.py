"""Pictures of a calibration: seen by the checkpoint's own vision side, one after the other, and kept.

What a picture became lies in the work directory under the hash of picture and tower, so that a calibration that was
killed goes on with the next picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopeq_edge.artifacts import digest, file_digest
from mopeq_edge.calibrate.modalities import DEFAULT_WEIGHT
from mopeq_edge.calibrate.pictures import Picture, picture_windows, pictures_of, write_picture
from mopeq_edge.calibrate.tokens import vocabulary
from mopeq_edge.calibrate.windows import Window
from mopeq_edge.errors import CalibrationError, FormatError
from mopeq_edge.pipeline_context import Context
from mopeq_edge.pipeline_vision import family_of
from mopeq_edge.progress import Step
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.vision.description import ENDING, Description, weights_file
from mopeq_edge.vision.image_file import open_image

if TYPE_CHECKING:
    from converters.vision import Family

FOLDER = "pictures"
"""In the work directory; it may be deleted at any time."""

DEFAULT_MOST = 32


@dataclass(frozen=True)
class PicturesRequest:
    """The first ``most`` pictures of ``directory``; their tokens have the share ``weight`` in all statistics.

    ``weight`` None: tokens count as they come.
    """

    directory: Path
    most: int = DEFAULT_MOST
    weight: float | None = DEFAULT_WEIGHT


@dataclass(frozen=True)
class Eyes:
    """The pictures, and what sees them."""

    source: HuggingFaceSource
    family: Family
    tower: Any
    pictures: tuple[Picture, ...]

    def made_from(self, source_sha256: str) -> str:
        """Hash of pictures, captions and vision side."""
        seen = [[p.path.name, file_digest(p.path), p.caption] for p in self.pictures]
        return digest(["pictures 1", source_sha256, repr(self.tower), seen])


def open_eyes(context: Context, request: PicturesRequest) -> Eyes:
    """What is to be seen. Raises :class:`MopeqError` before anything is computed for what cannot be."""
    source = context.source
    if not isinstance(source, HuggingFaceSource):
        raise CalibrationError(
            f"{source.path}: --images needs the Hugging Face directory, whose vision side sees them; this is a GGUF; "
            "calibrate that directory, or leave out --images"
        )
    family = family_of(source)
    if family is None:
        raise CalibrationError(
            f"{source.path}: --images needs a model that sees pictures, expected the vision side of a DeepSeek-VL2 or "
            f"MolmoE, found none in this {source.architecture}; leave out --images"
        )
    tower = family.read(source.path, source.config, source.checkpoint)
    return Eyes(source, family, tower, tuple(pictures_of(request.directory, request.most, tower.layout)))


def see_pictures(context: Context, eyes: Eyes, n_ctx: int) -> list[Window]:
    """A window for each picture. One tile is in memory at a time; what is on disk already is not computed again."""
    folder = context.work.file(FOLDER)
    made_from = digest(["eyes 1", context.source_sha256, repr(eyes.tower)])
    keys = (digest(["picture 1", made_from, file_digest(picture.path)]) for picture in eyes.pictures)
    kept = [folder / f"{key}.safetensors" for key in keys]
    graph = folder / f"eyes{ENDING}"
    with context.progress.step("calibrate: pictures", len(kept), "pictures") as step:
        if not all(path.is_file() for path in kept):
            _write_graph(context, eyes, graph, made_from)
            _see(context, eyes, graph, kept, step)
        for path in (graph, weights_file(graph)):
            # twice the room of the vision side in BF16, and everything is seen
            path.unlink(missing_ok=True)
    with vocabulary(eyes.source.kvs) as model:
        return picture_windows(model, _description(eyes), eyes.pictures, kept, n_ctx)


def _see(context: Context, eyes: Eyes, graph: Path, kept: Sequence[Path], step: Step) -> None:
    from mopeq_edge.vision.tower import Tower

    tower = Tower(graph, context.threads)
    for picture, path in zip(eyes.pictures, kept, strict=True):
        if not path.is_file():
            (seen,) = tower.embed([open_image(picture.path)], [str(picture.path)])
            write_picture(seen, path, path.stem)
        step.advance()


def _write_graph(context: Context, eyes: Eyes, graph: Path, made_from: str) -> None:
    """The vision side in F32: what the checkpoint itself computes."""
    from converters.vision import read_vision, write_vision

    graph.parent.mkdir(parents=True, exist_ok=True)
    try:
        if graph.is_file() and read_vision(graph).description.made_from == made_from:
            return
    except FormatError:
        pass
    write_vision(
        eyes.source.checkpoint,
        eyes.family,
        eyes.source.path,
        eyes.source.config,
        graph,
        kind="F32",
        made_from=made_from,
        threads=context.threads,
    )


def _description(eyes: Eyes) -> Description:
    """What a vision file of these says of prompt and layout."""
    tower = eyes.tower
    return Description(tower.kind, tower.n_embd, tower.layout, tower.prompt, "F32", 0, 0.0, "")
