"""The calibrate stage on a GGUF: llama-imatrix of the installed llama.cpp does the work. No torch."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from mopeq_edge.calibrate.statistics import routing_from_imatrix
from mopeq_edge.calibrate.tokens import token_windows
from mopeq_edge.errors import MopeqError
from mopeq_edge.imatrix import Imatrix, read_imatrix, split_stacks
from mopeq_edge.progress import Progress
from mopeq_edge.runtime.tools import run_tool
from mopeq_edge.sensitivity.pricing import Statistics
from mopeq_edge.source.model import Source
from mopeq_edge.source.roles import Role


def calibrate_gguf(
    source: Source, text: str, dataset: str, *, n_ctx: int, chunks: int | None, threads: int, progress: Progress
) -> Statistics:
    """Activation statistics of ``text`` through the GGUF; gradients need the Hugging Face checkpoint."""
    windows = token_windows(source.kvs, text, n_ctx, chunks)
    with tempfile.TemporaryDirectory(prefix="mopeq-edge-") as folder, progress.step("llama-imatrix", None):
        text_file, output = Path(folder) / "text.txt", Path(folder) / "imatrix.gguf"
        text_file.write_text(text, encoding="utf-8")
        options = ["-m", str(source.path), "-f", str(text_file), "-o", str(output), "-c", str(n_ctx)]
        options += ["--chunks", str(len(windows)), "--no-ppl", "-t", str(threads), "--process-output"]
        try:
            run_tool("llama-imatrix", options)
            made = split_stacks(read_imatrix(output), {t.name: t.n_matrices for t in source.tensors})
        except MopeqError:
            _read_all(source)
            raise
    imatrix = Imatrix(made.entries, (dataset,), made.chunk_count, made.chunk_size, unrouted=made.unrouted)
    n_vocab = next(t for t in source.tensors if t.role is Role.EMBEDDING).n_out
    counts = np.bincount(windows.reshape(-1), minlength=n_vocab).astype(np.float64)
    return Statistics(activation=imatrix, routing=routing_from_imatrix(imatrix, source, counts))


def _read_all(source: Source) -> None:
    """Name the tensor and expert if damaged weights are why llama-imatrix failed."""
    for tensor in source.tensors:
        for matrix in range(tensor.n_matrices):
            source.read(tensor, matrix)
