"""Recipes from tables: what a family calls its tensors, where they go in a GGUF, and their shapes in names of sizes.

A family says what it has in a :class:`Tables`; everything that can be missing, unknown or of another layout is found
here, the same for all families.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from converters.key_values import need_number
from mopeq_edge.errors import SourceError
from mopeq_edge.source.converter import Config, Part, Recipe

Shapes = Mapping[str, tuple[int, ...]]
Sizes = Mapping[str, int]

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
_TIED = "tie_word_embeddings"
_DERIVED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class Row:
    """One tensor of the checkpoint: its GGUF ``name``, its shape as ggml's ne in names of sizes.

    ``f32``: llama.cpp wants it in F32. ``heads``: the size that counts the heads whose rotary halves llama.cpp
    interleaves. ``optional``: not every checkpoint has it. ``also``: the name under which it is written a second time.
    ``same_as``, ``needed``: see :class:`Recipe`.
    """

    name: str
    axes: tuple[str, ...]
    f32: bool = False
    heads: str = ""
    optional: bool = False
    also: str = ""
    same_as: str | None = None
    needed: bool = False


@dataclass(frozen=True)
class HeadStack:
    """One GGUF tensor of a matrix a head: ``rows`` (a size) rows of each, or with ``transposed`` their transpose."""

    name: str
    rows: str
    transposed: bool = False


@dataclass(frozen=True)
class PerHead:
    """A tensor of the checkpoint that has the rows of one head after the other, ``columns`` wide.

    ``heads`` is the size that counts them; within a head the rows of each of ``stacks`` follow each other.
    """

    heads: str
    columns: str
    stacks: tuple[HeadStack, ...]


@dataclass(frozen=True)
class Fused:
    """A tensor of the checkpoint that has the rows of several GGUF matrices of the same width, one after the other."""

    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Experts:
    """Where the routed experts of a layer are: matrix ``matrices[projection]`` of expert e is the checkpoint's
    ``{prefix}.{e}.{matrix}.weight``, stacks are written in the order of ``matrices``.

    With ``packed`` they may also be two tensors of all experts, ``{prefix}.{gate_up}`` [n_expert, 2 ff, hidden]
    (gate first) and ``{prefix}.{down}`` [n_expert, hidden, ff], the last two axes the other way round if they are
    ``transposed``; without ``single`` they are never anything else, and the names in ``matrices`` are not used.
    """

    prefix: str
    matrices: Mapping[str, str]
    packed: bool = False
    single: bool = True
    gate_up: str = "gate_up_proj"
    down: str = "down_proj"
    transposed: bool = False


Layout = Row | PerHead | Fused


@dataclass(frozen=True)
class Tables:
    """A family of checkpoints. ``layer(number)`` are the tensors of a block, by their name behind ``model.layers.N.``;
    ``sparse(number)`` whether it has routed experts. ``model`` are the tensors outside the blocks, by their whole name.

    Tensors whose names begin with one of ``skipped`` are for something else.

    ``sizes`` needs ``hidden``, ``ff`` (of an expert) and ``expert``, and every name that an axis has.
    """

    family: str
    model: Mapping[str, Row]
    layer: Callable[[int], Mapping[str, Layout]]
    experts: Experts
    sizes: Sizes
    n_layer: int
    sparse: Callable[[int], bool] = field(default=lambda _: True)
    layers_prefix: str = "model.layers."
    skipped: tuple[str, ...] = ()


def decoder_rows(
    config: Config, shapes: Shapes, *, decoder: str = "model.", head: str = "lm_head.", needs_output: bool = False
) -> dict[str, Row]:
    """Embedding, last norm and output matrix under transformers' usual names, behind ``decoder`` and ``head``.

    The matrix is the embedding where ``config`` says so and the checkpoint has no other; llama.cpp does not load every
    family like that, so of one that ``needs_output`` the embedding is written a second time. Raises
    :class:`SourceError` if there is no matrix where one is expected.
    """
    embedding, output, axes = f"{decoder}embed_tokens.weight", f"{head}weight", ("hidden", "vocab")
    found = {embedding: Row(EMBEDDING, axes), f"{decoder}norm.weight": Row("output_norm.weight", ("hidden",), f32=True)}
    tied = bool(config.get(_TIED))
    if output in shapes:
        of = EMBEDDING if tied else None
        return {**found, output: Row(OUTPUT, axes, same_as=of, needed=needs_output)}
    if not tied:
        raise SourceError(
            f"tensor '{output}' (the output matrix: config.json does not have {_TIED} true) is missing; download the "
            "whole checkpoint again"
        )
    if needs_output:
        found[embedding] = Row(EMBEDDING, axes, also=OUTPUT)
    return found


_STACK_AXES: Mapping[str, tuple[str, ...]] = {
    "down": ("ff", "hidden", "expert"),
    "gate": ("hidden", "ff", "expert"),
    "up": ("hidden", "ff", "expert"),
}


def recipes_of(tables: Tables, shapes: Shapes) -> list[Recipe]:
    """Recipes in the order of ``shapes``; a layer's stacks stand where its last expert stood.

    Raises :class:`SourceError` for a tensor that is missing or not known.
    """
    n_layer = tables.n_layer
    check_count("num_hidden_layers", n_layer, shapes)
    rows: dict[str, tuple[Layout, str]] = {name: (row, "") for name, row in tables.model.items()}
    for layer in range(n_layer):
        prefix = f"{tables.layers_prefix}{layer}."
        rows |= {prefix + name: (row, f"blk.{layer}.") for name, row in tables.layer(layer).items()}
    sparse = [layer for layer in range(n_layer) if tables.sparse(layer)]
    _check_n_matrices(tables, len(sparse), shapes)
    parts = {layer: _expert_parts(tables, layer, shapes) for layer in sparse}
    waiting = {layer: {part.tensor for stack in stacks.values() for part in stack} for layer, stacks in parts.items()}
    layer_of = {name: layer for layer, names in waiting.items() for name in names}
    wanted = set(rows)
    found: list[Recipe] = []
    for name in shapes:
        if name in wanted:
            row, prefix = rows[name]
            if isinstance(row, PerHead):
                found.extend(_head_stacks(tables, row, name, prefix, shapes))
            elif isinstance(row, Fused):
                found.extend(_fused(tables, row, name, prefix, shapes))
            else:
                shape = tuple(tables.sizes[axis] for axis in row.axes)
                heads = tables.sizes[row.heads] if row.heads else None
                own = (shape, (Part(name, heads=heads),), row.f32, row.same_as, row.needed)
                found += [Recipe(prefix + ours, *own) for ours in (row.name, row.also) if ours]
            wanted.remove(name)
        elif name in layer_of:
            layer = layer_of.pop(name)
            waiting[layer].remove(name)
            if not waiting[layer]:
                found.extend(_stacks(tables, layer, parts[layer]))
        elif not name.endswith(_DERIVED) and not name.startswith(tables.skipped):
            raise SourceError(f"tensor '{name}' is not known in {tables.family} of {n_layer} layers; update mopeq-edge")
    missing = {name for name in wanted if not getattr(rows[name][0], "optional", False)}
    for name in sorted(missing.union(*waiting.values())):
        raise SourceError(f"tensor '{name}'{_whose(tables, name)} is missing; download the whole checkpoint again")
    return found


def check_only(config: Config, only: Mapping[str, object], computed_as: str) -> None:
    """Refuse settings that llama.cpp's graph would compute in another way: a key must be absent or as in ``only``."""
    for key, value in only.items():
        if (found := config.get(key)) not in (None, value):
            expected = "none" if value is None else value
            raise SourceError(
                f"config.json has {key} {found!r}, expected {expected}: llama.cpp computes {computed_as} like that "
                "only, so no GGUF of this checkpoint would be right"
            )


