"""The requests that the embedded server takes, in SGLang's words. What it cannot do, it refuses."""

from __future__ import annotations

import secrets
from base64 import b64encode
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from megatron_rapo.embedded_server.decode import Completion, Sample
from megatron_rapo.embedded_server.engine import Engine
from megatron_rapo.errors import RapoError


class StrictRequest(BaseModel):
    """Unknown fields are refused: a sampling option that is ignored would bias training unseen."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class SamplingParams(StrictRequest):
    """How one prompt is sampled, with SGLang's defaults."""

    max_new_tokens: int = Field(128, ge=1)
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1)
    n: int = Field(1, ge=1)
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    sampling_seed: int | None = Field(None, ge=0, lt=2**63)


class GenerateRequest(StrictRequest):
    """Prompts as text or token ids, one or a list of them, with parameters for all or for each."""

    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None
    sampling_params: SamplingParams | list[SamplingParams] = SamplingParams()
    return_logprob: bool = False
    return_routed_experts: bool = False
    rid: str | None = None
    # What SGLang's router adds to every request. The first two say nothing here; the others are not offered.
    log_metrics: bool = True
    no_logs: bool = False
    model: None = None
    stream: Literal[False] = False
    background: Literal[False] = False
    return_text_in_logprobs: Literal[False] = False
    return_hidden_states: Literal[False] = False
    return_entropy: Literal[False] = False
    return_bytes: Literal[False] = False

    @property
    def batched(self) -> bool:
        """Whether it is a list of prompts, which is answered with a list."""
        if self.text is not None:
            return isinstance(self.text, list)
        return bool(self.input_ids) and isinstance(self.input_ids[0], list)  # type: ignore[index]


class PauseRequest(StrictRequest):
    """What becomes of requests under way.

    `abort` ends them as they are, `retract` stops them and makes them anew afterwards, `in_place` lets the
    one that runs come to its end.
    """

    mode: Literal["abort", "retract", "in_place"] = "abort"


class ContinueRequest(StrictRequest):
    """SGLang's one option; there is no memory to return."""

    torch_empty_cache: bool = True


class AbortRequest(StrictRequest):
    """Which requests to abort."""

    rid: str | None = None
    abort_all: bool = False


def to_samples(request: GenerateRequest, engine: Engine) -> list[Sample]:
    """One sample a response, in the order of the answer.

    Raises:
        RapoError: the request cannot be served; the message says why.
    """
    if request.return_routed_experts and not engine.is_mixture:
        raise RapoError(f"{engine.model_path} has no experts; do not ask for return_routed_experts")
    prompts = _prompts(request, engine)
    params = request.sampling_params
    if not isinstance(params, list):
        params = [params] * len(prompts)
    if len(params) != len(prompts):
        raise RapoError(
            f"sampling_params has {len(params)} entries for {len(prompts)} prompts; send one for each"
        )
    samples: list[Sample] = []
    for prompt, sampling in zip(prompts, params, strict=True):
        _check(prompt, sampling, engine)
        stop_ids = frozenset() if sampling.ignore_eos else engine.eos_ids | frozenset(sampling.stop_token_ids)
        first_seed = secrets.randbits(62) if sampling.sampling_seed is None else sampling.sampling_seed
        samples += [
            Sample(
                prompt,
                sampling.max_new_tokens,
                sampling.temperature,
                stop_ids,
                (first_seed + i) % 2**63,
                sampling.top_p,
                top_k=None if sampling.top_k == -1 else sampling.top_k,
                tells_experts=request.return_routed_experts,
            )
            for i in range(sampling.n)
        ]
    return samples


def _prompts(request: GenerateRequest, engine: Engine) -> list[tuple[int, ...]]:
    if (request.text is None) == (request.input_ids is None):
        raise RapoError("send either text or input_ids")
    given: Any = request.input_ids if request.text is None else request.text
    prompts = given if request.batched else [given]
    if not prompts:
        raise RapoError("there is no prompt; send at least one")
    if request.text is not None:
        if engine.tokenizer is None:
            raise RapoError(f"{engine.model_path} has no tokenizer; send input_ids")
        prompts = engine.tokenizer(prompts)["input_ids"]
    return [tuple(prompt) for prompt in prompts]


def _check(prompt: tuple[int, ...], sampling: SamplingParams, engine: Engine) -> None:
    if not prompt:
        raise RapoError("a prompt is empty; send at least one token")
    for token in (min(prompt), max(prompt)):
        if not 0 <= token < engine.vocab_size:
            raise RapoError(f"token id {token} is outside the vocabulary of {engine.vocab_size}")
    if len(prompt) + sampling.max_new_tokens > engine.context_length:
        raise RapoError(
            f"a prompt of {len(prompt)} tokens and max_new_tokens = {sampling.max_new_tokens} exceed the "
            f"context of {engine.context_length} tokens"
        )
    if sampling.top_k == 0:
        raise RapoError("top_k = 0 leaves no token; send a positive number, or -1 for no limit")


def to_answer(
    request: GenerateRequest,
    samples: list[Sample],
    completions: list[Completion],
    weight_version: str,
    engine: Engine,
) -> dict[str, Any] | list[dict[str, Any]]:
    """SGLang's answer: an object for one response to one prompt, else a list."""
    request_id = request.rid or secrets.token_hex(16)
    texts = _texts(samples, completions, engine)
    answers = []
    for i, (sample, completion) in enumerate(zip(samples, completions, strict=True)):
        meta_info: dict[str, Any] = {
            "id": request_id if len(samples) == 1 else f"{request_id}_{i}",
            "finish_reason": _finish_reason(sample, completion),
            "prompt_tokens": len(sample.prompt),
            "completion_tokens": len(completion.token_ids),
            "cached_tokens": 0,
            "weight_version": weight_version,
        }
        if request.return_logprob:
            pairs = zip(completion.log_probs, completion.token_ids, strict=True)
            meta_info["output_token_logprobs"] = [[log_prob, token, None] for log_prob, token in pairs]
        if completion.experts is not None:
            # As SGLang has it: int32, of all tokens but the last, layer by layer.
            meta_info["routed_experts"] = b64encode(completion.experts.astype("<i4").tobytes()).decode()
        answers.append({"text": texts[i], "output_ids": completion.token_ids, "meta_info": meta_info})
    return answers if request.batched or len(answers) > 1 else answers[0]


def _texts(samples: list[Sample], completions: list[Completion], engine: Engine) -> list[str]:
    """Each response as text, without the token that stopped it; empty where there is no tokenizer."""
    if engine.tokenizer is None:
        return [""] * len(samples)
    shown = [
        completion.token_ids[:-1] if completion.finish == "stop" else completion.token_ids
        for completion in completions
    ]
    return engine.tokenizer.batch_decode(shown, skip_special_tokens=True)


def _finish_reason(sample: Sample, completion: Completion) -> dict[str, Any]:
    if completion.finish == "stop":
        return {"type": "stop", "matched": completion.token_ids[-1]}
    if completion.finish == "length":
        return {"type": "length", "length": sample.max_new_tokens}
    return {"type": "abort", "message": "aborted on request"}
