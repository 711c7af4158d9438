"""The contract between the core and a converter: how a checkpoint's tensors become GGUF tensors.

A converter is data and two functions. It lives in the package ``converters``, which this package never
imports; the CLI and the pipeline hand the right one in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mopeq_edge.gguf_file import KV
from mopeq_edge.source.model import SourceTensor

MAX_NAME = 128
"""Characters of an architecture's name."""

Config = Mapping[str, Any]
"""A checkpoint's ``config.json``."""


@dataclass(frozen=True)
class Part:
    """Where one matrix comes from in the checkpoint: a tensor, or a piece of one.

    ``expert`` picks along the first axis of a packed tensor [n_expert, …]; ``transposed`` says that what is left is
    stored as [n_in, n_out] and makes it [n_out, n_in]; ``rows`` then picks along its first axis (the gate half of a
    packed gate_up), ``columns`` along its last one (a head's rows in a transposed tensor); ``every`` takes every so
    many-th of these rows, or of the columns if there are no rows. ``heads`` is set for a q or k whose rows llama.cpp's
    rope wants in another order: of each of so many heads, row i of the first half and row i of the second half in turn.
    """

    tensor: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    heads: int | None = None
    transposed: bool = False
    columns: tuple[int, int] | None = None
    every: int = 1


@dataclass(frozen=True)
class Recipe:
    """One GGUF tensor and its parts: one a matrix (experts in router order), or a single one.

    ``shape`` is ggml's ``ne``. ``keep_f32`` is set for what llama.cpp wants in F32 (norms, routers). ``same_as`` is the
    GGUF name of the tensor that config.json says this one is (tied embeddings): a second copy of the same numbers is
    left out of the GGUF unless it is ``needed``, and one of other numbers stays.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    keep_f32: bool = False
    same_as: str | None = None
    needed: bool = False


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: of one latent a token, ``module`` makes each head's key (the part without rope),
    then its value, head after head. ``keys`` and ``values`` are the GGUF's stacks of a matrix a head, the key's
    transposed.

    ``attention`` is the module around it: it asks transformers for the attention function by its configuration, with
    queries whose first numbers meet that part of the key.
    """

    attention: str = "self_attn"
    module: str = "self_attn.kv_b_proj"
    keys: str = "attn_k_b.weight"
    values: str = "attn_v_b.weight"


@dataclass(frozen=True)
class Skeleton:
    """transformers' modules of a family, for calibration.

    ``base(directory, config)`` builds configuration and decoder (with ``layers``, ``norm`` and ``rotary_emb``) on the
    meta device, so without weights; None leaves both to transformers' own tables. ``prefix`` stands before the
    decoder's tensors in the checkpoint, ``layers`` and ``norm`` are what it calls these two; ``renamed`` are beginnings
    of names inside a block that differ: the module's, then the checkpoint's. ``fused`` are parameters of a block of
    which the checkpoint has several in one tensor, rows after rows: the tensor's name inside the block, which one of
    how many. ``experts`` is where a block has its routed experts; ``gated(gate, up)`` computes from their two products
    (torch tensors) what goes into the third matrix, for a family where that is not act(gate) * up. ``attention`` is
    transformers' name of the implementation, ``latent`` is set where attention is latent.

    ``embedding_multiplier`` and ``logits_divisor`` name the numbers in transformers' configuration that multiply the
    embeddings and divide the logits, for a family that has them; what is inside a block its own module computes.
    """

    base: Callable[[Path, Config], tuple[Any, Any]] | None = None
    prefix: str = "model."
    layers: str = "layers."
    norm: str = "norm."
    renamed: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, int, int]] = field(default_factory=dict)
    experts: str = "mlp.experts"
    gated: Callable[[Any, Any], Any] | None = None
    attention: str = "sdpa"
    embedding_multiplier: str | None = None
    logits_divisor: str | None = None
    latent: Latent | None = None


def nothing_left_out(_: Config, __: Mapping[str, tuple[int, ...]]) -> list[str]:
    """For a family whose every tensor is in the GGUF."""
    return []


@dataclass(frozen=True)
class Converter:
    """How one family of checkpoints becomes a GGUF.

    ``recipes(config, shapes)`` gets the checkpoint's tensor shapes by name and returns the recipes in
    writing order; it raises :class:`SourceError` for a tensor that is missing or not known.
    ``key_values(directory, config, tensors, file_type, pre)`` returns the key-values in writing order;
    ``file_type`` is llama.cpp's ``general.file_type``, ``pre`` overrides the pre-tokenizer's name.
    ``left_out(config, shapes)`` says, a line for each kind, what the GGUF lacks of the checkpoint. ``with_mtp`` is the
    one that keeps blocks that predict further tokens, of a family that has some.
    """

    architecture: str
    recipes: Callable[[Config, Mapping[str, tuple[int, ...]]], list[Recipe]]
    key_values: Callable[[Path, Config, Sequence[SourceTensor], int, str | None], dict[str, KV]]
    skeleton: Skeleton = Skeleton()
    left_out: Callable[[Config, Mapping[str, tuple[int, ...]]], list[str]] = nothing_left_out
    with_mtp: Converter | None = None


Choice = Callable[[Config], Converter]
"""Picks the converter of a name that several families share; raises :class:`SourceError` if it is none of them."""

Converters = Mapping[str, Converter | Choice]
"""By the first name in ``architectures`` of a checkpoint's ``config.json``, or by its ``model_type`` if it has none."""


def architecture_name(converters: Converters, config: Config) -> str | None:
    """What ``config`` calls the architecture; its ``model_type`` counts only if there is nothing else."""
    names, model_type = config.get("architectures"), config.get("model_type")
    if not names and isinstance(model_type, str) and model_type in converters:
        return model_type
    name = names[0] if isinstance(names, list) and names else None
    # it is printed before anything else of the file is looked at
    return name if isinstance(name, str) and name.isprintable() and 0 < len(name) <= MAX_NAME else None


def find_converter(converters: Converters, name: str, config: Config) -> Converter | None:
    """The converter of the architecture ``name``, or None."""
    found = converters.get(name)
    return found if found is None or isinstance(found, Converter) else found(config)
