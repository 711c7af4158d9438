"""The calibrate stage on a Hugging Face directory: windows of text and pictures in, statistics out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mopeq_edge.binding import Tokens
from mopeq_edge.calibrate.blocks import BlockModel
from mopeq_edge.calibrate.memory import return_large_blocks
from mopeq_edge.calibrate.modalities import Modalities
from mopeq_edge.calibrate.passes import backward, forward, one_torch_thread, output_sums
from mopeq_edge.calibrate.states import HiddenStates
from mopeq_edge.calibrate.statistics import TEXT, VISION, Tallies
from mopeq_edge.calibrate.tokens import token_windows
from mopeq_edge.calibrate.windows import Window, text_windows
from mopeq_edge.imatrix import EMBEDDING, LOOKUP
from mopeq_edge.progress import Progress
from mopeq_edge.sensitivity.pricing import Statistics
from mopeq_edge.source.huggingface import HuggingFaceSource
from mopeq_edge.source.model import Source


def calibrate_text(
    source: Source,
    text: str,
    dataset: str,
    *,
    n_ctx: int,
    chunks: int | None,
    fisher: bool,
    seed: int,
    threads: int,
    scratch: Path,
    progress: Progress,
) -> Statistics:
    """Cut ``text`` into at most ``chunks`` windows of ``n_ctx`` tokens and run :func:`calibrate` on them."""
    if not isinstance(source, HuggingFaceSource):
        raise TypeError(f"expected a Hugging Face checkpoint, got {source.kind}")
    windows = token_windows(source.kvs, text, n_ctx, chunks)
    return calibrate(
        source, windows, dataset, fisher=fisher, seed=seed, threads=threads, scratch=scratch, progress=progress
    )


def calibrate(
    source: HuggingFaceSource,
    windows: Tokens,
    dataset: str,
    *,
    fisher: bool,
    seed: int,
    threads: int,
    scratch: Path,
    progress: Progress,
) -> Statistics:
    """Statistics of text alone, ``windows`` [n_windows, n_ctx]; ``dataset`` names it. See :func:`calibrate_mixed`."""
    measured = calibrate_mixed(
        source,
        text_windows(windows),
        (dataset,),
        n_ctx=windows.shape[1],
        fisher=fisher,
        seed=seed,
        threads=threads,
        scratch=scratch,
        progress=progress,
    )
    return measured.statistics()


def calibrate_mixed(
    source: HuggingFaceSource,
    windows: Sequence[Window],
    datasets: tuple[str, ...],
    *,
    n_ctx: int,
    fisher: bool,
    seed: int,
    threads: int,
    scratch: Path,
    progress: Progress,
) -> Modalities:
    """Stream ``windows`` through the model block by block; what text and what pictures do is kept apart.

    ``datasets`` names what was read in the imatrix; ``fisher`` adds the backward pass, whose labels ``seed`` draws;
    ``scratch`` is a folder for states that do not fit in memory. The result does not depend on ``threads``.

    Labels are drawn where text is predicted. Positions of pictures have none, but what text behind them does with
    them: its gradient reaches them through attention, and says what an error there costs the text.
    """
    return_large_blocks()
    model = BlockModel(source)
    slots = model.n_layer + 1 if fisher else 1
    last = slots - 1
    states = HiddenStates(slots, [len(window) for window in windows], model.n_embd, scratch)
    ids = np.concatenate([window.tokens[~window.seen] for window in windows])
    try:
        with one_torch_thread():
            found = forward(model, windows, states, keep=fisher, threads=threads, progress=progress)
            first_seed = seed * len(windows) if fisher else None
            output = output_sums(model, windows, states, last, seed=first_seed, threads=threads, progress=progress)
            if fisher:
                gradients, embedding = backward(model, windows, states, threads=threads, progress=progress)
                _merge(found, gradients)
            _merge(found, output)
            if fisher:
                tied = model.output_name == EMBEDDING
                found[TEXT].gradient.add(LOOKUP if tied else EMBEDDING, 1, 0, embedding, len(ids))
    finally:
        states.close()
    return Modalities(
        tallies=found,
        n_tokens={TEXT: len(ids), VISION: sum(map(len, windows)) - len(ids)},
        token_counts=np.bincount(ids, minlength=model.n_vocab).astype(np.float64),
        datasets=datasets,
        n_windows=len(windows),
        n_ctx=n_ctx,
        n_pictures=sum(window.embeddings is not None for window in windows),
        fisher=fisher,
    )


def _merge(found: Tallies, further: Tallies) -> None:
    for kind, own in further.items():
        found[kind].merge(own)
