"""Toy llama.cpp trees, the diff between two of them, and a digest of all that is in one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mopeq_edge.llama_cpp.diff import FilePatch, parse_patches

CMAKE = 'cmake_minimum_required(VERSION 3.14)\nproject("llama.cpp" C CXX)\n'
GRAPH = "".join(f"line {n}\n" for n in range(1, 21))


def make_tree(root: Path, **files: str | bytes | None) -> Path:
    """A checkout in ``root``; ``files`` adds or replaces ``src/NAME.cpp`` by name, None leaves it out."""
    texts: dict[str, str | bytes | None] = {"CMakeLists.txt": CMAKE, "src/llama-graph.cpp": GRAPH}
    texts |= {f"src/{name.replace('_', '-')}.cpp": text for name, text in files.items()}
    for name, text in texts.items():
        if text is not None:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def digest(root: Path) -> str:
    """SHA-256 over names, kinds, permissions and contents below ``root``."""
    found = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        found.update(f"{path.relative_to(root)}\0{path.lstat().st_mode:o}\0{len(content)}\0".encode() + content)
    return found.hexdigest()


def parsed(*texts: str) -> tuple[FilePatch, ...]:
    return parse_patches({f"{number}.patch": text.encode() for number, text in enumerate(texts)})


REPLACE = """\
--- a/src/llama-graph.cpp
+++ b/src/llama-graph.cpp
@@ -3,1 +3,1 @@
-line 3
+LINE 3
"""
INSERT = """\
--- a/src/llama-graph.cpp
+++ b/src/llama-graph.cpp
@@ -10,1 +10,3 @@
 line 10
+  ten and a third
+  ten and two thirds
"""
REMOVE = """\
--- a/src/llama-graph.cpp
+++ b/src/llama-graph.cpp
@@ -15,2 +17,1 @@
-line 15
 line 16
"""
CREATE = """\
--- /dev/null
+++ b/src/new/groups.h
@@ -0,0 +1,3 @@
+#pragma once
+
+int groups;
"""
ALL = (REPLACE, INSERT, REMOVE, CREATE)


def patched_graph() -> str:
    """`GRAPH` with all of them, by hand."""
    lines = [f"line {n}" for n in range(1, 21)]
    lines[2] = "LINE 3"
    del lines[14]
    lines[10:10] = ["  ten and a third", "  ten and two thirds"]
    return "".join(f"{line}\n" for line in lines)
