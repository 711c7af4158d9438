"""What a GGUF tensor is for, told from its name: the vocabulary of every stage."""

from __future__ import annotations

import re
from enum import Enum
from functools import cache


class Role(str, Enum):
    """The part of the model that a tensor belongs to."""

    EXPERT = "expert"
    SHARED_EXPERT = "shared_expert"
    DENSE_FFN = "dense_ffn"
    ROUTER = "router"
    ATTENTION = "attention"
    EMBEDDING = "embedding"
    OUTPUT = "output"
    NORM = "norm"
    MTP = "mtp"
    """A matrix of a block behind the others that predicts further tokens (llama.cpp's NextN); its name alone does not
    tell, the number of blocks does."""
    OTHER = "other"


PROJECTIONS: tuple[str, ...] = ("gate", "up", "down", "gate_up")
"""Matrices of one expert, as GGUF names them: ``blk.N.ffn_{projection}_exps.weight``."""

_LAYER = re.compile(r"^blk\.(\d+)\.")
_EXPERT = re.compile(r"^blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps\.weight$")

# First match wins; patterns are tried on the name without its ``blk.N.`` prefix.
_RULES: tuple[tuple[Role, re.Pattern[str]], ...] = (
    (Role.NORM, re.compile(r"norm(_\w+)?\.(weight|bias)$")),
    (Role.ROUTER, re.compile(r"^(ffn_gate_inp|ffn_gate_tid2eid|exp_probs_b)")),
    (Role.EXPERT, re.compile(r"^ffn_(gate|up|down|gate_up)_exps\.")),
    (Role.SHARED_EXPERT, re.compile(r"^ffn_(gate|up|down)_shexp\.")),
    (Role.DENSE_FFN, re.compile(r"^ffn_(gate|up|down)\.")),
    (Role.ATTENTION, re.compile(r"^attn_")),
    (Role.EMBEDDING, re.compile(r"^token_embd\.weight$")),
    (Role.OUTPUT, re.compile(r"^output\.weight$")),
)


@cache
def layer_of(name: str) -> int | None:
    """The block number in ``blk.N.…``, or None outside the blocks."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


@cache
def role_of(name: str) -> Role:
    """The role of the tensor called ``name``."""
    rest = _LAYER.sub("", name)
    for role, pattern in _RULES:
        if pattern.search(rest):
            return role
    return Role.OTHER


@cache
def projection_of(name: str) -> str | None:
    """``gate``, ``up``, ``down`` or ``gate_up`` for an expert stack's weight, else None."""
    match = _EXPERT.match(name)
    return match[2] if match else None
