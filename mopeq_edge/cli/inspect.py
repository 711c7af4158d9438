"""``mopeq-edge inspect``: what a model is and what sizes a plan can give it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mopeq_edge.cli import options
from mopeq_edge.cli.console import FILE, json_option

if TYPE_CHECKING:
    from mopeq_edge.calibrate.modalities import RoutingByKind
    from mopeq_edge.summary import Summary

STACKS_SHOWN = 24
"""Stacks that get a line each; more are summed up by projection."""


@click.command()
@click.argument("model", type=FILE)
@click.option("--types", default="default", show_default=True, help="Candidate types: default, k, all, or a list.")
@click.option("--floor", "floors", multiple=True, help="ROLE=TYPE or ROLE=BITS: least type of a role.")
@click.option("--work-dir", type=FILE, help="Also show which experts text and pictures went to there.")
@options.source_options
@json_option
def inspect(
    model: Path,
    types: str,
    floors: tuple[str, ...],
    work_dir: Path | None,
    pre: str | None,
    keep_mtp: bool,
    as_json: bool,
) -> None:
    """Show architecture, experts, bytes by kind and the sizes that a plan for MODEL can have.

    A directory with an architecture that no converter of ours knows is asked through llama.cpp's own script, without
    converting it.

    For a GGUF whose experts are in groups of different types, or that sees pictures for another (mmproj): what it is,
    and what runs it.

    \b
    Example:
      mopeq-edge inspect OLMoE-1B-7B
    """
    from converters.by_script import SCRIPT
    from mopeq_edge.cli.console import print_json, print_table
    from mopeq_edge.describe import describe
    from mopeq_edge.pipeline import open_header
    from mopeq_edge.pipeline_calibrate import load_routing_by_kind
    from mopeq_edge.plan.candidates import parse_floors, parse_types
    from mopeq_edge.plan.options import PlanOptions
    from mopeq_edge.summary import summarise_finished
    from mopeq_edge.workdir import WorkDirectory

    finished = summarise_finished(model)
    if finished is not None:
        if as_json:
            print_json(finished.as_dict())
            return
        click.echo(finished.sentence())
        print_table(_finished_table(finished))
        return
    request = PlanOptions("weight-mse", parse_types(types), parse_floors(floors))

    def note(directory: Path, architecture: str) -> None:
        click.echo(
            f"note: {directory}: no converter of ours knows {architecture}; llama.cpp's {SCRIPT} describes it", err=True
        )

    source = open_header(model, pre=pre, keep_mtp=keep_mtp, before_script=note)
    found = describe(source, request, options.CALIBRATION_NAME)
    by_kind = load_routing_by_kind(WorkDirectory(work_dir)) if work_dir is not None else None
    if as_json:
        print_json({**found.as_dict(), "modalities": by_kind.as_dict() if by_kind is not None else None})
        return
    for warning in source.warnings:
        click.echo(f"note: {warning.replace(str(source.path), str(model))}", err=True)
    print_table(_table(model, found, by_kind))


def _table(model: Path, found: Any, by_kind: RoutingByKind | None) -> Any:
    from mopeq_edge.cli.console import rows_table
    from mopeq_edge.units import format_bytes

    rows = [
        ("architecture", f"{found.architecture}, {found.kind}"),
        ("layers", str(found.n_layer)),
        ("experts", f"{found.n_expert}, {found.n_expert_used} used per token"),
        ("weights", f"{found.n_weights:,}"),
        ("tensor data", f"{found.tensor_bytes:,} bytes ({found.bpw:.3f} bpw)"),
    ]
    for role, part in found.by_role.items():
        rows.append((f"  {role}", f"{format_bytes(part.nbytes)}, {part.n_weights:,} weights ({', '.join(part.types)})"))
    rows += [
        ("smallest plan", f"{found.smallest_bytes:,} bytes ({format_bytes(found.smallest_bytes)})"),
        ("largest plan", f"{found.largest_bytes:,} bytes ({format_bytes(found.largest_bytes)})"),
        *(by_kind.rows() if by_kind is not None else []),
    ]
    return rows_table(str(model), rows)


def _finished_table(found: Summary) -> Any:
    from mopeq_edge.cli.console import rows_table
    from mopeq_edge.source.roles import projection_of
    from mopeq_edge.summary import experts_by_type
    from mopeq_edge.units import format_bytes, plural

    def mix(sizes: dict[str, int], show: Any) -> str:
        return ", ".join(f"{name} {show(size)}" for name, size in sizes.items())

    rows = [("architecture", f"{found.architecture}, gguf")]
    if found.stacks:
        rows.append(("layers", str(found.n_layer)))
        rows.append(("experts", f"{found.n_expert}, {found.n_expert_used} used per token"))
    rows += [
        ("weights", f"{found.n_weights:,}"),
        ("file", f"{found.file_bytes:,} bytes ({found.bpw:.3f} bpw)"),
        ("types", mix(found.bytes_by_type, format_bytes)),
    ]
    if not found.stacks:
        return rows_table(str(found.path), rows)
    if len(found.stacks) <= STACKS_SHOWN:
        rows += [(stack.name.removesuffix(".weight"), mix(experts_by_type([stack]), str)) for stack in found.stacks]
        return rows_table(f"{found.path}, experts by type", rows)
    by_projection: dict[str, list[Any]] = {}
    for stack in found.stacks:
        by_projection.setdefault(str(projection_of(stack.name)), []).append(stack)
    for projection, stacks in by_projection.items():
        rows.append((f"{projection}, {plural(len(stacks), 'stack')}", mix(experts_by_type(stacks), str)))
    return rows_table(f"{found.path}, experts by type", rows)
