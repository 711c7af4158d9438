"""What every stage gets: an opened source and its work directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from converters import CONVERTERS
from converters.by_script import checkpoint_files, converted_gguf, header_gguf
from mopeq_edge.artifacts import digest
from mopeq_edge.engine.interface import Engine
from mopeq_edge.progress import Progress
from mopeq_edge.source.digests import Digests
from mopeq_edge.source.model import Source
from mopeq_edge.source.open import open_remote, open_source
from mopeq_edge.source.remote import ModelURL
from mopeq_edge.workdir import WorkDirectory

BeforeScript = Callable[[tuple[Path, ...]], None]
"""Raises for what could not be done with the GGUF that llama.cpp's script would make; gets the checkpoint's files."""


@dataclass(frozen=True)
class Context:
    """One source with its work directory: what every stage needs."""

    source: Source
    source_sha256: str
    work: WorkDirectory
    threads: int
    progress: Progress
    checkpoint: tuple[Path, ...] = ()
    """Files of the directory that the source, a GGUF in the work directory, was made of."""
    engine: Engine | None = None
    """Who runs the tasks of sensitivity and emit; None: this process."""
    directory: Path | None = None
    """The Hugging Face directory that the source is, or was made of; None for a GGUF of the user's."""

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Files that nothing may be written over."""
        return (*self.source.files, *self.checkpoint)


def open_context(
    model: Path | ModelURL,
    work: Path,
    *,
    pre: str | None,
    keep_mtp: bool = False,
    threads: int,
    progress: Progress,
    before_script: BeforeScript | None = None,
    engine: Engine | None = None,
) -> Context:
    """Open ``model`` and say what its user should know.

    ``keep_mtp`` keeps blocks of a checkpoint that predict further tokens. A directory that no converter of ours knows
    becomes a GGUF in ``work`` by llama.cpp's own script (one at a URL does not); ``before_script`` is asked first,
    because that takes minutes.
    """
    directory = WorkDirectory(work)
    digests = Digests(directory.file("hashes.json"))
    checkpoint: tuple[Path, ...] = ()

    def to_gguf(path: Path, architecture: str) -> Path:
        nonlocal checkpoint
        checkpoint = checkpoint_files(path)
        if before_script is not None:
            before_script(checkpoint)
        return converted_gguf(path, architecture, directory, digests, pre=pre, progress=progress)

    source: Source
    if isinstance(model, ModelURL):
        folder = directory.file("remote") / model.name
        source, content = open_remote(model, folder, CONVERTERS, pre, keep_mtp=keep_mtp)
    else:
        source = open_source(model, CONVERTERS, pre, to_gguf, keep_mtp=keep_mtp)
        content = ""
    for warning in source.warnings:
        progress.note(f"note: {warning}")
    content = content or digests.of_source(source)
    if keep_mtp:
        # another model of the same files: what was measured or written without its further blocks must not serve it
        content = digest(["with MTP", content])
    made_of = model if isinstance(model, Path) and model.is_dir() else None
    return Context(source, content, directory, threads, progress, checkpoint, engine, made_of)


def open_header(
    model: Path, *, pre: str | None, keep_mtp: bool = False, before_script: Callable[[Path, str], None] | None = None
) -> Source:
    """Open ``model`` to see its names, shapes and key-values; of a directory without a converter there are no weights.

    ``before_script`` gets the directory and its architecture when llama.cpp's script has to describe it.
    """
    with TemporaryDirectory(prefix="mopeq-edge-") as folder:

        def to_gguf(directory: Path, architecture: str) -> Path:
            if before_script is not None:
                before_script(directory, architecture)
            header_gguf(directory, Path(folder) / "header.gguf", pre=pre)
            return Path(folder) / "header.gguf"

        return open_source(model, CONVERTERS, pre, to_gguf, keep_mtp=keep_mtp)
