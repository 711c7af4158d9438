"""Draws the map of types."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mopeq_edge.pictures.figure import drawn
from mopeq_edge.pictures.type_map import TypeMap
from mopeq_edge.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOUR_AT: tuple[tuple[float, ...], tuple[float, ...]] = (
    (1, 2, 3, 4.5, 6.5, 16, 32),
    (0.02, 0.08, 0.38, 0.7, 0.84, 0.95, 0.98),
)
"""Place on the colour scale by bits per weight. It is the same in every picture, and widest where plans differ."""
COLOUR_SCALE = "turbo"
NO_MATRIX = "#dddddd"

MOST_TICKS = 12
GRID_UP_TO = 32
"""Experts in a row up to which cells are set apart by lines."""
INCHES_A_LETTER = 0.075
SPREAD = 0.8
"""Part of a layer's column that its experts take in the scatter plot."""


def map_picture(types: TypeMap, picture_format: str, *, scatter: bool = False) -> bytes:
    """The picture as a file of ``picture_format``, ``png`` or ``svg``.

    A heat map of layers by experts for each projection, coloured by bits per weight; or with ``scatter`` for each
    projection a column a layer, in which the experts stand from left to right at their bits per weight. Raises
    :class:`ExtraMissingError` without matplotlib.
    """

    def draw() -> Figure:
        figure = _scatter(types) if scatter else _heat_map(types)
        figure.suptitle(_title(types))
        _legend(figure, types)
        return figure

    return drawn(draw, picture_format)


def colour(bpw: float) -> tuple[float, float, float, float]:
    """Red, green, blue and opacity of ``bpw`` in every picture."""
    import matplotlib

    return matplotlib.colormaps[COLOUR_SCALE](float(np.interp(bpw, *COLOUR_AT)))


def _title(types: TypeMap) -> str:
    size = f"{types.file_bytes:,} bytes ({format_bytes(types.file_bytes)}), {types.bpw:.3f} bpw"
    return f"{types.name}: {size}\n{types.layout} layout, {types.made_by}"


def _heat_map(types: TypeMap) -> Figure:
    from matplotlib.figure import Figure

    n_layers, n_expert = len(types.layers), types.n_expert
    width, height = float(np.clip(n_expert * 0.07, 2.6, 9)), float(np.clip(n_layers * 0.14, 1.6, 9))
    n = len(types.projections)
    figure = Figure(figsize=(n * width + 0.8, height + 1.6), layout="constrained")
    panels = figure.subplots(1, n, sharey=True, squeeze=False)[0]
    for panel, projection in zip(panels, types.projections, strict=True):
        _cells(panel, types, projection)
        panel.set(title=projection, xlabel="expert", xlim=(-0.5, n_expert - 0.5), ylim=(n_layers - 0.5, -0.5))
        _ticks(panel.set_xticks, range(n_expert))
        _ticks(panel.set_yticks, types.layers)
    panels[0].set_ylabel("layer")
    return figure


def _cells(panel: Axes, types: TypeMap, projection: str) -> None:
    """Neighbours of one type are drawn as one rectangle: fewer shapes, and no seams between them."""
    from matplotlib.collections import PolyCollection

    panel.set_facecolor(NO_MATRIX)
    bits = types.bits(projection)
    corners, colours = [], []
    for row, values in enumerate(bits):
        edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
        for first, end in itertools.pairwise(edges):
            if np.isfinite(values[first]):
                left, right, top, bottom = first - 0.5, end - 0.5, row - 0.5, row + 0.5
                corners.append([(left, top), (right, top), (right, bottom), (left, bottom)])
                colours.append(colour(float(values[first])))
    panel.add_collection(PolyCollection(corners, facecolors=colours, edgecolors="none", antialiased=False))
    if types.n_expert <= GRID_UP_TO:
        panel.vlines(np.arange(0.5, types.n_expert - 1), -0.5, len(bits) - 0.5, color="white", linewidth=0.4)
        panel.hlines(np.arange(0.5, len(bits) - 1), -0.5, types.n_expert - 0.5, color="white", linewidth=0.4)


def _scatter(types: TypeMap) -> Figure:
    from matplotlib.figure import Figure

    n_layers, n = len(types.layers), len(types.projections)
    width = float(np.clip(n_layers * 0.35, 5, 18))
    # a line for each number of bits: at their distances some would lie on each other
    levels = list(types.counts())
    figure = Figure(figsize=(width + 1, (0.22 * len(levels) + 0.7) * n + 1.4), layout="constrained")
    panels = figure.subplots(n, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for panel, projection in zip(panels, types.projections, strict=True):
        bits = types.bits(projection)
        rows, experts = np.nonzero(np.isfinite(bits))
        at = rows + ((experts + 0.5) / types.n_expert - 0.5) * SPREAD
        values = bits[rows, experts]
        panel.scatter(at, np.searchsorted(levels, values), s=7, c=[colour(float(v)) for v in values], linewidths=0)
        panel.vlines(np.arange(0.5, n_layers - 1), 0, 1, transform=panel.get_xaxis_transform(), color=NO_MATRIX, lw=0.5)
        panel.set(title=projection, ylabel="bits per weight", xlim=(-0.5, n_layers - 0.5))
        panel.set(ylim=(-0.6, len(levels) - 0.4))
        panel.set_yticks(range(len(levels)), [f"{value:.4g}" for value in levels])
        _ticks(panel.set_xticks, types.layers)
    panels[-1].set_xlabel("layer; in its column the experts from left to right")
    return figure


def _ticks(set_ticks: Callable[[Sequence[int], Sequence[str]], object], labels: Sequence[int]) -> None:
    """At most :data:`MOST_TICKS`, at round distances."""
    n = len(labels)
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, n) if n <= MOST_TICKS * s)
    set_ticks(range(0, n, step), [str(label) for label in labels[::step]])


def _legend(figure: Figure, types: TypeMap) -> None:
    from matplotlib.patches import Patch

    patches = []
    for bpw, number in types.counts().items():
        mix = ", ".join(f"{name} ({n:,})" for name, n in number.items())
        patches.append(Patch(facecolor=colour(bpw), label=f"{bpw:.4g} bpw: {mix}"))
    widest = max(len(str(patch.get_label())) for patch in patches)
    columns = max(1, min(len(patches), int((figure.get_figwidth() - 0.3) / (INCHES_A_LETTER * widest + 0.65))))
    figure.legend(handles=patches, loc="outside lower center", ncols=columns, title="type (number of matrices)")
