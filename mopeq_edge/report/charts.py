"""The charts of a report as SVG that takes its colours and its font from the page; needs matplotlib.

The same numbers give the same bytes. What a chart shows is also in a table beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mopeq_edge.pictures.figure import drawn, require_matplotlib
from mopeq_edge.plan.artifact import PER_EXPERT, STOCK
from mopeq_edge.report.artifacts import Missing
from mopeq_edge.report.coverage import Coverage
from mopeq_edge.report.device import Memory
from mopeq_edge.report.document import Report, Routers
from mopeq_edge.report.sizes import Size
from mopeq_edge.sensitivity.scores import IN_NATS
from mopeq_edge.units import GB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#010101", "#020202", "#030303"
SERIES = ("#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04")
VARIABLES: Mapping[str, str] = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, 1)},
}
"""Colours that nothing else has stand for variables of the page's style sheet."""

STYLE: Mapping[str, Any] = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "lines.markersize": 5,
}
WIDTH = 5.4
"""Inches of every chart: on a phone it is as wide as the page, and still legible."""
MB = 10**6
NAMED_FIRST = ("Q4_K_M", "Q3_K_M", "Q2_K", "Q6_K", "Q5_K_M", "Q8_0", "IQ2_XXS", "IQ3_XXS", "IQ4_XS")
ROOM = (70, 14)
"""Pixels of figures with 100 an inch that a name takes, across and up."""
MOST_TICKS = 12


def require_libraries() -> None:
    """Raise :class:`ExtraMissingError` without the libraries of the extra ``pictures``."""
    require_matplotlib("reports", "jinja2")


def charts(report: Report) -> dict[str, str]:
    """The SVG of every part that has numbers, by name."""
    drawn: dict[str, str] = {"sizes": _chart("sizes", lambda: _sizes(report.sizes))}
    if not isinstance(report.curve, Missing) or not isinstance(report.presets, Missing):
        drawn["curve"] = _chart("curve", lambda: _curve(report))
    if isinstance(report.coverage, Coverage):
        covered = report.coverage
        drawn["coverage"] = _chart("coverage", lambda: _coverage(covered))
    if isinstance(report.routers, tuple):
        routers = report.routers
        drawn["routers"] = _chart("routers", lambda: _routers(routers))
    if isinstance(report.memory, Memory):
        taken = report.memory
        drawn["memory"] = _chart("memory", lambda: _memory(taken))
    return drawn


def _chart(name: str, draw: Callable[[], Figure]) -> str:
    return themed(drawn(draw, "svg", STYLE).decode(), name)


def themed(svg: str, name: str) -> str:
    """``svg`` to be put into a page: no prologue, names of its own, and the page's variables for colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    # a table beside it says the same
    return svg.replace("<svg ", '<svg class="chart" aria-hidden="true" focusable="false" ', 1)


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _unit(sizes: Sequence[int]) -> tuple[int, str]:
    return (GB, "GB") if max(sizes) >= GB else (MB, "MB")


def _sizes(rows: Sequence[Size]) -> Figure:
    divisor, unit = _unit([row.nbytes for row in rows])
    figure, panel = _figure(0.3 * len(rows) + 0.7)
    names = [row.kind for row in rows]
    values = [row.nbytes / divisor for row in rows]
    bars = panel.barh(range(len(rows)), values, color=SERIES[0], height=0.7)
    panel.set_yticks(range(len(rows)), names)
    panel.invert_yaxis()
    total = sum(values)
    panel.bar_label(bars, [f"{100 * value / total:.1f} %" for value in values], padding=3)
    panel.margins(x=0.14)
    panel.grid(axis="y", visible=False)
    panel.set_xlabel(f"{unit} of the file")
    return figure


def _curve(report: Report) -> Figure:
    got = report.overview
    points = () if isinstance(report.curve, Missing) else report.curve.points
    others = () if isinstance(report.presets, Missing) else report.presets
    divisor, unit = _unit([got.file_bytes])
    figure, panel = _figure(3.6)
    for number, layout in enumerate((PER_EXPERT, STOCK)):
        own = [(p.file_bytes / divisor, p.damage) for p in points if p.layout == layout and p.damage > 0]
        if own:
            line, colour = ("o-", "s--")[number], SERIES[number]
            panel.plot(*_columns(own), line, color=colour, markersize=3.5, label=f"{layout}, predicted")
    priced = [(p.file_bytes / divisor, p.damage, p.name) for p in others if p.damage]
    if priced:
        look = {"color": SERIES[2], "markerfacecolor": "none", "label": "llama-quantize, predicted"}
        panel.plot(*_columns([(x, y) for x, y, _ in priced]), "D", **look)  # type: ignore[arg-type]
    if got.predicted_damage:
        at = got.file_bytes / divisor
        panel.plot([at], [got.predicted_damage], "o", color=SERIES[3], markersize=9, label="this file, predicted")
        if got.measured is not None and got.sensitivity in IN_NATS and got.measured["kld_mean_nats"] > 0:
            kld = got.measured["kld_mean_nats"]
            panel.plot([at], [kld], "*", color=SERIES[3], markersize=12, label="this file, mean KLD measured")
    panel.set(xlabel=f"file, {unit}", ylabel=got.unit, yscale="log")
    panel.yaxis.set_major_formatter(_plain)
    panel.legend(fontsize=8)
    _name_points(panel, priced)
    return figure


def _name_points(panel: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Names beside the points as far as there is room, those first that people choose; the table has all."""
    taken: list[tuple[float, float]] = []
    order = {name: rank for rank, name in enumerate(NAMED_FIRST)}
    for x, y, name in sorted(points, key=lambda point: (order.get(point[2], len(order)), point[0])):
        at, height = panel.transData.transform((x, y))
        if all(abs(at - other) > ROOM[0] or abs(height - above) > ROOM[1] for other, above in taken):
            taken.append((at, height))
            panel.annotate(name, (x, y), (5, 2), textcoords="offset points", fontsize=7.5)


