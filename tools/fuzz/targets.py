"""What is fuzzed: functions of one file's bytes that may end in one way only, by themselves or with a MopeqError."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from typing import Any

from mopeq_edge.errors import MOST_CHARACTERS, MopeqError
from tools.fuzz import seeds

Target = Callable[[bytes], None]


class UnfitError(AssertionError):
    """An error that is no line for a person, or a file that is not what was read."""


class Folder:
    """Where the bytes are written; a folder in memory where there is one."""

    def __init__(self, name: str) -> None:
        base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
        self.path = Path(mkdtemp(prefix=f"fuzz-{os.getpid()}-{name}-", dir=base))

    def write(self, name: str, data: bytes) -> Path:
        path = self.path / name
        path.write_bytes(data)
        return path


@contextlib.contextmanager
def one_line() -> Any:
    """Lets an expected error pass if it is one line of limited length, of printable characters."""
    try:
        yield
    except MopeqError as error:
        text = str(error)
        if not text or len(text) > 6 * MOST_CHARACTERS or not text.isprintable():
            raise UnfitError(repr(text[:400])) from error


def gguf_target() -> Target:
    """Everything that looks at a model without its weights, and one row of each tensor."""
    from mopeq_edge.memory.model import model_of_gguf
    from mopeq_edge.memory.predict import predict
    from mopeq_edge.memory.repack import Cpu
    from mopeq_edge.memory.settings import Settings
    from mopeq_edge.pictures.type_map import map_of_gguf
    from mopeq_edge.source.gguf import GGUFSource
    from mopeq_edge.source.model import moe_shape
    from mopeq_edge.split import read_parts
    from mopeq_edge.summary import summarise

    folder = Folder("gguf")

    def source(path: Path) -> None:
        found = GGUFSource(path)
        moe_shape(found)
        for tensor in found.tensors:
            if not tensor.type.is_quantized:
                found.read_stored(tensor, 0, slice(0, 1))

    def memory(path: Path) -> None:
        predict(model_of_gguf(read_parts(path)), Settings(), Cpu("x86", frozenset()))

    def run(data: bytes) -> None:
        path = folder.write("m.gguf", data)
        for use in (lambda p: summarise(p).sentence(), map_of_gguf, source, memory):
            with one_line():
                use(path)

    return run


def imatrix_target() -> Target:
    """Read, and what was read comes back when it is written."""
    from mopeq_edge.imatrix import read_imatrix, write_imatrix

    folder = Folder("imatrix")

    def run(data: bytes) -> None:
        path, again = folder.write("i.gguf", data), folder.path / "again.gguf"
        with one_line():
            found = read_imatrix(path)
            write_imatrix(found, again)
            if read_imatrix(again).entries.keys() != found.entries.keys():
                raise UnfitError("entries changed")

    return run


def plan_target() -> Target:
    """Read, described, priced and drawn."""
    from mopeq_edge.memory.model import model_of_plan
    from mopeq_edge.pictures.type_map import map_of_plan
    from mopeq_edge.plan.artifact import read_plan, write_plan

    folder = Folder("plan")
    kvs = seeds.model_kvs()

    def run(data: bytes) -> None:
        path = folder.write("plan.json", data)
        with one_line():
            found = read_plan(path)
            write_plan(found, folder.path / "again.json")
            if read_plan(folder.path / "again.json") != found:
                raise UnfitError("the plan changed")
            found.bytes_by_type(), found.bpw, found.type_of()
            with one_line():
                map_of_plan(found, "x")
            model_of_plan(found, kvs, "x")

    return run


def index_target() -> Target:
    """The index of two shards that are there."""
    from mopeq_edge.source.checkpoint import INDEX, Checkpoint

    folder = Folder("index")
    for number, name in enumerate("ab", 1):
        folder.write(f"{number}.safetensors", seeds.safetensors_bytes({name: (2, 2)}))

    def run(data: bytes) -> None:
        folder.write(INDEX, data)
        with one_line():
            found = Checkpoint(folder.path)
            if not set(found.names) <= {"a", "b"}:
                raise UnfitError(str(found.names))

    return run


def _checkpoint(folder: Folder) -> None:
    folder.write("model.safetensors", seeds.safetensors_bytes(seeds.checkpoint_shapes()))
    folder.write("config.json", json.dumps(dict(seeds.CONFIG)).encode())
    folder.write("tokenizer.json", json.dumps(seeds.tokenizer_json()).encode())
    folder.write("tokenizer_config.json", json.dumps(dict(seeds.TOKENIZER_CONFIG)).encode())


def config_target() -> Target:
    """config.json of a checkpoint that is whole; its tokenizer is loaded once, because that takes a while."""
    from converters import CONVERTERS, vocabulary
    from mopeq_edge.source.open import open_source

    folder = Folder("config")
    _checkpoint(folder)
    tokenizer = vocabulary.load_tokenizer(folder.path)
    vocabulary.load_tokenizer = lambda _: tokenizer

    def run(data: bytes) -> None:
        folder.write("config.json", data)
        with one_line():
            found = open_source(folder.path, CONVERTERS, "gpt-2")
            found.read(found.tensors[0], 0, slice(0, 1))

    return run


def tokenizer_target() -> Target:
    """tokenizer.json and tokenizer_config.json, given as one object of both, through transformers and gguf."""
    import logging

    import gguf

    from converters.pre_tokenizer import why_not_plain
    from converters.vocabulary import add_bpe_vocabulary

    logging.disable(logging.CRITICAL)
    folder = Folder("tokenizer")
    _checkpoint(folder)

    def run(data: bytes) -> None:
        try:
            both = json.loads(data)
        except (ValueError, RecursionError):
            both = None
        for name in ("tokenizer", "tokenizer_config"):
            part = both.get(name) if isinstance(both, dict) else None
            raw = json.dumps(part).encode() if part is not None else data
            folder.write(f"{name}.json", raw)
        with one_line():
            why_not_plain(folder.path)
        with one_line():
            add_bpe_vocabulary(gguf.GGUFWriter(path=None, arch="x"), folder.path, seeds.VOCAB, "gpt-2")

    return run


def _shard_target(name: str, open_shard: Callable[[Path], Any]) -> Target:
    folder = Folder(name)

    def run(data: bytes) -> None:
        path = folder.write("shard", data)
        with one_line():
            shard = open_shard(path)
            for entry in shard.entries.values():
                if entry.offset < 0 or entry.offset + entry.nbytes > len(data):
                    raise UnfitError(str(entry))
                with one_line():
                    shard.read(entry.name, 0, min(1, entry.n_rows))

    return run


def safetensors_target() -> Target:
    """The header, and a row of each tensor."""
    from mopeq_edge.source.safetensors_file import SafetensorsFile

    return _shard_target("safetensors", SafetensorsFile)


def torch_target() -> Target:
    """The archive, its pickle in torch's loader of weights alone, and a row of each tensor."""
    from mopeq_edge.source.torch_file import open_torch_file

    return _shard_target("torch", open_torch_file)