def sizes_of(config: Config, keys: Mapping[str, str]) -> dict[str, int]:
    """Sizes by name from the keys of config.json that hold them."""
    return {name: need_number(config, key) for name, key in keys.items()}


MAX_PACKED = 2**16
"""Experts of all layers together in checkpoints that have one tensor for all of a layer; those in use have 15,000."""


def _check_n_matrices(tables: Tables, n_sparse: int, shapes: Shapes) -> None:
    """The same of layers times experts, each of which is a tensor unless they are packed."""
    experts = tables.experts
    packed = any(name.endswith((f".{experts.gate_up}", f".{experts.down}")) for name in shapes)
    if not packed:
        check_count("num_experts", tables.sizes["expert"], shapes)
        check_count("num_hidden_layers times num_experts", n_sparse * tables.sizes["expert"], shapes)
    elif n_sparse * tables.sizes["expert"] > MAX_PACKED:
        raise SourceError(
            f"config.json has {n_sparse} layers of {tables.sizes['expert']} experts, expected at most {MAX_PACKED} "
            "experts together; use the config.json of these weights"
        )


def check_count(key: str, count: int, shapes: Shapes) -> None:
    """An absurd number must not cost the memory of as many names."""
    if count > max(len(shapes), 1000):
        raise SourceError(f"config.json has {key} {count}, expected no more than there are tensors ({len(shapes)})")


