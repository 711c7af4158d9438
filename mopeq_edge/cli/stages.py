"""The single stages: ``calibrate``, ``sensitivity``, ``plan``, ``emit``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mopeq_edge.cli import options
from mopeq_edge.cli.console import FILE, MODEL, json_option, threads_option

if TYPE_CHECKING:
    from mopeq_edge.device_files import DeviceFile
    from mopeq_edge.dry_run import DryRun
    from mopeq_edge.engine.interface import Engine
    from mopeq_edge.memory.tower import TowerMemory
    from mopeq_edge.pipeline import Context
    from mopeq_edge.pipeline_context import BeforeScript
    from mopeq_edge.pipeline_fits import Fit
    from mopeq_edge.plan.artifact import Plan
    from mopeq_edge.plan.forecast import Forecast
    from mopeq_edge.source.remote import ModelURL


def _context(
    model: Path | ModelURL,
    given: dict[str, Any],
    progress: Any,
    before_script: BeforeScript | None = None,
    engine: Engine | None = None,
) -> Context:
    from mopeq_edge.pipeline import open_context

    work = options.work_directory(given["work_dir"], model)
    return open_context(
        model,
        work,
        pre=given.get("pre"),
        keep_mtp=given.get("keep_mtp", False),
        threads=given["threads"],
        progress=progress,
        before_script=before_script,
        engine=engine,
    )


def _described(model: Path | ModelURL, given: dict[str, Any], progress: Any) -> Context:
    """The context of a command that reads no weights."""
    from mopeq_edge.pipeline import open_description

    work, keep_mtp = options.work_directory(given["work_dir"], model), given.get("keep_mtp", False)
    return open_description(
        model, work, pre=given.get("pre"), keep_mtp=keep_mtp, threads=given["threads"], progress=progress
    )


@click.command()
@click.argument("model", type=MODEL)
@options.calibration_options
@options.work_option
@options.source_options
@threads_option
@json_option
def calibrate(model: Path | ModelURL, **given: Any) -> None:
    """Run text, and pictures, through MODEL and keep the statistics in the work directory.

    Leaves imatrix.gguf, with --fisher gradient.gguf (both serve llama-quantize too), and the routing; with
    --trace also trace.safetensors, with --images also modalities.safetensors: text and pictures apart.

    \b
    Example:
      mopeq-edge calibrate OLMoE-1B-7B --text corpus.txt --work-dir olmoe.mopeq
    """
    from mopeq_edge.alone import alone
    from mopeq_edge.cli.console import console_progress, print_json, print_table, rows_table
    from mopeq_edge.evaluate.chunks import read_text
    from mopeq_edge.pipeline_calibrate import load_routing_by_kind, run_calibrate

    with console_progress() as progress, alone(options.work_directory(given["work_dir"], model)):
        text = options.calibration_text(model, given["text"], given["imatrix"])
        context = _context(model, given, progress, lambda _: options.check_before_script(model, given, text))
        words = read_text(text) if text is not None else ""
        request = options.calibration_request(context.source.kind == "huggingface", text, words, given)
        statistics = run_calibrate(context, request).statistics
    routing, imatrix, traces = statistics.routing, statistics.activation, statistics.traces
    by_kind = load_routing_by_kind(context.work)
    left = [*context.work.files("calibrate"), *(context.work.files("trace") if traces is not None else ())]
    summary = {
        "tokens": routing.n_tokens if routing is not None else 0,
        "entries": len(imatrix.entries) if imatrix is not None else 0,
        "gradient_imatrix": statistics.gradient is not None,
        "never_routed": list(imatrix.unrouted) if imatrix is not None else [],
        "files": {name: str(context.work.file(name)) for name in left},
        "modalities": by_kind.as_dict() if by_kind is not None else None,
        "trace": traces.summary() if traces is not None else None,
    }
    if given["as_json"]:
        print_json(summary)
        return
    rows = [("tokens", f"{summary['tokens']:,}"), ("imatrix entries", str(summary["entries"]))]
    rows += by_kind.rows() if by_kind is not None else []
    rows += [(name, str(context.work.file(name))) for name in left]
    if traces is not None:
        rows.append(("trace", traces.sentence()))
    print_table(rows_table(f"calibration of {model}", rows))


@click.command()
@click.argument("model", type=MODEL)
@click.option("--types", default="default", show_default=True, help="Candidate types: default, k, all, or a list.")
@options.sensitivity_options
@options.engine_options
@options.work_option
@options.source_options
@threads_option
@json_option
def sensitivity(model: Path | ModelURL, **given: Any) -> None:
    """Quantize every expert of MODEL to every candidate type and price the error by every score.

    With --quantize-with none that is by the weights alone: no calibration is needed, and plan knows weight-mse and
    mopeq.

    \b
    Example:
      mopeq-edge sensitivity OLMoE-1B-7B --work-dir olmoe.mopeq --sample-rows 64
    """
    from mopeq_edge.alone import alone
    from mopeq_edge.cli.console import console_progress, print_json, print_table, rows_table
    from mopeq_edge.pipeline import run_sensitivity
    from mopeq_edge.pipeline_calibrate import load_calibrated
    from mopeq_edge.plan.candidates import parse_types
    from mopeq_edge.sensitivity.sample import share_read
    from mopeq_edge.sensitivity.scores import UNITS

    if given["rows_only"] and given["sample_rows"] is None:
        raise click.UsageError("--rows-only with --sample-rows all: all rows are to be measured; leave out one of them")
    with (
        console_progress() as progress,
        alone(options.work_directory(given["work_dir"], model)),
        options.engine(given, progress) as engine,
    ):
        context = _context(model, given, progress, engine=engine)
        kind = given["quantize_with"]
        calibrated = load_calibrated(context, kind)
        if kind == "auto" and calibrated is not None:
            kind = calibrated.statistics.richest
        types, sample, rows_only = parse_types(given["types"]), given["sample_rows"], given["rows_only"]
        table = run_sensitivity(context, calibrated, types, kind, sample, rows_only=rows_only)
        matrices = [tensor for tensor in context.source.tensors if tensor.quantizable]
        share = share_read(matrices, sample) if rows_only else 1.0
    errors = {score: table.relative_error(score) for score in table.scores}
    file = context.work.file(f"sensitivity-{kind}.safetensors")
    if given["as_json"]:
        found = {"file": str(file), "quantized_with": kind, "relative_sampling_error": errors}
        print_json({**found, "rows_only": rows_only, "share_of_weights_read": share})
        return
    rows = [
        ("file", str(file)),
        ("quantized with", "no imatrix" if calibrated is None else f"{kind} imatrix"),
        ("tensors", str(len(table.errors))),
    ]
    if rows_only:
        rows.append(("rows", f"{100 * share:.2g} % of the weights were read; norms are estimates"))
    rows += [(score, f"{UNITS[score]}; sampling error at most {100 * e:.2f} %") for score, e in errors.items()]
    print_table(rows_table(f"sensitivity of {model}", rows))


@click.command()
@click.argument("model", type=MODEL)
@options.budget_options
@options.vision_options
@options.plan_options
@options.split_option
@click.option("-o", "--output", type=FILE, help="Where to write the plan (default: plan.json in the work directory).")
@click.option("--tensor-type-file", type=FILE, help="Also write the plan for llama-quantize --tensor-type-file.")
@options.work_option
@options.source_options
@threads_option
@json_option
def plan(model: Path | ModelURL, **given: Any) -> None:
    """Choose a type for every tensor of MODEL under a byte budget; needs a finished sensitivity.

    Of a model that sees pictures the budget is for both sides, as convert writes them. The name of its vision file,
    which its bytes depend on, is that of the work directory, or give the file that there is with --beside.

    --planner mopeq is the paper's (arXiv 2509.02512): precisions by the experts' scores alone. Without a
    target the size comes out; with one the map grows or shrinks to fit.

    \b
    Example:
      mopeq-edge plan OLMoE-1B-7B --target-gb 4 --work-dir olmoe.mopeq
    """
    from mopeq_edge.alone import alone
    from mopeq_edge.atomic import atomic_write
    from mopeq_edge.cli.console import console_progress, print_json, print_table
    from mopeq_edge.pipeline import load_sensitivity, planner_of, run_forecast, run_plan
    from mopeq_edge.pipeline_calibrate import load_calibrated
    from mopeq_edge.plan.artifact import tensor_type_lines, write_plan
    from mopeq_edge.plan.options import for_llama_quantize
    from mopeq_edge.sensitivity.pricing import Statistics
    from mopeq_edge.sensitivity.scores import best_score

    budget, fits, request = options.budget(given), options.fits_request(given), options.plan_request(given)
    if given["tensor_type_file"] is not None:
        request = for_llama_quantize(request)
    with console_progress() as progress, alone(options.work_directory(given["work_dir"], model)):
        context = _described(model, given, progress)
        table = load_sensitivity(context.work, partial(best_score, asked=request.sensitivity))
        calibrated = load_calibrated(context, table.quantized_with, entries=False)
        statistics = Statistics() if calibrated is None else calibrated.statistics
        if calibrated is None:
            progress.note("note: planned by the weights alone; what calibrate measures makes better plans")
        request = replace(request, sensitivity=best_score(table.scores, request.sensitivity))
        tower, beside = _beside(context, given)
        if fits is not None:
            fits = replace(fits, tower=tower, beside=beside)
        if budget is not None:
            budget = replace(budget, beside=(*(tower.files if tower is not None else ()), *beside))
        fit: Fit | None = None
        planner = planner_of(context, table, statistics, request)
        if fits is None:
            made = run_plan(context, planner, budget)
        else:
            from mopeq_edge.pipeline_fits import run_plan_that_fits

            made, fit, budget = run_plan_that_fits(context, planner, fits)
        comparison = run_forecast(planner, statistics.routing, budget, made)
    if given["output"] is not None:
        write_plan(made, given["output"])
    if given["tensor_type_file"] is not None:
        lines = tensor_type_lines({t.name: t.type for t in made.tensors if made.is_quantized(t)})
        with atomic_write(given["tensor_type_file"]) as file:
            file.write(lines.encode())
    if given["as_json"]:
        further = {"forecast": comparison, "fits": fit}
        print_json({**made.as_dict(), **{k: v.as_dict() if v is not None else None for k, v in further.items()}})
    else:
        print_table(plan_table(made, comparison, fit))


def _beside(context: Context, given: dict[str, Any]) -> tuple[TowerMemory | None, tuple[DeviceFile, ...]]:
    """What the device loads beside the GGUF: the vision file, the one that is given or the one to come, and others."""
    from mopeq_edge.device_files import device_files
    from mopeq_edge.memory.tower import tower_of_file
    from mopeq_edge.pipeline_vision import planned_mmproj, planned_tower
    from mopeq_edge.vision.description import ENDING
    from mopeq_edge.vision.mmproj import PREFIX

    seen = [path for path in given["beside"] if path.name.endswith(ENDING)]
    others = tuple(file for path in given["beside"] if path not in seen for file in device_files(path))
    if given["text_only"]:
        return None, others
    if seen:
        return tower_of_file(seen[-1]), others
    name = context.work.path.name.removesuffix(".mopeq")
    tower = planned_tower(context.source, f"{name}{ENDING}", given["vision_type"])
    if tower is None and not any(path.name.startswith(PREFIX) for path in given["beside"]):
        others += planned_mmproj(context, Path(f"{name}.gguf"), given["vision_type"])
    return tower, others


def plan_table(made: Plan, comparison: Forecast | None, fit: Fit | None) -> Any:
    """Sizes and types of a plan, the memory it was made for, and what the other layout would bring."""
    from mopeq_edge.cli.console import rows_table
    from mopeq_edge.units import format_bytes

    types = ", ".join(f"{name} {format_bytes(size)}" for name, size in made.bytes_by_type().items())
    rows = [
        ("predicted file", size_of(made, made.file_bytes)),
        ("possible files", f"{made.smallest_bytes:,} to {made.largest_bytes:,} bytes"),
        ("types", types),
        ("predicted damage", f"{made.damage:.6g} {made.unit} ({made.sensitivity})"),
        planner_row(made),
    ]
    rows += padding_row(made)
    if fit is not None:
        rows.append(("memory", fit.sentence()))
    if comparison is not None:
        rows.append(("layouts", comparison.sentence()))
    return rows_table(f"plan, {made.layout} layout", rows)


def size_of(made: Plan, file_bytes: int) -> str:
    """Bytes of the file, what was allowed, and bits per weight."""
    allowed = f" of {made.budget_bytes:,} allowed" if made.budget_bytes is not None else ", no target"
    return f"{file_bytes:,} bytes{allowed} ({made.bpw:.3f} bpw)"


def padding_row(made: Plan) -> list[tuple[str, str]]:
    """Whether the experts are padded."""
    padding = made.expert_padding
    return [] if padding is None else [("experts", f"padded with zeros from {padding.width} to {padding.padded}")]


def planner_row(made: Plan) -> tuple[str, str]:
    """What the planner says of its plan: how far from the optimum, or how the paper's map was scaled."""
    if made.precision_map is not None:
        return "precision map", made.precision_map.sentence(made.budget_bytes)
    return "optimality gap", f"{100 * (made.gap or 0):.4f} %"


