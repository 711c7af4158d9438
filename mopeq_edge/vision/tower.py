"""Pictures to embeddings: cut as the vision file says, seen tile by tile, arranged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mopeq_edge.vision.crops import crop, stitch
from mopeq_edge.vision.description import Crops, Tiles
from mopeq_edge.vision.session import Floats, VisionSession
from mopeq_edge.vision.tiles import arrange, cut


class Tower:
    """A vision file that is ready; raises :class:`FormatError` for one that is damaged or not whole."""

    def __init__(self, path: Path, threads: int) -> None:
        self._session = VisionSession(path, threads)
        self.description = self._session.describe()

    def embed(self, images: Sequence[Image.Image], names: Sequence[str] | None = None) -> list[Floats]:
        """What stands for each of ``images`` (RGB) in the sequence, [n_tokens, n_embd] of float32.

        One tile is in memory at a time. How a picture is cut may depend on how many there are. ``names`` are for
        errors.
        """
        names = names or [f"picture {i + 1}" for i in range(len(images))]
        return [self.embed_one(image, len(images), name) for image, name in zip(images, names, strict=True)]

    def embed_one(
        self, image: Image.Image, n_images: int, name: str, between: Callable[[], object] = lambda: None
    ) -> Floats:
        """The same of one of ``n_images``; ``between`` is called before every tile and may raise."""
        see = self._tiles if isinstance(self.description.layout, Tiles) else self._crops
        return see(image, n_images, name, between)

    def _run(self, between: Callable[[], object], **feeds: Floats) -> dict[str, Floats]:
        between()
        return self._session.run(feeds)

    def _tiles(self, image: Image.Image, n_images: int, name: str, between: Callable[[], object]) -> Floats:
        layout = self.description.layout
        assert isinstance(layout, Tiles)
        place = cut(image, layout, n_images, name)
        seen = [self._run(between, pixels=tile[None]) for tile in place.pixels]
        embeddings = np.stack([outputs["embeddings"] for outputs in seen])
        return arrange(embeddings, place, layout, seen[0]["image_newline"], seen[0]["view_seperator"])

    def _crops(self, image: Image.Image, _: int, name: str, between: Callable[[], object]) -> Floats:
        layout = self.description.layout
        assert isinstance(layout, Crops)
        place = crop(image, layout, name)
        views = zip(place.pixels, place.masks, strict=True)
        seen = [self._run(between, pixels=pixels[None], mask=mask) for pixels, mask in views]
        return stitch(np.stack([outputs["embeddings"] for outputs in seen]), place, layout, seen[0]["picture_tokens"])