def _expert_parts(tables: Tables, layer: int, shapes: Shapes) -> dict[str, tuple[Part, ...]]:
    """Where each expert's matrices of one layer are: packed if the packed tensors are there."""
    sizes, experts = tables.sizes, tables.experts
    n_expert, hidden, ff = sizes["expert"], sizes["hidden"], sizes["ff"]
    prefix = f"{tables.layers_prefix}{layer}.{experts.prefix}"
    gate_up, down = f"{prefix}.{experts.gate_up}", f"{prefix}.{experts.down}"
    if experts.single and (not experts.packed or (gate_up not in shapes and down not in shapes)):
        check_count("num_experts", n_expert, shapes)
        return {
            which: tuple(Part(f"{prefix}.{e}.{matrix}.weight") for e in range(n_expert))
            for which, matrix in experts.matrices.items()
        }
    for name, matrix in ((gate_up, (2 * ff, hidden)), (down, (hidden, ff))):
        expected = (n_expert, *(matrix[::-1] if experts.transposed else matrix))
        _check_shape(name, shapes.get(name, expected), expected)
    where = {"down": (down, None), "gate": (gate_up, (0, ff)), "up": (gate_up, (ff, 2 * ff))}
    return {
        which: tuple(Part(where[which][0], e, where[which][1], transposed=experts.transposed) for e in range(n_expert))
        for which in experts.matrices
    }


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise SourceError(
            f"tensor '{name}' has shape {list(found)}, but config.json asks for {list(expected)}; "
            "use the config.json of these weights"
        )


def _head_stacks(tables: Tables, row: PerHead, name: str, prefix: str, shapes: Shapes) -> list[Recipe]:
    n_head, n_columns = tables.sizes[row.heads], tables.sizes[row.columns]
    of_one = sum(tables.sizes[stack.rows] for stack in row.stacks)
    _check_shape(name, shapes[name], (n_head * of_one, n_columns))
    found, before = [], 0
    for stack in row.stacks:
        n_rows = tables.sizes[stack.rows]
        starts = range(before, n_head * of_one, of_one)
        pieces = [(start, start + n_rows) for start in starts]
        parts = tuple(
            Part(name, transposed=True, columns=piece) if stack.transposed else Part(name, rows=piece)
            for piece in pieces
        )
        shape = (n_rows, n_columns) if stack.transposed else (n_columns, n_rows)
        found.append(Recipe(prefix + stack.name, (*shape, n_head), parts))
        before += n_rows
    return found


def _fused(tables: Tables, fused: Fused, name: str, prefix: str, shapes: Shapes) -> list[Recipe]:
    sizes = [tuple(tables.sizes[axis] for axis in row.axes) for row in fused.rows]
    _check_shape(name, shapes[name], (sum(n_out for _, n_out in sizes), sizes[0][0]))
    found, before = [], 0
    for row, shape in zip(fused.rows, sizes, strict=True):
        found.append(Recipe(prefix + row.name, shape, (Part(name, rows=(before, before + shape[1])),), row.f32))
        before += shape[1]
    return found


def _stacks(tables: Tables, layer: int, parts: Mapping[str, tuple[Part, ...]]) -> list[Recipe]:
    return [
        Recipe(f"blk.{layer}.ffn_{which}_exps.weight", tuple(tables.sizes[axis] for axis in _STACK_AXES[which]), own)
        for which, own in parts.items()
    ]


def _whose(tables: Tables, name: str) -> str:
    """The layer and expert of a tensor of the routed experts, for people."""
    experts = tables.experts
    match = re.match(rf"^{re.escape(tables.layers_prefix)}(\d+)\.{re.escape(experts.prefix)}\.((\d+)?.*)", name)
    if match is None or not (match[3] or match[2] in (experts.gate_up, experts.down)):
        return ""
    return f" (layer {match[1]}, expert {match[3]})" if match[3] else f" (layer {match[1]}, all experts)"