@click.command()
@click.argument("model", type=MODEL)
@click.argument("out", type=FILE)
@click.option("--plan", "plan_file", type=FILE, help="Plan to write (default: plan.json in the work directory).")
@click.option(
    "--quantize-with", type=click.Choice(["activation", "gradient"]), help="Imatrix (default: the plan's own)."
)
@options.split_option
@click.option("--dry-run", is_flag=True, help="Check everything and tell sizes and time; reads and writes no weights.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@options.engine_options
@options.work_option
@options.source_options
@threads_option
@json_option
def emit(model: Path | ModelURL, out: Path, **given: Any) -> None:
    """Write the GGUF of a plan for MODEL and read it back.

    \b
    Example:
      mopeq-edge emit OLMoE-1B-7B out.gguf --work-dir olmoe.mopeq
    """
    from mopeq_edge.alone import alone
    from mopeq_edge.atomic import check_output
    from mopeq_edge.cli.console import console_progress, print_json, print_table
    from mopeq_edge.pipeline import check_plan, output_files, run_dry, run_emit
    from mopeq_edge.pipeline_calibrate import load_calibrated
    from mopeq_edge.plan.artifact import read_plan
    from mopeq_edge.sensitivity.pricing import Statistics
    from mopeq_edge.split import check_parts

    is_dry, chosen = given["dry_run"], given["quantize_with"]
    with (
        console_progress() as progress,
        alone(options.work_directory(given["work_dir"], model), out),
        options.engine(given, progress) as engine,
    ):
        context = _described(model, given, progress) if is_dry else _context(model, given, progress, engine=engine)
        split = options.split_bytes(given)
        (check_output if split is None else check_parts)(out, context.inputs, force=given["force"])
        made = read_plan(given["plan_file"] or context.work.file("plan.json"))
        check_plan(made, context.source)
        calibrated = load_calibrated(context, chosen or made.quantized_with, entries=not is_dry)
        statistics = Statistics() if calibrated is None else calibrated.statistics
        if is_dry:
            found = run_dry(context, made, statistics, out, chosen, split)
        else:
            written = run_emit(context, made, statistics, out, chosen, split_bytes=split)
            files = output_files(context, made, statistics, out, split)
    if is_dry:
        if given["as_json"]:
            print_json({**found.as_dict(), "predicted_file_bytes": made.file_bytes})
        else:
            print_table(_dry_table(found, made))
        return
    if given["as_json"]:
        sizes = {"file_bytes": written, "predicted_file_bytes": made.file_bytes}
        print_json({**sizes, "output": str(files[0]), "output_files": len(files)})
    else:
        many = f" in {len(files)} files" if len(files) > 1 else ""
        click.echo(f"{files[0]}: {written:,} bytes{many}, {_as_planned(written, made)}")


def _as_planned(written: int, made: Plan) -> str:
    return "as planned" if written == made.file_bytes else f"{made.file_bytes:,} planned"


FILES_SHOWN = 8
"""Files of a split output that a dry run lists."""


def _dry_table(found: DryRun, made: Plan) -> Any:
    from mopeq_edge.cli.console import rows_table
    from mopeq_edge.units import format_bytes

    rows = [(path.name, f"{size:,} bytes") for path, size in found.files[:FILES_SHOWN]]
    if len(found.files) > FILES_SHOWN:
        rows.append(("further files", str(len(found.files) - FILES_SHOWN)))
    rows += [
        ("together", f"{found.file_bytes:,} bytes, {_as_planned(found.file_bytes, made)}"),
        ("free there", format_bytes(found.free)),
        ("tensors", f"{found.n_tensors:,}"),
        ("to quantize", ", ".join(f"{n:,} weights to {name}" for name, n in found.weights.items()) or "nothing"),
        ("quantizing", f"about {found.seconds:,.0f} s on {found.threads} threads, if reading and writing keep up"),
    ]
    return rows_table("dry run, nothing written", rows)
