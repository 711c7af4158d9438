"""Tiny checkpoints that say their embeddings are tied or not, with and without an output matrix in their files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tools.vision_language_configs import BASE, TINY

from ..builders import build_olmoe
from .families import FAMILIES, causal_model, qwen3_vl_moe_model
from .vision_language import VISION_LANGUAGE, plain_model, renamed

NONE, COPY, OTHER = "no matrix", "the embedding's", "another one"
"""What the files have for an output matrix."""
TIED = "tie_word_embeddings"


def olmoe(directory: Path, dtype: str) -> Path:
    return build_olmoe(directory, dtype=dtype)


def renamed_model(directory: Path) -> Any:
    """transformers' model of the text side; it is asked whether that is tied."""
    into = directory.with_name(f"{directory.name}-renamed")
    if not into.exists():
        text = json.loads((directory / "config.json").read_text())["language_config"]
        path = renamed(directory, into) / "config.json"
        # a rank that is null says something
        path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": text[TIED]}))
    return causal_model(into)


def tiny_model(directory: Path) -> Any:
    """The decoder inside DeepSeek-OCR-2 has an output matrix of its own, which gets the embedding's numbers."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    embedding, output = names(directory)
    into = shutil.copytree(directory, directory.with_name(f"{directory.name}-whole"))
    whole = {output: tensors[embedding].clone(), **tensors}
    save_file(whole, into / "model.safetensors", metadata={"format": "pt"})
    return plain_model(into)


BUILDERS: Mapping[str, tuple[Callable[[Path, str], Path], Callable[[Path], Any]]] = {
    "olmoe": (olmoe, causal_model),
    **{name: FAMILIES[name] for name in ("mixtral", "granite-moe", "qwen2-moe", "qwen3-moe", "gpt-oss")},
    **{name: FAMILIES[name] for name in ("deepseek-v2", "deepseek-v3")},
    "qwen3-vl-moe": (FAMILIES["qwen3-vl-moe"][0], qwen3_vl_moe_model),
    BASE: (VISION_LANGUAGE[BASE][0], renamed_model),
    TINY: (VISION_LANGUAGE[TINY][0], tiny_model),
}
"""How to write one, and transformers' float32 model of the directory."""
NEEDS_OUTPUT = ("olmoe", "qwen2-moe", "gpt-oss")
"""llama.cpp loads no GGUF of these without ``output.weight``."""


def build_tied(name: str, directory: Path, tied: bool | None, head: str, dtype: str = "float32") -> Path:
    """``tied`` is what config.json says, None for nothing."""
    from safetensors.torch import load_file, save_file

    BUILDERS[name][0](directory, dtype)
    tensors = load_file(directory / "model.safetensors")
    embedding, output = names(directory)
    if head == NONE:
        del tensors[output]
    elif head == COPY:
        tensors[output] = tensors[embedding].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    say(directory, tied)
    return directory


def say(directory: Path, tied: bool | None) -> None:
    """Let config.json say it where the family says it, or say nothing."""
    config = json.loads((directory / "config.json").read_text())
    text = config.get("language_config", config)
    text.pop(TIED, None)
    if tied is not None:
        text[TIED] = tied
    (directory / "config.json").write_text(json.dumps(config))


def names(directory: Path) -> tuple[str, str]:
    """The checkpoint's names of the embedding and the output matrix."""
    config = json.loads((directory / "config.json").read_text())
    if "language_config" in config:
        return "language.model.embed_tokens.weight", "language.lm_head.weight"
    inside = "language_model." if "text_config" in config else ""
    return f"model.{inside}embed_tokens.weight", "lm_head.weight"
