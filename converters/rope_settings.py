"""Rope scaling: what a checkpoint's settings ask for, and whether llama.cpp's graph turns queries and keys like that.

llama.cpp's converter writes all of YaRN's numbers into a GGUF, but for our families llama.cpp reads the factor and the
original length only: its ramp always runs between the dimensions that turn 32 times and once within that length, its
ends rounded, and queries and keys grow by 1 + 0.1 ln(factor). Another ramp or growth moves logits by more than their
spread (measured on small random models, as that every accepted setting moves them by less than 1e-4 of it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mopeq_edge.errors import SourceError, shown
from mopeq_edge.source.converter import Config

NEEDED: Mapping[str, Sequence[str]] = {"linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings")}
"""Scalings that a GGUF has a name for, and the settings that each needs."""

_BETA_FAST, _BETA_SLOW = 32.0, 1.0
_SAME = 1e-5
"""Relative; the growth given as a rounded number is still the same."""
_HUGE = 2.0**64
"""No setting is that large; whole numbers of config.json have no end."""
_WRONG = "so no GGUF of this checkpoint would be right"


@dataclass(frozen=True)
class Graph:
    """What llama.cpp does for an architecture: ``scalings`` it has, ``rotary`` the key in config.json that counts the
    dimensions that it turns (none: a head's), ``rounded`` is set where rounded ends of the ramp are taken for the
    model's own, ``one_mscale`` where the growth is undone and attention scaled by ``mscale_all_dim`` instead."""

    scalings: tuple[str, ...] = ("linear", "yarn")
    rotary: str | None = None
    rounded: bool = False
    one_mscale: bool = False


GRAPHS: Mapping[str, Graph] = {
    "deepseek2": Graph(scalings=("yarn",), rotary="qk_rope_head_dim", one_mscale=True),
    "deepseek2-ocr": Graph(scalings=()),
    "gpt-oss": Graph(rounded=True),
    "granitemoe": Graph(),
    "llama": Graph(),
    "olmoe": Graph(),
    "qwen2moe": Graph(),
    "qwen3moe": Graph(),
    "qwen3vlmoe": Graph(),
}
"""By the architecture's name in a GGUF."""


def rope_of(config: Config) -> tuple[str, dict[str, Any]]:
    """Type of the rope and its settings, whatever they are called and wherever older configurations keep them."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise SourceError(
            f"config.json has rope settings {str(found)[:40]!r}, expected an object; use the weights' own"
        )
    kind = found.get("rope_type", found.get("type")) or "default"
    if not isinstance(kind, str):
        raise SourceError(
            f"config.json has rope type {shown(kind)}, expected a name; use the config.json of the weights"
        )
    beside = {key: config[key] for key in NEEDED.get(kind, ()) if key in config}
    return kind, {**beside, **found}


def require_needed(kind: str, rope: Mapping[str, Any]) -> None:
    """Refuse a scaling of type ``kind`` without its numbers."""
    missing = next((key for key in NEEDED[kind] if rope.get(key) is None), None)
    if missing is not None:
        raise SourceError(
            f"config.json has a rope of type '{kind}' without {missing}; use the config.json of these weights"
        )


def check_rope(config: Config, architecture: str, family: str) -> None:
    """Refuse settings of the rope that llama.cpp's graph would compute in another way."""
    graph = GRAPHS[architecture]
    kind, rope = rope_of(config)
    if (partial := rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))) not in (None, 1):
        raise SourceError(
            f"config.json has partial_rotary_factor {partial!r}, expected none; not supported for {family}"
        )
    if kind == "default":
        return
    if kind not in graph.scalings:
        names = [*("default", *graph.scalings)]
        reason = "llama.cpp would scale the rope or attention in another way" if kind in NEEDED else "not supported yet"
        raise SourceError(
            f"config.json has rope type '{kind}', expected {' or '.join((', '.join(names[:-1]), names[-1]))}: {reason}"
        )
    require_needed(kind, rope)
    if kind == "yarn":
        _check_ramp(config, rope, graph, family)
        _check_growth(rope, graph, family)


