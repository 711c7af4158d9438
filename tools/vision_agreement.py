"""Pictures and a question to logits at the real sizes: the device's path against the whole model in torch.

``python -m tools.vision_agreement vl2-tiny`` writes DeepSeek-VL2-Tiny with random weights at its full size, a GGUF and
a vision file of one type, and compares the logits at every position for a square, a wide and a tall picture.
``--layers 2`` is for the larger ones: the first dense and one sparse block, at their real widths; the vision side is
whole always. One block of the reference is in memory at a time, in float32. Needs the room of the checkpoint and both
files, which go away.

The reference is not the device's code: tower by transformers, what follows it by the equations, order of tiles and
newlines by hand (tests/converters/vision/references.py), blocks by transformers (mopeq_edge/calibrate/blocks.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from rich.table import Table

from converters import CONVERTERS
from converters.vision import find_family, write_vision
from mopeq_edge.binding import Floats, LlamaModel, Tokens
from mopeq_edge.calibrate.blocks import BlockModel
from mopeq_edge.cli.console import available_threads, console_progress, print_json, print_table
from mopeq_edge.emit import emit
from mopeq_edge.evaluate.divergence import compare
from mopeq_edge.ggml.library import load_ggml
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.progress import Progress
from mopeq_edge.source.checkpoint import Checkpoint
from mopeq_edge.source.huggingface import HuggingFaceSource, open_huggingface
from mopeq_edge.vision.crops import crop
from mopeq_edge.vision.description import Tiles
from mopeq_edge.vision.prompt import lay_out
from mopeq_edge.vision.tiles import cut
from mopeq_edge.vision.tower import Tower
from tools.vision_language_checkpoints import Options, write_checkpoint
from tools.vision_language_configs import MODELS

QUESTION = "What is in this picture?"
SHAPES = {"square": (1, 1), "wide": (2, 1), "tall": (1, 2)}
"""Width and height in tiles."""


@dataclass(frozen=True)
class Agreement:
    """Logits of one picture and the question, on the device and in torch."""

    picture: str
    pixels: tuple[int, int]
    n_tokens: int
    picture_error: float
    """‖e − r‖ / ‖r‖ of the picture's embeddings."""
    largest: float
    """The largest difference of two logits, in standard deviations of all."""
    median: float
    """Of the positions' largest differences."""
    kld: float
    """Mean KLD in nats."""
    same_top: float
    """Share of positions with the same likeliest token."""
    depends: float
    """What the picture's embeddings in reverse order do to the last position's logits: the largest difference in
    standard deviations."""


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    """A picture of smooth random colours."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def write_files(model: Path, folder: Path, kind: str, threads: int, progress: Progress) -> tuple[Path, Path]:
    """The GGUF with matrices of ``kind`` and the vision file of the checkpoint ``model``."""
    source = open_huggingface(model, CONVERTERS, pre="gpt-2")
    types = {t.name: BY_NAME[kind] if len(t.shape) > 1 and t.type.name != "F32" else t.type for t in source.tensors}
    gguf, vision = folder / "out.gguf", folder / "out.vision.onnx"
    emit(source, types, source.kvs, None, load_ggml(), gguf, threads=threads, progress=progress)
    family = find_family(source.config)
    assert family is not None
    wanted: dict[str, Any] = {"kind": "F16" if kind == "BF16" else kind, "made_from": "0" * 64, "threads": threads}
    write_vision(Checkpoint(model), family, model, source.config, vision, **wanted)
    return gguf, vision


def reference_picture(model: Path, image: Image.Image, layout: Any) -> Floats:
    """What stands for a picture, [n_tokens, n_embd], in torch."""
    from tests.converters.vision.references import molmo_picture, vl2_picture

    if isinstance(layout, Tiles):
        tiles = cut(image, layout, 1)
        return vl2_picture(model, tiles.pixels, tiles.columns, tiles.rows)
    return molmo_picture(model, crop(image, layout))


def reference_logits(
    source: HuggingFaceSource,
    sequences: Sequence[Sequence[Tokens | Floats]],
    firsts: Sequence[int],
    progress: Progress,
) -> list[Floats]:
    """[n, n_vocab] for each of ``sequences``, of tokens [n] and embeddings [n, n_embd]: rows from the one of
    ``firsts`` on. One block is in memory at a time.
    """
    model = BlockModel(source)
    rows = [
        torch.cat([torch.from_numpy(p) if p.ndim == 2 else model.embed(p) for p in parts])[None] for parts in sequences
    ]
    with torch.no_grad(), progress.step("torch", model.n_layer) as step:
        for layer in range(model.n_layer):
            with model.block(layer) as block:
                for i, x in enumerate(rows):
                    out = block(x, **model.positions(x.shape[1], layer))
                    rows[i] = out[0] if isinstance(out, tuple) else out
            step.advance()
        with model.final_norm() as norm:
            rows = [norm(x)[0, first:] for x, first in zip(rows, firsts, strict=True)]
        matrix = model.output_matrix().float()
        return [(x @ matrix.T).mul_(model.logits_scale).numpy() for x in rows]


def agreement(name: str, size: tuple[int, int], seen: Floats, picture: Floats, logits: Sequence[Floats]) -> Agreement:
    """Of embeddings ``seen`` and ``picture``, and of logits: the device's, torch's, torch's of ``picture`` reversed."""
    got, expected, other = logits
    spread = float(expected.std())
    apart = np.abs(got - expected).max(axis=1) / spread
    scores = compare(expected, got, expected.argmax(axis=1).astype(np.int32))
    return Agreement(
        picture=name,
        pixels=size,
        n_tokens=len(got),
        picture_error=float(np.linalg.norm(seen - picture) / np.linalg.norm(picture)),
        largest=float(apart.max()),
        median=float(np.median(apart)),
        kld=float(scores.kld.mean()),
        same_top=float(scores.same_top.mean()),
        depends=float(np.abs(other[-1] - expected[-1]).max() / spread),
    )


