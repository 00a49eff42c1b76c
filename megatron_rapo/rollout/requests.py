"""What engines are asked, and groups of responses from what they answer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.errors import RapoError
from megatron_rapo.rollout.groups import RolloutGroup
from megatron_rapo.rollout.responses import to_response


def sample_seed(seed: int, prompt: Prompt, response: int) -> int:
    """The seed of one response: a pure function of the run's seed for this step, the prompt, its draw, and
    the response's number.

    It does not depend on which data-parallel head asks, in which request, or of which server. The draw tells
    a prompt from the same one of another epoch in the same batch. 31 bits, since SGLang keeps seeds as int32.
    """
    key = f"{seed}/{prompt.index}/{prompt.draw}/{response}"
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class Sampling:
    """How prompts are sampled.

    Attributes:
        responses_per_prompt: responses of one group.
        max_response_tokens: where a response is cut.
        temperature: which log-probs include.
        weight_version: that must have sampled every token.
        seed: of this batch; another one for each step gives a repeated prompt other responses.
        top_p, top_k: for evaluation alone, since log-probs do not include them; 1 and -1: full support.
        first_response: number of each group's first response, which its seed comes from: to go on with a
            group is to sample what it would have had.
    """

    responses_per_prompt: int
    max_response_tokens: int
    temperature: float
    weight_version: int
    seed: int
    top_p: float = 1.0
    top_k: int = -1
    first_response: int = 0

    def params(self, prompt: Prompt, response: int) -> dict[str, Any]:
        """The `sampling_params` of one response."""
        return {
            "max_new_tokens": self.max_response_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "sampling_seed": sample_seed(self.seed, prompt, self.first_response + response),
        }


@dataclass(frozen=True)
class GroupRequest:
    """One request: whole groups, so that an engine runs a prompt once for all its responses.

    A request is the same whichever engine gets it: sent again, it yields the same responses.
    """

    prompts: tuple[Prompt, ...]
    sampling: Sampling

    def __len__(self) -> int:
        return len(self.prompts) * self.sampling.responses_per_prompt

    @property
    def input_ids(self) -> list[tuple[int, ...]]:
        """The prompt of each response."""
        return [p.token_ids for p in self.prompts for _ in range(self.sampling.responses_per_prompt)]

    @property
    def sampling_params(self) -> list[dict[str, Any]]:
        """The parameters of each response."""
        numbers = range(self.sampling.responses_per_prompt)
        return [self.sampling.params(prompt, number) for prompt in self.prompts for number in numbers]

    def groups(self, answers: Sequence[dict[str, Any]], vocab_size: int, source: str) -> list[RolloutGroup]:
        """The groups of an engine's answers, one a response.

        Raises:
            RapoError: one is not what was asked for (see `to_response`).
        """
        responses = [
            to_response(
                answer,
                weight_version=self.sampling.weight_version,
                vocab_size=vocab_size,
                max_tokens=self.sampling.max_response_tokens,
                source=source,
            )
            for answer in answers
        ]
        size = self.sampling.responses_per_prompt
        return [
            RolloutGroup(prompt, tuple(responses[i * size : (i + 1) * size]))
            for i, prompt in enumerate(self.prompts)
        ]


def split(prompts: Sequence[Prompt], sampling: Sampling, size: int) -> list[GroupRequest]:
    """Requests of at most `size` prompts each, in order."""
    return [
        GroupRequest(tuple(prompts[start : start + size]), sampling) for start in range(0, len(prompts), size)
    ]


def check_prompts(prompts: Sequence[Prompt], vocab_size: int) -> None:
    """Refuses unknown token ids: where one reaches SGLang 0.5.21, the whole server ends.

    Raises:
        RapoError: a prompt is empty or has a token outside the policy's vocabulary.
    """
    for prompt in prompts:
        if not prompt.token_ids:
            raise RapoError(f"prompt {prompt.index} is empty; look at its row and at the template")
        for token in (min(prompt.token_ids), max(prompt.token_ids)):
            if not 0 <= token < vocab_size:
                raise RapoError(
                    f"prompt {prompt.index} has token id {token}, but the policy's vocabulary has "
                    f"{vocab_size}; use the tokenizer of the model that is trained"
                )
