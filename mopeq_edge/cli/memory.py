"""``mopeq-edge memory``: what a model takes in llama.cpp, and whether this device has it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mopeq_edge.cli import options
from mopeq_edge.cli.console import FILE, available_threads, json_option

if TYPE_CHECKING:
    from mopeq_edge.memory.advice import Lever
    from mopeq_edge.memory.device import Device
    from mopeq_edge.memory.model import Model
    from mopeq_edge.memory.predict import Prediction
    from mopeq_edge.memory.settings import Settings
    from mopeq_edge.memory.verdict import Verdict
    from mopeq_edge.source.model import Source


@click.command()
@click.argument("model", type=FILE)
@click.option("--ctx", type=click.IntRange(min=0), default=0, help="Context (default: the model's own).")
@click.option("--parallel", type=click.IntRange(min=1), help="Slots (default: 4 that share the context).")
@click.option("--kv-unified", is_flag=True, help="The slots of --parallel share the context.")
@click.option(
    "--cache-type", type=click.Choice(options.CACHE_TYPES), default="f16", show_default=True, help="Type of K and V."
)
@click.option("--cache-type-v", type=click.Choice(options.CACHE_TYPES), help="Type of V, if another.")
@click.option("--batch", type=click.IntRange(min=1), default=2048, show_default=True, help="llama.cpp's --batch-size.")
@click.option("--ubatch", type=click.IntRange(min=1), default=512, show_default=True, help="llama.cpp's --ubatch-size.")
@click.option("--ngl", type=click.IntRange(min=0), default=0, show_default=True, help="Layers on the GPU.")
@click.option("--threads", type=click.IntRange(min=1), default=available_threads, help="CPU threads.")
@click.option("--no-mmap", is_flag=True, help="Read the weights (llama.cpp's --load-mode none).")
@click.option("--no-repack", is_flag=True, help="No copies of weights in the CPU's own order.")
@click.option("--no-flash-attn", is_flag=True, help="llama.cpp's --flash-attn off.")
@click.option("--swa-full", is_flag=True, help="Layers with a sliding window keep the whole context.")
@click.option("--mmproj", type=FILE, help="What sees pictures for it (default: mmproj-MODEL if that lies beside).")
@click.option("--vision", "eyes", type=FILE, help="What sees pictures (default: the .vision.onnx beside MODEL).")
@click.option("--text-only", is_flag=True, help="Without what sees pictures.")
@click.option("--model", "source", type=FILE, help="The source of a plan.json.")
@click.option("--memory", help="Judge for a device with so much memory, e.g. 8GiB (default: what is free here).")
@click.option("--unified/--no-unified", default=None, help="Whether the GPU shares the memory (default: as here).")
@options.source_options
@json_option
def memory(
    model: Path,
    ctx: int,
    parallel: int | None,
    kv_unified: bool,
    cache_type: str,
    cache_type_v: str | None,
    batch: int,
    ubatch: int,
    ngl: int,
    threads: int,
    no_mmap: bool,
    no_repack: bool,
    no_flash_attn: bool,
    swa_full: bool,
    mmproj: Path | None,
    eyes: Path | None,
    text_only: bool,
    source: Path | None,
    memory: str | None,
    unified: bool | None,
    pre: str | None,
    keep_mtp: bool,
    as_json: bool,
) -> None:
    """Predict the memory that MODEL takes in llama-server, by parts, and compare it with this device.

    MODEL is a GGUF, a plan.json (with --model SOURCE) or a Hugging Face directory; no weights are read. GB is 1e9
    bytes, GiB is 2^30.

    \b
    Example:
      mopeq-edge memory out.gguf --ctx 4096 --cache-type q8_0
    """
    from dataclasses import replace

    from mopeq_edge.cli.console import print_json
    from mopeq_edge.memory.advice import advise
    from mopeq_edge.memory.command import command_line
    from mopeq_edge.memory.device import probe
    from mopeq_edge.memory.predict import predict
    from mopeq_edge.memory.repack import this_cpu
    from mopeq_edge.memory.settings import CACHE_TYPES, Settings
    from mopeq_edge.memory.tower import tower_of_file
    from mopeq_edge.memory.verdict import judge, parse_memory
    from mopeq_edge.split import read_parts
    from mopeq_edge.vision.description import vision_beside
    from mopeq_edge.vision.mmproj import mmproj_beside

    settings = Settings(
        ctx=ctx,
        parallel=parallel,
        unified=True if kv_unified else None,
        cache_type_k=CACHE_TYPES[cache_type],
        cache_type_v=CACHE_TYPES[cache_type_v or cache_type],
        batch=batch,
        ubatch=ubatch,
        flash_attn=not no_flash_attn,
        mmap=not no_mmap,
        repack=not no_repack,
        swa_full=swa_full,
        gpu_layers=ngl,
        threads=threads,
    )
    found = replace(open_model(model, source, pre, keep_mtp), name=os.fspath(model))
    if mmproj is None and not text_only and mmproj_beside(model).is_file():
        mmproj = mmproj_beside(model)
    vision = read_parts(mmproj) if mmproj is not None else ()
    cpu = this_cpu()
    if eyes is None and not text_only and vision_beside(model).is_file():
        eyes = vision_beside(model)
    prediction = predict(found, settings, cpu, vision, tower_of_file(eyes) if eyes is not None else None)
    device = probe()
    limit = parse_memory(memory) if memory is not None else device.usable
    shared = bool(device.unified) if unified is None else unified
    gpu_free = device.gpus[0].free if device.gpus and memory is None else None
    verdict = judge(prediction, limit, gpu_free, unified=shared)
    levers: tuple[Lever, ...] = ()
    if verdict.missing and limit is not None:
        levers = advise(found, settings, cpu, limit, gpu_free=gpu_free, unified=shared)
    command = command_line(os.fspath(model), settings)
    if as_json:
        print_json(_as_dict(found, prediction, device, verdict, levers, command))
        return
    _print(found, settings, prediction, device, verdict, levers, command)


def open_model(path: Path, source: Path | None, pre: str | None, keep_mtp: bool = False) -> Model:
    """The model of a GGUF, a plan or a directory; only headers are read."""
    from mopeq_edge.errors import SourceError
    from mopeq_edge.memory.model import model_of_gguf, model_of_plan, model_of_source
    from mopeq_edge.split import read_parts
    from mopeq_edge.vision.mmproj import is_mmproj

    def as_stored(directory: Path) -> Source:
        # a GGUF needs no converters
        from mopeq_edge.pipeline import open_header

        return open_header(directory, pre=pre, keep_mtp=keep_mtp)

    if path.suffix == ".json":
        from mopeq_edge.plan.artifact import read_plan

        if source is None:
            found = [path.with_name(name) for name in ("converted.gguf", "source.gguf")]
            source = next((candidate for candidate in found if candidate.is_file()), None)
        if source is None:
            raise SourceError(f"{path}: a plan does not say how the model is built; give its source with --model")
        plan = read_plan(path)
        kvs = as_stored(source).kvs if source.is_dir() else read_parts(source)[0].kvs
        return model_of_plan(plan, kvs, str(path))
    if source is not None:
        raise SourceError(f"{path}: --model is for a plan.json; leave it out")
    if path.is_dir():
        return model_of_source(as_stored(path))
    parts = read_parts(path)
    if is_mmproj(parts[0]):
        raise SourceError(f"{path}: is no model but what sees pictures for one; give the model, and this with --mmproj")
    return model_of_gguf(parts)


def _as_dict(
    model: Model,
    prediction: Prediction,
    device: Device,
    verdict: Verdict,
    levers: tuple[Lever, ...],
    command: str,
) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "model": model.name,
        "file_bytes": model.file_bytes,
        "prediction": prediction.as_dict(),
        "device": device.as_dict(),
        "verdict": {**asdict(verdict), "ok": verdict.ok},
        "advice": [lever.as_dict() for lever in levers],
        "command": command,
    }


def _print(
    model: Model,
    settings: Settings,
    prediction: Prediction,
    device: Device,
    verdict: Verdict,
    levers: tuple[Lever, ...],
    command: str,
) -> None:
    from mopeq_edge.cli.console import print_table, rows_table
    from mopeq_edge.memory.predict import GPU, MAPPED

    where = {MAPPED: ", pages of files", GPU: ", on the GPU"}
    rows = [
        (f"{part.name}{where.get(part.place, '')}", both(part.nbytes) + (" (estimated)" if part.estimated else ""))
        for part in prediction.parts
    ]
    rows.append(("resident", both(prediction.host)))
    if prediction.peak > prediction.host:
        rows.append(("while loading", both(prediction.peak)))
    if prediction.tower:
        rows.append(("seeing, before the model is loaded", f"{both(prediction.tower)} (estimated)"))
    if prediction.droppable:
        rows.append(("needed", f"{both(prediction.needed)}, without pages that nothing reads again"))
    if prediction.gpu:
        rows.append(("on the GPU", both(prediction.gpu)))
    resolved = prediction.resolved
    shared = "shared" if resolved.unified else "each"
    cells = resolved.n_ctx if resolved.unified else resolved.n_ctx_seq
    print_table(rows_table(f"{model.name}: {resolved.n_seq} x {cells} tokens ({shared})", rows))
    device_rows = [
        (name, nothing if size is None else both(size))
        for name, size, nothing in (
            ("memory", device.total, "unknown"),
            ("available", device.available, "unknown"),
            ("limit of the control group", device.limit, "none known"),
            ("swap", device.swap_total, "unknown"),
            ("may be locked", device.locked_limit, "no limit known"),
        )
    ]
    for gpu in device.gpus:
        device_rows.append((gpu.name, "unknown" if gpu.total is None else both(gpu.total)))
    shared_memory = {True: "yes", False: "no", None: "unknown"}[device.unified]
    device_rows.append(("GPU shares the memory", shared_memory))
    print_table(rows_table(device.name or "this device", device_rows))
    limit = "an unknown limit" if verdict.limit is None else both(verdict.limit)
    word = click.style(verdict.word, fg="green" if verdict.ok else "red", bold=True)
    click.echo(f"{word}: {both(verdict.needed)} needed, {limit} to be had")
    if verdict.missing:
        click.echo(f"missing: {both(verdict.missing)}")
    for lever in levers:
        enough = "enough" if lever.fits else "not enough alone"
        click.echo(f"- {lever.what}: saves {both(lever.saves)}, {enough}\n    {lever.command}")
    if not verdict.missing:
        click.echo(command)


def both(n: int) -> str:
    """``n`` bytes in GB (1e9) and GiB (2^30), or in MB and MiB."""
    if n >= 10**9:
        return f"{n / 1e9:.2f} GB ({n / 2**30:.2f} GiB)"
    return f"{n / 1e6:.1f} MB ({n / 2**20:.1f} MiB)"
