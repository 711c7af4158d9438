"""The page in Chromium: what a reader sees, points at and hears, against the artifacts. No request leaves it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ..commands import run_json
from .models import EVALUATION, UNREACHED, Made, make

pytestmark = pytest.mark.browser

DESKTOP = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
OPENS_WITHIN_MS = 15_000
"""A hang, not a speed: that is measured by tools/bench/report.py."""
HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror=alert(1)>{{7*7}}'
TITLE = f"A <b>model</b> & {HOSTILE}"


@dataclass(frozen=True)
class Page:
    """A report, its numbers as --json prints them, and what it was made of."""

    path: Path
    numbers: dict[str, Any]
    made: Made


def written(made: Made, *args: object) -> Page:
    path = made.file.with_name("report.html")
    return Page(path, run_json("report", made.file, "-o", path, "--validation", made.checks, "--json", *args), made)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return written(make(tmp_path_factory.mktemp("small"), title=TITLE), "--points", 4)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return written(make(tmp_path_factory.mktemp("large"), 61, 256, n_rows=2), "--points", 0)


@contextmanager
def opened(browser: Any, page: Page, **options: Any) -> Iterator[Any]:
    """The page, ready; at the end it must not have asked for anything, nor said anything on the console."""
    context = browser.new_context(**{**DESKTOP, **options})
    asked: list[str] = []
    said: list[str] = []

    def answer(route: Any) -> None:
        url = route.request.url
        if url == page.path.as_uri():
            route.continue_()
        else:
            asked.append(url)
            route.abort()

    context.route("**/*", answer)
    tab = context.new_page()
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    tab.goto(page.path.as_uri())
    tab.wait_for_selector("html[data-ready=yes]")
    try:
        yield tab
        assert asked == []
        assert said == []
    finally:
        context.close()


def cells(tab: Any, selector: str) -> list[list[str]]:
    script = "rows => rows.map(row => [...row.children].map(cell => cell.textContent.trim()))"
    found: list[list[str]] = tab.eval_on_selector_all(f"{selector} tbody tr", script)
    return found


def label(tab: Any) -> str:
    """What a screen reader says of the cell that has the focus."""
    text: str = tab.evaluate("document.activeElement.getAttribute('aria-label')")
    return text


def stack(page: Page, layer: int, projection: str) -> dict[str, Any]:
    found = page.numbers["experts"]["stacks"]
    return next(s for s in found if (s["layer"], s["projection"]) == (layer, projection))


def three(value: float) -> float:
    return float(f"{value:.3g}")


def test_tables_say_what_the_artifacts_say(browser: Any, small: Page) -> None:
    plan = small.made.plan
    with opened(browser, small) as tab:
        assert tab.title() == "model.gguf: report of mopeq-edge"
        text = tab.inner_text("#result")
        assert f"{plan.budget_bytes:,} bytes" in text
        assert f"{plan.file_bytes:,} bytes; 1,000 bytes under the budget" in text
        assert float(tab.inner_text("#predicted")) == pytest.approx(plan.damage, rel=1e-5)
        assert float(tab.inner_text("#kld")) == pytest.approx(EVALUATION["kld_mean_nats"], rel=1e-5)
        assert "93.21 %" in text
        sizes = cells(tab, "#sizes")
        assert sum(int(row[2].replace(",", "")) for row in sizes) == plan.file_bytes
        reached = cells(tab, "#reached")
        assert [row[4] for row in reached] == [str(UNREACHED), "none", "none", "none"]
        agreement = cells(tab, "#agreement")
        assert [row[1:4] for row in agreement] == [
            ["64", "0", "0"],
            ["63", "1", "0"],
            ["62", "2", "0"],
            ["64", "0", "0"],
        ]
        points = cells(tab, "#points")
        replans = [[row[0], int(row[1].replace(",", ""))] for row in points if row[3] == "predicted"][1:]
        assert replans == [[p["layout"], p["file_bytes"]] for p in small.numbers["curve"]["points"]]
        assert ["this file", f"{plan.file_bytes:,}", "0.01235", "measured mean KLD, nats"] in points


def test_every_cell_of_a_layer_s_table(browser: Any, small: Page) -> None:
    with opened(browser, small) as tab:
        tab.click("#layer-table summary")
        tab.select_option("#table-layer", "2")
        rows = cells(tab, "#layer-rows")
        assert len(rows) == 16
        for expert, row in enumerate(rows):
            assert row[:2] == [str(expert), str(round(small.made.routing.counts[2][expert]))]
            for at, projection in enumerate(("gate", "up", "down")):
                own = stack(small, 2, projection)
                kind, _, damage, sensitivity = row[3 + 4 * at : 7 + 4 * at]
                assert kind == own["types"][expert]
                assert float(damage) == pytest.approx(own["damage"][expert], rel=6e-3)
                assert float(sensitivity) == pytest.approx(own["sensitivity"][expert], rel=6e-3)


def test_hovering_a_cell_shows_that_cell(browser: Any, small: Page, screenshots: Path) -> None:
    with opened(browser, small) as tab:
        # canvas by projection; 40 pixels of labels, then square cells of equal width
        width = tab.evaluate("(document.querySelector('.panel canvas').clientWidth - 40) / 16")
        height = tab.evaluate("(document.querySelector('.panel canvas').clientHeight - 18) / 4")
        canvas = tab.locator(".panel canvas").nth(1)
        canvas.scroll_into_view_if_needed()
        canvas.hover(position={"x": 40 + 9.5 * width, "y": 2.5 * height})
        tip = tab.locator(".tip")
        assert tip.is_visible()
        said = tip.inner_text()
        assert "Layer 2, expert 9" in said
        for projection in ("gate", "up", "down"):
            assert re.search(rf"{projection}\s+{stack(small, 2, projection)['types'][9]}\s", said)
        tab.screenshot(path=screenshots / "hover.png")
        # the colour under the pointer is that of the type in the legend
        kind = stack(small, 2, "up")["types"][9]
        pixel = canvas.evaluate(
            f"c => [...c.getContext('2d').getImageData({40 + 9.5 * width}, {2.5 * height}, 1, 1).data].slice(0, 3)"
        )
        swatch = tab.eval_on_selector(f"[data-type={kind}] .swatch", "s => getComputedStyle(s).backgroundColor")
        assert [int(n) for n in re.findall(r"\d+", swatch)] == pixel
        tab.mouse.move(5, 5)
        assert not tip.is_visible()
        canvas.click(position={"x": 40 + 0.5 * width, "y": 3.5 * height})
        assert "Layer 3, expert 0" in tab.inner_text("#detail")


def test_the_map_by_keyboard_says_every_cell(browser: Any, small: Page) -> None:
    with opened(browser, small) as tab:
        tab.focus("#cells")
        stops = []
        for _ in range(len(small.numbers["experts"]["matrices_by_type"]) + 1):
            tab.keyboard.press("Tab")
            stops.append(tab.evaluate("document.activeElement.getAttribute('role') || document.activeElement.tagName"))
        # the buttons of the legend, then one stop for all of the map
        assert stops == ["BUTTON"] * (len(stops) - 1) + ["gridcell"]
        assert label(tab).startswith("Layer 0, expert 0: ")
        for key in ("ArrowDown", "ArrowDown", "ArrowRight", "End", "ArrowLeft", "ArrowUp"):
            tab.keyboard.press(key)
        own = stack(small, 1, "down")
        said = label(tab)
        assert said.startswith("Layer 1, expert 14: ")
        assert f"down {own['types'][14]}, " in said
        assert float(re.findall(r"predicted damage ([\d.e-]+)", said)[2].rstrip(".")) == three(own["damage"][14])
        places = "[c.getAttribute('aria-colindex'), c.parentElement.getAttribute('aria-rowindex')]"
        assert tab.evaluate(f"(c => {places})(document.activeElement)") == ["15", "2"]
        for key in ("Control+Home", "ArrowLeft", "ArrowUp"):
            tab.keyboard.press(key)
        assert label(tab).startswith("Layer 0, expert 0")
        for _ in range(UNREACHED):
            tab.keyboard.press("ArrowRight")
        assert "never routed to" in label(tab)
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.tagName") == "SUMMARY"


@pytest.mark.parametrize("by", ["damage", "tokens", "type", "sensitivity"])
def test_sorting_experts(browser: Any, small: Page, by: str) -> None:
    """The first columns of layer 1, against a sort of the artifacts."""
    bits = small.numbers["experts"]["bits_per_weight"]
    stacks = [stack(small, 1, projection) for projection in ("gate", "up", "down")]
    keys = {
        "damage": lambda e: sum(s["damage"][e] for s in stacks),
        "sensitivity": lambda e: sum(s["sensitivity"][e] for s in stacks),
        "type": lambda e: sum(bits[s["types"][e]] for s in stacks),
        "tokens": lambda e: small.made.routing.counts[1][e],
    }
    expected = sorted(range(16), key=lambda e: (-keys[by](e), e))
    with opened(browser, small) as tab:
        tab.select_option("#experts", by)
        tab.focus(".ring[tabindex='0']")
        tab.keyboard.press("ArrowDown")
        tab.keyboard.press("Home")
        found = []
        for _ in range(16):
            match = re.match(r"Layer 1, expert (\d+)", label(tab))
            assert match is not None
            found.append(int(match[1]))
            tab.keyboard.press("ArrowRight")
    assert found == expected


def test_sorting_layers_and_choosing_a_type(browser: Any, small: Page, screenshots: Path) -> None:
    damage = {
        n: sum(sum(stack(small, n, projection)["damage"]) for projection in ("gate", "up", "down")) for n in range(4)
    }
    with opened(browser, small) as tab:
        tab.select_option("#layers", "damage")
        tab.focus(".ring[tabindex='0']")
        tab.keyboard.press("Control+Home")
        found = []
        for _ in range(4):
            found.append(int(label(tab).split()[1].rstrip(",")))
            tab.keyboard.press("ArrowDown")
        assert found == sorted(damage, key=lambda n: -damage[n])
        tab.select_option("#cells", "large")
        tab.click("[data-type=Q3_K]")
        assert tab.get_attribute("[data-type=Q3_K]", "aria-pressed") == "true"
        tab.locator("#map").screenshot(path=screenshots / "one-type.png")
        tab.select_option("#projection", "up")
        assert tab.locator(".panel").count() == 1
        for kind in ("damage", "tokens", "sensitivity"):
            tab.select_option("#colour", kind)
            assert tab.locator("#ramp").is_visible()
        tokens = small.made.routing.counts
        tab.select_option("#colour", "tokens")
        most = max(100 * counts.max() / counts.sum() for counts in tokens.values())
        assert tab.inner_text("#ramp-high").startswith(f"{most:.3g} %")


@pytest.mark.parametrize("which", ["small", "large"])
@pytest.mark.parametrize("look", ["desktop", "dark", "phone"])
def test_no_page_is_wider_than_its_screen(
    browser: Any, request: pytest.FixtureRequest, screenshots: Path, which: str, look: str
) -> None:
    options = {"desktop": {}, "dark": {"color_scheme": "dark"}, "phone": PHONE}[look]
    with opened(browser, request.getfixturevalue(which), **options) as tab:
        wide = tab.evaluate("document.documentElement.scrollWidth")
        assert wide <= tab.evaluate("document.documentElement.clientWidth")
        assert tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") < OPENS_WITHIN_MS
        tab.screenshot(path=screenshots / f"{which}-{look}.png", full_page=True)


def test_a_large_map_is_all_there(browser: Any, large: Page) -> None:
    with opened(browser, large) as tab:
        assert tab.get_attribute("#grid", "aria-rowcount") == "61"
        assert tab.get_attribute("#grid", "aria-colcount") == "256"
        tab.focus(".ring[tabindex='0']")
        tab.keyboard.press("Control+End")
        own = stack(large, 60, "gate")
        assert label(tab).startswith("Layer 60, expert 255: ")
        assert f"gate {own['types'][255]}, " in label(tab)
        tab.select_option("#experts", "damage")
        tab.select_option("#colour", "damage")
        # the same expert is still the chosen one
        tab.focus(".ring[tabindex='0']")
        assert label(tab).startswith("Layer 60, expert 255: ")
        assert len(cells(tab, "#stacks")) == 61 * 3


def test_dark_and_printed(browser: Any, small: Page, screenshots: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, small, color_scheme="dark") as tab:
        assert tab.evaluate(background) == "rgb(16, 19, 24)"
        tab.emulate_media(media="print", color_scheme="dark")
        assert tab.evaluate(background) == "rgb(255, 255, 255)"
        assert not tab.is_visible("nav")
        assert not tab.is_visible("#tools")
        assert tab.is_visible(".panel canvas")
        pdf = tab.pdf(path=screenshots / "printed.pdf", format="A4")
        assert pdf.startswith(b"%PDF")
        assert len(re.findall(rb"/Type\s*/Page\b", pdf)) > 1
        tab.emulate_media(media="screen", color_scheme="light")
        assert tab.evaluate(background) == "rgb(247, 248, 250)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(browser: Any, small: Page, scheme: str) -> None:
    """axe-core's rules of WCAG 2.1 AA and its best practices, in both schemes, with every table open."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    with opened(browser, small, color_scheme=scheme) as tab:
        tab.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        tab.wait_for_selector("#layer-rows tbody tr")
        found = axe.run(tab).response
        problems = [(v["id"], v["help"], [n["target"] for n in v["nodes"]][:3]) for v in found["violations"]]
        assert problems == []
        # it looked: contrast and names are among what passed
        assert {"color-contrast", "html-has-lang", "select-name"} <= {one["id"] for one in found["passes"]}


