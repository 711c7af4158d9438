"""Options that several commands share, and how they become requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from mopeq_edge.cli.console import FILE

if TYPE_CHECKING:
    from mopeq_edge.engine.interface import Engine
    from mopeq_edge.pipeline_calibrate import CalibrationRequest
    from mopeq_edge.pipeline_fits import FitsRequest
    from mopeq_edge.pipeline_pictures import PicturesRequest
    from mopeq_edge.plan.budget import Budget
    from mopeq_edge.plan.options import PlanOptions
    from mopeq_edge.progress import Progress
    from mopeq_edge.sensitivity.sample import SampleRows
    from mopeq_edge.source.remote import ModelURL

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
"""llama.cpp's, of the KV cache."""

F = TypeVar("F", bound=Callable[..., Any])

CALIBRATION_NAME = "calibration.txt"
"""A text of this name beside a checkpoint is calibrated on when no other is given."""


def _stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def work_option(command: F) -> F:
    """``--work-dir``."""
    return click.option(
        "--work-dir",
        type=FILE,
        help="Directory that keeps the artifacts (default: MODEL.mopeq here; convert: OUT.mopeq beside OUT).",
    )(command)


source_options = _stack(
    click.option("--pre", help="Name of the pre-tokenizer (tokenizer.ggml.pre), if it is not recognised."),
    click.option(
        "--keep-mtp", is_flag=True, help="Keep the blocks of a DeepSeek-V3 that predict further tokens (MTP, NextN)."
    ),
)
"""``--pre`` and ``--keep-mtp``: how a MODEL is read."""


calibration_options = _stack(
    click.option("--text", type=FILE, help="Text to calibrate on (default: calibration.txt in MODEL)."),
    click.option("--imatrix", type=FILE, help="Use this imatrix of llama-imatrix instead of calibrating."),
    click.option("--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of one window."),
    click.option(
        "--chunks", type=click.IntRange(min=1), default=128, show_default=True, help="Windows to read, at most."
    ),
    click.option(
        "--fisher/--no-fisher", default=None, help="Also the gradient-weighted imatrix (default: for a checkpoint)."
    ),
    click.option("--seed", type=int, default=1, show_default=True, help="Draws labels and probes."),
    click.option(
        "--images", type=FILE, help="Also calibrate on the pictures of this folder, each with the text of its NAME.txt."
    ),
    click.option("--max-images", type=click.IntRange(min=1), default=32, show_default=True, help="Pictures, at most."),
    click.option(
        "--vision-weight",
        default="0.5",
        show_default=True,
        help="Share of the pictures' tokens in all statistics, 0 to 1, or tokens: as many as there are.",
    ),
    click.option(
        "--trace", is_flag=True, help="Also Hessian traces for --sensitivity trace: two more passes for each probe."
    ),
    click.option("--probes", type=click.IntRange(min=2), default=8, show_default=True, help="Probes of --trace."),
    click.option(
        "--trace-chunks", type=click.IntRange(min=1), default=8, show_default=True, help="Windows of --trace, at most."
    ),
)


engine_options = _stack(
    click.option(
        "--engine",
        "engine_name",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Who computes: this process, or the machines of a Ray cluster.",
    ),
    click.option(
        "--address",
        envvar="RAY_ADDRESS",
        help="--engine ray: the cluster's HOST:PORT, or auto (default: $RAY_ADDRESS, or this machine alone).",
    ),
)


@contextmanager
def engine(given: Mapping[str, Any], progress: Progress) -> Iterator[Engine | None]:
    """What ``--engine`` asks for, as long as the block runs; None for this process."""
    from mopeq_edge.errors import ClusterError

    if given["engine_name"] == "local":
        # $RAY_ADDRESS is no request
        source = click.get_current_context().get_parameter_source("address")
        if source is ParameterSource.COMMANDLINE:
            raise ClusterError(
                f"--address {given['address']}: belongs to --engine ray; add it, or leave the address out"
            )
        yield None
        return
    from mopeq_edge.engine.ray import connected

    with connected(given["address"], progress.note) as found:
        yield found


