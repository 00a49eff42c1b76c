"""What the gateway speaks: vLLM's `/inference/v1/generate`, and `/recorded`.

What cannot be honoured exactly is refused by name; vLLM itself ignores parameters that it does not know.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from megatron_rapo.episode.environment import Turn
from megatron_rapo.section import PositiveInt

_SEEDED = "the run gives each turn its own"
_SAMPLED = "the run samples at its own, which training goes by"
_SUPPORT = "log-probs are of the full distribution"
_TEXT = "answers are token ids; send stop_token_ids"
# What a parameter may be besides null, as it changes nothing then; and why not else.
_NEUTRAL: dict[str, tuple[object, str]] = {
    "n": (1, "send a request for each response"),
    "seed": (None, _SEEDED),
    "temperature": (None, _SAMPLED),
    "top_p": (None, _SAMPLED),
    "top_k": (None, _SAMPLED),
    "min_p": (0, _SUPPORT),
    "presence_penalty": (0, _SUPPORT),
    "frequency_penalty": (0, _SUPPORT),
    "repetition_penalty": (1, _SUPPORT),
    "logit_bias": ({}, _SUPPORT),
    "allowed_token_ids": (None, _SUPPORT),
    "bad_words": ([], _SUPPORT),
    "structured_outputs": (None, _SUPPORT),
    "min_tokens": (0, "the end of sequence may come at any time"),
    "ignore_eos": (False, "the end of sequence ends a turn"),
    "stop": ([], _TEXT),
    "detokenize": (False, _TEXT),
    "prompt_logprobs": (None, "a prompt's log-probs are not computed"),
}
# Of texts, which are not made, and of routed experts, which are not returned.
_WITHOUT_EFFECT = {
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "routed_experts_prompt_start",
}


class SamplingParams(BaseModel):
    """What a turn may ask for."""

    model_config = ConfigDict(extra="allow", strict=True)

    max_tokens: PositiveInt | None = None
    stop_token_ids: list[int] | None = None
    logprobs: Literal[0, 1] | None = None

    @model_validator(mode="after")
    def _check_others(self) -> SamplingParams:
        for name, value in (self.model_extra or {}).items():
            if value is None or name in _WITHOUT_EFFECT:
                continue
            if name not in _NEUTRAL:
                raise ValueError(f"{name} is no parameter that the gateway honours; leave it out")
            neutral, why = _NEUTRAL[name]
            if value != neutral:
                raise ValueError(f"{name} = {value!r:.60} is not honoured: {why}; leave it out")
        return self


class Asked(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    token_ids: list[int] = Field(min_length=1)
    sampling_params: SamplingParams = SamplingParams()
    model: str | None = None
    request_id: str | None = None
    cache_salt: str | None = None  # of prefix caches, which are the engines' own affair
    priority: int | None = None
    stream: Literal[False] | None = None

    @field_validator("stream", mode="before")
    @classmethod
    def _whole(cls, stream: object) -> object:
        if stream:
            raise ValueError("turns are answered whole; leave it out")
        return stream

    @property
    def stop(self) -> list[int]:
        """Token ids that end the turn, besides the model's own end of sequence."""
        return self.sampling_params.stop_token_ids or []

    def outside(self, vocabulary: int) -> int | None:
        """A token id that the model does not have."""
        return next((token for token in (*self.token_ids, *self.stop) if not 0 <= token < vocabulary), None)


class Heard(BaseModel):
    """The body of what a program has kept."""

    model_config = ConfigDict(extra="forbid")

    question: Any
    answer: Any


def answer_of(asked: Asked, turn: Turn, request_id: str) -> dict[str, Any]:
    """The body that answers with the turn."""
    token_ids = turn.token_ids.tolist()
    last = token_ids[-1]
    content = [
        {"token": f"token_id:{token}", "token_id": token, "logprob": log_prob, "top_logprobs": []}
        for token, log_prob in zip(token_ids, turn.log_probs.tolist(), strict=True)
    ]
    choice = {
        "index": 0,
        "token_ids": token_ids,
        "logprobs": {"content": content},
        "finish_reason": turn.finish,
        "stop_reason": last if turn.finish == "stop" and last in asked.stop else None,
        "weight_versions": _spans(turn.versions.tolist()),
    }
    prompt, sampled = len(asked.token_ids), len(token_ids)
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
    }
    return {"request_id": request_id, "choices": [choice], "usage": usage}


def _spans(versions: list[int]) -> list[dict[str, Any]]:
    spans, start = [], 0
    for version, same in itertools.groupby(versions):
        end = start + len(list(same))
        spans.append({"version": str(version), "start": start, "end": end})
        start = end
    return spans