def _check_ramp(config: Config, rope: Mapping[str, Any], graph: Graph, family: str) -> None:
    """The ramp's ends, rounded as they are in transformers, are llama.cpp's."""
    fast, slow = _positive(rope, "beta_fast", _BETA_FAST), _positive(rope, "beta_slow", _BETA_SLOW)
    truncate = graph.rounded or rope.get("truncate", True)
    ramp = (_rotary(config, graph), _theta(config, rope), _positive(rope, "original_max_position_embeddings"))
    asked, done = _ends(*ramp, fast, slow, truncate), _ends(*ramp, _BETA_FAST, _BETA_SLOW, True)
    if any(abs(ours - theirs) > _SAME for ours, theirs in zip(asked, done, strict=True)):
        given = ", ".join(f"{key} {rope[key]!r}" for key in ("beta_fast", "beta_slow", "truncate") if key in rope)
        raise SourceError(
            f"config.json has yarn with {given}, expected beta_fast 32, beta_slow 1, truncate True or none: llama.cpp "
            f"computes {family}'s ramp like that only, {_WRONG}"
        )


def _check_growth(rope: Mapping[str, Any], graph: Graph, family: str) -> None:
    """What multiplies queries and keys is what llama.cpp multiplies them by."""
    factor = _positive(rope, "factor")
    usual = _growth(factor, 1.0)
    mscale, of_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if graph.one_mscale and (not of_all or mscale != of_all):
        raise SourceError(
            f"config.json has yarn with mscale {mscale!r} and mscale_all_dim {of_all!r}, expected equal numbers: "
            f"llama.cpp knows one of them only, {_WRONG}"
        )
    done = 1.0 if graph.one_mscale else usual
    keys: tuple[str, ...] = ("attention_factor",)
    if rope.get("attention_factor") is not None:
        asked = _positive(rope, "attention_factor")
    elif mscale and of_all:
        keys = ("mscale", "mscale_all_dim")
        asked = _growth(factor, _positive(rope, keys[0])) / _growth(factor, _positive(rope, keys[1]))
    else:
        asked = usual
    if abs(asked / done - 1) > _SAME:
        given = " and ".join(f"{key} {rope[key]!r}" for key in keys)
        raise SourceError(
            f"config.json has yarn with {given}, expected none: llama.cpp multiplies {family}'s queries and keys by "
            f"{done:.4f}, not {asked:.4f}, {_WRONG}"
        )
    # transformers reads neither; other code multiplies by them
    for key in ("attn_factor", "extrapolation_factor"):
        if rope.get(key) not in (None, 1):
            raise SourceError(
                f"config.json has yarn with {key} {rope[key]!r}, expected 1 or none: llama.cpp ignores it, {_WRONG}"
            )


def _ends(
    n_dims: int, theta: float, n_original: float, fast: float, slow: float, truncate: object
) -> tuple[float, float]:
    """Pairs of dimensions between which YaRN goes from not scaled to scaled: those that turn ``fast`` and ``slow``
    times in the original length (arXiv 2309.00071)."""
    low, high = (
        n_dims * math.log(n_original / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow)
    )
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, n_dims - 1)


def _growth(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _rotary(config: Config, graph: Graph) -> int:
    """Dimensions that are turned."""
    keys = (graph.rotary or "head_dim",) if graph.rotary or config.get("head_dim") is not None else ()
    if keys:
        return int(_positive(config, keys[0]))
    return int(_positive(config, "hidden_size")) // int(_positive(config, "num_attention_heads"))


def _theta(config: Config, rope: Mapping[str, Any]) -> float:
    theta = _positive(rope if rope.get("rope_theta") is not None else config, "rope_theta", 10000.0)
    if theta <= 1:
        raise SourceError(
            f"config.json has rope_theta {theta!r}, expected more than 1; use the config.json of the weights"
        )
    return theta


def _positive(settings: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """The number under ``key``; as in transformers, none and 0 are the default where there is one."""
    value = settings.get(key)
    if default is not None and not value:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < _HUGE:
        raise SourceError(
            f"config.json has {key} {shown(value)}, expected a positive number; use the one of these weights"
        )
    return float(value)
