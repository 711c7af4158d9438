"""Whether a GGUF's numbers and its tensors say the same of layers and experts, before a list has their size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from mopeq_edge.errors import FormatError, shown
from mopeq_edge.gguf_file import KV
from mopeq_edge.json_file import is_count
from mopeq_edge.source.roles import layer_of, projection_of

MAX_LAYERS, MAX_EXPERTS = 512, 1024
"""What llama.cpp loads at most (``LLAMA_MAX_LAYERS``, ``LLAMA_MAX_EXPERTS``)."""

_LARGEST: Mapping[str, int] = {
    **{"block_count": MAX_LAYERS, "nextn_predict_layers": MAX_LAYERS, "leading_dense_block_count": MAX_LAYERS},
    **{"expert_count": MAX_EXPERTS, "expert_used_count": MAX_EXPERTS, "expert_group_count": MAX_EXPERTS},
}
"""Keys behind the architecture's name that must be one number, and how large it may be."""

_MAX_ARCHITECTURE = 64


def check_model_keys(path: Path, kvs: Mapping[str, KV], tensors: Iterable[tuple[str, tuple[int, ...]]]) -> None:
    """Raise :class:`FormatError` if ``kvs`` and ``tensors`` (name and shape, ggml's ``ne``) contradict each other.

    What a file does not say is not asked for: an imatrix has no layers. Experts in groups are for ``expert_groups``.
    """
    architecture = _architecture(path, kvs)
    if architecture is None:
        return
    numbers: dict[str, int] = {}
    for key, most in _LARGEST.items():
        kv = kvs.get(f"{architecture}.{key}")
        if kv is None:
            continue
        if not is_count(kv.value, most):
            raise FormatError(
                f"{path}: {architecture}.{key} is {shown(kv.value)} ({kv.type.name}), expected a number up to {most}; "
                "convert the model again"
            )
        numbers[key] = kv.value
    n_layer, n_expert = numbers.get("block_count"), numbers.get("expert_count")
    if n_expert is not None and numbers.get("expert_used_count", 0) > n_expert:
        raise FormatError(
            f"{path}: {architecture}.expert_used_count is {numbers['expert_used_count']}, expected at most the "
            f"{n_expert} of {architecture}.expert_count; convert the model again"
        )
    if numbers.get("nextn_predict_layers", 0) > (n_layer or 0):
        raise FormatError(
            f"{path}: {architecture}.nextn_predict_layers is {numbers['nextn_predict_layers']}, expected at most the "
            f"{n_layer or 0} of {architecture}.block_count; convert the model again"
        )
    for name, shape in tensors:
        layer = layer_of(name)
        if layer is not None and n_layer is not None and layer >= n_layer:
            raise FormatError(
                f"{path}: tensor '{name}': expected blocks 0 to {n_layer - 1} as {architecture}.block_count says, "
                f"found {layer}; convert the model again"
            )
        found = (*shape, 1, 1)[2]
        if n_expert and projection_of(name) is not None and found != n_expert:
            raise FormatError(
                f"{path}: tensor '{name}' has {found} experts, expected the {n_expert} of "
                f"{architecture}.expert_count; convert the model again"
            )


def _architecture(path: Path, kvs: Mapping[str, KV]) -> str | None:
    kv = kvs.get("general.architecture")
    if kv is None:
        return None
    name = kv.value
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= _MAX_ARCHITECTURE:
        raise FormatError(
            f"{path}: general.architecture is {shown(name)} ({kv.type.name}), expected a short name; "
            "convert the model again"
        )
    return name
