"""What engines are asked, and the responses in what they answer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.engine import Generated, Generation
from megatron_rapo.episode.choices import ChoiceShape
from megatron_rapo.errors import RapoError
from megatron_rapo.rollout.response import Response
from megatron_rapo.rollout.responses import to_response


def sample_seed(seed: int, prompt: Prompt, response: int, turn: int = 0) -> int:
    """The seed of one turn: a pure function of the run's seed for this step, the prompt, its draw, the
    response's number, and the turn's.

    It does not depend on which data-parallel head asks, in which request, or of which server. The draw tells
    a prompt from the same one of another epoch in the same batch. 31 bits, since SGLang keeps seeds as int32.
    """
    key = f"{seed}/{prompt.index}/{prompt.draw}/{response}" + (f"/{turn}" if turn else "")
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
        experts: of the choices that engines are to tell; None: none are needed.
    """

    responses_per_prompt: int
    max_response_tokens: int
    temperature: float
    weight_version: int
    seed: int
    top_p: float = 1.0
    top_k: int = -1
    first_response: int = 0
    experts: ChoiceShape | None = None

    def seed_of(self, prompt: Prompt, response: int, turn: int = 0) -> int:
        """The seed of a turn of the prompt's `response`-th response, counted from `first_response`."""
        return sample_seed(self.seed, prompt, self.first_response + response, turn)


@dataclass(frozen=True)
class Ask:
    """One continuation that is wanted.

    Attributes:
        name: of the prompt, and of the turn after the first, for messages.
        token_ids: what it continues.
        seed: of the sample.
        max_tokens: at most, at least 1.
        stop: token ids that end it, besides the model's own.
        temperature: of this one; None: that of the request's `sampling`.
    """

    name: str
    token_ids: tuple[int, ...]
    seed: int
    max_tokens: int
    stop: tuple[int, ...] = ()
    temperature: float | None = None

    def after(self, piece: Response) -> Ask:
        """What is still wanted once a piece of it is there; `max_tokens` is 0 where nothing is.

        With another seed, since engines draw a seed's numbers from the first on with each request.
        """
        digest = hashlib.blake2b(f"{self.seed}+".encode(), digest_size=4).digest()
        return replace(
            self,
            token_ids=(*self.token_ids, *piece.token_ids.tolist()),
            seed=int.from_bytes(digest, "big") >> 1,
            max_tokens=self.max_tokens - len(piece.token_ids),
        )


@dataclass(frozen=True)
class Request:
    """What goes to an engine at once, so that it runs a prompt once for all its responses.

    A request is the same whichever engine gets it: sent again, it yields the same responses.
    """

    asks: tuple[Ask, ...]
    sampling: Sampling

    def __len__(self) -> int:
        return len(self.asks)

    @property
    def wanted(self) -> list[Generation]:
        """What an engine is asked for."""
        return [
            Generation(
                ask.token_ids,
                ask.max_tokens,
                self.sampling.temperature if ask.temperature is None else ask.temperature,
                seed=ask.seed,
                top_p=self.sampling.top_p,
                top_k=self.sampling.top_k,
                stop=ask.stop,
                experts=self.sampling.experts is not None,
            )
            for ask in self.asks
        ]

    def responses(self, answers: Sequence[Generated], vocab_size: int, source: str) -> list[Response]:
        """The responses in an engine's answers.

        Raises:
            RapoError: one is not what was asked for (see `to_response`).
        """
        return [
            to_response(
                answer,
                weight_version=self.sampling.weight_version,
                vocab_size=vocab_size,
                max_tokens=ask.max_tokens,
                source=source,
                given=len(ask.token_ids),
                experts=self.sampling.experts,
            )
            for ask, answer in zip(self.asks, answers, strict=True)
        ]


def name_of(prompt: Prompt, turn: int = 0) -> str:
    """What messages call the tokens that a turn continues."""
    return f"prompt {prompt.index}" + (f", turn {turn}," if turn else "")


def first_turns(prompts: Sequence[Prompt], sampling: Sampling) -> Request:
    """The responses of each prompt, as a rollout begins them."""
    numbers = range(sampling.responses_per_prompt)
    asks = [
        Ask(name_of(prompt), prompt.token_ids, sampling.seed_of(prompt, number), sampling.max_response_tokens)
        for prompt in prompts
        for number in numbers
    ]
    return Request(tuple(asks), sampling)


def check_tokens(request: Request, vocab_size: int) -> None:
    """Refuses unknown token ids: where one reaches SGLang 0.5.21, the whole server ends.

    Raises:
        RapoError: there is nothing to continue, or a token outside the policy's vocabulary.
    """
    for name, token_ids in dict.fromkeys((ask.name, ask.token_ids) for ask in request.asks):
        if not token_ids:
            raise RapoError(f"{name} is empty; look at its row, at the template, and at the environment")
        for token in (min(token_ids), max(token_ids)):
            if not 0 <= token < vocab_size:
                raise RapoError(
                    f"{name} has token id {token}, but the policy's vocabulary has {vocab_size}; use the "
                    "tokenizer of the model that is trained"
                )
