"""``mopeq-edge convert``: all stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mopeq_edge.cli import options
from mopeq_edge.cli.console import FILE, MODEL, json_option, threads_option

if TYPE_CHECKING:
    from mopeq_edge.convert import Converted
    from mopeq_edge.engine.interface import Engine
    from mopeq_edge.source.remote import ModelURL


@click.command()
@click.argument("model", type=MODEL)
@click.argument("out", type=FILE)
@options.budget_options
@options.calibration_options
@options.plan_options
@options.measure_options
@options.split_option
@options.engine_options
@click.option("--eval-text", type=FILE, help="Text to validate on (default: the calibration text's held-out tail).")
@click.option("--no-evaluate", is_flag=True, help="Do not run the result in llama.cpp.")
@options.vision_options
@click.option("--no-report", is_flag=True, help="Do not write OUT.report.html at the end.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@options.work_option
@options.source_options
@threads_option
@json_option
def convert(model: Path | ModelURL, out: Path, **given: Any) -> None:
    """Convert MODEL, a Hugging Face directory or GGUF, to OUT under a byte budget.

    Calibrates on a text, measures what every candidate type would hurt, plans, writes OUT and compares it
    with MODEL in llama.cpp. The artifacts stay in the work directory: another budget takes seconds.

    --planner mopeq is the paper's (arXiv 2509.02512): precisions by the experts' scores alone. Without a
    target the size comes out; with one the map grows or shrinks to fit.

    \b
    Example:
      mopeq-edge convert OLMoE-1B-7B out.gguf --target-gb 4 --text corpus.txt
    """
    from mopeq_edge.alone import alone
    from mopeq_edge.atomic import check_output
    from mopeq_edge.cli.console import console_progress, print_json, print_table
    from mopeq_edge.cli.report import LEFT_OUT, default_output, report_of_conversion

    work = options.work_directory_of_output(given["work_dir"], out)
    page = None if given["no_report"] else default_output(out)
    if page is not None:
        check_output(page, [], force=given["force"])
    with console_progress() as progress, alone(work, out), options.engine(given, progress) as engine:
        result = _run(model, out, given, progress, engine)
        written = report_of_conversion(result.files[0], work, page, progress) if page is not None else ""
    if given["as_json"]:
        print_json(result.as_dict())
        if written.startswith(LEFT_OUT):
            click.echo(f"note: report {written}", err=True)
    else:
        print_table(_table(result, written))


def _run(model: Path | ModelURL, out: Path, given: dict[str, Any], progress: Any, engine: Engine | None) -> Converted:
    from mopeq_edge.atomic import atomic_write, check_output
    from mopeq_edge.calibrate.tokens import split_text
    from mopeq_edge.convert import HELD_OUT, ConvertRequest, convert, default_sensitivity
    from mopeq_edge.device_files import device_files
    from mopeq_edge.evaluate.chunks import read_text
    from mopeq_edge.pipeline import open_context
    from mopeq_edge.split import check_parts

    budget, fits, plan = options.budget(given), options.fits_request(given), options.plan_request(given)
    work = options.work_directory_of_output(given["work_dir"], out)
    text = options.calibration_text(model, given["text"], given["imatrix"])
    evaluation_text, evaluate = given["eval_text"], not given["no_evaluate"]

    def before_script(checkpoint: tuple[Path, ...]) -> None:
        check = check_output if plan.split_bytes is None else check_parts
        check(out, checkpoint, force=given["force"])
        options.check_before_script(model, given, text, evaluation_text)

    context = open_context(
        model,
        work,
        pre=given["pre"],
        keep_mtp=given["keep_mtp"],
        threads=given["threads"],
        progress=progress,
        before_script=before_script,
        engine=engine,
    )
    # the tail is kept back always: so --no-evaluate and --eval-text reuse the calibration too
    words, tail = split_text(read_text(text), HELD_OUT) if text is not None else ("", "")
    if tail and evaluation_text is None:
        evaluation_text = context.work.file("held-out.txt")
        with atomic_write(evaluation_text) as file:
            file.write(tail.encode())
    calibration = options.calibration_request(context.source.kind == "huggingface", text, words, given)
    if plan.sensitivity == "auto":
        plan = replace(plan, sensitivity=default_sensitivity(context, calibration))
    return convert(
        context,
        ConvertRequest(
            output=out,
            budget=budget,
            calibration=calibration,
            options=plan,
            quantize_with=given["quantize_with"],
            sample_rows=given["sample_rows"],
            evaluation_text=evaluation_text,
            evaluate=evaluate,
            force=given["force"],
            fits=fits,
            vision=None if given["text_only"] else given["vision_type"],
            beside=tuple(file for path in given["beside"] for file in device_files(path)),
        ),
    )


def _table(result: Converted, report: str) -> Any:
    from mopeq_edge.cli.console import rows_table
    from mopeq_edge.cli.stages import padding_row, planner_row, size_of
    from mopeq_edge.units import format_bytes

    plan, evaluation = result.plan, result.evaluation
    types = ", ".join(f"{name} {format_bytes(size)}" for name, size in plan.bytes_by_type().items())
    rows = [
        ("layout", plan.layout),
        ("file", size_of(plan, result.file_bytes)),
        *([("files", f"{len(result.files)}, give llama.cpp the first")] if len(result.files) > 1 else []),
        ("types", types),
        *padding_row(plan),
        planner_row(plan),
        ("imatrix", result.choice.sentence()),
        ("predicted damage", f"{plan.damage:.6g} {plan.unit} ({plan.sensitivity})"),
    ]
    if result.sampling_error:
        rows.append(
            ("row sampling", f"standard error of a tensor's damage at most {100 * result.sampling_error:.2f} %")
        )
    if evaluation is not None:
        d = evaluation.divergence
        rows += [
            ("mean KLD", f"{d.kld_mean:.5f} ± {d.kld_mean_se:.5f} nats, median {d.kld_median:.5f}"),
            ("99.9 % KLD", f"{d.kld_p99_9:.4f} nats"),
            ("same top token", f"{100 * d.same_top:.2f} %"),
            ("PPL", f"{d.ppl_target:.4f}, source {d.ppl_base:.4f}"),
            ("measured on", f"{d.n_positions} held-out tokens, {evaluation.library}"),
        ]
    if result.vision is not None:
        rows.append(("vision", result.vision.sentence()))
    rows += [("beside it", f"{file.name}, {file.nbytes:,} bytes") for file in result.beside]
    if result.beside_bytes:
        rows.append(("the device loads", f"{result.device_bytes:,} bytes"))
    if result.fit is not None:
        rows.append(("memory", result.fit.sentence()))
    if result.forecast is not None:
        rows.append(("layouts", result.forecast.sentence()))
    if report:
        rows.append(("report", report))
    return rows_table(str(result.files[0]), rows)
