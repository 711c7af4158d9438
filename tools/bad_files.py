"""GGUF files as a stranger could make them, and what readers make of those: ``python -m tools.bad_files``.

Each function below is one kind of file, at most 80 kB, the same every time. Each file goes
through ``mopeq-edge validate``, through ``gguf.GGUFReader`` of the installed package and through llama-completion of
the installed llama.cpp, each in a process of its own with a limit of time and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from mopeq_edge.expert_groups.layout import VERSION_KEY
from mopeq_edge.gguf_file import KV, ValueType
from mopeq_edge.gguf_layout import encode_kv, string, uint32
from mopeq_edge.runtime.locate import find_runtime
from tools.fuzz.seeds import gguf_bytes, model_kvs, model_specs

ROOT = Path(__file__).parent.parent
SECONDS, MEMORY = 10, 4 << 30

FILES: dict[str, Callable[[], bytes]] = {}
"""By the name of the kind, filled in the order of this file."""

BAD_MAP = struct.pack("<8i", 0, -1, -1, 0, -1, 1, -1, 9)


def kind(build: Callable[[], bytes]) -> Callable[[], bytes]:
    FILES[build.__name__] = build
    return build


def header(*kvs: bytes, tensors: Sequence[bytes] = (), n_kvs: int | None = None, n_tensors: int | None = None) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(kvs) if n_kvs is None else n_kvs)
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(kvs) + b"".join(tensors)


def text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def info(name: bytes, shape: Sequence[int], type_id: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_id, offset)


def tensor_file(*tensors: bytes) -> bytes:
    """A header with the architecture and 4 KiB behind it, so that nothing is refused just for being short."""
    raw = header(encode_kv("general.architecture", string("llama")), tensors=tensors)
    return raw + bytes(-len(raw) % 32 + 4096)


def model(**changes: KV | None) -> bytes:
    """A model of one layer, whole but for ``changes`` of its key-values (``__`` is a dot)."""
    kvs = {**model_kvs(), **{key.replace("__", "."): kv for key, kv in changes.items()}}
    return gguf_bytes({key: kv for key, kv in kvs.items() if kv is not None}, model_specs("F32"))


@kind
def nothing_wrong() -> bytes:
    return model()


@kind
def empty() -> bytes:
    return b""


@kind
def magic_alone() -> bytes:
    return b"GGUF"


@kind
def other_magic() -> bytes:
    return b"GGML" + bytes(60)


@kind
def version_1() -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(40)


@kind
def big_endian() -> bytes:
    return b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(40)


@kind
def tensors_2_63() -> bytes:
    return header(n_tensors=2**63) + bytes(64)


@kind
def tensors_2_40() -> bytes:
    return header(n_tensors=2**40) + bytes(64)


@kind
def keys_2_62() -> bytes:
    return header(n_kvs=2**62) + bytes(64)


@kind
def key_of_2_62_bytes() -> bytes:
    return header(struct.pack("<Q", 2**62) + b"k") + bytes(64)


@kind
def key_of_2_64_bytes_less_8() -> bytes:
    """A reader that adds offsets in 64 bits comes back to where it was."""
    return header(struct.pack("<Q", 2**64 - 8) + b"k") + bytes(64)


@kind
def string_of_2_63_bytes() -> bytes:
    return header(text(b"k") + struct.pack("<IQ", 8, 2**63)) + bytes(64)


@kind
def array_of_2_40_bytes() -> bytes:
    return header(text(b"k") + struct.pack("<IIQ", 9, 0, 2**40))


@kind
def array_of_2_61_numbers() -> bytes:
    return header(text(b"k") + struct.pack("<IIQ", 9, 6, 2**61))


@kind
def array_of_2_40_strings() -> bytes:
    return header(text(b"k") + struct.pack("<IIQ", 9, 8, 2**40)) + bytes(64)


@kind
def arrays_in_arrays() -> bytes:
    return header(text(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000 + struct.pack("<IQB", 0, 1, 7))


@kind
def unknown_value_type() -> bytes:
    return header(text(b"k") + struct.pack("<IQ", 13, 0)) + bytes(64)


@kind
def key_twice() -> bytes:
    return header(*[encode_kv("k", uint32(1))] * 2) + bytes(64)


@kind
def key_no_utf_8() -> bytes:
    return header(text(b"\xff\xfe") + struct.pack("<II", 4, 1)) + bytes(64)


@kind
def key_with_escapes() -> bytes:
    return header(text(b"\x1b[2Jk\n") + struct.pack("<II", 4, 1)) + bytes(64)


@kind
def alignment_0() -> bytes:
    return model(general__alignment=uint32(1)).replace(
        encode_kv("general.alignment", uint32(1)), encode_kv("general.alignment", uint32(0))
    )


@kind
def alignment_48() -> bytes:
    return model(general__alignment=uint32(48))


@kind
def alignment_2_31() -> bytes:
    raw = encode_kv("general.alignment", uint32(2**31))
    return model().replace(encode_kv("general.alignment", uint32(32)), raw)


@kind
def alignment_as_text() -> bytes:
    return header(encode_kv("general.alignment", string("32"))) + bytes(64)


@kind
def no_axes() -> bytes:
    return tensor_file(info(b"a", ()))


@kind
def five_axes() -> bytes:
    return tensor_file(info(b"a", (1,) * 5))


@kind
def axes_2_32() -> bytes:
    return header(tensors=[text(b"a") + struct.pack("<I", 2**32 - 1)]) + bytes(4096)


@kind
def axis_of_0() -> bytes:
    return tensor_file(info(b"a", (0, 4)))


@kind
def axis_below_0() -> bytes:
    return tensor_file(info(b"a", (2**64 - 4, 4)))


@kind
def product_wraps_to_0() -> bytes:
    return tensor_file(info(b"a", (2**32, 2**32)))


@kind
def product_wraps_to_64() -> bytes:
    return tensor_file(info(b"a", (2**59 + 1, 2**4 * 4, 1)))


@kind
def tensor_beyond_the_file() -> bytes:
    return tensor_file(info(b"a", (2**20,)))


@kind
def offset_beyond_the_file() -> bytes:
    return tensor_file(info(b"a", (4,), 0, 2**40))


@kind
def offset_wraps() -> bytes:
    return tensor_file(info(b"a", (4,), 0, 2**64 - 64))


@kind
def offset_not_aligned() -> bytes:
    return tensor_file(info(b"a", (4,)), info(b"b", (4,), 0, 20))


@kind
def tensors_overlap() -> bytes:
    return tensor_file(info(b"a", (64,)), info(b"b", (64,), 0, 32))


@kind
def tensors_out_of_order() -> bytes:
    return tensor_file(info(b"a", (8,), 0, 32), info(b"b", (8,), 0, 0))


@kind
def tensor_twice() -> bytes:
    return tensor_file(info(b"a", (8,)), info(b"a", (8,), 0, 32))


@kind
def unknown_tensor_type() -> bytes:
    return tensor_file(info(b"a", (32,), 4000))


@kind
def removed_tensor_type() -> bytes:
    return tensor_file(info(b"a", (32,), 4))


@kind
def part_of_a_block() -> bytes:
    return tensor_file(info(b"a", (33,), 8))


@kind
def name_of_64_bytes() -> bytes:
    return tensor_file(info(b"x" * 64, (8,)))


@kind
def name_no_utf_8() -> bytes:
    return tensor_file(info(b"\xff\xfe", (8,)))


@kind
def name_with_escapes() -> bytes:
    return tensor_file(info(b"\x1b[2J\n", (8,)))


@kind
def data_cut_off() -> bytes:
    return model()[:-4096]


@kind
def header_cut_off() -> bytes:
    return model()[:700]


@kind
def blocks_2_32() -> bytes:
    return model(olmoe__block_count=uint32(2**32 - 1))


@kind
def blocks_as_text() -> bytes:
    return model(olmoe__block_count=string("1"))


@kind
def fewer_blocks_than_tensors() -> bytes:
    return model(olmoe__block_count=uint32(0))


@kind
def experts_2_31() -> bytes:
    return model(olmoe__expert_count=uint32(2**31))


@kind
def other_number_of_experts() -> bytes:
    return model(olmoe__expert_count=uint32(8))


@kind
def more_experts_used_than_there() -> bytes:
    return model(olmoe__expert_used_count=uint32(5))


@kind
def experts_as_array() -> bytes:
    return model(olmoe__expert_count=KV(ValueType.ARRAY, [4], ValueType.UINT32))


@kind
def architecture_as_number() -> bytes:
    return model(general__architecture=uint32(1))


@kind
def expert_map_out_of_range() -> bytes:
    kvs = {**model_kvs(), VERSION_KEY: uint32(1)}
    return gguf_bytes(kvs, model_specs("Q4_0", grouped=True), {"blk.0.ffn_up_exps.map": BAD_MAP})


@dataclass(frozen=True)
class Outcome:
    """What became of one file in one reader: ``refuses``, ``accepts``, ``hangs`` or ``crashes``, and how.

    ``seconds`` and ``mib`` (largest resident set) are of the whole process, its start included.
    """

    verdict: str
    how: str
    seconds: float
    mib: float


READ_WITH_GGUF = """
import sys, gguf
reader = gguf.GGUFReader(sys.argv[1])
for field in reader.fields.values():
    field.contents()