def _coverage(found: Coverage) -> Figure:
    figure, panel = _figure(2.8)
    at = range(len(found.layers))
    least = [layer.least for layer in found.layers]
    most = [layer.most for layer in found.layers]
    panel.vlines(at, least, most, color=SERIES[0], linewidth=3, alpha=0.45, label="least to most")
    panel.plot(at, [layer.median for layer in found.layers], "_", color=INK, markersize=9, label="median")
    panel.plot(at, most, "^", color=SERIES[0], label="most")
    panel.plot(at, least, "v", color=SERIES[1], label="least")
    panel.set(xlabel="layer", ylabel="tokens of an expert", yscale="symlog")
    panel.set_ylim(bottom=0)
    panel.yaxis.set_major_formatter(_plain)
    _ticks(panel, [layer.layer for layer in found.layers])
    panel.legend(fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _routers(rows: Sequence[Routers]) -> Figure:
    figure, panel = _figure(2.4)
    at = range(len(rows))
    same = [100 * row.same / row.tokens for row in rows]
    ties = [100 * row.ties / row.tokens for row in rows]
    wrong = [100 * row.wrong / row.tokens for row in rows]
    above = [a + b for a, b in zip(same, ties, strict=True)]
    panel.bar(at, same, color=SERIES[0], label="same experts")
    panel.bar(at, ties, bottom=same, color=SERIES[2], hatch="//", edgecolor=INK, label="a tie")
    panel.bar(at, wrong, bottom=above, color=SERIES[1], hatch="xx", edgecolor=INK, label="other experts")
    panel.set(xlabel="layer", ylabel="% of tokens", ylim=(0, 100))
    panel.grid(axis="x", visible=False)
    _ticks(panel, [row.layer for row in rows])
    panel.legend(fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _memory(found: Memory) -> Figure:
    divisor, unit = _unit([row.needed for row in found.rows])
    figure, panel = _figure(2.8)
    cpus = list(dict.fromkeys(row.cpu for row in found.rows))
    kinds = list(dict.fromkeys(row.cache_type for row in found.rows))
    contexts = sorted({row.n_ctx for row in found.rows})
    for number, cpu in enumerate(cpus):
        for line, kind in enumerate(kinds):
            own = [r for r in found.rows if (r.cpu, r.cache_type) == (cpu, kind)]
            x = [contexts.index(row.n_ctx) for row in own]
            y = [row.needed / divisor for row in own]
            look = "os"[number % 2] + ("-", "--")[line % 2]
            panel.plot(x, y, look, color=SERIES[number % 4], label=f"{cpu}, cache {kind}")
    panel.set_xticks(range(len(contexts)), [f"{n:,}" for n in contexts])
    panel.set(xlabel="tokens of context", ylabel=f"{unit} needed")
    panel.set_xlim(-0.5, len(contexts) - 0.5)
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _plain(value: float, _: float) -> str:
    """Numbers of logarithmic axes as text: matplotlib's own are formulas."""
    return f"{value:,.0f}" if value >= 1 or value == 0 else f"{value:.0e}" if value < 1e-3 else f"{value:g}"


def _ticks(panel: Axes, labels: Sequence[int]) -> None:
    step = -(-len(labels) // MOST_TICKS)
    panel.set_xticks(range(0, len(labels), step), [str(label) for label in labels[::step]])
