"""Pictures of a study; need matplotlib, the extra ``pictures``. The same rows give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mopeq_edge.pictures.figure import drawn
from mopeq_edge.sensitivity.scores import Doubles
from mopeq_edge.study.bootstrap import rank_correlation
from mopeq_edge.study.cases import PLAN
from mopeq_edge.study.report import label
from mopeq_edge.study.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 4
DECADE = 10
"""Span above which an axis is logarithmic."""


def kld_picture(rows: Sequence[Row], picture_format: str) -> bytes:
    """Mean KLD against bytes, a line for each way to plan and points for the controls."""

    def draw() -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 5.5), layout="constrained")
        panel = figure.subplots()
        series: dict[str, list[Row]] = {}
        for row in rows:
            name = (
                f"{row.layout}, {label(row)}, {row.sensitivity}" if row.kind == PLAN else f"{row.layout}, {_group(row)}"
            )
            series.setdefault(name, []).append(row)
        for number, (name, own) in enumerate(series.items()):
            own = sorted(own, key=lambda row: row.file_bytes)
            style = "-" if own[0].kind == PLAN else "none"
            marker = "osv^<>DpP*Xhd"[number // 10 % 13] if own[0].kind == PLAN else "x+1234"[number % 6]
            x, y = [r.file_bytes / 1e6 for r in own], [r.kld_mean for r in own]
            panel.plot(x, y, linestyle=style, marker=marker, label=name)
        panel.set(xlabel="file, MB (1e6 bytes)", ylabel="mean KLD, nats per token", yscale="log")
        panel.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
        return figure

    return drawn(draw, picture_format)


def prediction_picture(
    predicted: Mapping[str, Doubles], measured: Sequence[float], what: str, picture_format: str
) -> bytes:
    """Predicted damage against measured KLD, a panel for each score [n] with Spearman's rho."""

    def draw() -> Figure:
        from matplotlib.figure import Figure

        n_rows = -(-len(predicted) // COLUMNS)
        figure = Figure(figsize=(2.8 * COLUMNS, 2.6 * n_rows + 0.4), layout="constrained")
        panels = figure.subplots(n_rows, COLUMNS, squeeze=False).ravel()
        for panel, (score, values) in zip(panels, predicted.items(), strict=False):
            panel.scatter(values, measured, s=10)
            panel.set(title=f"{score}: rho {rank_correlation(values, measured):.2f}", xlabel="predicted")
            wide = min(values) > 0 and DECADE * min(values) < max(values)
            panel.set_xscale("log" if wide else "linear")
            # an expert that the text never reaches hurts nothing and stands at the lower edge
            panel.set_yscale("log", nonpositive="clip")
        for panel in panels[len(predicted) :]:
            panel.set_visible(False)
        figure.suptitle(f"measured mean KLD (nats) of {what}")
        return figure

    return drawn(draw, picture_format)


def _group(row: Row) -> str:
    return "llama-quantize" if row.planner == "llama-quantize" else row.planner.split("-")[0]
