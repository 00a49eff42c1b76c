"""First turns of prompts through a pool, as a rollout asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.rollout.dispatch import TooFewEngines
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.requests import Sampling, first_turns
from megatron_rapo.rollout.response import Response


class Sampled(NamedTuple):
    """A prompt and the responses to it."""

    prompt: Prompt
    responses: tuple[Response, ...]


def generate_groups(pool: EnginePool, prompts: Sequence[Prompt], **options: Any) -> list[Sampled | None]:
    """The responses to each prompt; None where too few engines were left. `Sampling` has the options."""
    sampling = Sampling(**options)
    size, count = pool.requests(len(prompts)), sampling.responses_per_prompt
    parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    found: list[Sampled | None] = []
    with pool.round() as opened:
        answers = [opened.ask(first_turns(part, sampling)) for part in parts]
        for part, answer in zip(parts, answers, strict=True):
            try:
                responses = answer.result()
            except TooFewEngines:
                found += [None] * len(part)
                continue
            found += [
                Sampled(prompt, tuple(responses[place * count : (place + 1) * count]))
                for place, prompt in enumerate(part)
            ]
    return found