def split_option(command: F) -> F:
    """``--split-max-size``."""
    return click.option(
        "--split-max-size", help="Split OUT into files of at most so many bytes (K, M, G: powers of 1000)."
    )(command)


def split_bytes(given: Mapping[str, Any]) -> int | None:
    """Bytes of ``--split-max-size``, None without."""
    from mopeq_edge.split import parse_size

    return None if given.get("split_max_size") is None else parse_size(given["split_max_size"])


budget_options = _stack(
    click.option("--target-gb", type=float, help="Most bytes that the device loads, in GB (1e9 bytes)."),
    click.option("--target-gib", type=float, help="Most bytes that the device loads, in GiB (2^30 bytes)."),
    click.option("--target-bpw", type=float, help="Most bits per weight of the GGUF, as llama.cpp counts them."),
    click.option("--fits", help="Instead: memory that llama.cpp may take with the next options, e.g. 6GiB."),
    click.option("--ctx", type=click.IntRange(min=1), help="--fits: tokens of context."),
    click.option("--parallel", type=click.IntRange(min=1), help="--fits: llama-server's slots (default: 1)."),
    click.option("--cache-type", type=click.Choice(CACHE_TYPES), help="--fits: type of K and V (default: f16)."),
    click.option("--ngl", type=click.IntRange(min=0), help="--fits: layers on a GPU that shares the memory."),
)

vision_options = _stack(
    click.option(
        "--vision-type",
        type=click.Choice(["F16", "F32", "INT8", "BF16", "Q8_0"]),
        default="F16",
        show_default=True,
        help="Type of the matrices that see pictures, in OUT's .vision.onnx (F16, F32, INT8) or, where llama.cpp sees "
        "with the model, in mmproj-OUT (F16, F32, BF16, Q8_0); they are part of the budget.",
    ),
    click.option("--text-only", is_flag=True, help="Leave out what sees pictures."),
    click.option(
        "--beside",
        "beside",
        type=FILE,
        multiple=True,
        help="Another file that the device loads (a draft model, say): its bytes are part of the budget.",
    ),
)
"""``--vision-type``, ``--text-only`` and ``--beside``: what a device loads beside the GGUF."""


_FITS = ("ctx", "parallel", "cache_type", "ngl")
"""Options that belong to ``--fits``."""

plan_options = _stack(
    click.option(
        "--sensitivity",
        type=click.Choice(
            ["auto", "fisher", "fisher-trace", "imatrix", "weight-mse", "mopeq", "frequency", "hybrid", "trace"]
        ),
        default="auto",
        show_default=True,
        metavar="SCORE",
        help="What prices errors: fisher, fisher-trace, imatrix, weight-mse, mopeq, frequency, hybrid or trace. "
        "auto is fisher-trace with --trace, else fisher; for a GGUF imatrix; for --planner mopeq mopeq.",
    ),
    click.option("--types", default="default", show_default=True, help="Candidate types: default, k, all, or a list."),
    click.option(
        "--pad-experts",
        type=click.Choice(["auto", "never", "always"]),
        default="auto",
        show_default=True,
        help="Pad experts to a multiple of 256 with zeros, so that down matrices take 2- and 3-bit types.",
    ),
    click.option("--floor", "floors", multiple=True, help="ROLE=TYPE or ROLE=BITS: least type of a role."),
    click.option(
        "--layout",
        type=click.Choice(["stock", "per-expert"]),
        help="One type for each stack of experts (the default; runs in any llama.cpp), or for each expert.",
    ),
    click.option(
        "--planner",
        type=click.Choice(["knapsack", "mopeq"]),
        default="knapsack",
        show_default=True,
        help="Least damage within the budget, or the paper's 2, 3 or 4 bit for every expert, with or without one.",
    ),
    click.option(
        "--scope",
        type=click.Choice(["layer", "model"]),
        help="--planner mopeq: cluster the experts of each layer, or of the model (the default).",
    ),
    click.option("--bits", help="--planner mopeq: types of its precisions (default: 2=Q2_K,3=Q3_K,4=Q4_K)."),
)


