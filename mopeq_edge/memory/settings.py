"""How llama.cpp is started: what decides about memory, and the numbers that it makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mopeq_edge.errors import MopeqError
from mopeq_edge.ggml.types import BY_NAME, F16, GgmlType
from mopeq_edge.gguf_file import pad
from mopeq_edge.memory.model import Hyperparameters

CONTEXT_STEP = 256
"""llama.cpp rounds the context of a sequence up to a multiple of this."""

SERVER, COMPLETION = "llama-server", "llama-completion"
PROGRAMS = (SERVER, COMPLETION)

CACHE_TYPES: Mapping[str, GgmlType] = {
    name.lower(): BY_NAME[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "IQ4_NL", "Q5_0", "Q5_1")
}

AUTO_SLOTS = 4
"""Slots of llama-server without ``--parallel``; they share one cache."""


@dataclass(frozen=True)
class Settings:
    """The options of llama.cpp that decide about memory, with its defaults.

    ``ctx`` is 0 for the context that the model was trained with. ``parallel`` is None for the program's default:
    4 slots that share one cache in llama-server, 1 elsewhere. ``gpu_layers`` counts as llama.cpp does: the layers and,
    one more, the output.
    """

    ctx: int = 0
    parallel: int | None = None
    unified: bool | None = None
    cache_type_k: GgmlType = F16
    cache_type_v: GgmlType = F16
    batch: int = 2048
    ubatch: int = 512
    flash_attn: bool = True
    mmap: bool = True
    repack: bool = True
    swa_full: bool = False
    gpu_layers: int = 0
    threads: int = 1
    program: str = SERVER


@dataclass(frozen=True)
class Resolved:
    """What llama.cpp makes of :class:`Settings` for one model.

    ``n_ctx`` are all cells of the cache, ``n_ctx_seq`` those of one stream; ``n_tokens`` is the batch for which the
    graph is reserved and ``n_outputs`` how many of its tokens have logits.
    """

    n_ctx: int
    n_ctx_seq: int
    n_seq: int
    unified: bool
    n_batch: int
    n_ubatch: int
    n_tokens: int
    n_outputs: int

    @property
    def n_stream(self) -> int:
        """Parts of the cache that do not share cells."""
        return 1 if self.unified else self.n_seq


def resolve(settings: Settings, hparams: Hyperparameters) -> Resolved:
    """The padded and clamped numbers. Raises :class:`MopeqError` for settings that llama.cpp refuses."""
    if settings.cache_type_v.is_quantized and not settings.flash_attn:
        raise MopeqError(
            f"--cache-type-v {settings.cache_type_v.name.lower()}: a quantized V cache needs flash attention; "
            "leave out --no-flash-attn, or use f16"
        )
    if hparams.is_mla and settings.cache_type_k is not settings.cache_type_v:
        raise MopeqError(
            f"--cache-type-v {settings.cache_type_v.name.lower()}: V is a part of K in this model (MLA), expected the "
            f"type of K, {settings.cache_type_k.name.lower()}; leave out --cache-type-v"
        )
    for option, kind, head in (
        ("--cache-type", settings.cache_type_k, hparams.head_k),
        ("--cache-type-v", settings.cache_type_v, hparams.head_v),
    ):
        if settings.flash_attn and not kind.fits(head):
            raise MopeqError(
                f"{option} {kind.name.lower()}: heads of {head} values are not whole blocks of {kind.block_size}; "
                "use f16"
            )
    asked = settings.ctx or hparams.n_ctx_train
    if asked <= 0:
        raise MopeqError("--ctx: the model does not say what context it was trained with; give a number")
    server = settings.program == SERVER
    n_seq = settings.parallel or (AUTO_SLOTS if server else 1)
    unified = settings.unified if settings.unified is not None else server and settings.parallel is None
    n_batch = min(asked, settings.batch)
    n_ubatch = min(n_batch, settings.ubatch or settings.batch)
    n_ctx = pad(asked, CONTEXT_STEP)
    n_ctx_seq = n_ctx if unified else pad(n_ctx // n_seq, CONTEXT_STEP)
    n_ctx = n_ctx if unified else n_ctx_seq * n_seq
    n_tokens = pad(min(n_ctx, n_ubatch), n_seq)
    n_outputs_max = min(n_seq, n_batch) if server else n_batch
    return Resolved(
        n_ctx, n_ctx_seq, n_seq, unified, n_batch, n_ubatch, n_tokens, min(min(n_ctx, n_ubatch), n_outputs_max)
    )
