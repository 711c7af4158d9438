"""Whether a prediction fits a device."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mopeq_edge.errors import MopeqError
from mopeq_edge.memory.predict import ANONYMOUS, Prediction
from mopeq_edge.units import GB, GIB

FITS, TIGHT, FROM_DISK, TOO_LARGE, UNKNOWN = "fits", "tight", "from disk", "does not fit", "unknown"

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": GB, "kib": 2**10, "mib": 2**20, "gib": GIB}


def parse_memory(text: str) -> int:
    """Bytes of ``8GiB`` (2**30 each), ``8GB`` (1e9 each), ``7620MiB`` or a number of bytes."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise MopeqError(f"memory '{text}': expected a size such as 8GiB (2^30 bytes each), 8GB (1e9 bytes each)")
    return int(float(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True)
class Verdict:
    """Bytes; ``limit`` is what the device has to give, ``missing`` what is lacking (0 if it fits).

    ``tight``: it fits once the kernel has dropped pages that nothing reads again. ``from disk``: what is allocated
    fits, but the mapped weights do not stay in memory and are read again and again.
    """

    word: str
    limit: int | None
    needed: int
    missing: int

    @property
    def ok(self) -> bool:
        return self.word in (FITS, TIGHT)


def judge(prediction: Prediction, limit: int | None, gpu_limit: int | None = None, *, unified: bool = False) -> Verdict:
    """Compare with ``limit`` bytes of host memory and ``gpu_limit`` of a GPU's own.

    With ``unified`` memory the GPU's part comes out of ``limit`` too. Where the GPU's memory is not known, the verdict
    on what fits into the host's is unknown.
    """
    extra = prediction.gpu if unified else 0
    needed = prediction.needed + extra
    if limit is None:
        return Verdict(UNKNOWN, None, needed, 0)
    if not unified and gpu_limit is not None and prediction.gpu > gpu_limit:
        return Verdict(TOO_LARGE, gpu_limit, prediction.gpu, prediction.gpu - gpu_limit)
    if not unified and gpu_limit is None and prediction.gpu and needed <= limit:
        return Verdict(UNKNOWN, limit, needed, 0)
    if prediction.peak + extra <= limit:
        return Verdict(FITS, limit, needed, 0)
    if needed <= limit:
        return Verdict(TIGHT, limit, needed, 0)
    word = FROM_DISK if prediction.total(ANONYMOUS) + extra <= limit else TOO_LARGE
    return Verdict(word, limit, needed, needed - limit)