def _rows(context: click.Context, option: click.Parameter, value: str) -> SampleRows:
    """``auto``, ``all`` (None) or a number of rows, two or more."""
    if value == "auto":
        return "auto"
    if value == "all":
        return None
    if not value.isdecimal() or int(value) < 2:
        raise click.BadParameter(f"'{value}' is neither auto, all nor a number from 2")
    return int(value)


_sample_rows = click.option(
    "--sample-rows",
    callback=_rows,
    metavar="[auto|all|N]",
    default="auto",
    show_default=True,
    help="Rows measured of each expert, 8 times that of other matrices. auto: 16, and up to 128 until the standard "
    "error of its damage is at most 5 %; all rows of small tensors.",
)


def _quantize_with(choices: tuple[str, ...], what: str) -> Callable[[F], F]:
    return click.option("--quantize-with", type=click.Choice(choices), default="auto", show_default=True, help=what)


measure_options = _stack(
    _sample_rows,
    _quantize_with(
        ("auto", "activation", "gradient"),
        "Imatrix that weighs the quantizer; convert measures which is better.",
    ),
)
sensitivity_options = _stack(
    _sample_rows,
    click.option(
        "--rows-only",
        is_flag=True,
        help="Read no rows but those that --sample-rows measures: minutes for hundreds of GB, and larger "
        "errors from the same rows. S(e) of --sensitivity mopeq is then an estimate too.",
    ),
    _quantize_with(
        ("auto", "activation", "gradient", "none"),
        "Imatrix that weighs the quantizer; none needs no calibration, for --sensitivity weight-mse or mopeq.",
    ),
)


def budget(given: Mapping[str, Any]) -> Budget | None:
    """What the ``--target-…`` options ask for; None with ``--fits`` and where the planner needs none."""
    from mopeq_edge.errors import PlanError
    from mopeq_edge.plan.budget import Budget

    targets = [given[name] for name in ("target_gb", "target_gib", "target_bpw")]
    if given["fits"] is None:
        for name in _FITS:
            if given[name] is not None:
                option = name.replace("_", "-")
                raise PlanError(f"--{option} {given[name]}: belongs to --fits; add --fits SIZE, or leave it out")
    elif targets != [None] * 3:
        raise PlanError("--fits: takes the place of --target-gb, --target-gib and --target-bpw; give one of them")
    if targets == [None] * 3 and (given["fits"] is not None or given["planner"] == "mopeq"):
        return None
    return Budget(*targets)


def fits_request(given: Mapping[str, Any]) -> FitsRequest | None:
    """What ``--fits`` and its options ask for; None without. Raises :class:`PlanError` for no context."""
    from mopeq_edge.errors import PlanError
    from mopeq_edge.memory import settings
    from mopeq_edge.memory.verdict import parse_memory
    from mopeq_edge.pipeline_fits import FitsRequest

    if given["fits"] is None:
        return None
    if given["ctx"] is None:
        raise PlanError(f"--fits {given['fits']}: expected the context that it has to hold, found none; give --ctx N")
    kind = settings.CACHE_TYPES[given["cache_type"] or "f16"]
    wanted = settings.Settings(
        ctx=given["ctx"],
        parallel=given["parallel"] or 1,
        cache_type_k=kind,
        cache_type_v=kind,
        gpu_layers=given["ngl"] or 0,
        threads=given["threads"],
    )
    return FitsRequest(parse_memory(given["fits"]), wanted)


def plan_request(given: Mapping[str, Any]) -> PlanOptions:
    """What the options of :data:`plan_options` ask for. A sensitivity of ``auto`` stays so for the knapsack."""
    from mopeq_edge.errors import PlanError
    from mopeq_edge.plan.candidates import parse_floors, parse_types
    from mopeq_edge.plan.options import PER_MODEL, MapOptions, PlanOptions, parse_bits

    sensitivity, types, floors = given["sensitivity"], parse_types(given["types"]), parse_floors(given["floors"])
    if given["planner"] == "knapsack":
        for name in ("scope", "bits"):
            if given[name] is not None:
                raise PlanError(f"--{name} {given[name]}: belongs to --planner mopeq; add that, or leave it out")
        layout, padding = given["layout"] or "stock", given["pad_experts"]
        return PlanOptions(sensitivity, types, floors, layout, split_bytes=split_bytes(given), pad_experts=padding)
    asked = MapOptions(given["scope"] or PER_MODEL, parse_bits(given["bits"] or ""))
    # one measurement serves both planners
    every = tuple(sorted({*types, *asked.types}, key=lambda kind: (kind.bpw, kind.name)))
    paper = "mopeq" if sensitivity == "auto" else sensitivity
    layout = given["layout"] or "per-expert"
    return PlanOptions(paper, every, floors, layout, asked, split_bytes(given), given["pad_experts"])


