"""What reading costs at the limits: files that are as large as they may be, and wrong at their very end.

``python -m tools.bench.limits`` writes one file of each kind and reads it in a process of its own. Seconds are of
processor time and memory is what the largest resident set grew by, both without the start of Python.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from mopeq_edge.gguf_file import MAX_ELEMENTS, MAX_KEYS, MAX_TENSORS, MAX_TEXTS
from mopeq_edge.json_file import MAX_BYTES, MAX_VALUES
from mopeq_edge.source.safetensors_file import MAX_TENSORS as MAX_SAFETENSORS

_READ = """
import sys, time
from pathlib import Path
from mopeq_edge.errors import MopeqError
from {module} import {name} as read
def largest():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
before, began = largest(), time.process_time()
try:
    read(Path(sys.argv[1]))
    said = "read"
except (MopeqError, ValueError) as error:
    said = str(error).replace(sys.argv[1], "…")
print(time.process_time() - began, largest() - before, said[:160])
"""


def _text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def _key(name: str, kind: int, value: bytes) -> bytes:
    return _text(name.encode()) + struct.pack("<I", kind) + value


def _header(keys: list[bytes], tensors: bytes = b"", n_tensors: int = 0) -> bytes:
    raw = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, len(keys)) + b"".join(keys) + tensors
    return raw + bytes(-len(raw) % 32)


def _strings(name: str, n: int, length: int) -> bytes:
    return _key(name, 9, struct.pack("<IQ", 8, n) + _text(b"x" * length) * n)


def _tensors(n: int, last: bytes) -> bytes:
    names = [*(b"blk.%d.x" % i for i in range(n - 1)), last]
    return b"".join(_text(name) + struct.pack("<I4QIQ", 4, 1, 1, 1, 1, 0, 32 * i) for i, name in enumerate(names))


def vocabulary() -> bytes:
    """As many strings as there may be, in a header of 112 MiB, and a key of no known type behind them."""
    return _header([_strings("k", MAX_TEXTS, 48), _key("b", 99, bytes(8))])


def everything() -> bytes:
    """All limits of a GGUF at once; the last tensor has the name of the first."""
    n = MAX_KEYS - 1
    keys = [_strings(f"k{i}", MAX_TEXTS // n, 3) for i in range(n)]
    keys.append(_key("n", 9, struct.pack("<IQ", 4, MAX_ELEMENTS - MAX_TEXTS) + bytes(4 * (MAX_ELEMENTS - MAX_TEXTS))))
    return _header(keys, _tensors(MAX_TENSORS, b"blk.0.x"), MAX_TENSORS) + bytes(32 * MAX_TENSORS)


def lists() -> bytes:
    """As many values as there may be, and no end."""
    n = MAX_VALUES // 2 - 2
    return b"[" + b"[]," * n + b"[]"


def one_text() -> bytes:
    """One long text, and no end."""
    return b'["' + b"x" * (MAX_BYTES - 10) + b'"'


def shard() -> bytes:
    """As many tensors as there may be, of which the last lies beyond the file."""
    n = MAX_SAFETENSORS
    entries: dict[str, Any] = {
        f"model.layers.0.mlp.experts.{i}.up_proj.weight": {
            "dtype": "BF16",
            "shape": [1, 1],
            "data_offsets": [2 * i, 2 * i + 2],
        }
        for i in range(n)
    }
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(2 * n - 2)


def imatrix() -> bytes:
    """As many tensors as there may be, with the last one's counts missing."""
    texts = _key("general.type", 8, _text(b"imatrix")), _strings("imatrix.datasets", 1, 3)
    keys = [*texts, *(_key(f"imatrix.chunk_{name}", 4, bytes(4)) for name in ("count", "size"))]
    names = [b"blk.%d.%s" % (i, part) for i in range(MAX_TENSORS // 2) for part in (b"in_sum2", b"counts")][:-1]
    place = b"".join(
        _text(name.replace(b".in_sum2", b".weight.in_sum2").replace(b".counts", b".weight.counts"))
        + struct.pack("<I2QIQ", 2, 1, 1, 0, 32 * i)
        for i, name in enumerate(names)
    )
    return _header(keys, place, len(names)) + bytes(32 * len(names))


CASES: Mapping[str, tuple[Callable[[], bytes], str, str]] = {
    "GGUF, strings": (vocabulary, "mopeq_edge.gguf_file", "read_header"),
    "GGUF, all at once": (everything, "mopeq_edge.gguf_file", "read_header"),
    "imatrix, tensors": (imatrix, "mopeq_edge.imatrix", "read_imatrix"),
    "safetensors, tensors": (shard, "mopeq_edge.source.safetensors_file", "SafetensorsFile"),
    "JSON, lists": (lists, "mopeq_edge.json_file", "load_json"),
    "JSON, one text": (one_text, "mopeq_edge.json_file", "load_json"),
}
"""What is written, and what reads it."""


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Bytes, seconds, MiB and what is said of one case."""
    make, module, reader = CASES[name]
    path = folder / "file"
    path.write_bytes(make())
    code = _READ.format(module=module, name=reader)
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    seconds, mib, said = done.stdout.strip().split(" ", 2)
    found = {"file_mib": path.stat().st_size / 2**20, "seconds": float(seconds), "memory_mib": float(mib)}
    return {"file": name, **{key: round(value, 2) for key, value in found.items()}, "says": said}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(as_json: bool) -> None:
    """Measure reading at the limits."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(name, Path(folder)) for name in CASES]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    print("| file | MiB | processor seconds | memory, MiB | it says |\n|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
