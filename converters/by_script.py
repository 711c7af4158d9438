"""A checkpoint that no converter here knows, through llama.cpp's own ``convert_hf_to_gguf.py`` into a BF16 GGUF.

The script runs in a process of its own (:mod:`converters.script_child`, which also keeps it from running code of the
checkpoint), offline, and is killed with everything below it on Ctrl-C.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from converters.model_card import check_model_card
from converters.pre_tokenizer import PLAIN_BYTE_LEVEL, why_not_plain
from converters.script_child import UNKNOWN_PRE_TOKENIZER, Job
from mopeq_edge.artifacts import digest
from mopeq_edge.atomic import atomic_path
from mopeq_edge.errors import ExtraMissingError, MopeqError, OutputError, SourceError
from mopeq_edge.progress import BYTES, Progress, Step
from mopeq_edge.runtime.locate import require_runtime
from mopeq_edge.runtime.process import describe_exit, last_words, run_lines
from mopeq_edge.source.checkpoint import Checkpoint
from mopeq_edge.source.digests import Digests
from mopeq_edge.source.gguf import GGUFSource
from mopeq_edge.source.model import moe_shape
from mopeq_edge.units import format_bytes
from mopeq_edge.workdir import WorkDirectory

STAGE, NAME = "converted", "converted.gguf"
SCRIPT = "convert_hf_to_gguf.py"
CHILD = Path(__file__).with_name("script_child.py")
NEEDED = ("torch", "transformers")

READ_BY_SCRIPT = (".jinja", ".json", ".md", ".model", ".tiktoken", ".txt", ".vocab")
"""Endings of the files beside the weights that the script may read: settings, tokenizers, the model card."""
NOT_READ = ("calibration.txt", "evaluation.txt")

BYTES_PER_ELEMENT: Mapping[str, int] = {"I32": 16, "U8": 1, "I8": 2, "BOOL": 1}
"""What an element of a matrix becomes, where that is not one BF16: eight 4-bit weights; packed bits that stay so."""

_ERROR = re.compile(r"^(?:ERROR:[\w.-]*:|(?:[\w.]+\.)?(\w*(?:Error|Exception)): )(.+)$")
_POLL_SECONDS = 0.5


def checkpoint_files(directory: Path) -> tuple[Path, ...]:
    """The weights and everything beside them that may shape the GGUF, sorted."""
    beside = {path for path in directory.iterdir() if path.suffix in READ_BY_SCRIPT and path.name not in NOT_READ}
    beside |= set((directory / "additional_chat_templates").glob("*.jinja"))
    return tuple(sorted({*(path for path in beside if path.is_file()), *Checkpoint(directory).files}))


def converted_gguf(
    directory: Path, architecture: str, work: WorkDirectory, digests: Digests, *, pre: str | None, progress: Progress
) -> Path:
    """The BF16 GGUF of ``directory`` in ``work``: made now, or by an earlier run from the same files.

    ``pre`` overrides the pre-tokenizer's name. Raises :class:`OutputError` if it does not fit on the disk,
    :class:`SourceError` with the script's last error if it fails, :class:`ExtraMissingError` without transformers.
    """
    runtime = require_runtime()
    files = digests.of_files(directory, checkpoint_files(directory))
    made_from = digest(["llama.cpp's script 1", files, pre, runtime.version])
    output = work.file(NAME)
    if work.has(STAGE, made_from, digests.of):
        progress.note(f"note: {directory}: read as {output}, which llama.cpp's {SCRIPT} made of it")
        return output
    require_packages(directory)
    needed, free = bytes_needed(directory), free_bytes(work.path)
    sizes = f"{format_bytes(needed)} of disk, {format_bytes(free)} are free in {work.path}"
    if needed > free:
        raise OutputError(
            f"{directory}: its BF16 GGUF (by llama.cpp's {SCRIPT}, no converter of ours knows {architecture}) needs "
            f"about {sizes}; free space or choose another place with --work-dir"
        )
    progress.note(
        f"note: {directory}: no converter of ours knows {architecture}; llama.cpp's own {SCRIPT} makes a BF16 GGUF "
        f"of it, once, which needs about {sizes}"
    )
    for warning in _warnings(directory):
        progress.note(f"note: {warning}")
    with atomic_path(output) as temporary:
        with progress.step("convert_hf_to_gguf", needed, BYTES) as step, _following(temporary, step):
            run_script(directory, temporary, pre=pre)
        _require_moe(directory, temporary)
    work.record(STAGE, made_from, [NAME], digests.of)
    return output


def header_gguf(directory: Path, output: Path, *, pre: str | None) -> None:
    """Write the header of ``directory``'s GGUF to ``output``, with a hole of the data's size behind it."""
    checkpoint_files(directory)
    run_script(directory, output, pre=pre, header_only=True)
    _require_moe(directory, output)


def run_script(directory: Path, output: Path, *, pre: str | None, header_only: bool = False) -> None:
    """Run the script to its end. Raises :class:`SourceError` with its last error if it fails."""
    plain = PLAIN_BYTE_LEVEL if why_not_plain(directory) is None else None
    run_job(Job(str(directory.absolute()), str(output.absolute()), pre, plain, header_only), directory)


def run_job(job: Job, directory: Path, otherwise: str = "give a BF16 GGUF of it instead, if there is one") -> None:
    """The same of any job. ``otherwise`` is what to do about an error that no option of ours helps against."""
    folder = require_runtime().convert
    check_model_card(directory)
    require_packages(directory)
    command: list[str | Path] = [sys.executable, CHILD, folder, json.dumps(asdict(job))]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    lines: list[str] = []
    code = run_lines(command, lines.append, cwd=folder, env={**os.environ, **offline})
    if code != 0:
        said = last_error(lines)
        advice = (
            "give the name of one that splits text like it with --pre NAME"
            if UNKNOWN_PRE_TOKENIZER in said
            else otherwise
        )
        raise SourceError(f"{directory}: llama.cpp's {SCRIPT} {describe_exit(code)}: {said}; {advice}")


def last_error(lines: Sequence[str]) -> str:
    """What the script said last that reads like an error, without the name of its logger; else its last words."""
    for line in reversed(lines):
        match = _ERROR.match(line.strip())
        if match:
            return (f"{match[1]}: {match[2]}" if match[1] else match[2])[:300]
    return last_words(lines)


def bytes_needed(directory: Path) -> int:
    """About how large the GGUF gets: two bytes for each weight, four for those of vectors, and the vocabulary."""
    checkpoint = Checkpoint(directory)
    total = sum(path.stat().st_size for path in directory.glob("tokenizer*") if path.is_file())
    for name, shape in checkpoint.shapes.items():
        size = BYTES_PER_ELEMENT.get(checkpoint.dtype(name), 2) if len(shape) > 1 else 4
        total += size * math.prod(shape)
    return total


def free_bytes(folder: Path) -> int:
    """Free space where ``folder`` is or will be."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


