"""Figures of matplotlib as files: the same figure gives the same bytes, whatever the user's settings are."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mopeq_edge.errors import ExtraMissingError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
_METADATA: Mapping[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
"""Nothing that changes with the clock or the version."""
_STYLE: Mapping[str, Any] = {
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "mopeq-edge",
    "savefig.dpi": 120,
    "text.parse_math": False,
}
_WITHOUT_SETTINGS: Mapping[str, Any] = {}


def require_matplotlib(what: str = "pictures", *modules: str) -> None:
    """Raise :class:`ExtraMissingError` if matplotlib or one of ``modules`` is missing, before hours of measuring."""
    for module in (*modules, "matplotlib.style"):
        try:
            import_module(module)
        except ImportError:
            name = module.partition(".")[0]
            raise ExtraMissingError(
                f"{what} need {name}, which is not installed; run: pip install 'mopeq-edge[pictures]'"
            ) from None


def drawn(draw: Callable[[], Figure], picture_format: str, settings: Mapping[str, Any] = _WITHOUT_SETTINGS) -> bytes:
    """What ``draw`` draws as a file of ``picture_format``, of :data:`FORMATS`, with matplotlib's ``settings``.

    Raises :class:`ExtraMissingError` without matplotlib.
    """
    require_matplotlib()
    import matplotlib.style

    with matplotlib.style.context(["default", {**_STYLE, **settings}]):
        file = io.BytesIO()
        draw().savefig(file, format=picture_format, metadata=_METADATA[picture_format])
    return file.getvalue()
