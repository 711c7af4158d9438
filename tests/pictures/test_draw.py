"""What is in the pictures, read back from them, and that the same map gives the same bytes anywhere."""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result

from mopeq_edge.cli import cli
from mopeq_edge.errors import ExtraMissingError, FormatError, OutputError
from mopeq_edge.pictures import draw
from mopeq_edge.pictures.draw import map_picture
from mopeq_edge.pictures.figure import FORMATS
from mopeq_edge.pictures.type_map import TypeMap

from .maps import DIGITS, KINDS, type_map, write

SVG = "{http://www.w3.org/2000/svg}"


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def groups(svg: bytes) -> dict[str, ElementTree.Element]:
    return {g.get("id", ""): g for g in ElementTree.fromstring(svg).iter(f"{SVG}g")}


def texts(svg: bytes) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def fill(element: ElementTree.Element) -> str:
    found = re.search(r"fill: (#[0-9a-f]{6})", element.get("style", ""))
    assert found is not None
    return found[1]


def box(element: ElementTree.Element) -> npt.NDArray[np.float64]:
    """[left, top, right, bottom] of a path."""
    points = np.array(re.findall(r"[ML] (\S+) (\S+)", element.get("d", "")), dtype=float)
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


def legend(svg: bytes) -> dict[str, float]:
    """Bits per weight by colour."""
    found = groups(svg)["legend_1"]
    labels = [t.text or "" for t in found.iter(f"{SVG}text") if "bpw" in (t.text or "")]
    fills = [
        fill(p)
        for p in found.iter(f"{SVG}path")
        if "fill: #" in p.get("style", "") and "opacity" not in p.get("style", "")
    ]
    assert len(set(fills)) == len(fills) == len(labels)
    return {colour: float(label.split(" bpw")[0]) for colour, label in zip(fills, labels, strict=True)}


