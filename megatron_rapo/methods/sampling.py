"""How a step's responses are sampled."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How a step's responses are sampled.

    Attributes:
        temperature: T; the trainer divides its logits by the same.
        responses_per_prompt: G.
        max_response_tokens: where responses are cut.
    """

    temperature: float
    responses_per_prompt: int
    max_response_tokens: int

    def wrong(self, configured: Sampling) -> str | None:
        """What of it cannot be, beside the configuration's; None where all can."""
        if not 0.0 < self.temperature < float("inf"):
            return f"temperature = {self.temperature} is no positive number"
        if self.responses_per_prompt < 2:
            return f"responses_per_prompt = {self.responses_per_prompt} leaves nothing to compare"
        if not 0 < self.max_response_tokens <= configured.max_response_tokens:
            return (
                f"max_response_tokens = {self.max_response_tokens} is not from 1 to "
                f"rollout.max_response_tokens = {configured.max_response_tokens}"
            )
        return None
