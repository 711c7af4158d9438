"""Open a model, whatever it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mopeq_edge.artifacts import digest
from mopeq_edge.errors import SourceError
from mopeq_edge.source.checkpoint import INDEX
from mopeq_edge.source.converter import Converters
from mopeq_edge.source.digests import Digests
from mopeq_edge.source.gguf import GGUFSource
from mopeq_edge.source.huggingface import BESIDE_WEIGHTS, HuggingFaceSource, open_huggingface, unknown_architecture
from mopeq_edge.source.model import Source, moe_shape
from mopeq_edge.source.remote import ModelURL, RemoteDirectory

ToGGUF = Callable[[Path, str], Path]
"""Makes the GGUF of a checkpoint directory with an architecture that no converter knows."""


def open_remote(
    model: ModelURL, folder: Path, converters: Converters, pre: str | None = None, *, keep_mtp: bool = False
) -> tuple[HuggingFaceSource, str]:
    """Open the checkpoint directory at a URL, and say what names its content; ``folder`` gets its small files.

    The hash is that of the small files, and of size and version of the others as their storage has them: reading
    terabytes through a network to hash them would take longer than the work.
    """
    remote = RemoteDirectory(model.url)
    remote.copy_to(folder, (*BESIDE_WEIGHTS, INDEX))
    source = open_huggingface(folder, converters, pre, keep_mtp=keep_mtp, remote=remote)
    moe_shape(source)
    weights = [(file.name, file.size, file.version) for file in source.checkpoint.remote_files]
    return source, digest(["remote 1", Digests().of_source(source), weights])


def open_source(
    path: Path,
    converters: Converters,
    pre: str | None = None,
    to_gguf: ToGGUF | None = None,
    *,
    keep_mtp: bool = False,
) -> Source:
    """Open a Hugging Face directory or a GGUF file.

    ``converters`` are keyed by the name that ``config.json`` has for the architecture; ``pre`` overrides the name of a
    checkpoint's pre-tokenizer, ``keep_mtp`` keeps its blocks that predict further tokens. A directory that none of them
    knows is opened as the GGUF that ``to_gguf`` makes of it.
    Raises :class:`SourceError` or :class:`FormatError` for anything that is no Mixture-of-Experts model or cannot be
    read.
    """
    source: Source
    if path.is_dir():
        unknown = unknown_architecture(path, converters) if to_gguf is not None else None
        if unknown is not None and to_gguf is not None:
            if keep_mtp:
                raise SourceError(
                    f"{path}: llama.cpp's own converter decides what it keeps of a {unknown}; leave out --keep-mtp"
                )
            source = GGUFSource(to_gguf(path, unknown))
        else:
            source = open_huggingface(path, converters, pre, keep_mtp=keep_mtp)
    elif not path.exists():
        raise SourceError(f"{path}: does not exist; give the directory of a Hugging Face checkpoint or a GGUF file")
    elif path.suffix == ".safetensors":
        raise SourceError(f"{path}: holds weights only; give the directory that has its config.json too")
    elif pre is not None:
        raise SourceError(f"{path}: a GGUF file names its own pre-tokenizer; leave out the name '{pre}'")
    elif keep_mtp:
        raise SourceError(f"{path}: a GGUF file keeps all that it has; leave out --keep-mtp")
    else:
        source = GGUFSource(path)
    moe_shape(source)
    return source
