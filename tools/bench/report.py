"""How soon a report opens in headless Chromium: its map of experts against the same map as plotly draws it.

Both are whole pages from the disk, opened in turn; prints sizes and medians, and ratios, ours over plotly's. Needs
Chromium, playwright and plotly.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

from mopeq_edge.cli.console import print_json
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.report.artifacts import Missing
from mopeq_edge.report.document import Report
from mopeq_edge.report.experts import ExpertMap, ExpertStack
from mopeq_edge.report.overview import Overview
from mopeq_edge.report.page import page
from mopeq_edge.report.sizes import Size

TYPES = ("IQ2_XS", "Q2_K", "Q3_K", "Q4_K", "Q6_K")
PROJECTIONS = ("gate", "up", "down")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@click.command()
@click.option("--layers", default=61, show_default=True)
@click.option("--experts", default=256, show_default=True)
@click.option("--rounds", default=7, show_default=True)
def main(layers: int, experts: int, rounds: int) -> None:
    """Open both pages ROUNDS times in turn."""
    drawn = _experts(layers, experts)
    with tempfile.TemporaryDirectory() as folder:
        pages = {"report": Path(folder) / "report.html", "plotly": Path(folder) / "plotly.html"}
        pages["report"].write_bytes(page(_report(drawn)))
        pages["plotly"].write_text(_plotly(drawn), encoding="utf-8")
        times = _open(pages, rounds)
        found: dict[str, Any] = {
            name: {"bytes": path.stat().st_size, "ms": times[name]} for name, path in pages.items()
        }
    ours, theirs = found["report"], found["plotly"]
    found["ratio"] = {key: round(ours[key] / theirs[key], 3) for key in ("bytes", "ms")}
    print_json({"cells": layers * experts * len(PROJECTIONS), "rounds": rounds, **found})


def _open(pages: dict[str, Path], rounds: int) -> dict[str, float]:
    """Median milliseconds from the start of the navigation to two frames behind the load event."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("chromium: not installed; run: make browser")
    painted = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now()))))"
    times: dict[str, list[float]] = {name: [] for name in pages}
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=FLAGS)
        for _ in range(rounds):
            for name, path in pages.items():
                tab = browser.new_page(viewport={"width": 1280, "height": 900})
                tab.goto(path.as_uri(), timeout=120_000)
                times[name].append(float(tab.evaluate(painted)))
                tab.close()
        browser.close()
    return {name: round(statistics.median(own), 1) for name, own in times.items()}


def _experts(n_layer: int, n_expert: int) -> ExpertMap:
    rng = np.random.default_rng(0)

    def stack(layer: int, projection: str) -> ExpertStack:
        damage = tuple(float(value) for value in 1e-6 * np.exp(rng.normal(size=n_expert)))
        return ExpertStack(layer, projection, tuple(map(str, rng.choice(TYPES, n_expert))), damage, damage, "Q3_K")

    stacks = tuple(stack(layer, projection) for layer in range(n_layer) for projection in PROJECTIONS)
    tokens = {n: tuple(int(count) for count in rng.integers(0, 10**4, n_expert)) for n in range(n_layer)}
    return ExpertMap(tuple(range(n_layer)), PROJECTIONS, n_expert, stacks, tokens, "fisher", "nats of KLD per token")


def _report(experts: ExpertMap) -> Report:
    absent = Missing("not part of this measurement", "none")
    unknown = dict.fromkeys(Overview.__dataclass_fields__)
    shown: dict[str, Any] = {"layout": "per-expert", "file_bytes": 10**9, "header_bytes": 10**6, "bpw": 3.0}
    texts = dict.fromkeys(("architecture", "planner", "sensitivity", "unit", "padding", "precision_map"), "")
    texts |= dict.fromkeys(("imatrix", "forecast", "fits"), "")
    got = Overview(**{**unknown, **texts, **shown, "files": (), "beside": {}})  # type: ignore[arg-type]
    sizes = (Size("routed experts", 1, 10**9, 10**9, {"Q3_K": 10**9}),)
    rest = (absent, absent, (), absent, absent, absent, {}, {})
    return Report("bench.gguf", "bench", got, sizes, experts, *rest)  # type: ignore[arg-type]


def _plotly(experts: ExpertMap) -> str:
    import plotly.graph_objects as go
    import plotly.io
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=len(PROJECTIONS), cols=1, subplot_titles=PROJECTIONS)
    for row, projection in enumerate(PROJECTIONS, 1):
        own = [stack for stack in experts.stacks if stack.projection == projection]
        bits = [[BY_NAME[name].bpw for name in stack.types] for stack in own]
        text = [[f"{name}, {d:.3g}" for name, d in zip(s.types, s.damage or (), strict=True)] for s in own]
        figure.add_trace(go.Heatmap(z=bits, text=text, coloraxis="coloraxis"), row=row, col=1)
    figure.update_layout(height=1400, coloraxis={"colorscale": "Viridis"})
    html: str = plotly.io.to_html(figure, include_plotlyjs=True)
    return html


if __name__ == "__main__":
    main()
