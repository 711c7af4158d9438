"""What every stage gets: an opened source and its work directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from mopeq_edge.artifacts import digest
from mopeq_edge.engine.interface import Engine
from mopeq_edge.progress import Progress
from mopeq_edge.source.described import read_description, stamp, stamp_of_files, write_description
from mopeq_edge.source.digests import Digests
from mopeq_edge.source.model import Source
from mopeq_edge.source.remote import ModelURL
from mopeq_edge.workdir import WorkDirectory

HASHES, DESCRIPTION = "hashes.json", "description.gguf"
CODE = tuple(Path(__file__).parents[1] / folder for folder in ("converters", "mopeq_edge/source"))
"""Folders of the code that reads names, shapes and key-values."""

BeforeScript = Callable[[tuple[Path, ...]], None]
"""Raises for what could not be done with the GGUF that llama.cpp's script would make; gets the checkpoint's files."""


@dataclass(frozen=True)
class Context:
    """One source with its work directory: what every stage needs."""

    source: Source
    work: WorkDirectory
    threads: int
    progress: Progress
    checkpoint: tuple[Path, ...] = ()
    """Files of the directory that the source, a GGUF in the work directory, was made of."""
    keep_mtp: bool = False
    """Whether blocks of the checkpoint that predict further tokens are kept."""

    engine: Engine | None = None
    """Who runs the tasks of sensitivity and emit; None: this process."""
    content: str = ""
    """Digest of the source's files, where it is known from elsewhere: of a model at a URL."""
    directory: Path | None = None
    """The Hugging Face directory that the source is, or was made of; None for a GGUF of the user's."""

    @cached_property
    def source_sha256(self) -> str:
        """Names the source by its content. Reads all of it the first time, so only stages that read weights ask."""
        digests = Digests(self.work.file(HASHES))
        content = self.content or digests.of_source(self.source, threads=self.threads, progress=self.progress)
        # another model of the same files: what was measured or written without its further blocks must not serve it
        return digest(["with MTP", content]) if self.keep_mtp else content

    @cached_property
    def source_stamp(self) -> str:
        """Names the source by names, sizes, times and inodes of its files, for what reads few of its weights."""
        content = self.content or stamp_of_files(self.source.files)
        return digest(["with MTP", content]) if self.keep_mtp else content

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
    from converters import CONVERTERS
    from converters.by_script import checkpoint_files, converted_gguf
    from mopeq_edge.source.open import open_remote, open_source

    directory = WorkDirectory(work)
    digests = Digests(directory.file(HASHES))
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
    made_of = _directory(model)
    return Context(source, directory, threads, progress, checkpoint, keep_mtp, engine, content, made_of)


def open_description(
    model: Path | ModelURL, work: Path, *, pre: str | None, keep_mtp: bool = False, threads: int, progress: Progress
) -> Context:
    """:func:`open_context` for what reads no weights; remembers in ``work`` what the model is.

    A directory that is converted by llama.cpp's own script, a model at a URL, and one with a vision side, whose size
    follows from its tensors, are opened whole.
    """
    if isinstance(model, ModelURL):
        return open_context(model, work, pre=pre, keep_mtp=keep_mtp, threads=threads, progress=progress)
    path = WorkDirectory(work).file(DESCRIPTION)
    made_from = stamp(model, (model, model.absolute(), pre, keep_mtp), CODE) if model.exists() else ""
    known = read_description(path, made_from) if made_from else None
    if known is not None:
        for warning in known.warnings:
            progress.note(f"note: {warning}")
        return Context(known, WorkDirectory(work), threads, progress, keep_mtp=keep_mtp, directory=_directory(model))
    context = open_context(model, work, pre=pre, keep_mtp=keep_mtp, threads=threads, progress=progress)
    if not context.checkpoint and not _sees(context.source):
        write_description(context.source, path, made_from)
    return context


def _directory(model: Path | ModelURL) -> Path | None:
    return model if isinstance(model, Path) and model.is_dir() else None


def _sees(source: Source) -> bool:
    from converters.vision import find_family
    from mopeq_edge.source.huggingface import HuggingFaceSource

    return isinstance(source, HuggingFaceSource) and find_family(source.config) is not None


def open_header(
    model: Path, *, pre: str | None, keep_mtp: bool = False, before_script: Callable[[Path, str], None] | None = None
) -> Source:
    """Open ``model`` to see its names, shapes and key-values; of a directory without a converter there are no weights.

    ``before_script`` gets the directory and its architecture when llama.cpp's script has to describe it.
    """
    from converters import CONVERTERS
    from converters.by_script import header_gguf
    from mopeq_edge.source.open import open_source

    with TemporaryDirectory(prefix="mopeq-edge-") as folder:

        def to_gguf(directory: Path, architecture: str) -> Path:
            if before_script is not None:
                before_script(directory, architecture)
            header_gguf(directory, Path(folder) / "header.gguf", pre=pre)
            return Path(folder) / "header.gguf"

        return open_source(model, CONVERTERS, pre, to_gguf, keep_mtp=keep_mtp)
