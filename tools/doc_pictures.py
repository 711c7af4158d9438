"""The pictures of docs/how-it-works.md, from artifacts of the bundled model.

``python -m tools.doc_pictures WORK --layouts L.json --presets P.json`` draws routing, damages and the plan of the work
directory WORK, and KLD against bytes from what ``tools.compare_layouts --json`` and ``tools.compare_presets --json``
measured, into docs/pictures. The same numbers give the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from matplotlib.figure import Figure

from mopeq_edge.atomic import atomic_write
from mopeq_edge.calibrate.statistics import Routing, read_routing
from mopeq_edge.pictures.draw import map_picture
from mopeq_edge.pictures.figure import drawn
from mopeq_edge.pictures.type_map import read_type_map
from mopeq_edge.pipeline import load_sensitivity
from mopeq_edge.pipeline_calibrate import ROUTING_FILE
from mopeq_edge.sensitivity.scores import FISHER
from mopeq_edge.sensitivity.table import SensitivityTable
from mopeq_edge.source.roles import layer_of, projection_of
from mopeq_edge.workdir import WorkDirectory

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
SHOWN_TYPES = ("IQ2_XXS", "Q3_K", "Q4_K")
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#666666"


def routing_figure(routing: Routing) -> Figure:
    """A row of bars for each layer: the share of its tokens that each expert got, with an even share as a line."""
    figure = Figure(figsize=(7, 1.1 * len(routing.counts)), layout="constrained")
    panels = figure.subplots(len(routing.counts), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (layer, counts) in zip(panels, sorted(routing.counts.items()), strict=True):
        share = 100 * counts / counts.sum()
        panel.bar(np.arange(len(share)), share, color=BLUE, width=0.7)
        panel.axhline(100 / len(share), color=GREY, linewidth=0.8, linestyle="--")
        panel.set_ylabel(f"layer {layer}\n%", rotation=0, labelpad=22, va="center")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xticks(np.arange(len(share)))
    panels[-1].set_xlabel("expert")
    return figure


def damage_by_expert(table: SensitivityTable) -> dict[str, dict[int, np.ndarray[Any, Any]]]:
    """Damage [n_expert] in nats by type and layer, summed over the projections."""
    found: dict[str, dict[int, np.ndarray[Any, Any]]] = {name: {} for name in SHOWN_TYPES}
    for tensor, errors in table.errors.items():
        layer = layer_of(tensor)
        if projection_of(tensor) is None or layer is None:
            continue
        for name in SHOWN_TYPES:
            own = errors.damage[FISHER][errors.types.index(name)]
            found[name][layer] = found[name].get(layer, 0.0) + own
    return found


def damage_figure(table: SensitivityTable) -> Figure:
    """A column for each layer and type, a point for each expert, on a logarithmic axis."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    panel = figure.subplots()
    by_type = damage_by_expert(table)
    for index, (name, colour, marker) in enumerate(zip(SHOWN_TYPES, (ORANGE, BLUE, GREY), "osv", strict=True)):
        for layer, damage in sorted(by_type[name].items()):
            x = np.full(len(damage), layer + 0.22 * (index - 1))
            panel.scatter(x, damage, s=14, color=colour, marker=marker, alpha=0.7, label=name if layer == 0 else None)
    _logarithmic(panel)
    panel.set_xticks(sorted(by_type[SHOWN_TYPES[0]]))
    panel.set_xlabel("layer")
    panel.set_ylabel("predicted damage of one expert, nats")
    panel.legend(frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    return figure


def _logarithmic(panel: Any) -> None:
    """A logarithmic axis whose numbers are plain text."""
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("")


def kld_figure(layouts: list[dict[str, Any]], presets: list[dict[str, Any]]) -> Figure:
    """Measured mean KLD against the bytes of the file."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    panel = figure.subplots()
    for layout, colour, marker in (("stock", BLUE, "o"), ("per-expert", ORANGE, "s")):
        points = [(row[layout]["bytes"] / 1e6, row[layout]["kld_mean_nats"]) for row in layouts]
        panel.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, label=f"mopeq-edge, {layout}")
    theirs = [(row["preset"], row["llama_quantize"]["gradient"]) for row in presets]
    x, y = [found["bytes"] / 1e6 for _, found in theirs], [found["kld_mean_nats"] for _, found in theirs]
    panel.scatter(x, y, color=GREY, marker="x", label="llama-quantize, same imatrix")
    for (name, _), left, top in zip(theirs, x, y, strict=True):
        panel.annotate(name, (left, top), xytext=(5, 3), textcoords="offset points", color=GREY, fontsize=8)
    _logarithmic(panel)
    panel.set_yticks([0.001, 0.002, 0.004, 0.01, 0.02, 0.04])
    panel.set_xlabel("bytes of the file, MB (1e6)")
    panel.set_ylabel("mean KLD, nats")
    panel.legend(frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    return figure


@click.command()
@click.argument("work", type=click.Path(exists=True, path_type=Path))
@click.option("--layouts", type=click.Path(exists=True, path_type=Path), required=True, help="compare_layouts --json.")
@click.option("--presets", type=click.Path(exists=True, path_type=Path), required=True, help="compare_presets --json.")
def main(work: Path, layouts: Path, presets: Path) -> None:
    """Draw docs/pictures."""
    directory = WorkDirectory(work)
    table = load_sensitivity(directory)
    measured = [json.loads(path.read_text()) for path in (layouts, presets)]
    pictures = {
        "routing.svg": drawn(lambda: routing_figure(read_routing(directory.file(ROUTING_FILE))), "svg"),
        "damage.svg": drawn(lambda: damage_figure(table), "svg"),
        "kld.svg": drawn(lambda: kld_figure(*measured), "svg"),
        "map.png": map_picture(read_type_map(directory.file("plan.json")), "png"),
    }
    PICTURES.mkdir(exist_ok=True)
    for name, picture in pictures.items():
        with atomic_write(PICTURES / name) as file:
            file.write(picture)
        click.echo(f"{name}: {len(picture):,} bytes")


if __name__ == "__main__":
    main()
