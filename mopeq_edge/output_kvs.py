"""The key-values of a finished file: the source's own, what llama-quantize adds, and where it came from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mopeq_edge import __version__
from mopeq_edge.file_hashes import unknown_hashes
from mopeq_edge.gguf_file import KV
from mopeq_edge.gguf_layout import TensorSpec, string, uint32
from mopeq_edge.imatrix import Imatrix

FILE_TYPES: Mapping[str, int] = {
    **{"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9},
    **{"Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18},
    **{"IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ2_S": 28},
    **{"IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38, "NVFP4": 39},
    **{"Q1_0": 40, "Q2_0": 41},
}
"""``general.file_type`` (llama.h, ``llama_ftype``) of a file in which a type has the most bytes."""

QUANTIZATION_VERSION = 2

IMATRIX_NAME = "imatrix.gguf"
"""Name given for the imatrix, whichever kind it is: the header's size must not depend on the kind."""

PLAN_KEY = "mopeq.plan.sha256"
"""Of the plan that a file was written from; every file of a split one has it."""

_UNKNOWN_HASH = "0" * 64


@dataclass(frozen=True)
class Provenance:
    """Hashes (hex SHA-256) of the source and the plan."""

    source: str = _UNKNOWN_HASH
    plan: str = _UNKNOWN_HASH


def output_kvs(
    kvs: Mapping[str, KV], file_type: int, imatrix: Imatrix | None, imatrix_name: str, provenance: Provenance
) -> dict[str, KV]:
    """Key-values in writing order. Their size does not depend on the hashes, so a plan can be sized first."""
    result = dict(kvs)
    result["general.file_type"] = uint32(file_type)
    result["general.quantization_version"] = uint32(QUANTIZATION_VERSION)
    if imatrix is not None:
        result["quantize.imatrix.file"] = string(imatrix_name)
        result["quantize.imatrix.dataset"] = string(imatrix.datasets[0] if imatrix.datasets else "")
        result["quantize.imatrix.entries_count"] = uint32(len(imatrix.entries))
        result["quantize.imatrix.chunks_count"] = uint32(imatrix.chunk_count)
    result["mopeq.version"] = string(__version__)
    result["mopeq.source.sha256"] = string(provenance.source)
    result[PLAN_KEY] = string(provenance.plan)
    # the writer fills them in; the source may have its own
    result.update(unknown_hashes(0))
    return result


def file_type_of(specs: Iterable[TensorSpec]) -> int:
    """The file type of the tensor type that has the most bytes; types that no weights have do not count."""
    sizes: Counter[str] = Counter()
    for _, shape, kind in specs:
        if kind.name in FILE_TYPES:
            sizes[kind.name] += kind.nbytes(math.prod(shape))
    best = max(sizes, key=lambda name: (sizes[name], name))
    return FILE_TYPES[best]
