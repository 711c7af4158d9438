"""What the model's thread says of a request, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenChance:
    """One token, its bytes and its log-probability in nats; ``top`` are the likeliest in its place, best first."""

    token: int
    data: bytes
    logprob: float | None
    """None for the first token of a prompt: nothing is before it."""
    top: tuple[tuple[int, bytes, float], ...] = ()
    """(token, bytes, log-probability)"""

    @property
    def text(self) -> str:
        """Parts of characters become U+FFFD."""
        return self.data.decode(errors="replace")


@dataclass(frozen=True)
class Delta:
    """Text that is certain, and the tokens since the last one where log-probabilities were asked for."""

    index: int
    text: str
    chances: tuple[TokenChance, ...] = ()


@dataclass(frozen=True)
class Finish:
    """The end of one choice: ``stop`` or ``length``, and how many tokens it took."""

    index: int
    reason: str
    prompt_tokens: int
    completion_tokens: int
    kept_tokens: int
    """Of the prompt, those that were in the context already."""


Event = Delta | Finish
