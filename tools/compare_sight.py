"""A tiny-sight model in few bits, ours by what it was calibrated on and llama-quantize's presets: what each sees.

``python -m tools.compare_sight examples/tiny-sight --work-dir DIR`` calibrates three times, not at all, on
calibration.txt, and on it with the model's pictures. For each preset it makes llama-quantize's file with the activation
imatrix, and ours in either layout of at most as many bytes; ``--target-bpw`` adds ours of so many bits a weight, of the
whole file. Then it asks all of them as tools/sight_accuracy.py does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from converters.vision import find_family, write_vision
from mopeq_edge.cli.console import console_progress, threads_option
from mopeq_edge.errors import NoRoomError
from mopeq_edge.ggml.types import GgmlType
from mopeq_edge.gguf_file import TensorInfo, read_header
from mopeq_edge.imatrix import ACTIVATION, NO_IMATRIX
from mopeq_edge.pipeline import (
    Context,
    imatrix_file,
    open_context,
    planner_of,
    run_emit,
    run_plan,
    run_sensitivity,
    source_gguf,
)
from mopeq_edge.pipeline_calibrate import CalibrationRequest, run_calibrate
from mopeq_edge.pipeline_pictures import PicturesRequest
from mopeq_edge.plan.artifact import PER_EXPERT, STOCK
from mopeq_edge.plan.budget import Budget
from mopeq_edge.plan.candidates import FLOORS, parse_types
from mopeq_edge.plan.options import PlanOptions
from mopeq_edge.progress import Progress
from mopeq_edge.runtime.tools import run_tool
from mopeq_edge.sensitivity.pricing import Statistics
from mopeq_edge.sensitivity.table import SensitivityTable
from mopeq_edge.source.checkpoint import Checkpoint, read_json_object
from mopeq_edge.source.roles import Role
from tools.sight_accuracy import Files, measure, show

LAYOUTS = (STOCK, PER_EXPERT)
NOTHING, TEXT, PICTURES = CALIBRATIONS = ("nothing", "text", "text and pictures")
WINDOW = 128
LOW_FLOORS = dict.fromkeys(FLOORS, 2.0)
"""For files of so few bits that the default ones leave no room."""


@dataclass(frozen=True)
class Calibrated:
    """A calibration in a work directory of its own, and what ours are planned by."""

    name: str
    context: Context
    types: tuple[GgmlType, ...]
    table: SensitivityTable
    statistics: Statistics

    @property
    def score(self) -> str:
        return "weight-mse" if self.name == NOTHING else "fisher"

    @property
    def imatrix(self) -> str:
        return NO_IMATRIX if self.name == NOTHING else ACTIVATION


def calibrate(model: Path, work_dir: Path, name: str, types: str, threads: int, progress: Progress) -> Calibrated:
    """``model`` on what ``name`` says."""
    context = open_context(model, work_dir / name.replace(" ", "-"), pre=None, threads=threads, progress=progress)
    chosen = parse_types(types)
    if name == NOTHING:
        statistics = Statistics()
        table = run_sensitivity(context, None, chosen, NO_IMATRIX, None)
    else:
        text = (model / "calibration.txt").read_text(encoding="utf-8")
        pictures = PicturesRequest(model / "pictures") if name == PICTURES else None
        request = CalibrationRequest(text=text, dataset="calibration.txt", n_ctx=WINDOW, pictures=pictures)
        calibrated = run_calibrate(context, request)
        statistics = calibrated.statistics
        table = run_sensitivity(context, calibrated, chosen, statistics.richest, None)
    return Calibrated(name, context, chosen, table.fitting(context.source.tensors), statistics)


def vision_file(context: Context, kind: str) -> Path:
    """The tower as ``kind``."""
    directory = context.source.path
    config = read_json_object(directory / "config.json")
    family = find_family(config)
    if family is None:
        raise click.UsageError(f"{directory}: expected a model that sees")
    out = context.work.file(f"{kind}.vision.onnx")
    options: dict[str, Any] = {"kind": kind, "made_from": "0" * 64, "threads": context.threads}
    write_vision(Checkpoint(directory), family, directory, config, out, **options)
    return out


def expert_bits(gguf: Path) -> float:
    """Bits of all experts' matrices over their weights."""
    return _bits([t for t in read_header(gguf).tensors if "_exps" in t.name and t.type.name != "I32"])