def artifacts_target() -> Target:
    """Sensitivity, routing and traces."""
    from mopeq_edge.calibrate.statistics import read_routing
    from mopeq_edge.calibrate.traces import read_traces
    from mopeq_edge.sensitivity.table import read_table

    folder = Folder("artifacts")

    def run(data: bytes) -> None:
        path = folder.write("artifact", data)
        for read in (read_table, read_routing, read_traces):
            with one_line():
                read(path)

    return run


def vision_target() -> Target:
    """A description, or a whole graph beside weights that are there: as ``run --image`` and ``verify`` read them."""
    import numpy as np
    from PIL import Image

    from mopeq_edge.progress import SilentProgress
    from mopeq_edge.verify import verify
    from mopeq_edge.vision.crops import crop
    from mopeq_edge.vision.description import Tiles, read_description, weights_file
    from mopeq_edge.vision.graph_file import read_graph
    from mopeq_edge.vision.tiles import cut

    folder = Folder("vision")
    path = seeds.write_vision_files(folder.path / "out.vision.onnx")
    kept = weights_file(path).read_bytes()
    image = Image.new("RGB", (40, 30))

    def described(text: str) -> None:
        found = read_description(text, "x")
        if read_description(found.text(), "x") != found:
            raise UnfitError("the description changed")
        # tiles of a picture, as long as a call may take with them
        if found.layout.side <= 64:
            use = cut(image, found.layout, 1) if isinstance(found.layout, Tiles) else crop(image, found.layout)
            if not np.isfinite(use.pixels).all():
                raise UnfitError("pixels that are no numbers")

    def run(data: bytes) -> None:
        if data.startswith(b"{"):
            with one_line():
                described(data.decode("utf-8", "surrogateescape"))
            return
        folder.write(path.name, data)
        weights_file(path).write_bytes(kept)
        with one_line():
            verify(path, SilentProgress())
        with one_line():
            for tensor in read_graph(path).stored:
                if tensor.offset + tensor.nbytes > len(kept):
                    raise UnfitError(str(tensor))

    return run


TARGETS: dict[str, Callable[[], Target]] = {
    **{"gguf": gguf_target, "imatrix": imatrix_target, "plan": plan_target, "index": index_target},
    **{"config": config_target, "tokenizer": tokenizer_target, "safetensors": safetensors_target},
    **{"torch": torch_target, "artifacts": artifacts_target, "vision": vision_target},
}
"""By name: a function that prepares and gives the target."""


def clean_up() -> None:
    """Remove the folders of runs that have ended: libFuzzer ends the process without a last word."""
    for base in (Path("/dev/shm"), Path(gettempdir())):
        for folder in base.glob("fuzz-*-*") if base.is_dir() else ():
            number = folder.name.split("-")[1]
            if number.isdecimal() and not Path(f"/proc/{number}").exists() and folder.stat().st_uid == os.getuid():
                shutil.rmtree(folder, ignore_errors=True)
