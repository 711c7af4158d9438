"""Output matrices that config.json says are the embedding, in checkpoints that have one of their own all the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mopeq_edge.source.checkpoint import CONFIG, Checkpoint
from mopeq_edge.source.converter import Recipe

AT_ONCE = 2**22
"""Weights of each of two tensors that are compared at once."""


def without_copies(checkpoint: Checkpoint, recipes: Sequence[Recipe]) -> tuple[list[Recipe], list[str]]:
    """``recipes`` without those that say again what another one says, and a line for each that is tied by its words.

    transformers, too, takes a tensor that differs for what it is: then config.json is wrong. Torch's own files have
    both names of a tensor that is one.
    """
    by_name = {recipe.name: recipe for recipe in recipes}
    kept, lines = [], []
    for recipe in recipes:
        if recipe.same_as is None:
            kept.append(recipe)
            continue
        own, other = (part.tensor for part in (recipe.parts[0], by_name[recipe.same_as].parts[0]))
        said = f"{CONFIG} has tie_word_embeddings true"
        if not same_numbers(checkpoint, own, other):
            lines.append(f"{said}, but '{own}' differs from '{other}'; it is kept, as transformers does")
        elif not recipe.needed:
            lines.append(f"{said} and '{own}' has the numbers of '{other}'; the GGUF has them once")
            continue
        kept.append(recipe)
    return kept, lines


def same_numbers(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two matrices are equal; a part of each is in memory at a time."""
    shape = checkpoint.shape(one)
    if checkpoint.shape(other) != shape:
        return False
    n_rows, step = math.prod(shape[:-1]), max(1, AT_ONCE // max(1, shape[-1]))
    for start in range(0, n_rows, step):
        rows = (start, min(start + step, n_rows))
        if not np.array_equal(checkpoint.read_rows(one, *rows), checkpoint.read_rows(other, *rows)):
            return False
    return True
