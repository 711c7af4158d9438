"""Run the source once and a target against it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mopeq_edge.binding import UBATCH, Floats, LlamaModel, Tokens, library_version
from mopeq_edge.errors import MopeqError
from mopeq_edge.evaluate.chunks import Positions, cut_text, first_counted, read_text
from mopeq_edge.evaluate.divergence import Divergence, PositionScores, compare, summarise
from mopeq_edge.evaluate.reference import ReferenceKey, ReferenceLogits, open_reference, write_reference
from mopeq_edge.progress import BYTES, Progress, SilentProgress, Step
from mopeq_edge.split import gguf_parts
from mopeq_edge.units import plural

FORMAT = 1
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Evaluation:
    """One target against one source: what was measured, and how.

    ``library`` is the llama.cpp that computed both, ``target_bytes`` the size of all the target's files, and
    ``kld_by_window`` [n_windows] the mean KLD of each window in nats.
    """

    target_name: str
    target_bytes: int
    source_name: str
    source_sha256: str
    text_sha256: str
    n_ctx: int
    n_windows: int
    positions: Positions
    library: str
    divergence: Divergence
    kld_by_window: tuple[float, ...]

    def as_dict(self) -> dict[str, object]:
        """Plain values with units in the names, sorted; the same input gives the same dictionary."""
        d = self.divergence
        values: dict[str, object] = {
            "format": FORMAT,
            "kld_max_nats": d.kld_max,
            "kld_mean_nats": d.kld_mean,
            "kld_mean_standard_error_nats": d.kld_mean_se,
            "kld_median_nats": d.kld_median,
            "kld_p99_9_nats": d.kld_p99_9,
            "kld_p99_nats": d.kld_p99,
            "library": self.library,
            "ln_ppl_ratio_nats": d.ln_ppl_ratio,
            "ln_ppl_ratio_standard_error_nats": d.ln_ppl_ratio_se,
            "positions": self.positions,
            "positions_count": d.n_positions,
            "ppl_source_per_token": d.ppl_base,
            "ppl_source_standard_error_per_token": d.ppl_base_se,
            "ppl_target_per_token": d.ppl_target,
            "ppl_target_standard_error_per_token": d.ppl_target_se,
            "same_top_fraction": d.same_top,
            "same_top_standard_error_fraction": d.same_top_se,
            "source": self.source_name,
            "source_sha256": self.source_sha256,
            "target": self.target_name,
            "target_bytes": self.target_bytes,
            "text_sha256": self.text_sha256,
            "window_count": self.n_windows,
            "window_tokens": self.n_ctx,
        }
        return dict(sorted(values.items()))


def make_reference(
    source_gguf: Path,
    text: Path,
    work_dir: Path,
    *,
    n_ctx: int = 512,
    n_chunks: int | None = None,
    positions: Positions = "second-half",
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
    source_sha256: str | None = None,
    progress: Progress | None = None,
) -> ReferenceLogits:
    """The logits of ``source_gguf`` on ``text``, from ``work_dir`` if they are there, else computed.

    Windows of ``n_ctx`` tokens, the first ``n_chunks`` or all; ``positions`` are the ones that are kept.
    ``source_sha256`` spares reading the file again if the caller knows it. Raises :class:`MopeqError` for
    a text or a model that cannot serve, :class:`OutputError` if the logits do not fit on the disk.
    """
    progress = progress or SilentProgress()
    words = read_text(text)
    key = ReferenceKey(
        source_sha256=source_sha256 or gguf_sha256(source_gguf, progress),
        text_sha256=hashlib.sha256(words.encode()).hexdigest(),
        n_ctx=n_ctx,
        n_chunks=n_chunks,
        positions=positions,
        library=library_version(),
    )
    known = open_reference(work_dir, key)
    if known is not None:
        return known
    # Cut before the weights are loaded: a text that is too short should not cost minutes.
    with LlamaModel(source_gguf, vocab_only=True) as vocabulary:
        tokens = _cut(vocabulary, text, words, n_ctx, n_chunks)
        n_vocab = vocabulary.n_vocab
    if n_chunks is not None and len(tokens) < n_chunks:
        progress.note(f"{text}: has {plural(len(tokens), 'window')} of {n_ctx} tokens, {n_chunks} were asked for")
    with (
        _open(source_gguf, n_ctx, n_threads, n_gpu_layers, progress) as model,
        progress.step("running the source", len(tokens), "windows") as step,
    ):
        rows = _rows(model, tokens, first_counted(n_ctx, positions), step)
        return write_reference(work_dir, key, source_gguf.name, tokens, n_vocab, rows)


def evaluate(
    target: Path,
    reference: ReferenceLogits,
    *,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
    positions: Positions = "second-half",
    progress: Progress | None = None,
) -> Evaluation:
    """Run ``target`` on the reference's tokens and compare.

    Raises :class:`MopeqError` if the target has another vocabulary, gives logits that are no numbers, or
    ``positions`` asks for more than the reference holds.
    """
    progress = progress or SilentProgress()
    key = reference.key
    first = first_counted(key.n_ctx, positions)
    if first < reference.first:
        raise MopeqError(
            f"{reference.folder}: holds the positions '{key.positions}', '{positions}' were asked for; "
            f"make a reference of '{positions}'"
        )
    scores = []
    with _open(target, key.n_ctx, n_threads, n_gpu_layers, progress) as model:
        if model.n_vocab != reference.n_vocab:
            raise MopeqError(
                f"{target}: has {model.n_vocab} tokens in its vocabulary, expected {reference.n_vocab} as in "
                f"{reference.source_name}; evaluate it against the model it was made from"
            )
        with progress.step("running the target", reference.n_windows, "windows") as step:
            # The reference's first row, not ours: which rows are asked for must not differ between the two.
            windows = _rows(model, reference.tokens, reference.first, step)
            for index, logits in enumerate(windows):
                scores.append(_compare(reference, index, logits, first))
                _check_finite(target, reference.source_name, index, scores[-1])
    return Evaluation(
        target_name=target.name,
        target_bytes=sum(part.stat().st_size for part in gguf_parts(target)),
        source_name=reference.source_name,
        source_sha256=key.source_sha256,
        text_sha256=key.text_sha256,
        n_ctx=key.n_ctx,
        n_windows=reference.n_windows,
        positions=positions,
        library=library_version(),
        divergence=summarise(scores),
        kld_by_window=tuple(float(window.kld.mean()) for window in scores),
    )


def gguf_sha256(path: Path, progress: Progress | None = None) -> str:
    """SHA-256 in hex of a GGUF's bytes, the parts of a split one in order.

    Raises :class:`MopeqError` if a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        parts = gguf_parts(path)
        total = sum(part.stat().st_size for part in parts)
        with (progress or SilentProgress()).step(f"hashing {path.name}", total, BYTES) as step:
            for part in parts:
                with part.open("rb") as file:
                    while block := file.read(_READ_BYTES):
                        digest.update(block)
                        step.advance(len(block))
    except OSError as error:
        raise MopeqError(f"{error.filename or path}: cannot be read ({error.strerror}); give a GGUF file") from None
    return digest.hexdigest()