def file_bits(gguf: Path) -> float:
    """The same of all tensors of the file."""
    return _bits(read_header(gguf).tensors)


def _bits(tensors: Sequence[TensorInfo]) -> float:
    return 8 * sum(t.nbytes for t in tensors) / sum(t.n_weights for t in tensors)


def ours(calibrated: Calibrated, budget: Budget, floors: Mapping[Role, float], name: str) -> Iterator[tuple[str, Path]]:
    """Both layouts within ``budget``; none where a preset leaves attention less than ``floors``."""
    context = calibrated.context
    for layout in LAYOUTS:
        options = PlanOptions(calibrated.score, calibrated.types, floors, layout)
        try:
            planner = planner_of(context, calibrated.table, calibrated.statistics, options)
            plan = run_plan(context, planner, budget)
        except NoRoomError:
            continue
        path = context.work.file(f"ours-{name}-{layout}.gguf")
        run_emit(context, plan, calibrated.statistics, path, calibrated.imatrix)
        yield layout, path


def preset_file(calibrated: Calibrated, preset: str) -> Path:
    """llama-quantize's, with the imatrix of ``calibrated`` if it has one."""
    context = calibrated.context
    path = context.work.file(f"preset-{preset}.gguf")
    known = [] if calibrated.name == NOTHING else ["--imatrix", str(context.work.file(imatrix_file(ACTIVATION)))]
    run_tool("llama-quantize", [*known, str(source_gguf(context)), str(path), preset])
    return path


def make_files(calibrations: Sequence[Calibrated], presets: Sequence[str], targets: Sequence[float]) -> Files:
    """By name, which says bytes, bits a weight of the file and of its experts, the files to compare.

    Presets and ours of their sizes see with an F16 tower, those of ``targets`` bits a weight with an INT8 one too.
    """
    context = calibrations[-1].context
    source, vision, small = source_gguf(context), vision_file(context, "F16"), vision_file(context, "INT8")
    found: dict[str, tuple[Path, Path]] = {"BF16": (source, vision), "BF16, INT8 tower": (source, small)}

    def add(name: str, calibrated: Calibrated, gguf: Path, seen_with: Path = vision) -> None:
        bits = f"{gguf.stat().st_size:,} bytes, {file_bits(gguf):.2f} bpw, experts {expert_bits(gguf):.2f}"
        found[f"{name}, {calibrated.name}: {bits}"] = (gguf, seen_with)

    for calibrated in calibrations:
        for target in targets:
            for layout, path in ours(calibrated, Budget(bpw=target), LOW_FLOORS, f"{target:g}"):
                add(layout, calibrated, path)
                if calibrated is calibrations[-1]:
                    add(f"{layout}, INT8 tower", calibrated, path, small)
        for preset in presets:
            path = preset_file(calibrated, preset)
            add(preset, calibrated, path)
            for layout, made in ours(calibrated, Budget(nbytes=path.stat().st_size), FLOORS, preset):
                add(layout, calibrated, made)
    return found


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--work-dir", type=click.Path(path_type=Path), required=True, help="Where artifacts and files go.")
@click.option("--presets", default="Q2_K,Q3_K_S,Q4_K_S", show_default=True, help="Presets of llama-quantize.")
@click.option(
    "--target-bpw", "targets", default="2.5,3", show_default=True, help="Bits a weight of further files of ours."
)
@click.option("--types", default="default", show_default=True, help="Candidate types: default, k, all, or a list.")
@click.option("--pictures", default=150, show_default=True, help="Pictures, with up to three questions each.")
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    model: Path, work_dir: Path, presets: str, targets: str, types: str, pictures: int, threads: int, as_json: bool
) -> None:
    """Compare files of MODEL, calibrated on its calibration.txt and its pictures."""
    torch.set_num_threads(threads)
    with console_progress() as progress:
        calibrations = [calibrate(model, work_dir, name, types, threads, progress) for name in CALIBRATIONS]
        files = make_files(calibrations, _listed(presets), [float(target) for target in _listed(targets)])
        found = measure(model, files, pictures, controls=True, threads=threads, progress=progress)
    show(found, as_json)


def _listed(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


if __name__ == "__main__":
    main()
