"""The static table of types against libggml, and against gguf-py where no library is built."""

import gguf
import pytest

from mopeq_edge.errors import FormatError
from mopeq_edge.ggml.types import BY_ID, BY_NAME, NEEDS_IMATRIX, QUANTIZABLE, GgmlType, type_named


@pytest.mark.runtime
@pytest.mark.parametrize("kind", BY_NAME.values(), ids=lambda kind: kind.name)
def test_the_table_is_libggmls(kind: GgmlType) -> None:
    from mopeq_edge.ggml.library import load_ggml

    name, block_size, type_size = load_ggml().describe(kind.id)
    assert (name.upper(), block_size, type_size) == (kind.name, kind.block_size, kind.type_size)


@pytest.mark.runtime
def test_no_type_of_libggml_is_left_out() -> None:
    from mopeq_edge.ggml.library import load_ggml

    ggml = load_ggml()
    in_use = {number for number in range(43) if ggml.describe(number)[2]}
    assert in_use == set(BY_ID)


def test_the_table_is_gguf_pys() -> None:
    for kind, (block_size, type_size) in gguf.GGML_QUANT_SIZES.items():
        if kind.name == "Q8_1":
            continue  # gguf-py says 40 bytes, libggml (above) 36; no file holds this type
        ours = BY_ID[int(kind)]
        assert (ours.name, ours.block_size, ours.type_size) == (kind.name, block_size, type_size)


def test_sizes() -> None:
    assert BY_NAME["Q2_K"].bpw == 2.625
    assert BY_NAME["Q3_K"].bpw == 3.4375
    assert BY_NAME["F32"].bpw == 32
    assert BY_NAME["Q4_K"].nbytes(512) == 288
    assert BY_NAME["Q4_K"].fits(768)
    assert not BY_NAME["Q4_K"].fits(896)
    assert not BY_NAME["BF16"].is_quantized


def test_lists_name_known_types() -> None:
    assert set(QUANTIZABLE) <= set(BY_NAME)
    assert set(QUANTIZABLE) >= NEEDS_IMATRIX


def test_type_named() -> None:
    assert type_named("q4_k") is BY_NAME["Q4_K"]
    with pytest.raises(FormatError, match="type 'Q4_K_M': unknown GGUF type; known: F16"):
        type_named("Q4_K_M")