def require_packages(directory: Path) -> None:
    """Raise :class:`ExtraMissingError` without the packages that the script needs."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ExtraMissingError(
            f"{directory}: llama.cpp's {SCRIPT} needs {' and '.join(missing)}, not installed; "
            "run: pip install 'mopeq-edge[calibrate]'"
        )


def _require_moe(directory: Path, gguf: Path) -> None:
    """The file is whole and has experts: before it gets its name."""
    try:
        moe_shape(GGUFSource(gguf))
    except MopeqError as error:
        raise type(error)(str(error).replace(str(gguf), f"{directory}: of llama.cpp's {SCRIPT}")) from None


def _warnings(directory: Path) -> Iterator[str]:
    checkpoint = Checkpoint(directory)
    wider = sorted({checkpoint.dtype(n) for n, s in checkpoint.shapes.items() if len(s) > 1} & {"F16", "F32", "F64"})
    if wider:
        yield f"{directory}: its weights in {', '.join(wider)} are rounded to BF16 (routers and norms stay F32)"


@contextmanager
def _following(path: Path, step: Step) -> Iterator[None]:
    """Advance ``step`` by what ``path`` grows while the block runs."""
    done = threading.Event()

    def follow() -> None:
        seen = 0
        while not done.wait(_POLL_SECONDS):
            with suppress(OSError):  # not there yet
                size = path.stat().st_size
                step.advance(max(0, size - seen))
                seen = max(seen, size)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
