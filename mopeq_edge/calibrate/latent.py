"""Latent attention watched as llama.cpp computes it, while transformers computes it in its own way.

transformers makes each head's key k = K c and value v = V c of every token's latent c. llama.cpp never makes them: as
q . K c = (K^T q) . c and sum_s a_s V c_s = V (sum_s a_s c_s), it multiplies K^T with the query and V with the latents
that a head attends to, summed. The results are the same; what goes into the matrices is not. The quantizer has to
weigh by the latter. The price of an error does not depend on it, so gradients are taken where transformers has them:
at k and v, token by token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, cat, nn, split
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from mopeq_edge.calibrate.experts import Tap
from mopeq_edge.source.model import SourceTensor

ATTENTION = "mopeq_edge_latent"
"""Name of :func:`attend` in transformers' table of attention functions."""

_WATCH = "_mopeq_edge_watch"


class LatentWatch:
    """Reports a block's ``keys`` [n_key, n_latent, n_head] and ``values`` [n_latent, n_value, n_head] to ``tap``.

    Windows may run side by side in threads.
    """

    def __init__(self, keys: SourceTensor, values: SourceTensor, tap: Tap) -> None:
        self.keys, self.values, self.tap = keys, values, tap
        self._local = threading.local()

    def attach(self, attention: nn.Module, expansion: nn.Module) -> Callable[[], None]:
        """Watch until the returned function is called; ``expansion`` makes keys and values inside ``attention``."""
        hook = expansion.register_forward_hook(self._expanded)
        setattr(attention, _WATCH, self)

        def detach() -> None:
            hook.remove()
            delattr(attention, _WATCH)

        return detach

    def _expanded(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """The latents became keys and values: let every head's have a gradient of its own."""
        recorder = self.tap.recorder
        if recorder is None:
            return None
        latent = args[0].reshape(-1, args[0].shape[-1])
        self._local.latent = latent.detach()
        if not output.requires_grad:
            return None
        n_head = self.keys.n_matrices
        pieces = split(output, [self.keys.n_in, self.values.n_out] * n_head, dim=-1)
        for head in range(n_head):
            recorder.watch_output(self.keys.name, latent, pieces[2 * head], head, n_head, transposed=True)
            recorder.watch_output(self.values.name, latent, pieces[2 * head + 1], head, n_head)
        return cat(pieces, dim=-1)

    def attended(self, query: Tensor, attention: Callable[[Tensor], Tensor]) -> None:
        """``query`` [n_windows, n_head, n_tokens, n]; ``attention(values)`` applies theirs to other values."""
        recorder = self.tap.recorder
        # a window runs again for its gradients, its activations are known by then
        if recorder is None or query.requires_grad:
            return
        n_head = self.keys.n_matrices
        latent: Tensor = self._local.latent
        latent = latent.reshape(len(query), 1, -1, latent.shape[-1])
        mixed = attention(latent.expand(-1, n_head, -1, -1))
        for head in range(n_head):
            keys = query[:, head, :, : self.keys.n_in].reshape(-1, self.keys.n_in)
            recorder.saw_input(self.keys.name, keys, head, n_head)
            recorder.saw_input(self.values.name, mixed[:, :, head].reshape(-1, latent.shape[-1]), head, n_head)


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    """transformers' own attention, watched if ``module`` is."""
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    watch: LatentWatch | None = getattr(module, _WATCH, None)
    if watch is not None:
        watch.attended(query, lambda values: own(module, query, key, values, mask, **options)[0])
    return own(module, query, key, value, mask, **options)


AttentionInterface.register(ATTENTION, attend)