def measure(options: Options, kind: str, threads: int, folder: Path, progress: Progress) -> list[Agreement]:
    """Write everything into ``folder``, and compare."""
    model = write_checkpoint(folder / "model", options)
    gguf, vision = write_files(model, folder, kind, threads, progress)
    tower = Tower(vision, threads)
    description, layout = tower.description, tower.description.layout
    sizes = {name: (layout.side * w, layout.side * h) for name, (w, h) in SHAPES.items()}
    images = [noise(size, seed) for seed, size in enumerate(sizes.values())]
    with progress.step("device: pictures", len(images)) as step:
        seen = []
        for image in images:
            # one at a time: more than two would be cut into fewer tiles
            seen += tower.embed([image])
            step.advance()
    del tower
    with LlamaModel(gguf, n_ctx=max(map(len, seen)) + 64, n_threads=threads, plain=True) as device:
        parts = [lay_out(device, description, QUESTION, [one]) for one in seen]
        got = []
        with progress.step("device: logits", len(parts)) as step:
            for one in parts:
                got.append(device.mixed_logits(one))
                step.advance()
    pictures = []
    with progress.step("torch: pictures", len(images)) as step:
        for image in images:
            pictures.append(reference_picture(model, image, layout))
            step.advance()
    whole = [[p if p.ndim == 1 else picture for p in one] for one, picture in zip(parts, pictures, strict=True)]
    turned = [[p if p.ndim == 1 else p[::-1].copy() for p in one] for one in whole]
    source = open_huggingface(model, CONVERTERS, pre="gpt-2")
    n = len(images)
    logits = reference_logits(source, [*whole, *turned], [0] * n + [-1] * n, progress)
    return [
        agreement(name, size, seen[i], pictures[i], (got[i], logits[i], logits[n + i]))
        for i, (name, size) in enumerate(sizes.items())
    ]


def agreement_table(found: Sequence[Agreement], title: str) -> Table:
    """One row for each picture."""
    table = Table(title=title, caption="differences of logits in their standard deviations")
    for column in (
        "Picture",
        "Tokens",
        "Embeddings",
        "Largest",
        "Median",
        "KLD (nats)",
        "Same top (%)",
        "Other picture",
    ):
        table.add_column(column, justify="left" if column == "Picture" else "right")
    for row in found:
        numbers = (f"{row.picture_error:.1e}", f"{row.largest:.1e}", f"{row.median:.1e}", f"{row.kld:.1e}")
        table.add_row(row.picture, str(row.n_tokens), *numbers, f"{100 * row.same_top:.2f} %", f"{row.depends:.1f}")
    return table


@click.command()
@click.argument("model", type=click.Choice(MODELS))
@click.option("--layers", type=click.IntRange(min=1), help="The first so many blocks only.")
@click.option("--type", "kind", type=click.Choice(["F32", "F16", "BF16"]), default="F32", show_default=True)
@click.option("--shrink", is_flag=True, help="A test-size model.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to write for the time (default: the system's).")
@click.option("--threads", type=int, default=available_threads, help="Threads (default: every CPU).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    model: str, layers: int | None, kind: str, shrink: bool, folder: Path | None, threads: int, as_json: bool
) -> None:
    """Compare the device's logits for MODEL with torch's."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(dir=folder) as inside, console_progress() as progress:
        found = measure(Options(model, layers, shrink), kind, threads, Path(inside), progress)
    if as_json:
        print_json({"model": model, "layers": layers, "type": kind, "pictures": [asdict(row) for row in found]})
    else:
        print_table(agreement_table(found, f"{model}, {kind}: the device against torch"))


if __name__ == "__main__":
    main()
