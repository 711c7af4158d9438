"""What the Hub wants to know of a model: carried over from key-values and from the source's README, never invented."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopeq_edge.card.text import clean
from mopeq_edge.errors import FormatError, MopeqError
from mopeq_edge.gguf_file import KV
from mopeq_edge.split import read_parts

MOST_BYTES = 1 << 16
"""Of a README that are read for its metadata."""

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REPOSITORY = re.compile(rf"https://huggingface\.co/({_ID.pattern})/?")


@dataclass(frozen=True)
class Origin:
    """What a model says about where it comes from; empty where it says nothing. ``base_model``: ids of the Hub."""

    base_model: tuple[str, ...] = ()
    license: tuple[str, ...] = ()
    license_name: str = ""
    license_link: str = ""
    language: tuple[str, ...] = ()

    def filled_from(self, other: Origin) -> Origin:
        """What is missing taken from ``other``; the three of the licence together."""
        licence = self if self.license else other
        return Origin(
            self.base_model or other.base_model,
            licence.license,
            licence.license_name,
            licence.license_link,
            self.language or other.language,
        )


def hub_id(text: str) -> str:
    """``text`` if it is an id of the Hub. Raises :class:`MopeqError` for anything else."""
    if _ID.fullmatch(text) is None:
        raise MopeqError(f"--base-model {text}: expected an id of the Hub such as allenai/OLMoE-1B-7B-0924")
    return text


def origin_of_kvs(kvs: Mapping[str, KV]) -> Origin:
    """What the key-values of a GGUF say (``general.license``, ``general.base_model.N.repo_url``, …)."""

    def value(key: str) -> Any:
        return kvs[key].value if key in kvs else None

    count = value("general.base_model.count")
    numbers = range(min(count, 16)) if isinstance(count, int) else range(0)
    links = [_REPOSITORY.fullmatch(str(value(f"general.base_model.{i}.repo_url"))) for i in numbers]
    return Origin(
        tuple(link[1] for link in links if link is not None),
        _strings(value("general.license")),
        _string(value("general.license.name")),
        _string(value("general.license.link")),
        _strings(value("general.languages")),
    )


def origin_of_source(path: Path) -> Origin:
    """What a GGUF, or the README.md of a checkpoint directory, says.

    Raises :class:`FormatError` for metadata that is no YAML.
    """
    if not path.is_dir():
        return origin_of_kvs(read_parts(path)[0].kvs)
    readme = path / "README.md"
    if not readme.is_file():
        return Origin()
    with readme.open("rb") as file:
        lines = file.read(MOST_BYTES).decode("utf-8", "replace").splitlines()
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return Origin()
    # comes with gguf
    import yaml

    try:
        # strings only, so that the language "no" is no boolean
        found = yaml.load("\n".join(lines[1 : lines.index("---", 1)]), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise FormatError(f"{readme}: its metadata is no YAML ({' '.join(str(error).split())}); correct it") from None
    if not isinstance(found, dict):
        return Origin()
    return Origin(
        tuple(name for name in _strings(found.get("base_model")) if _ID.fullmatch(name)),
        _strings(found.get("license")),
        _string(found.get("license_name")),
        _string(found.get("license_link")),
        _strings(found.get("language")),
    )


def _string(value: Any) -> str:
    return clean(value) if isinstance(value, str) else ""


def _strings(value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    return tuple(text for item in items[:64] if (text := _string(item)))
