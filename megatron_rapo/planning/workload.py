"""What a step does, whatever the layout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from megatron_rapo.config import RunConfig
from megatron_rapo.errors import RapoError


@dataclass(frozen=True)
class Workload:
    """Tokens and passes of one step.

    Attributes:
        prompts, responses: of a step.
        prompt_tokens, response_tokens: means.
        longest: tokens of the longest response.
        updates: optimizer updates.
        old_log_probs: whether annotation runs the policy.
        reference: whether it runs the reference.
        frozen_logits: whether the loss makes logits of a frozen model beside the policy's.
    """

    prompts: int
    responses: int
    prompt_tokens: float
    response_tokens: float
    longest: int
    updates: int
    old_log_probs: bool
    reference: bool
    frozen_logits: bool

    @property
    def sequence(self) -> float:
        """Mean tokens of a sequence."""
        return self.prompt_tokens + self.response_tokens

    def still_running(self, tokens: float) -> float:
        """The share of responses with more tokens than so many: exponential lengths, cut at the longest.

        The exponential's own mean is such that the cut one's is `response_tokens`.
        """
        if tokens >= self.longest:
            return 0.0
        return math.exp(-tokens / self._scale) if math.isfinite(self._scale) else 1.0

    @cached_property
    def _scale(self) -> float:
        if self.response_tokens >= 0.999 * self.longest:
            return math.inf
        low, high = self.response_tokens, 1000.0 * self.longest
        for _ in range(60):
            middle = (low + high) / 2
            mean = -middle * math.expm1(-self.longest / middle)
            low, high = (middle, high) if mean < self.response_tokens else (low, middle)
        return high


def workload_of(
    config: RunConfig, prompt_tokens: float | None = None, response_tokens: float | None = None
) -> Workload:
    """That of a configuration; lengths are means, by default the longest that it allows.

    Raises:
        RapoError: a mean beyond the longest, or not above 0; the run samples nothing.
    """
    rollout, method = config.rollout, config.new_method()
    if not config.opens_engines or config.demonstrations is not None:
        raise RapoError(
            "megatron-rapo plan divides devices between trainer and engines, and this configuration samples "
            "nothing to train on; choose its layout by --dry-run"
        )
    for option, value, most, limit in (
        ("--prompt-tokens", prompt_tokens, rollout.max_prompt_tokens, "rollout.max_prompt_tokens"),
        ("--response-tokens", response_tokens, rollout.max_response_tokens, "rollout.max_response_tokens"),
    ):
        if value is not None and not 0 < value <= most:
            raise RapoError(f"{option} {value:g} is not above 0 and at most {limit} = {most}; correct it")
    weighs = method.weighs or method.marks_tokens
    recomputed = config.algorithm.old_log_probs == "recomputed"
    return Workload(
        prompts=rollout.prompts_per_step,
        responses=config.responses_per_step,
        prompt_tokens=prompt_tokens or rollout.max_prompt_tokens,
        response_tokens=response_tokens or rollout.max_response_tokens,
        longest=rollout.max_response_tokens,
        updates=config.updates_per_step,
        old_log_probs=bool(recomputed and (config.updates_per_step > 1 or weighs)),
        reference=method.wants_reference,
        frozen_logits=method.wants_reference_hidden,
    )
