"""Time and memory of a vision side at its full size, with random weights: DeepSeek-VL2-Tiny's, in BF16, or MolmoE's.

``python -m tools.bench.vision`` writes the checkpoint's vision side (435.8 M weights) and its vision file in each
type, and then, in a process of its own for each, loads the file and looks at one picture of 3 x 2 tiles. The memory is
compared with what ``mopeq-edge memory`` predicts.
"""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from converters.molmoe import NEW_EMBEDDING
from converters.vision import TYPES, find_family, write_vision
from converters.vision.molmoe import TOKENS
from mopeq_edge.cli.console import available_threads, print_json
from mopeq_edge.memory.tower import tower_of_file
from mopeq_edge.source.checkpoint import Checkpoint
from mopeq_edge.vision.tower import Tower
from tools.vision_language_checkpoints import write_weights
from tools.vision_language_configs import MOLMOE, TINY, config_of
from tools.vision_sides import molmoe_vision_shapes, processor_file, vl2_vision_shapes

SIZE = (1152, 768)


def write_side(directory: Path, model: str) -> None:
    """The vision side alone, as a checkpoint."""
    config = config_of(model)
    directory.mkdir()
    shapes = vl2_vision_shapes(config) if model == TINY else molmoe_vision_shapes(config)
    if model == MOLMOE:
        n_vocab, n_new = config["embedding_size"], config["additional_vocab_size"]
        shapes[NEW_EMBEDDING] = (n_new, config["d_model"])
        added = [{"content": token, "id": n_vocab + i} for i, token in enumerate(TOKENS)]
        (directory / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (directory / "config.json").write_text(json.dumps(config))
    name, content = processor_file(config)
    (directory / name).write_text(json.dumps(content))
    write_weights(directory / "model.safetensors", shapes, "bfloat16", 0)


def measure_write(directory: str, out: str, kind: str, threads: int) -> None:
    """Write the vision file; print seconds, the process's most memory, bytes and error as JSON."""
    start = time.perf_counter()
    config = json.loads((Path(directory) / "config.json").read_text())
    family = find_family(config)
    assert family is not None
    options: dict[str, Any] = {"kind": kind, "made_from": "0" * 64, "threads": threads}
    written = write_vision(Checkpoint(Path(directory)), family, Path(directory), config, Path(out), **options)
    found = {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time(),
        "peak": _peak(),
        "bytes": written.file_bytes,
    }
    print(json.dumps({**found, "relative_error": written.description.relative_error}))


def measure_see(out: str, threads: int) -> None:
    """Load the file and see one picture; print seconds and memory as JSON."""
    noise = np.random.default_rng(0).integers(0, 256, (SIZE[1] // 8, SIZE[0] // 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(SIZE)
    before, start, used = _peak(), time.perf_counter(), time.process_time()
    tower = Tower(Path(out), threads)
    loaded = time.perf_counter() - start
    (seen,) = tower.embed([image])
    found = {
        "load": loaded,
        "seconds": time.perf_counter() - start - loaded,
        "cpu": time.process_time() - used,
        "before": before,
        "peak": _peak(),
        "predicted": tower_of_file(Path(out)).nbytes,
    }
    found |= {"tokens": len(seen), "finite": bool(np.isfinite(seen).all()), **_parts()}
    del tower
    gc.collect()
    print(json.dumps({**found, "left": sum(_parts().values())}))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _parts() -> dict[str, int]:
    """Bytes that are the process's own, and that are pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    named = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return {"anon": int(named["RssAnon"]) * 1024, "file": int(named["RssFile"]) * 1024}


def _in_child(call: str) -> dict[str, Any]:
    code = f"from tools.bench.vision import *; {call}"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@click.command()
@click.option("--type", "kinds", multiple=True, type=click.Choice(TYPES), default=TYPES, help="Types to measure.")
@click.option("--model", type=click.Choice([TINY, MOLMOE]), default=TINY, show_default=True, help="Whose side.")
@click.option("--threads", default=available_threads, help="Threads (default: every CPU).")
def main(kinds: tuple[str, ...], model: str, threads: int) -> None:
    """Write, load and run each type; print everything as JSON."""
    result: dict[str, Any] = {"model": model, "picture": SIZE, "threads": threads}
    with tempfile.TemporaryDirectory() as folder:
        write_side(Path(folder) / "model", model)
        for kind in kinds:
            out = Path(folder) / f"{kind}.vision.onnx"
            write = _in_child(f"measure_write({folder + '/model'!r}, {str(out)!r}, {kind!r}, {threads})")
            result[kind] = {"write": write, "see": _in_child(f"measure_see({str(out)!r}, {threads})")}
            for path in Path(folder).glob(f"{kind}.*"):
                path.unlink()
    print_json(result)


if __name__ == "__main__":
    main()