def cells(svg: bytes, panel: int, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
    """The matrix that a panel shows: of each cell's middle the bits per weight of its colour, by the legend."""
    axes, bits = groups(svg)[f"axes_{panel}"], legend(svg)
    frame = next(box(path) for path in axes.iter(f"{SVG}path"))
    collection = next(g for g in axes.iter(f"{SVG}g") if g.get("id", "").startswith("PolyCollection"))
    found = np.full(shape, np.nan)
    height, width = (frame[3] - frame[1]) / shape[0], (frame[2] - frame[0]) / shape[1]
    for path in collection.iter(f"{SVG}path"):
        left, top, right, bottom = box(path)
        for row, column in np.ndindex(shape):
            x, y = frame[0] + (column + 0.5) * width, frame[1] + (row + 0.5) * height
            if left < x < right and top < y < bottom:
                assert np.isnan(found[row, column])
                found[row, column] = bits[fill(path)]
    return found


def test_the_heat_map_read_back() -> None:
    types = type_map()
    svg = map_picture(types, "svg")
    for number, projection in enumerate(types.projections, 1):
        np.testing.assert_allclose(cells(svg, number, (2, 4)), types.bits(projection), atol=1e-3)
    words = texts(svg)
    for expected in ("x.gguf: 1,234,567 bytes (1.235 MB), 3.250 bpw", "per-expert layout, olmoe"):
        assert expected in words
    for expected in ("2.625 bpw: Q2_K (8)", "3.438 bpw: Q3_K (7)", "4.5 bpw: Q4_K (9)", "gate", "up", "down"):
        assert expected in words
    # of the layers, the dense one is left out
    assert [word for word in words if word in ("0", "1", "2", "3")].count("1") == 3


def test_a_stack_that_is_not_there() -> None:
    digits = {(0, "down"): "2233", (1, "down"): "4444", (1, "gate_up"): "2222"}
    svg = map_picture(type_map(digits), "svg")
    expected = [[2.625, 2.625, 3.438, 3.438], [4.5] * 4]
    np.testing.assert_allclose(cells(svg, 1, (2, 4)), expected, atol=1e-3)
    np.testing.assert_allclose(cells(svg, 2, (2, 4)), [[np.nan] * 4, [2.625] * 4], atol=1e-3)


def large(seed: int = 0, n_layer: int = 48, n_expert: int = 128) -> TypeMap:
    rng = np.random.default_rng(seed)
    digits = {
        (n, p): "".join(str(d) for d in rng.integers(2, 5, n_expert))
        for n in range(n_layer)
        for p in ("gate", "up", "down")
    }
    return type_map(digits)


def test_the_pixels_of_a_large_map() -> None:
    """48 layers of 128 experts: every cell has its colour in the picture."""
    from matplotlib.image import imread

    types = large()
    pixels = np.rint(imread(io.BytesIO(map_picture(types, "png"))) * 255).astype(int)[..., :3]
    colours = {kind.bpw: np.rint(np.array(draw.colour(kind.bpw)[:3]) * 255).astype(int) for kind in KINDS.values()}
    bits = np.full(pixels.shape[:2], np.nan)
    for bpw, colour in colours.items():
        bits[(np.abs(pixels - colour) <= 1).all(axis=2)] = bpw
    # panels are where whole columns have colours
    wide = np.flatnonzero(np.isfinite(bits).sum(axis=0) > 0.5 * pixels.shape[0])
    starts = wide[np.flatnonzero(np.diff(wide, prepend=-2) > 1)]
    ends = wide[np.flatnonzero(np.diff(wide, append=10**9) > 1)] + 1
    assert len(starts) == 3
    for start, end, projection in zip(starts, ends, types.projections, strict=True):
        middle = bits[:, (start + end) // 2]
        rows = np.flatnonzero(np.isfinite(middle))
        # the legend is below the panel
        rows = rows[: 1 + np.flatnonzero(np.diff(rows, append=10**9) > 5)[0]]
        top, bottom = rows[0], rows[-1] + 1
        assert (end - start) / 128 > 5
        assert (bottom - top) / 48 > 10
        y = (top + (np.arange(48) + 0.5) * (bottom - top) / 48).astype(int)
        x = (start + (np.arange(128) + 0.5) * (end - start) / 128).astype(int)
        np.testing.assert_array_equal(bits[np.ix_(y, x)], types.bits(projection))


def test_the_scatter_plot_read_back() -> None:
    types = type_map()
    svg = map_picture(types, "svg", scatter=True)
    bits = legend(svg)
    for number, projection in enumerate(types.projections, 1):
        axes = groups(svg)[f"axes_{number}"]
        (collection,) = (g for g in axes.iter(f"{SVG}g") if g.get("id", "").startswith("PathCollection"))
        points = [use for use in collection.iter(f"{SVG}use") if use.get("x")]
        found = sorted((float(p.get("x", "")), -float(p.get("y", "")), bits[fill(p)]) for p in points)
        # from left to right: the experts of layer 0, then those of layer 2
        expected = types.bits(projection).ravel()
        np.testing.assert_allclose([value for _, _, value in found], expected, atol=1e-3)
        heights = {value: height for _, height, value in found}
        assert sorted(heights, key=heights.__getitem__) == sorted(heights)
        assert all(height == pytest.approx(heights[value]) for _, height, value in found)


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("picture_format", FORMATS)
def test_other_maps_are_other_pictures(picture_format: str, scatter: bool) -> None:
    first = map_picture(type_map(), picture_format, scatter=scatter)
    assert map_picture(type_map(), picture_format, scatter=scatter) == first
    other = map_picture(type_map({**DIGITS, (2, "down"): "4443"}), picture_format, scatter=scatter)
    assert other != first
    assert len(first) > 5000


def test_settings_and_time_change_no_byte(tmp_path: Path) -> None:
    """Another process with other settings of matplotlib."""
    (tmp_path / "matplotlibrc").write_text("font.size: 20\naxes.facecolor: red\nsvg.fonttype: path\nsavefig.dpi: 30\n")
    code = """
import hashlib
from mopeq_edge.pictures.draw import map_picture
from tests.pictures.maps import type_map
for picture_format in ("png", "svg"):
    for scatter in (False, True):
        print(hashlib.sha256(map_picture(type_map(), picture_format, scatter=scatter)).hexdigest())
"""
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"), "TZ": "Asia/Tokyo"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    ways = [(picture_format, scatter) for picture_format in ("png", "svg") for scatter in (False, True)]
    own = [hashlib.sha256(map_picture(type_map(), f, scatter=scatter)).hexdigest() for f, scatter in ways]
    assert done.stdout.split() == own


def test_the_command(tmp_path: Path) -> None:
    model = write(tmp_path / "x.gguf")
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("b.SVG", b"<?xml")):
        done = invoke("map", model, "-o", tmp_path / name)
        assert done.exception is None, done.exception
        assert done.stdout == f"{tmp_path / name}: 2 layers of 4 experts, gate, up, down\n"
        assert (tmp_path / name).read_bytes().startswith(start)
    before = (tmp_path / "a.svg").read_bytes()
    refused = invoke("map", model, "-o", tmp_path / "a.svg", "--scatter")
    assert isinstance(refused.exception, OutputError)
    assert (tmp_path / "a.svg").read_bytes() == before
    assert invoke("map", model, "-o", tmp_path / "a.svg", "--scatter", "--force").exception is None
    assert (tmp_path / "a.svg").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg", "b.SVG", "x.gguf"]


def test_refusals_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = write(tmp_path / "x.gguf"), tmp_path / "out"
    for arguments, error, expected in (
        ((model, "-o", out / "a.pdf"), OutputError, "expected a name that ends in .png or .svg"),
        ((model, "-o", model), OutputError, "expected a name that ends in"),
        ((tmp_path / "no.json", "-o", out / "a.png"), FormatError, "cannot be read"),
    ):
        done = invoke("map", *arguments)
        assert isinstance(done.exception, error)
        assert expected in str(done.exception)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = invoke("map", model, "-o", out / "a.png")
    assert isinstance(done.exception, ExtraMissingError)
    assert str(done.exception) == (
        "pictures need matplotlib, which is not installed; run: pip install 'mopeq-edge[pictures]'"
    )
    assert not out.exists()


def test_matplotlib_is_loaded_only_to_draw() -> None:
    code = "import sys, mopeq_edge.cli.map, mopeq_edge.pictures.draw; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
