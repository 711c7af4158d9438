"""Every element of every GGUF tensor comes from the element of the checkpoint that it must come from.

The weights of tiny checkpoints are replaced by the numbers of their places (``address_code``), converted, and read back
from the finished file by gguf's own reader: one conversion for each digit of the numbers, so that the whole place of
each element is known. ``address_tables`` says by hand what it must be. ``test_against_llama_cpp`` compares the same
numbers with the files of llama.cpp's script.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from converters import CONVERTERS
from converters.refused import REFUSED
from mopeq_edge.source.open import open_source

from ..builders import build_olmoe, write_gguf
from .address_code import BASE, N_DIGITS, Numbers, numbers_of, read_ggufs, write_digit
from .address_tables import NOT_TEXT, TABLES, unused
from .families import FAMILIES
from .vision_language import VISION_LANGUAGE


def olmoe(directory: Path, dtype: str, packed: bool = False) -> Path:
    return build_olmoe(directory, dtype=dtype, packed=packed)


BUILDERS: Mapping[str, Callable[[Path, str], Path]] = {
    "olmoe": olmoe,
    "olmoe-packed": partial(olmoe, packed=True),
    **{name: build for name, (build, _) in {**FAMILIES, **VISION_LANGUAGE}.items()},
}
SAME_LAYOUT = {"gpt-oss-mxfp4", "mixtral-tied", "granite-moe-tied"}
"""Of these the first has codes for weights, which ``test_gpt_oss`` follows."""

BY_ARCHITECTURE: Mapping[str, set[str]] = {
    "DeepseekOCRForCausalLM": {"deepseek-ocr"},
    "DeepseekV2ForCausalLM": {"deepseek-v2", "deepseek-v2-lite"},
    "DeepseekV3ForCausalLM": {"deepseek-v3"},
    "DeepseekVLV2ForCausalLM": {"vl2-tiny", "vl2-small", "vl2-base"},
    "deepseek_vl_v2": {"vl2-tiny", "vl2-small", "vl2-base"},
    "GptOssForCausalLM": {"gpt-oss"},
    "GraniteMoeForCausalLM": {"granite-moe"},
    "MixtralForCausalLM": {"mixtral"},
    "OLMoForCausalLM": {"molmoe-1b"},
    "OlmoeForCausalLM": {"olmoe", "olmoe-packed"},
    "Qwen2MoeForCausalLM": {"qwen2-moe"},
    "Qwen3MoeForCausalLM": {"qwen3-moe", "qwen3-moe-packed-tied"},
    "Qwen3VLMoeForConditionalGeneration": {"qwen3-vl-moe"},
}


def test_every_family_has_a_table() -> None:
    assert set(BY_ARCHITECTURE) == set(CONVERTERS) - set(REFUSED)
    assert set().union(*BY_ARCHITECTURE.values()) == set(TABLES) == set(BUILDERS) - SAME_LAYOUT


def converted(directory: Path) -> dict[str, Numbers]:
    """The number of every element of the GGUF of ``directory``, put together from a conversion for each digit."""
    files = [directory / f"{digit}.gguf" for digit in range(N_DIGITS)]
    for digit, file in enumerate(files):
        write_digit(directory, digit)
        write_gguf(open_source(directory, CONVERTERS, pre="gpt-2"), file)
    digits = read_ggufs(files)
    return {name: sum(of[name] * BASE**at for at, of in enumerate(digits)) for name in digits[0]}


@pytest.mark.parametrize("name", TABLES)
def test_every_element_comes_from_its_place(name: str, tmp_path: Path) -> None:
    directory = BUILDERS[name](tmp_path / "model", "bfloat16")
    numbers = numbers_of(directory)
    expected = TABLES[name](numbers)
    left_out = {tensor for tensor in numbers if tensor.startswith(NOT_TEXT.get(name, ("nothing",)))}
    assert set(unused(numbers, expected)) == left_out
    found = converted(directory)
    assert set(found) == set(expected)
    for tensor, want in expected.items():
        assert found[tensor].shape == want.shape, tensor
        wrong = np.argwhere(found[tensor] != want)
        assert not len(wrong), f"{tensor}: {len(wrong)} elements, the first is {wrong[0]}"
