"""The report of a real conversion of the bundled model: convert's own numbers, and presets against llama-quantize."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mopeq_edge.gguf_file import read_header
from mopeq_edge.runtime.tools import run_tool
from mopeq_edge.sensitivity.table import read_table

from ..commands import run_json

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out.gguf"
    few = ["--no-fisher", "--types", "k", "--window", "128", "--chunks", "2", "--sample-rows", "8"]
    run_json("convert", tiny_model, out, "--target-gb", "0.0085", "--layout", "per-expert", *few, "--json")
    return out


@pytest.fixture(scope="module")
def numbers(converted: Path) -> dict[str, Any]:
    return run_json("report", converted, "--json", "--points", 2)


def test_convert_leaves_a_report_of_its_own_numbers(converted: Path, numbers: dict[str, Any]) -> None:
    page = converted.with_name("out.report.html").read_text(encoding="utf-8")
    said = json.loads((converted.with_name("out.mopeq") / "validation.json").read_text())
    got = numbers["overview"]
    assert got["file_bytes"] == said["file_bytes"] == converted.stat().st_size
    assert got["measured"]["kld_mean_nats"] == said["evaluation"]["kld_mean_nats"]
    assert got["predicted_damage"] == said["predicted_damage"]
    assert f"{said['file_bytes']:,} bytes" in page
    assert f"{said['evaluation']['kld_mean_nats']:.5f} nats" in page
    # the knapsack with the usual floors: its replans are those of this file
    assert numbers["curve"]["same_rules"]


def test_presets_are_llama_quantize_s_files(converted: Path, numbers: dict[str, Any]) -> None:
    """Bytes of a file that it writes, and the types in it priced by hand."""
    work = converted.with_name("out.mopeq")
    table = read_table(work / "sensitivity-activation.safetensors")
    presets = {row["name"]: row for row in numbers["presets"]}
    for name in ("Q3_K_M", "Q4_K_S"):
        run_tool("llama-quantize", ["--imatrix", "imatrix.gguf", "source.gguf", "preset.gguf", name], cwd=work)
        written = work / "preset.gguf"
        assert presets[name]["file_bytes"] == written.stat().st_size
        damage = 0.0
        for info in read_header(written).tensors:
            errors = table.errors.get(info.name)
            if errors is not None:
                damage += errors.damage["imatrix"][errors.types.index(info.type.name)].sum()
        assert presets[name]["damage"] == pytest.approx(damage, rel=1e-12)


@pytest.mark.browser
def test_the_page_of_the_bundled_model(converted: Path, browser: Any, screenshots: Path) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab = context.new_page()
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    page = converted.with_name("out.report.html")
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-ready=yes]")
    assert asked == [page.as_uri(), "data:,"] or asked == [page.as_uri()]
    assert tab.inner_text("h1") == "Tiny Olmoe"
    assert tab.locator("#points tbody tr", has_text="llama-quantize Q3_K_M").count() == 1
    tab.focus(".ring[tabindex='0']")
    tab.keyboard.press("Control+End")
    assert tab.evaluate("document.activeElement.getAttribute('aria-label')").startswith("Layer 3, expert 15")
    tab.screenshot(path=screenshots / "bundled.png", full_page=True)
    context.close()
