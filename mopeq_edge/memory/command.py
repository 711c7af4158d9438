"""llama.cpp's command line for settings."""

from __future__ import annotations

import shlex

from mopeq_edge.memory.settings import SERVER, Settings


def arguments(settings: Settings) -> list[str]:
    """Options of llama.cpp's programs that say the same as ``settings``; defaults are left out."""
    found = ["--ctx-size", str(settings.ctx)] if settings.ctx else []
    if settings.parallel is not None:
        found += ["--parallel", str(settings.parallel)]
        if settings.unified:
            found += ["--kv-unified"]
    default = Settings()
    for option, value, usual in (
        ("--cache-type-k", settings.cache_type_k, default.cache_type_k),
        ("--cache-type-v", settings.cache_type_v, default.cache_type_v),
    ):
        if value is not usual:
            found += [option, value.name.lower()]
    for option, number, usual_number in (
        ("--batch-size", settings.batch, default.batch),
        ("--ubatch-size", settings.ubatch, default.ubatch),
    ):
        if number != usual_number:
            found += [option, str(number)]
    # said in any case: where there is a GPU, llama.cpp puts on it what it has room for
    found += ["--gpu-layers", str(settings.gpu_layers), "--threads", str(settings.threads)]
    if not settings.flash_attn:
        found += ["--flash-attn", "off"]
    if not settings.mmap:
        found += ["--load-mode", "none"]
    if not settings.repack:
        found += ["--no-repack"]
    if settings.swa_full:
        found += ["--swa-full"]
    return found


def command_line(model: str, settings: Settings) -> str:
    """The whole line for a shell. Without a prompt cache, which would grow to 8 GiB beside the prediction."""
    own = ["--cache-ram", "0"] if settings.program == SERVER else []
    return shlex.join([settings.program, "-m", model, *arguments(settings), *own])
