"""The name of the pre-tokenizer, ``tokenizer.ggml.pre``: how llama.cpp splits text before the merges.

A wrong name still makes tokens, only other ones than the model was trained on. So nothing is guessed: llama.cpp's
converter knows tokenizers by the tokens that they make of one text, and that table is read from the installed
copy; a plain byte-level tokenizer is told by its definition; for any other one the user has to say.
"""

from __future__ import annotations

import ast
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopeq_edge.errors import RuntimeMissingError, SourceError, shown
from mopeq_edge.runtime.locate import find_runtime
from mopeq_edge.source.checkpoint import read_json_object

TABLE = Path("conversion") / "base.py"
"""Where llama.cpp's converter keeps its table, in the directory of the script."""

PLAIN_BYTE_LEVEL = "gpt-2"


@dataclass(frozen=True)
class KnownTokenizers:
    """llama.cpp's table: SHA-256 (hex) of the ids that a tokenizer makes of ``text`` -> pre-tokenizer's name."""

    text: str
    name_of: dict[str, str]

    def hash(self, tokenizer: Any) -> str:
        ids: list[int] = list(tokenizer.encode(self.text))
        return hashlib.sha256(str(ids).encode()).hexdigest()


def pre_tokenizer_name(directory: Path, tokenizer: Any, pre: str | None = None) -> str:
    """Name for the tokenizer in ``directory``; ``pre`` overrides it.

    Raises :class:`SourceError` if llama.cpp has no such pre-tokenizer, :class:`RuntimeMissingError` if its table
    is not installed.
    """
    if pre is not None:
        return pre
    runtime = find_runtime()
    if runtime is None:
        raise RuntimeMissingError(
            f"{directory}: naming its pre-tokenizer needs llama.cpp's table; "
            "run: mopeq-edge runtime install, or give the name with --pre NAME"
        )
    known = read_known_tokenizers(runtime.convert / TABLE)
    found = known.hash(tokenizer)
    name = known.name_of.get(found)
    if name is not None:
        return name
    problem = why_not_plain(directory)
    if problem is None:
        return PLAIN_BYTE_LEVEL
    raise SourceError(
        f"{directory}: llama.cpp knows no tokenizer with hash {found}, and it is no plain byte-level one ({problem}); "
        "give the name of a pre-tokenizer that splits text like it with --pre NAME"
    )


def read_known_tokenizers(path: Path) -> KnownTokenizers:
    """Read the table out of llama.cpp's converter without running it."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise RuntimeMissingError(
            f"{path}: cannot be read ({error}); run: mopeq-edge runtime install --force"
        ) from None
    text: str | None = None
    name_of: dict[str, str] = {}
    function = next(
        (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "get_vocab_base_pre"), None
    )
    for node in ast.walk(function) if function else ():
        if isinstance(node, ast.If):
            digest = _compared_with(node.test, "chkhsh")
            name = next((value for step in node.body if (value := _assigned_to(step, "res")) is not None), None)
            if digest is not None and name is not None:
                name_of[digest] = name
        else:
            text = _assigned_to(node, "chktxt") or text
    if text is None or not name_of:
        raise RuntimeMissingError(
            f"{path}: has no table of pre-tokenizers; run: mopeq-edge runtime install --force, "
            "or give the name with --pre NAME"
        )
    return KnownTokenizers(text, name_of)


def why_not_plain(directory: Path) -> str | None:
    """None if ``tokenizer.json`` defines GPT-2's byte-level tokenizer, else what differs."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return "it has no tokenizer.json"
    tokenizer = read_json_object(path)
    steps = _flat(tokenizer.get("pre_tokenizer"), "pretokenizers")
    normalizers = _flat(tokenizer.get("normalizer"), "normalizers")
    model = tokenizer.get("model")
    if not isinstance(model, dict):
        return f"model {shown(model)}"
    if normalizers:
        return f"normalizer {_type(normalizers[0])}"
    if len(steps) != 1 or _type(steps[0]) != "ByteLevel":
        return f"pre-tokenizer {' + '.join(_type(step) for step in steps) or 'none'}"
    if steps[0].get("use_regex", True) is not True or steps[0].get("add_prefix_space") is not False:
        return "its ByteLevel pre-tokenizer does not split like GPT-2's"
    if _type(model) != "BPE":
        return f"model {_type(model)}"
    for key in ("ignore_merges", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            return f"{key} {model[key]!r}"
    return None


def _flat(step: Any, key: str) -> list[Any]:
    """The steps of a pre-tokenizer or normalizer, sequences taken apart."""
    if step is None:
        return []
    if _type(step) == "Sequence":
        parts = step.get(key)
        return [inner for part in parts for inner in _flat(part, key)] if isinstance(parts, list) else []
    return [step]


def _type(step: Any) -> str:
    return str(step.get("type")) if isinstance(step, dict) else "none"


def _compared_with(test: ast.expr, name: str) -> str | None:
    """ "…" in ``name == "…"``."""
    if (
        isinstance(test, ast.Compare)
        and isinstance(test.left, ast.Name)
        and test.left.id == name
        and len(test.ops) == 1
        and isinstance(test.ops[0], ast.Eq)
        and isinstance(value := test.comparators[0], ast.Constant)
        and isinstance(value.value, str)
    ):
        return value.value
    return None


def _assigned_to(node: ast.AST, name: str) -> str | None:
    """ "…" in ``name = "…"``."""
    if (
        isinstance(node, ast.Assign)
        and len(node.targets) == 1
        and isinstance(target := node.targets[0], ast.Name)
        and target.id == name
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ):
        return node.value.value
    return None