for tensor in reader.tensors:
    tensor.data.sum()
"""
READ_WITH_OURS = "from mopeq_edge.cli import main; main()"
OURS, PACKAGE, LLAMA = "mopeq-edge", "gguf package", "llama-completion"


def commands() -> dict[str, Callable[[Path], list[str]]]:
    """How each reader is started; llama.cpp's only where it is installed."""
    found: dict[str, Callable[[Path], list[str]]] = {
        OURS: lambda path: [sys.executable, "-c", READ_WITH_OURS, "validate", str(path)],
        PACKAGE: lambda path: [sys.executable, "-c", READ_WITH_GGUF, str(path)],
    }
    runtime = find_runtime()
    if runtime is not None:
        program = str(runtime.bin / LLAMA)
        options = ["-p", "a", "-n", "1", "-c", "32", "-t", "1", "-no-cnv", "--no-warmup"]
        found[LLAMA] = lambda path: [program, "-m", str(path), *options]
    return found


def read(command: Sequence[str]) -> Outcome:
    """Run one reader with the limits of this module."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    with TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with said.open("wb") as file:
            start = time.monotonic()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, preexec_fn=limit, cwd=folder, env=env
            )
            status, usage = None, None
            while status is None and time.monotonic() - start < SECONDS:
                pid, code, found = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    status, usage = os.waitstatus_to_exitcode(code), found
                else:
                    time.sleep(0.01)
            seconds = time.monotonic() - start
            if usage is None:
                process.kill()
                _, _, usage = os.wait4(process.pid, 0)
            process.returncode = 0 if status is None else status
        words = said.read_bytes().decode(errors="replace")
    return Outcome(*_verdict(status, words), round(seconds, 2), round(usage.ru_maxrss / 1024))


def _verdict(status: int | None, words: str) -> tuple[str, str]:
    lines = [line for line in words.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if status is None:
        return "hangs", f"stopped after {SECONDS} s"
    if status < 0:
        return "crashes", signal.Signals(-status).name
    if status == 0:
        return "accepts", ""
    if "Traceback (most recent call last)" in words:
        name = last.partition(":")[0].strip()
        # the package says so with a ValueError; anything else is what a later line stumbled over
        return ("refuses" if name == "ValueError" else "stumbles", name)
    return "refuses", ""


def measured(names: Sequence[str]) -> dict[str, dict[str, Outcome]]:
    """Outcomes by reader, by kind of file."""
    found: dict[str, dict[str, Outcome]] = {}
    with TemporaryDirectory() as folder:
        for name in names:
            path = Path(folder) / f"{name}.gguf"
            path.write_bytes(FILES[name]())
            found[name] = {reader: read(command(path)) for reader, command in commands().items()}
            print(f"{name}: {' | '.join(outcome.verdict for outcome in found[name].values())}", file=sys.stderr)
    return found


def table(found: Mapping[str, Mapping[str, Outcome]]) -> str:
    """Markdown: a row for each kind, and how often each verdict was given."""
    readers = list(next(iter(found.values())))
    rows = [f"| file | {' | '.join(readers)} |", "|---|" + "---|" * len(readers)]
    for name, outcomes in found.items():
        rows.append(f"| {name.replace('_', ' ')} | {' | '.join(map(_cell, outcomes.values()))} |")
    bad = [outcomes for name, outcomes in found.items() if name != nothing_wrong.__name__]
    total = []
    for reader in readers:
        counts = Counter(outcomes[reader].verdict for outcomes in bad)
        total.append(", ".join(f"{verdict} {n}" for verdict, n in counts.most_common()))
    return "\n".join([*rows, f"| **{len(bad)} bad files** | {' | '.join(total)} |"])


def _cell(outcome: Outcome) -> str:
    how = f" ({outcome.how})" if outcome.how else ""
    return f"{outcome.verdict}{how}, {outcome.seconds:.1f} s, {outcome.mib:.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bad_files", description=__doc__)
    parser.add_argument("--only", action="append", choices=sorted(FILES), help="Kinds of files; default: all.")
    parser.add_argument("--json", action="store_true", dest="as_json")
    parser.add_argument("--write", type=Path, help="Write the files into this folder and read nothing.")
    given = parser.parse_args()
    names = given.only or list(FILES)
    if given.write is not None:
        given.write.mkdir(parents=True, exist_ok=True)
        for name in names:
            (given.write / f"{name}.gguf").write_bytes(FILES[name]())
        return
    found = measured(names)
    if given.as_json:
        print(json.dumps({name: {r: asdict(o) for r, o in row.items()} for name, row in found.items()}, indent=1))
        return
    runtime = find_runtime()
    llama = f", llama.cpp of llama-cpp-python {runtime.version}" if runtime is not None else ""
    print(f"gguf {version('gguf')}{llama}; limits: {SECONDS} s, {MEMORY >> 30} GiB of address space\n")
    print(table(found))


if __name__ == "__main__":
    main()
