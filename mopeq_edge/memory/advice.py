"""What to do when a model does not fit: each lever, what it saves, and the command line that pulls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from mopeq_edge.errors import MopeqError
from mopeq_edge.memory.command import command_line
from mopeq_edge.memory.fits import file_budget
from mopeq_edge.memory.model import Model
from mopeq_edge.memory.predict import Prediction, predict
from mopeq_edge.memory.repack import Cpu
from mopeq_edge.memory.settings import CACHE_TYPES, CONTEXT_STEP, Settings
from mopeq_edge.memory.verdict import judge

SMALLEST_CONTEXT = 512


@dataclass(frozen=True)
class Lever:
    """One change. ``saves``: bytes of needed host memory. ``fits``: whether it is enough by itself.

    ``command`` is llama.cpp's command line, or mopeq-edge's for a smaller file.
    """

    what: str
    saves: int
    fits: bool
    command: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def advise(
    model: Model, settings: Settings, cpu: Cpu, limit: int, *, gpu_free: int | None = None, unified: bool = False
) -> tuple[Lever, ...]:
    """Levers that save something, the largest saving first; those that are enough come first.

    ``limit`` are the bytes of host memory to fit, ``gpu_free`` those of a GPU with memory of its own.
    """
    now = predict(model, settings, cpu)
    levers = []
    for what, changed in _changes(model, settings, cpu, limit, gpu_free, unified):
        try:
            then = predict(model, changed, cpu)
        except MopeqError:
            continue
        saves = _needed(now, unified) - _needed(then, unified)
        if saves > 0:
            ok = judge(then, limit, gpu_free, unified=unified).ok
            levers.append(Lever(what, saves, ok, command_line(model.name, changed)))
    levers += _smaller_file(model, settings, cpu, limit, now)
    return tuple(sorted(levers, key=lambda lever: (not lever.fits, -lever.saves)))


def _needed(found: Prediction, unified: bool) -> int:
    return found.needed + (found.gpu if unified else 0)


def _changes(
    model: Model, settings: Settings, cpu: Cpu, limit: int, gpu_free: int | None, unified: bool
) -> Iterator[tuple[str, Settings]]:
    def fits(changed: Settings) -> bool:
        return judge(predict(model, changed, cpu), limit, gpu_free, unified=unified).ok

    context = _largest_context(model, settings, fits)
    if context is not None:
        yield (
            f"a context of {context} instead of {settings.ctx or model.hparams.n_ctx_train}",
            replace(settings, ctx=context),
        )
    for name in ("q8_0", "q4_0"):
        kind = CACHE_TYPES[name]
        yield f"the KV cache in {name}", replace(settings, cache_type_k=kind, cache_type_v=kind)
    if settings.parallel is None or settings.parallel > 1:
        yield "one slot", replace(settings, parallel=1, unified=None)
    if settings.ubatch > 128:
        yield "batches of 128 tokens (slower prompts)", replace(settings, ubatch=128)
    if settings.repack:
        yield "no copies of weights in another order (slower)", replace(settings, repack=False)
    if settings.mmap:
        yield "weights read instead of mapped", replace(settings, mmap=False)
    if gpu_free is not None and not unified:
        layers = _most_layers(model, settings, cpu, gpu_free)
        if layers > settings.gpu_layers:
            yield f"{layers} of {model.hparams.n_layer + 1} layers on the GPU", replace(settings, gpu_layers=layers)
    small = CACHE_TYPES["q8_0"]
    together = replace(settings, parallel=1, unified=None, ubatch=128, cache_type_k=small, cache_type_v=small)
    yield "one slot, batches of 128 tokens and a cache in q8_0", together
    context = _largest_context(model, together, fits)
    if context is not None and not fits(together):
        yield (
            f"one slot, batches of 128 tokens, a cache in q8_0 and a context of {context}",
            replace(together, ctx=context),
        )


def _largest_context(model: Model, settings: Settings, fits: Callable[[Settings], bool]) -> int | None:
    """The largest context below the one asked for that fits, in llama.cpp's steps; None if the smallest does not."""
    asked = settings.ctx or model.hparams.n_ctx_train
    low, high = SMALLEST_CONTEXT // CONTEXT_STEP, (asked - 1) // CONTEXT_STEP
    if high < low or not fits(replace(settings, ctx=low * CONTEXT_STEP)):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if fits(replace(settings, ctx=middle * CONTEXT_STEP)):
            low = middle
        else:
            high = middle - 1
    return low * CONTEXT_STEP


def _most_layers(model: Model, settings: Settings, cpu: Cpu, gpu_free: int) -> int:
    most = settings.gpu_layers
    for layers in range(settings.gpu_layers + 1, model.hparams.n_layer + 2):
        if predict(model, replace(settings, gpu_layers=layers), cpu).gpu > gpu_free:
            break
        most = layers
    return most


def _smaller_file(model: Model, settings: Settings, cpu: Cpu, limit: int, now: Prediction) -> list[Lever]:
    if settings.gpu_layers > 0:
        return []
    try:
        found = file_budget(model, settings, cpu, limit)
    except MopeqError:
        return []
    saves = model.file_bytes - found.budget
    if saves <= 0:
        return []
    return [
        Lever(
            f"a file of {found.budget:,} bytes instead of {model.file_bytes:,}",
            saves,
            True,
            f"mopeq-edge convert SOURCE OUT.gguf --target-gb {found.budget // 10**6 / 1000:.3f}",
        )
    ]
