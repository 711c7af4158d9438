"""The vision stage: what of a checkpoint sees pictures, beside the GGUF: as ONNX, or as llama.cpp's own mmproj where
llama.cpp sees with the model. Kept while its inputs stay the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopeq_edge.artifacts import digest
from mopeq_edge.atomic import check_output
from mopeq_edge.device_files import DeviceFile, device_files, total_bytes
from mopeq_edge.errors import FormatError, PlanError
from mopeq_edge.memory.tower import TowerMemory, tower_memory
from mopeq_edge.pipeline_context import Context
from mopeq_edge.runtime.locate import pinned_version
from mopeq_edge.source.checkpoint import read_config
from mopeq_edge.source.digests import Digests
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.source.model import Source
from mopeq_edge.vision import mmproj
from mopeq_edge.vision.description import TYPES, WEIGHTS_ENDING, vision_beside, weights_file

if TYPE_CHECKING:
    from converters.vision import Family


@dataclass(frozen=True)
class Vision:
    """The vision file of a conversion."""

    path: Path
    files: tuple[DeviceFile, ...]
    """Of an ONNX graph also the weights beside it."""
    weights_type: str
    relative_error: float | None
    """Of the embeddings of a fixed picture, against F32; None where llama.cpp computes them."""

    def sentence(self) -> str:
        """What was written, and how far it is from F32."""
        measured = self.relative_error is not None and self.weights_type != "F32"
        error = f"; relative error {self.relative_error:.2g} against F32" if measured else ""
        beside = "".join(f" with {file.name}" for file in self.files[1:])
        return f"{self.path.name}: {self.weights_type}, {self.file_bytes:,} bytes{beside}{error}"

    @property
    def file_bytes(self) -> int:
        return total_bytes(self.files)

    def as_dict(self) -> dict[str, Any]:
        """Plain values with units in their names."""
        return {
            "file_bytes": self.file_bytes,
            "files": {file.name: file.nbytes for file in self.files},
            "output": self.path.name,
            "relative_error": self.relative_error,
            "type": self.weights_type,
        }


@dataclass(frozen=True)
class VisionRequest:
    """An ONNX file that is to be written."""

    source: HuggingFaceSource
    family: Family
    out: Path
    kind: str
    made_from: str
    tower: TowerMemory
    """The files that will be there, to the byte, and the memory that they will take."""

    @property
    def files(self) -> tuple[DeviceFile, ...]:
        return self.tower.files


@dataclass(frozen=True)
class MmprojRequest:
    """An mmproj that is to be written, of ``file_bytes`` exactly. It is in memory together with the text model."""

    directory: Path
    out: Path
    kind: str
    made_from: str
    file_bytes: int
    tower: None = None

    @property
    def files(self) -> tuple[DeviceFile, ...]:
        return (DeviceFile(self.out.name, self.file_bytes),)


def check_vision(
    context: Context, output: Path, kind: str | None, *, force: bool
) -> VisionRequest | MmprojRequest | None:
    """What :func:`run_vision` will write beside ``output``; None for a model that sees nothing, or without ``kind``.

    Raises before anything is computed for settings that are not known, and where the file may not be replaced.
    """
    source = context.source
    if kind is None or context.directory is None:
        return None
    family = family_of(source) if isinstance(source, HuggingFaceSource) else None
    if family is None:
        return _check_mmproj(context, context.directory, output, kind, force=force)
    assert isinstance(source, HuggingFaceSource)
    _check_kind(context.directory, kind, TYPES)
    settings = family.read(source.path, source.config, source.checkpoint)
    out = vision_beside(output)
    made_from = digest(["vision 2", context.source_sha256, kind, repr(settings)])
    tower = planned_tower(source, out.name, kind)
    if tower is None:
        return None
    request = VisionRequest(source, family, out, kind, made_from, tower)
    if _kept(request) is None:
        for path in (out, weights_file(out)):
            check_output(path, context.inputs, force=force)
    return request


def planned_tower(source: Source, name: str, kind: str) -> TowerMemory | None:
    """The vision file ``name`` as ``convert`` would write it as ``kind``, from shapes alone; None if nothing sees."""
    if not isinstance(source, HuggingFaceSource) or (family := family_of(source)) is None:
        return None
    from converters.vision import planned_graph

    graph, weights_bytes = planned_graph(source.checkpoint, family, source.path, source.config, name, kind)
    graph_bytes = len(graph.SerializeToString(deterministic=True))
    files = DeviceFile(name, graph_bytes), DeviceFile(f"{name}{WEIGHTS_ENDING}", weights_bytes)
    return tower_memory(graph, kind, files)


def family_of(source: HuggingFaceSource) -> Family | None:
    """How the vision side of ``source`` is built; None for a model that sees nothing."""
    from converters.vision import find_family

    family = find_family(source.config)
    found = family is not None and any(name.startswith(family.prefixes) for name in source.checkpoint.names)
    return family if found else None


def _check_mmproj(context: Context, directory: Path, output: Path, kind: str, *, force: bool) -> MmprojRequest | None:
    from converters.by_script import checkpoint_files
    from converters.mmproj import has_mmproj, mmproj_bytes

    if not has_mmproj(read_config(directory)):
        return None
    out = mmproj.mmproj_beside(output)
    _check_kind(directory, kind, mmproj.TYPES)
    files = Digests(context.work.file("hashes.json")).of_files(directory, checkpoint_files(directory))
    made_from = digest(["mmproj 1", files, kind, pinned_version()])
    if mmproj.mmproj_made_from(out) == made_from:
        return MmprojRequest(directory, out, kind, made_from, out.stat().st_size)
    check_output(out, (*context.inputs, *checkpoint_files(directory)), force=force)
    return MmprojRequest(directory, out, kind, made_from, mmproj_bytes(directory, kind))


def planned_mmproj(context: Context, output: Path, kind: str) -> tuple[DeviceFile, ...]:
    """The mmproj that ``convert`` would write beside ``output``, to the byte; none for other models."""
    from converters.mmproj import has_mmproj, mmproj_bytes

    directory = context.directory
    if directory is None or not has_mmproj(read_config(directory)):
        return ()
    _check_kind(directory, kind, mmproj.TYPES)
    return (DeviceFile(mmproj.mmproj_beside(output).name, mmproj_bytes(directory, kind)),)


def _check_kind(directory: Path, kind: str, known: Iterable[str]) -> None:
    if kind not in known:
        raise PlanError(f"{directory}: --vision-type {kind}: what sees pictures here can be {', '.join(known)}")


def run_vision(context: Context, request: VisionRequest | MmprojRequest | None) -> Vision | None:
    """Write the vision file, or keep the one that is there if it was made from the same."""
    if request is None:
        return None
    if isinstance(request, MmprojRequest):
        return _run_mmproj(context, request)
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
    return Vision(request.out, device_files(request.out), request.kind, written.description.relative_error)


def _run_mmproj(context: Context, request: MmprojRequest) -> Vision:
    found = Vision(request.out, request.files, request.kind, None)
    if mmproj.mmproj_made_from(request.out) == request.made_from:
        return found
    from converters.mmproj import write_mmproj

    with context.progress.step("mmproj", 1) as step:
        write_mmproj(request.directory, request.out, request.kind, request.made_from)
        step.advance()
    return found


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
    return Vision(request.out, device_files(request.out), request.kind, found.description.relative_error)
