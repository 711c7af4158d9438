"""The vision stage: what of a checkpoint sees pictures, as ONNX beside the GGUF. Kept while its inputs stay the
same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopeq_edge.artifacts import digest
from mopeq_edge.atomic import check_output
from mopeq_edge.errors import FormatError
from mopeq_edge.pipeline_context import Context
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.vision.description import vision_beside, weights_file

if TYPE_CHECKING:
    from converters.vision import Family


@dataclass(frozen=True)
class Vision:
    """The vision file of a conversion."""

    path: Path
    file_bytes: int
    """Of the graph and of the weights beside it."""
    weights_type: str
    relative_error: float
    """Of the embeddings of a fixed picture, against F32."""

    def sentence(self) -> str:
        """What was written, and how far it is from F32."""
        error = "" if self.weights_type == "F32" else f"; relative error {self.relative_error:.2g} against F32"
        size = f"{self.file_bytes:,} bytes with {self.path.name}.data, beside the budget"
        return f"{self.path.name}: {self.weights_type}, {size}{error}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values with units in their names."""
        return {
            "file_bytes": self.file_bytes,
            "output": self.path.name,
            "relative_error": self.relative_error,
            "type": self.weights_type,
        }


@dataclass(frozen=True)
class VisionRequest:
    """What is to be written."""

    source: HuggingFaceSource
    family: Family
    out: Path
    kind: str
    made_from: str


def check_vision(context: Context, output: Path, kind: str | None, *, force: bool) -> VisionRequest | None:
    """What :func:`run_vision` will write beside ``output``; None for a model that sees nothing, or without ``kind``.

    Raises before anything is computed for settings that are not known, and where the file may not be replaced.
    """
    source = context.source
    if kind is None or not isinstance(source, HuggingFaceSource):
        return None
    from converters.vision import find_family

    family = find_family(source.config)
    if family is None or not any(name.startswith(family.prefixes) for name in source.checkpoint.names):
        return None
    tower = family.read(source.path, source.config, source.checkpoint)
    out = vision_beside(output)
    made_from = digest(["vision 1", context.source_sha256, kind, repr(tower)])
    request = VisionRequest(source, family, out, kind, made_from)
    if _kept(request) is None:
        for path in (out, weights_file(out)):
            check_output(path, context.inputs, force=force)
    return request


def run_vision(context: Context, request: VisionRequest | None) -> Vision | None:
    """Write the vision file, or keep the one that is there if it was made from the same."""
    if request is None:
        return None
    if (kept := _kept(request)) is not None:
        return kept
    from converters.vision import write_vision

    with context.progress.step("vision", 1) as step:
        written = write_vision(
            request.source.checkpoint,
            request.family,
            request.source.path,
            request.source.config,
            request.out,
            kind=request.kind,
            made_from=request.made_from,
            threads=context.threads,
        )
        step.advance()
    return Vision(request.out, written.file_bytes, request.kind, written.description.relative_error)


def _kept(request: VisionRequest) -> Vision | None:
    """The file that is there already, if it is whole and was made from the same."""
    if not request.out.is_file():
        return None
    from converters.vision import read_vision

    try:
        found = read_vision(request.out)
    except FormatError:
        return None
    if found.description.made_from != request.made_from:
        return None
    return Vision(request.out, found.file_bytes, request.kind, found.description.relative_error)
