"""The patches that this package carries, and the name of the build that they make."""

from __future__ import annotations

import hashlib
from importlib.resources import files

STOCK = "stock"
"""Name of the build without patches."""


def patch_files() -> dict[str, bytes]:
    """Name and content of every patch, sorted by name."""
    found = (item for item in files(__package__).iterdir() if item.name.endswith(".patch"))
    return {item.name: item.read_bytes() for item in sorted(found, key=lambda item: item.name)}


def build_name() -> str:
    """Name of the build that all patches together make, [a-z0-9]+: another patch, another name. No patch: "stock"."""
    patches = patch_files()
    if not patches:
        return STOCK
    digest = hashlib.sha256()
    for name, content in patches.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return f"groups{digest.hexdigest()[:10]}"