def test_names_are_shown_and_never_run(browser: Any, small: Page) -> None:
    with opened(browser, small) as tab:
        assert tab.inner_text("h1") == TITLE
        assert tab.locator("img").count() == 0
        assert tab.locator("script").count() == 2
        assert "owned" not in tab.title()


def test_the_policy_stops_what_is_not_ours(browser: Any, small: Page) -> None:
    context = browser.new_context(**DESKTOP)
    tab = context.new_page()
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.goto(small.path.as_uri())
    tab.evaluate("x = document.createElement('script'); x.textContent = 'window.ran = 1'; document.body.append(x)")
    tab.evaluate("x = document.createElement('img'); x.src = 'https://example.org/a.png'; document.body.append(x)")
    tab.wait_for_timeout(50)
    assert tab.evaluate("window.ran") is None
    assert any("inline script" in text for text in said)
    assert any("example.org" in text and "Content Security Policy" in text for text in said)
    context.close()


def test_what_there_is_without_javascript(browser: Any, small: Page) -> None:
    context = browser.new_context(java_script_enabled=False, **DESKTOP)
    tab = context.new_page()
    tab.goto(small.path.as_uri())
    assert "The map needs JavaScript" in tab.inner_text("noscript")
    assert not tab.is_visible("#tools")
    assert tab.locator("#stacks tbody tr").count() == 12
    context.close()
