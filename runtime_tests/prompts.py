"""What the model is asked. The same on every device, so that two reports can be compared."""

from __future__ import annotations

TEXT = (
    "The library opens the file, reads the header and checks every length before it is used. If the header "
    "names a version that the library does not know, it returns an error and leaves the file as it was. "
    "Otherwise it maps the tensors one after the other, so that a large file does not need more memory than "
    "a small one. A program that only wants the names can stop there. The order of the tensors is the order "
    "in which they were written, and two programs that read the same file see the same names."
)

NON_ASCII = "Grüße aus Zürich, naïve café, Ελληνικά, русский, 你好世界, 日本語, 🙂👍🏽, 3 × 4 ≤ 12 €"

LENGTHS = (1, 7, 64, 600)
"""Tokens of a prompt: one alone, less than a block, more than one, and more than llama.cpp computes at once (512)."""

LONG_TAIL = 32
"""Positions of a long prompt that are compared: logits of all of them can take more memory than the model."""

N_PREDICT = 32
N_CTX = 1024
SLOTS = 4
"""Requests at once to llama-server; each has a context of :data:`N_CTX`."""
