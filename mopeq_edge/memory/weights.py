"""Where a model's weights lie: mapped from the file, allocated, copied into another order, or on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from mopeq_edge.gguf_file import pad
from mopeq_edge.memory.model import Model, StoredTensor
from mopeq_edge.memory.repack import Cpu, is_repacked
from mopeq_edge.memory.settings import Settings

BUFFER_ALIGNMENT = 32
PAGE = 4096

LARGEST_KEPT = 32 * 2**20
"""glibc gives back at once what is larger; a smaller piece that was freed stays with the process."""

USED_AGAIN = 7_000_000
"""What llama.cpp allocates of it later, in small pieces. Measured."""


@dataclass(frozen=True)
class Weights:
    """Bytes. ``mapped`` pages of the file are resident; ``unread`` of them belong to weights that were copied.

    ``allocated``: read into memory of the process. ``repacked``: copied in another order. ``gpu``: on the GPU.
    ``staging``: what is left of reading weights that are copied, without mmap.
    """

    mapped: int
    unread: int
    allocated: int
    repacked: int
    gpu: int
    staging: int = 0


def place_weights(model: Model, settings: Settings, cpu: Cpu) -> Weights:
    """Layers from the first on the CPU, the last ``gpu_layers`` (the output counts as one) on the GPU.

    With mmap the file stays mapped from the first to the last tensor that is used from it.
    """
    on_gpu = {t.name for t in model.tensors if _is_on_gpu(t, model, settings)}
    host = [t for t in model.tensors if t.name not in on_gpu]
    copied = {t.name for t in host if settings.repack and is_repacked(t, cpu)}
    plain = [t for t in host if t.name not in copied]
    gpu = sum(pad(t.nbytes, BUFFER_ALIGNMENT) for t in model.tensors if t.name in on_gpu)
    repacked = sum(pad(t.nbytes, BUFFER_ALIGNMENT) for t in host if t.name in copied)
    tied = not any(t.name == "output.weight" for t in model.tensors)
    embedding = next((t for t in model.tensors if t.name == "token_embd.weight"), None)
    if tied and embedding is not None:
        # the output is the embedding a second time, in a buffer of another kind
        head = StoredTensor("output.weight", embedding.shape, embedding.type)
        if settings.gpu_layers > 0:
            gpu += pad(head.nbytes, BUFFER_ALIGNMENT)
        elif settings.repack and is_repacked(head, cpu):
            repacked += pad(head.nbytes, BUFFER_ALIGNMENT)
    plain_bytes = sum(pad(t.nbytes, BUFFER_ALIGNMENT) for t in plain)
    if not settings.mmap:
        largest = max((t.nbytes for t in host if t.name in copied), default=0)
        return Weights(0, 0, plain_bytes, repacked, gpu, _left_of(largest))
    mapped = _span(model, {t.name for t in plain})
    return Weights(mapped, max(0, mapped - plain_bytes) if copied else 0, 0, repacked, gpu)


def _left_of(staged: int) -> int:
    return max(0, staged - USED_AGAIN) if staged <= LARGEST_KEPT else 0


def _is_on_gpu(tensor: StoredTensor, model: Model, settings: Settings) -> bool:
    if settings.gpu_layers <= 0 or tensor.name.startswith("token_embd."):
        return False
    n_layer = model.hparams.n_layer
    layer = n_layer if tensor.layer is None else tensor.layer
    return layer > n_layer - settings.gpu_layers


def _span(model: Model, used: set[str]) -> int:
    """From the first used tensor to the last, in whole pages, as if the file were one."""
    at, first, last = 0, None, 0
    for tensor in model.tensors:
        if tensor.name in used:
            first = at if first is None else first
            last = at + tensor.nbytes
        at += pad(tensor.nbytes, BUFFER_ALIGNMENT)
    return 0 if first is None else pad(last - first, PAGE)
