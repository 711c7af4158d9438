"""What all cases of a study share: a calibrated model, its damages, and its logits on held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from mopeq_edge.artifacts import digest
from mopeq_edge.evaluate.chunks import Positions
from mopeq_edge.evaluate.reference import ReferenceLogits
from mopeq_edge.evaluate.run import make_reference
from mopeq_edge.ggml.library import Quantizer, load_ggml
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.gguf_file import KV
from mopeq_edge.output_kvs import IMATRIX_NAME, Provenance, output_kvs
from mopeq_edge.pipeline import Context, run_sensitivity, source_gguf
from mopeq_edge.pipeline_calibrate import Calibrated, CalibrationRequest, run_calibrate
from mopeq_edge.plan.per_expert import expert_stacks
from mopeq_edge.sensitivity.table import SensitivityTable
from mopeq_edge.source.model import SourceTensor
from mopeq_edge.study.block_cache import BlockCache

POSITIONS: Positions = "all"
BLOCKS = "study-blocks"
"""Folder of the work directory with the blocks of all files; it may be deleted at any time."""


@dataclass(frozen=True)
class Setup:
    """``types`` are the candidates of every plan."""

    context: Context
    calibrated: Calibrated
    table: SensitivityTable
    types: tuple[GgmlType, ...]
    reference: ReferenceLogits

    @cached_property
    def kvs(self) -> Mapping[str, KV]:
        """Key-values of the size that a finished file's have."""
        imatrix = self.calibrated.statistics.imatrix(self.table.quantized_with)
        return output_kvs(self.context.source.kvs, 0, imatrix, IMATRIX_NAME, Provenance())

    @cached_property
    def quantizer(self) -> Quantizer:
        """libggml, with what it made for any file kept for the others."""
        return BlockCache(load_ggml(), self.context.work.file(BLOCKS), [self.reference.key.library])

    @cached_property
    def stacks(self) -> tuple[SourceTensor, ...]:
        """The stacks of experts, in writing order."""
        return expert_stacks(self.context.source)

    @cached_property
    def made_from(self) -> str:
        """Hash of source, calibration, evaluation text, windows and llama.cpp: all but the plan."""
        return digest(
            [
                *("study 1", self.context.source_sha256, self.calibrated.made_from, self.table.quantized_with),
                *(asdict(self.reference.key), POSITIONS),
            ]
        )


def prepare(
    context: Context,
    calibration: CalibrationRequest,
    types: tuple[GgmlType, ...],
    text: Path,
    *,
    n_ctx: int,
    n_windows: int,
) -> Setup:
    """Run the stages that the work directory lacks, and the source on ``n_windows`` windows of ``text``."""
    calibrated = run_calibrate(context, calibration)
    # every file of a study has the same shapes: nothing is padded
    measured = run_sensitivity(context, calibrated, types, calibrated.statistics.richest, None)
    table = measured.fitting(context.source.tensors)
    reference = make_reference(
        source_gguf(context),
        text,
        context.work.path,
        n_ctx=n_ctx,
        n_chunks=n_windows,
        positions=POSITIONS,
        n_threads=context.threads,
        source_sha256=context.source_sha256,
        progress=context.progress,
    )
    return Setup(context, calibrated, table, types, reference)
