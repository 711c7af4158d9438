"""The page: a template with everything that it needs inside, the numbers once as JSON for the map."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from mopeq_edge import __version__
from mopeq_edge.ggml.types import BY_NAME
from mopeq_edge.plan.artifact import id_runs
from mopeq_edge.report.artifacts import Missing
from mopeq_edge.report.charts import charts, require_libraries
from mopeq_edge.report.document import Report
from mopeq_edge.report.experts import ExpertMap, rounded
from mopeq_edge.units import GB, GIB

CODES = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""A letter for each type in the page's data; there are fewer types in ggml."""

BITS_AT: tuple[tuple[float, ...], tuple[float, ...]] = (
    (1, 2, 3, 4.5, 6.5, 16, 32),
    (0.0, 0.12, 0.4, 0.68, 0.82, 0.95, 1.0),
)
"""Place on the colour scale by bits per weight: the same in every report, and widest where plans differ."""
SCALE = "viridis"
"""Rises in lightness, and told apart by the colour-blind."""
N_SHADES = 24


def page(report: Report) -> bytes:
    """The HTML. The same report gives the same bytes.

    Raises :class:`ExtraMissingError` without the libraries of the extra ``pictures``.
    """
    require_libraries()
    import jinja2

    script = _resource("page.js")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "count": lambda n: f"{n:,}",
        "size": size_text,
        "number": number_text,
        "percent": lambda share: f"{100 * share:.2f} %",
        "runs": lambda ids: id_runs(ids).replace(",", ", "),
        "share": lambda part, whole: f"{100 * part / whole:.1f} %" if whole else "",
    }
    drawn = {name: _safe(svg) for name, svg in charts(report).items()}
    experts = None if isinstance(report.experts, Missing) else report.experts
    text = environment.from_string(_resource("page.html")).render(
        report=report,
        charts=drawn,
        missing=lambda part: isinstance(part, Missing),
        legend=[] if experts is None else _legend(experts),
        layer_types=[] if experts is None else _layer_types(experts),
        data=_safe(script_json(page_data(experts))) if experts is not None else "",
        style=_safe(_resource("page.css")),
        script=_safe(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=__version__,
    )
    return text.encode()


def page_data(experts: ExpertMap) -> dict[str, Any]:
    """What the script draws: for each projection a row a layer, a letter of ``CODES`` an expert."""
    codes = dict(zip(experts.bits(), CODES, strict=False))
    rows: dict[str, dict[str, list[Any]]] = {
        p: {"types": [], "damage": [], "sensitivity": [], "reference": []} for p in experts.projections
    }
    by_place = {(stack.layer, stack.projection): stack for stack in experts.stacks}
    for layer in experts.layers:
        for projection, own in rows.items():
            stack = by_place.get((layer, projection))
            own["types"].append("" if stack is None else "".join(codes[name] for name in stack.types))
            for key in ("damage", "sensitivity"):
                values = None if stack is None else getattr(stack, key)
                own[key].append(None if values is None else [rounded(value) for value in values])
            own["reference"].append(None if stack is None else stack.reference)
    return {
        "codes": CODES,
        "layers": list(experts.layers),
        "n_expert": experts.n_expert,
        "order": list(experts.projections),
        "projections": rows,
        "score": experts.score,
        "shades": _shades(),
        "tokens": None if experts.tokens is None else [list(experts.tokens.get(n, ())) for n in experts.layers],
        "types": [{"name": t["name"], "bpw": t["bpw"], "colour": t["colour"]} for t in _legend(experts)],
        "unit": experts.unit,
    }


def script_json(value: Any) -> str:
    """JSON that can stand in a ``<script>`` element: nothing in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def size_text(n: int) -> str:
    """``n`` bytes in GB (1e9) and GiB (2^30), or in MB and MiB."""
    if n >= GB:
        return f"{n / GB:.3f} GB ({n / GIB:.3f} GiB)"
    return f"{n / 10**6:.3f} MB ({n / 2**20:.3f} MiB)"


def number_text(value: float | None, digits: int = 4) -> str:
    """Significant digits; nothing for None."""
    return "" if value is None else f"{value:.{digits}g}"


def _legend(experts: ExpertMap) -> list[dict[str, Any]]:
    counts = experts.counts()
    return [
        {"name": name, "bpw": bpw, "count": counts[name], "colour": bits_colour(bpw)}
        for name, bpw in experts.bits().items()
    ]


def bits_colour(bpw: float) -> str:
    """The colour of ``bpw`` bits per weight."""
    import matplotlib
    import numpy as np
    from matplotlib.colors import to_hex

    return to_hex(matplotlib.colormaps[SCALE](float(np.interp(bpw, *BITS_AT))))


def _shades() -> list[str]:
    import matplotlib
    from matplotlib.colors import to_hex

    return [to_hex(matplotlib.colormaps[SCALE](n / (N_SHADES - 1))) for n in range(N_SHADES)]


def _layer_types(experts: ExpertMap) -> list[dict[str, Any]]:
    """For a table: the mix of types of every stack, and its bits per weight."""
    found, names = [], list(experts.bits())
    for stack in experts.stacks:
        mix = {name: stack.types.count(name) for name in names if name in stack.types}
        found.append(
            {
                "layer": stack.layer,
                "projection": stack.projection,
                "mix": ", ".join(f"{name} ({n})" for name, n in mix.items()),
                "bpw": sum(BY_NAME[name].bpw * n for name, n in mix.items()) / len(stack.types),
                "damage": None if stack.damage is None else sum(stack.damage),
            }
        )
    return found


def _resource(name: str) -> str:
    return (files("mopeq_edge.report") / name).read_text(encoding="utf-8")


def _safe(text: str) -> Any:
    """Our own HTML, which is not to be escaped."""
    from markupsafe import Markup

    return Markup(text)


def parts_missing(report: Report) -> Mapping[str, Missing]:
    """By part: for a note to the user."""
    parts: dict[str, object] = {"curve": report.curve, "presets": report.presets, "experts": report.experts}
    parts |= {"coverage": report.coverage, "router agreement": report.routers, "memory": report.memory}
    return {name: part for name, part in parts.items() if isinstance(part, Missing)}