def calibration_text(model: Path | ModelURL, text: Path | None, imatrix: Path | None) -> Path | None:
    """The text to calibrate on: the given one, the one beside the checkpoint, or None for an imatrix."""
    if text is not None or imatrix is not None or not isinstance(model, Path):
        return text
    beside = (model if model.is_dir() else model.parent) / CALIBRATION_NAME
    return beside if beside.is_file() else None


def check_before_script(model: Path | ModelURL, given: Mapping[str, Any], *texts: Path | None) -> None:
    """Raise for what could not be calibrated once llama.cpp's script has made a GGUF of ``model``.

    The first of ``texts`` is that to calibrate on.
    """
    from mopeq_edge.errors import CalibrationError
    from mopeq_edge.evaluate.chunks import read_text

    if given["trace"] or (given["fisher"] and given["imatrix"] is None):
        raise CalibrationError(
            f"{model}: gradients need an architecture that we have a converter for, and this one goes through a GGUF; "
            "leave out --fisher and --trace and use --sensitivity imatrix"
        )
    if given["images"] is not None:
        raise CalibrationError(
            f"{model}: --images needs a model whose vision side is known here, a DeepSeek-VL2 or MolmoE; leave it out"
        )
    if texts[0] is None and given["imatrix"] is None:
        raise CalibrationError(f"{model}: no text to calibrate on; give --text FILE or --imatrix FILE")
    for text in texts:
        if text is not None:
            read_text(text)


def calibration_request(
    has_gradients: bool, text: Path | None, words: str, given: Mapping[str, Any]
) -> CalibrationRequest:
    """What the options of :data:`calibration_options` ask for, with the ``words`` of ``text``.

    ``has_gradients``: the model can give the gradient-weighted imatrix, so it is made by default.
    """
    from mopeq_edge.pipeline_calibrate import CalibrationRequest, TraceRequest

    wanted = has_gradients if given["fisher"] is None else given["fisher"]
    return CalibrationRequest(
        text=words,
        dataset=text.name if text is not None else "",
        n_ctx=given["window"],
        chunks=given["chunks"],
        fisher=wanted and given["imatrix"] is None,
        seed=given["seed"],
        imatrix=given["imatrix"],
        trace=TraceRequest(given["trace_chunks"], given["probes"]) if given["trace"] else None,
        pictures=_pictures_request(given),
    )


def _pictures_request(given: Mapping[str, Any]) -> PicturesRequest | None:
    from mopeq_edge.errors import CalibrationError
    from mopeq_edge.pipeline_pictures import PicturesRequest

    if given["images"] is None:
        return None
    said = given["vision_weight"]
    try:
        weight = None if said == "tokens" else float(said)
    except ValueError:
        weight = -1.0
    if weight is not None and not 0 <= weight <= 1:
        raise CalibrationError(f"--vision-weight {said}: expected a share from 0 to 1, or tokens")
    return PicturesRequest(given["images"], given["max_images"], weight)


def work_directory(work_dir: Path | None, model: Path | ModelURL) -> Path:
    """The given directory, or ``MODEL.mopeq`` in the current one: a model's own folder may be read-only."""
    if work_dir is not None:
        return work_dir
    name = model.resolve().name if isinstance(model, Path) else model.name
    return Path(f"{name.removesuffix('.gguf')}.mopeq")


def work_directory_of_output(work_dir: Path | None, out: Path) -> Path:
    """The given directory, or ``OUT.mopeq`` beside the output."""
    return work_dir if work_dir is not None else out.with_name(f"{out.name.removesuffix('.gguf')}.mopeq")