def _cut(vocabulary: LlamaModel, text: Path, words: str, n_ctx: int, n_chunks: int | None) -> Tokens:
    try:
        return cut_text(vocabulary, words, n_ctx, n_chunks)
    except MopeqError as error:
        raise MopeqError(f"{text}: {error}") from None


def _open(path: Path, n_ctx: int, n_threads: int | None, n_gpu_layers: int, progress: Progress) -> LlamaModel:
    model = LlamaModel(path, n_ctx=n_ctx, n_batch=min(n_ctx, UBATCH), n_threads=n_threads, n_gpu_layers=n_gpu_layers)
    if n_ctx > model.n_ctx_train:
        progress.note(f"{path}: was trained on {model.n_ctx_train} tokens of context, the windows have {n_ctx}")
    return model


def _rows(model: LlamaModel, tokens: Tokens, first: int, step: Step) -> Iterator[Floats]:
    """Logits [n_rows, n_vocab] of each window, without the last position, which has no next token."""
    for index, window in enumerate(tokens):
        rows = model.logits(window, first)[:-1]
        if np.isnan(rows).any():
            raise MopeqError(f"{model.path}: gives logits that are no numbers in window {index}; the file is broken")
        yield rows
        step.advance()


def _compare(reference: ReferenceLogits, index: int, logits: Floats, first: int) -> PositionScores:
    n_ctx = reference.key.n_ctx
    skip = first - reference.first
    base = np.asarray(reference.logits[index, skip:])
    return compare(base, logits[skip:], reference.tokens[index, first + 1 : n_ctx])


def _check_finite(target: Path, source_name: str, index: int, scores: PositionScores) -> None:
    bad = ~(np.isfinite(scores.kld) & np.isfinite(scores.nll_base) & np.isfinite(scores.nll_target))
    if bad.any():
        raise MopeqError(
            f"{target}: cannot be compared with {source_name} in window {index} ({int(bad.sum())} positions have "
            "infinite logits); check that both files are whole"
        )
